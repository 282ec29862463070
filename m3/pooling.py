"""From the states of a view to one vector per sample.

Letters: B batch, V visible tokens, R prefix tokens, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from m3.attention import CrossAttention, key_mask
from m3.backbone import BackboneSpec, feed_forward
from m3.errors import M3Error
from m3.types import Encoded, masked_mean

Kind = Literal["mean", "all", "class", "class_max", "first", "last", "attention"]
"""`mean` of the visible tokens; `all`: mean of these and of the class tokens (FLIP's image); `class`: the first class
token (CLIP's image); `class_max`: this and the maximum of the visible tokens, 2 D wide (Point-MAE); `first` or `last`
visible token (FLIP's and CLIP's text); `attention`: of a learned query to all tokens (SigLIP's image)."""


class Pooling(nn.Module):
    """One vector per sample, `width` wide."""

    def __init__(self, kind: Kind, tower: BackboneSpec) -> None:
        """Check that the tower can be pooled so.

        Raises:
            M3Error: the pooling needs a class token that the tower has not.
        """
        super().__init__()
        if kind in ("class", "class_max", "all") and not tower.class_tokens:
            raise M3Error(f"pool: `{kind}` needs a class token; set class_tokens: 1.")
        self.kind = kind
        self.width = tower.width * (2 if kind == "class_max" else 1)
        self.attention = AttentionPool(tower) if kind == "attention" else None

    def forward(self, encoded: Encoded) -> Tensor:
        """Pool the states of a view -> (B, width)."""
        if self.attention is not None:
            return self.attention(encoded.sequence, encoded.is_valid)
        if self.kind == "class":
            return encoded.prefix[:, 0]
        if self.kind == "all":
            return masked_mean(encoded.sequence, encoded.is_valid)
        if self.kind == "mean":
            return encoded.pooled
        is_valid = encoded.plan.is_valid
        if self.kind == "class_max":
            states = encoded.states
            if is_valid is not None:
                states = states.masked_fill(~is_valid.unsqueeze(-1), torch.finfo(states.dtype).min)
            return torch.cat([encoded.prefix[:, 0], states.amax(1)], dim=1)
        if self.kind == "first" or is_valid is None:  # valid tokens come first
            return encoded.states[:, 0 if self.kind == "first" else -1]
        last = (is_valid.sum(1) - 1).clamp(min=0)
        return encoded.states[torch.arange(len(last), device=last.device), last]


class AttentionPool(nn.Module):
    """A learned query attends to all states, a residual MLP follows: the MAP head of Zhai et al. 2021, "Scaling Vision
    Transformers", section 3.2.
    """

    def __init__(self, tower: BackboneSpec) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, tower.width))
        self.attention = CrossAttention(tower.width, tower.heads, tower.bias)
        self.norm = nn.LayerNorm(tower.width, eps=tower.norm_eps, bias=tower.bias)
        self.mlp = feed_forward(tower.width, tower.mlp_ratio, tower.style)

    def forward(self, states: Tensor, is_valid: Tensor | None) -> Tensor:
        """Pool states (B, R + V, D), of which is_valid (B, R + V) exist (None: all) -> (B, D)."""
        query = self.query.expand(len(states), 1, -1).to(states.dtype)
        x = self.attention(query, states, key_mask(is_valid))
        return (x + self.mlp(self.norm(x)))[:, 0]
