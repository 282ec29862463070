"""One token per vector: global features, lists of readings.

Letters: B batch, C numbers of a vector, L vectors, N = L tokens, D width.
"""

from __future__ import annotations

from torch import Tensor

from m3.errors import M3Error
from m3.linear import Linear
from m3.plugins import Signal, Strict, Tokenizer
from m3.positions import grid
from m3.types import Tokens


class Vector(Tokenizer):
    """Every place along the only axis is a token: its C channels through one linear projection."""

    class Spec(Strict):
        """Settings of `type: vector`; it has none."""

    axes = 1

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        if signal.kind != "values" or len(signal.size) != 1 or signal.channel_axis != 1:
            raise M3Error(
                f"tokenizer `vector` reads channels over one axis, got {signal.kind} over {len(signal.size)}; "
                f"use `patch` for maps and `point_group` for points."
            )
        self.reference = signal.size
        self.value_width = self.output_width = signal.channels
        self.projection = Linear(self.value_width, width)

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Turn (B, C, L) float into tokens with values (B, N, C)."""
        counts = (signal.shape[2],)
        return Tokens(signal.transpose(1, 2), grid(counts, self.reference, signal.device))

    def embed(self, values: Tensor) -> Tensor:
        """Project (B, S, C) to (B, S, D); numbers that nobody knows (NaN) enter as 0, the mean."""
        return self.projection(values.nan_to_num(0.0) if self.signal.has_gaps else values)

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put (B, N, C) together to (B, C, L)."""
        return values.transpose(1, 2)

    def decode(self, output: Tensor) -> Tensor:
        """Return the prediction itself: a head predicts the values."""
        return output
