"""Self- and cross-attention on torch's scaled_dot_product_attention.

Letters: B batch, N queries, C context tokens, D width, H heads, E width of a head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def key_mask(is_valid: Tensor | None) -> Tensor | None:
    """Make (B, C) validity of keys a mask (B, 1, 1, C) for attention, True where a key takes part.

    A sample without any valid key would give NaN; there the first key, a zero token, is let in.
    """
    if is_valid is None:
        return None
    mask = is_valid.clone()
    mask[:, 0] |= ~is_valid.any(1)
    return mask[:, None, None, :]


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values, in this order."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend among x (B, N, D) -> (B, N, D); mask (B, 1, 1, N) is True for keys that take part."""
        batch, count, width = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, E)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.projection(x.transpose(1, 2).reshape(batch, count, width))


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a context."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let x (B, N, D) attend to context (B, C, D) -> (B, N, D); mask (B, 1, 1, C) True for keys that take part."""
        batch, count, width = x.shape
        q = self.q(x).view(batch, count, self.heads, -1).transpose(1, 2)
        k, v = self.kv(context).view(batch, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.projection(x.transpose(1, 2).reshape(batch, count, width))
