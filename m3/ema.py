"""An exponential moving average of the weights, kept outside the model: the teacher of objectives that have one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from m3.errors import M3Error
from m3.network import Network


class Average:
    """average <- decay * average + (1 - decay) * weights after every step, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = [p.detach().float().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float | None = None, is_taken: Tensor | None = None) -> None:
        """Take in the model's current weights.

        Args:
            model: whose weights.
            decay: of this update; None: the one it was made with.
            is_taken: () float on the model's device; 0: leave the average as it is.
        """
        share: float | Tensor = 1 - (self.decay if decay is None else decay)
        share = share if is_taken is None else is_taken * share
        for own, parameter in zip(self.weights, model.parameters(), strict=True):
            own.lerp_(parameter.detach().float(), share)

    @contextmanager
    def lent_to(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the average for as long as the context lasts, then its own weights again to the bit.

        The average stays where it is, since it is also the teacher of objectives that have one.
        """
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        _put(self.weights, model)
        try:
            yield
        finally:
            _put(kept, model)

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """Return name of a parameter -> its average, the tensors themselves."""
        return dict(zip((name for name, _ in model.named_parameters()), self.weights, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average for a checkpoint."""
        return {str(i): weight for i, weight in enumerate(self.weights)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take an average from a checkpoint."""
        for i, weight in enumerate(self.weights):
            weight.copy_(state[str(i)])


@torch.no_grad()
def _put(weights: list[Tensor], model: nn.Module) -> None:
    for weight, parameter in zip(weights, model.parameters(), strict=True):
        parameter.copy_(weight)


def teacher_of(model: Network, average: Average | None) -> dict[str, Tensor] | None:
    """Return the weights of the model's teacher, which are the average's own tensors; None: it has none.

    Raises:
        M3Error: an objective learns from an average, and the run keeps none.
    """
    if not model.has_teacher:
        return None
    if average is None:
        raise M3Error(
            "an objective learns from a moving average of the model, but the run keeps none; set train.ema, e.g. "
            "{start: 0.996, end: 1.0}."
        )
    return average.named(model)
