"""Patches over time and frequency, for spectrograms of any length (AudioMAE, Huang et al. 2022).

Letters: B batch, C channels, T frames, F bands, N patches, P values per patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m3.plugins import Signal
from m3.positions import grid
from m3.tokenizers.patch import Patch, grid_of, patchify
from m3.types import Tokens


class Spectrogram(Patch):
    """`patch` that fills up the last patch along time and leaves out patches behind the end of a recording."""

    def __init__(self, spec: Patch.Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        grid_of(signal.size, self.patch)

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Cut (B, C, T, F) float, NaN behind the end, into tokens with values (B, N, P), the frames in order."""
        signal = F.pad(signal, (0, 0, 0, -signal.shape[2] % self.patch[0]), value=torch.nan)
        values = patchify(signal, self.patch)
        rows, columns = grid_of(signal.shape[2:], self.patch)
        # A longer recording has positions beyond the reference, not between them: time has a unit.
        positions = grid((rows, columns), (rows, self.reference[1]), signal.device)
        return Tokens(values, positions, ~values.isnan().all(-1), counts=(rows, columns))

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put (B, N, P) together to (B, C, T, F)."""
        length = -(-size[0] // self.patch[0]) * self.patch[0]
        return super().detokenize(values, positions, (length, size[1]))[:, :, : size[0]]
