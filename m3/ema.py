"""An exponential moving average of the weights, kept outside the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """average <- decay * average + (1 - decay) * weights after every step, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = [p.detach().float().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's current weights."""
        for own, parameter in zip(self.weights, model.parameters(), strict=True):
            own.lerp_(parameter.detach().float(), 1 - self.decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the average; a second call undoes it."""
        for own, parameter in zip(self.weights, model.parameters(), strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(own)
            own.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average for a checkpoint."""
        return {str(i): weight for i, weight in enumerate(self.weights)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take an average from a checkpoint."""
        for i, weight in enumerate(self.weights):
            weight.copy_(state[str(i)])
