"""Scorers: a number for every token. Tokens with low scores are seen, tokens with high scores are hidden.

A new masking strategy is a new scorer: a class with a `Spec` and `__call__`. Letters: B batch, N tokens.
"""

from __future__ import annotations

from torch import Tensor

from m3.plugins import Strict
from m3.random import Draws
from m3.types import Tokens


class Uniform:
    """Independent uniform noise: random masking as in MAE (He et al. 2021, section 3)."""

    class Spec(Strict):
        """Uniform noise has no settings."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
        """Return modality -> (B, N) float scores."""
        return {name: draws.uniform(f"score/{name}", part.count) for name, part in tokens.items()}
