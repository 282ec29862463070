"""Non-overlapping patches of a map with any number of channels: images, depth, normals, spectrograms.

Letters: B batch, C channels, H height, W width, N = (H / h) (W / w) patches, P = C h w values per patch,
D width; h, w is the patch size. Values of a patch are ordered (channel, row, column).
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor

from m3.errors import M3Error
from m3.linear import Linear
from m3.plugins import Signal, Strict, Tokenizer
from m3.positions import grid
from m3.types import Tokens


def patchify(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut (B, C, H, W) into patches, row by row: (B, N, C * h * w).

    Raises:
        M3Error: H or W is not a multiple of the patch.
    """
    batch, channels, height, width = x.shape
    if height % patch[0] or width % patch[1]:
        raise M3Error(
            f"a map of {height} x {width} can't be cut into patches of {patch[0]} x {patch[1]}; "
            f"resize it to multiples of the patch or choose another patch size."
        )
    rows, columns = height // patch[0], width // patch[1]
    x = x.reshape(batch, channels, rows, patch[0], columns, patch[1]).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, rows * columns, -1)


def unpatchify(values: Tensor, patch: tuple[int, int], size: tuple[int, ...]) -> Tensor:
    """Undo `patchify`: (B, N, C * h * w) and size (H, W) -> (B, C, H, W)."""
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    x = values.reshape(len(values), rows, columns, -1, *patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(values), -1, *size)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Read `16` as (16, 16)."""
    return (size, size) if isinstance(size, int) else size


class Patch(Tokenizer):
    """Patches through one linear projection, as in ViT (Dosovitskiy et al. 2020)."""

    class Spec(Strict):
        """Settings of `type: patch`.

        Attributes:
            size: patch height and width in positions of the map; one number for square patches.
        """

        size: PositiveInt | tuple[PositiveInt, PositiveInt] = 16

    axes = 2

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        if signal.kind != "values" or len(signal.size) != 2:
            raise M3Error(
                f"tokenizer `patch` reads maps of values, got {signal.kind} over {len(signal.size)} axes; "
                f"use `class_patch` for class maps."
            )
        self.patch = pair(spec.size)
        self.reference = grid_of(signal.size, self.patch)
        self.value_width = self.output_width = signal.channels * self.patch[0] * self.patch[1]
        self.projection = Linear(self.value_width, width)

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Cut (B, C, H, W) float into tokens with values (B, N, P); any H and W that the patch divides."""
        values = patchify(signal, self.patch)
        counts = grid_of(signal.shape[2:], self.patch)
        return Tokens(values, grid(counts, self.reference, signal.device), counts=counts)

    def embed(self, values: Tensor) -> Tensor:
        """Project (B, S, P) to (B, S, D); values that nobody knows (NaN) enter as 0, the mean."""
        return self.projection(values.nan_to_num(0.0) if self.signal.has_gaps else values)

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put (B, N, P) together to (B, C, H, W)."""
        return unpatchify(values, self.patch, size)

    def decode(self, output: Tensor) -> Tensor:
        """Return the prediction itself: a head predicts the values."""
        return output

    def tied_weight(self) -> Tensor:
        """Return the projection's transpose (P, D)."""
        return self.projection.weight.t()


def grid_of(size: tuple[int, ...] | torch.Size, patch: tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of patches in a map of `size`.

    Raises:
        M3Error: the patch does not divide the size.
    """
    if size[0] % patch[0] or size[1] % patch[1]:
        raise M3Error(
            f"size {size[0]} x {size[1]} is not a multiple of the patch {patch[0]} x {patch[1]}; change one of them."
        )
    return size[0] // patch[0], size[1] // patch[1]
