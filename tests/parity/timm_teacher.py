"""A frozen teacher whose features tests work out by themselves.

Letters: B batch, N patches, C channels.
"""

from pathlib import Path

import timm
import torch
from torch import Tensor

from tests.parity.slow_vit import standardised


class TimmTeacher:
    """A ViT of timm with random weights, also of its last norm, saved to a file for M3 to read."""

    model = "timm:vit_tiny_patch16_224"

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        torch.manual_seed(29)
        self.path = path
        self.network = timm.create_model(self.model.removeprefix("timm:"), num_classes=0, img_size=size).eval()
        with torch.no_grad():
            for parameter in self.network.norm.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        torch.save(self.network.state_dict(), path)

    def features(self, pixels: Tensor) -> Tensor:
        """What it says of uint8 images, layer-normed (B, N, C)."""
        with torch.no_grad():
            states = self.network.forward_features((pixels.float() / 255 - 0.5) / 0.5)[:, 1:]
        return standardised(states.double(), eps=1e-5)
