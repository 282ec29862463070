"""Relative positions: what attention adds to its scores for the distance of two tokens.

Letters: B batch, V tokens, R prefix tokens, H heads, h, w places of the grid along its axes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3.errors import M3Error
from m3.positions import interpolated


class RelativeBias(nn.Module):
    """A learned number per head for each distance of two tokens on a grid (Bao et al. 2021, BEiT; Swin's table).

    Prefix tokens are nowhere: there is one number for all that they look at, one for all that look at them, and one
    for them among themselves. All start at 0, as BEiT's do. Distances that lie between those of the grid, on a finer
    one, are interpolated linearly, and those beyond it get the edge's.

    Attributes:
        table: (H, 2 h - 1, 2 w - 1): entry (y + h - 1, x + w - 1) belongs to a query y rows below and x columns to
            the right of its key.
        prefix: (H, 3): prefix to token, token to prefix, prefix to prefix; None without prefix tokens.
    """

    def __init__(self, grid: tuple[int, ...] | None, heads: int, prefix: int) -> None:
        super().__init__()
        if grid is None or len(grid) != 2:
            raise M3Error(
                "relative_bias is for a transformer of one modality on a grid of two axes, whose distances it knows, "
                "and this one reads several or other ones; set relative_bias: null."
            )
        self.count = prefix
        self.table = nn.Parameter(torch.empty(heads, *(2 * extent - 1 for extent in grid)))
        self.prefix = nn.Parameter(torch.empty(heads, 3)) if prefix else None

    def forward(self, coordinates: Tensor) -> Tensor:
        """Map coordinates (1 or B, V, 2), in places of the grid, to what is added: (1 or B, H, R + V, R + V)."""
        batch, visible, _ = coordinates.shape
        middle = torch.tensor([extent // 2 for extent in self.table.shape[1:]], device=coordinates.device)
        distances = coordinates.unsqueeze(2) - coordinates.unsqueeze(1) + middle
        bias = interpolated(self.table, distances.flatten(1, 2)).unflatten(1, (visible, visible)).permute(0, 3, 1, 2)
        if self.prefix is None:
            return bias
        to_token, to_prefix, among = (part.view(1, -1, 1, 1) for part in self.prefix.unbind(1))
        first = torch.cat([among.expand(batch, -1, -1, self.count), to_token.expand(batch, -1, -1, visible)], dim=-1)
        others = torch.cat([to_prefix.expand(batch, -1, visible, self.count).to(bias.dtype), bias], dim=-1)
        return torch.cat([first.expand(-1, -1, self.count, -1).to(bias.dtype), others], dim=-2)
