"""Transformer blocks with the published names, written from the papers' description, for code that can't be installed.

Letters: B batch, N tokens, D width, H heads, E width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B, N, D) each; softmax of the scaled products of every head by itself."""
    parts = []
    for one, two, three in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        parts.append((one @ two.transpose(1, 2) * one.shape[-1] ** -0.5).softmax(-1) @ three)
    return torch.cat(parts, -1)


class Attention(nn.Module):
    """`qkv` and `proj`; `bias` full, or of queries and values alone."""

    def __init__(self, width: int, heads: int, bias: str = "full") -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias == "full")
        if bias == "query and value":
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.qkv.bias is None:
            q, v = q + self.q_bias, v + self.v_bias
        return self.proj(attend(q, k, v, self.heads))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """timm's names."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float = 1e-6, attention: nn.Module | None = None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = attention or Attention(width, heads)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
