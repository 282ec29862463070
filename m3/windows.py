"""Blocks that attend within windows of a grid: Swin Transformer V2's (Liu et al. 2022), as AudioMAE's decoder has them.

Letters: B batch, N tokens of a grid, W windows, n places of a window, H heads, E width of a head, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3.attention import key_mask
from m3.backbone import MLP
from m3.errors import M3Error
from m3.layer import Layer, recomputable
from m3.linear import Linear

COOLEST = 0.01
"""Smallest temperature of the attention."""

BIAS_WIDTH = 384
"""Width of the hidden layer of the position bias."""


class Windows(NamedTuple):
    """How a grid is cut into windows.

    Attributes:
        tokens: (W, n) int64, the token at each place of a window; N where the window reaches beyond the grid.
        places: (N,) int64, where in the W * n places each token is.
        mask: (B or 1, W, n) bool, True for places whose token exists.
    """

    tokens: Tensor
    places: Tensor
    mask: Tensor


def cut_windows(
    counts: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    is_valid: Tensor | None,
    device: torch.device,
) -> Windows:
    """Cut a grid into windows.

    The borders between windows are `shift` away from the multiples of the window; what is left over at the edges are
    windows of their own. That is Swin's cyclic shift with its mask, without the wrapping around. An axis that one
    window holds is not shifted.

    Args:
        counts: tokens along both axes of the grid, the last axis fastest.
        window: places of a window along both axes.
        shift: along both axes.
        is_valid: (B, N) bool, False for tokens that don't exist.
        device: of the tokens.
    """
    axes = []
    for extent, length, offset in zip(counts, window, shift, strict=True):
        lead = -offset % length if extent > length else 0
        windows = -(-(lead + extent) // length)
        axes.append((torch.arange(windows * length, device=device) - lead).view(windows, length))
    row, column = axes[0][:, None, :, None], axes[1][None, :, None, :]
    is_inside = (row >= 0) & (row < counts[0]) & (column >= 0) & (column < counts[1])
    total = math.prod(counts)
    index = torch.where(is_inside, row * counts[1] + column, total).flatten(2).flatten(0, 1)
    place = index.flatten().argsort(stable=True)[:total]
    is_there = torch.ones(1, total, dtype=torch.bool, device=device) if is_valid is None else is_valid
    return Windows(index, place, F.pad(is_there, (0, 1))[:, index])


class WindowAttention(nn.Module):
    """Attention among the tokens of a window by the cosine of queries and keys, divided by a learned temperature.

    To each pair a small network adds a bias per head that depends on how far apart they are along both axes, as
    sign(d) log(1 + |d|).
    """

    def __init__(self, width: int, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        if width % heads:
            raise M3Error(f"width {width} is not divisible by heads {heads}; change one of them.")
        self.heads, self.window = heads, window
        self.qkv = Linear(width, 3 * width)
        self.projection = Linear(width, width)
        self.temperature = nn.Parameter(torch.zeros(heads))  # the difference from 1
        # Without a bias at its end, which the softmax would take away again.
        self.bias = nn.Sequential(Linear(2, BIAS_WIDTH), nn.ReLU(), Linear(BIAS_WIDTH, heads, bias=False))

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """Attend within windows: (B, N, D) -> (B, N, D)."""
        batch, (count, length) = len(x), windows.tokens.shape
        rows = F.pad(self.qkv(x), (0, 0, 0, 1)).index_select(1, windows.tokens.flatten())
        q, k, v = rows.view(batch * count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B W, H, n, E) each
        temperature = (1 + self.temperature).clamp(min=COOLEST).view(-1, 1, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) / temperature + self._bias(x)
        mask = key_mask(windows.mask.expand(batch, -1, -1).flatten(0, 1))
        assert mask is not None
        # Windows are short: all scores of a layer take less room than its tokens.
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
        mixed = mixed.transpose(1, 2).reshape(batch, count * length, -1)
        return self.projection(mixed.index_select(1, windows.places))

    def _bias(self, x: Tensor) -> Tensor:
        """Return (H, n, n)."""
        steps = [torch.arange(extent, device=x.device) for extent in self.window]
        place = torch.cartesian_prod(*steps).to(self.temperature.dtype)
        apart = place.unsqueeze(1) - place.unsqueeze(0)  # (n, n, 2)
        return self.bias(apart.sign() * apart.abs().log1p()).permute(2, 0, 1)


class WindowBlock(Layer):
    """Post-norm block: x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(self, width: int, heads: int, window: tuple[int, int], mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.attention = WindowAttention(width, heads, window)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.norm2 = nn.LayerNorm(width, eps=eps)

    @recomputable
    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        x = x + self.norm1(self.attention(x, windows))
        return x + self.norm2(self.mlp(x))
