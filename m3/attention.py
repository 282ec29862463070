"""Self- and cross-attention on torch's scaled_dot_product_attention, and on matrix products where that is slow.

Letters: B batch, N queries, C context tokens, D width, H heads, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3.errors import M3Error
from m3.linear import Linear, linear
from m3.types import take


def key_mask(is_valid: Tensor | None) -> Tensor | None:
    """Make (B, C) validity of keys a mask (B, 1, 1, C) for attention, True where a key takes part.

    A sample without any valid key would give NaN; there the first key, a zero token, is let in.
    """
    if is_valid is None:
        return None
    mask = is_valid.clone()
    mask[:, 0] |= ~is_valid.any(1)
    return mask[:, None, None, :]


LONGEST = 1024
"""Context up to which matrix products are used on a CPU: their scores take B H N C numbers for one layer."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax(q k^T / sqrt(E)) v: q (B, H, N, E), k and v (B, H, C, E) -> (B, H, N, E).

    Torch's fused kernel runs its bfloat16 backward pass on CPUs three to eight times slower than plain matrix
    products do; for short sequences those are used there, with as little kept for the backward pass.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: (B or 1, 1, 1 or N, C) bool, True for keys that take part; None: all do. Or (B or 1, H, N, C) numbers
            that are added to the scores.
    """
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= LONGEST:
        return _Products.apply(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class _Products(torch.autograd.Function):
    """Attention by matrix products; the backward pass works the probabilities out again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        return _probabilities(q, k, mask) @ v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask = ctx.saved_tensors
        p = _probabilities(q, k, mask)
        grad_scores = torch.ops.aten._softmax_backward_data(grads[0] @ v.transpose(-1, -2), p, -1, p.dtype)
        grad_mask = grad_scores.sum_to_size(mask.shape) if ctx.needs_input_grad[3] else None
        grad_scores = grad_scores * q.shape[-1] ** -0.5
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grads[0], grad_mask


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + E / 2) of x (B, H, N, E) by angles given as cosines and sines (B, 1, N, E / 2)."""
    cosine, sine = (part.to(x.dtype) for part in turn)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _check_heads(width: int, heads: int) -> int:
    if width % heads:
        raise M3Error(f"width {width} is not divisible by heads {heads}; change one of them.")
    return heads


def _head_norms(width: int, bias: bool, eps: float | None) -> tuple[nn.Module, nn.Module]:
    """Make the norms of queries and keys within a head; `eps` None: they stay as they are."""
    if eps is None:
        return nn.Identity(), nn.Identity()
    return nn.LayerNorm(width, eps=eps, bias=bias), nn.LayerNorm(width, eps=eps, bias=bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values, in this order."""

    def __init__(self, width: int, heads: int, bias: bool = True, qk_eps: float | None = None) -> None:
        super().__init__()
        self.heads = _check_heads(width, heads)
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.projection = Linear(width, width, bias=bias)
        self.q_norm, self.k_norm = _head_norms(width // heads, bias, qk_eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend among x (B, N, D) -> (B, N, D).

        Args:
            x: the tokens.
            mask: as in `attend`.
            keep: (B, T) int64, tokens whose result is wanted; only these become queries -> (B, T, D).
            turn: cosines and sines (B, 1, N, E / 2) of rotary positions; not together with `keep`.
        """
        q, k, v = self._projected(x, keep, turn)
        return self.projection(attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def probabilities(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return how much `forward` of the same arguments takes of each token, for pictures: (B, H, N or T, N).

        Each row adds up to 1; keys that take no part have 0.
        """
        q, k, _ = self._projected(x, keep, turn)
        return _probabilities(q, k, mask)

    def _projected(
        self, x: Tensor, keep: Tensor | None, turn: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, N or T, E), keys and values (B, H, N, E)."""
        width = x.shape[-1]
        if keep is None:
            q, k, v = self._heads(self.qkv(x), 3)
            q, k = self.q_norm(q), self.k_norm(k)
            return (q, k, v) if turn is None else (rotate(q, turn), rotate(k, turn), v)
        weight, bias = self.qkv.weight, self.qkv.bias
        (q,) = self._heads(linear(take(x, keep), weight[:width], None if bias is None else bias[:width]), 1)
        k, v = self._heads(linear(x, weight[width:], None if bias is None else bias[width:]), 2)
        return self.q_norm(q), self.k_norm(k), v

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """Split (B, N, parts * D) into heads: (parts, B, H, N, E)."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a context."""

    def __init__(self, width: int, heads: int, bias: bool = True, qk_eps: float | None = None) -> None:
        super().__init__()
        self.heads = _check_heads(width, heads)
        self.q = Linear(width, width, bias=bias)
        self.kv = Linear(width, 2 * width, bias=bias)
        self.projection = Linear(width, width, bias=bias)
        self.q_norm, self.k_norm = _head_norms(width // heads, bias, qk_eps)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let x (B, N, D) attend to context (B, C, D) -> (B, N, D); mask (B, 1, 1, C) True for keys that take part."""
        batch, count, width = x.shape
        q = self.q(x).view(batch, count, self.heads, -1).transpose(1, 2)
        k, v = self.kv(context).view(batch, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = attend(self.q_norm(q), self.k_norm(k), v, mask)
        return self.projection(x.transpose(1, 2).reshape(batch, count, width))
