"""One token per id: words, value tokens, codes.

Letters: B batch, L ids, N = L tokens, K classes, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from m3.errors import M3Error
from m3.plugins import Signal, Strict, Tokenizer
from m3.positions import grid
from m3.types import Tokens


class Embedding(Tokenizer):
    """A learned vector for every id; the place in the sequence is the position."""

    class Spec(Strict):
        """Settings of `type: embedding`; it has none."""

    axes = 1
    value_width = 1

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        if signal.kind != "classes" or len(signal.size) != 1:
            raise M3Error(
                f"tokenizer `embedding` reads sequences of ids, got {signal.kind} over {len(signal.size)} axes"
            )
        self.reference = signal.size
        self.output_width = signal.classes
        # One more row for padding, which is never seen but must have a place to look up.
        self.table = nn.Embedding(signal.classes + signal.has_gaps, width)

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Read (B, L) int64 ids, -1 behind the end -> values (B, N, 1)."""
        counts = (signal.shape[1],)
        is_valid = signal >= 0 if self.signal.has_gaps else None
        return Tokens(signal.unsqueeze(-1), grid(counts, counts, signal.device), is_valid)

    def embed(self, values: Tensor) -> Tensor:
        """Look up (B, S, 1) -> (B, S, D)."""
        ids = values.squeeze(-1)
        return self.table(ids.masked_fill(ids < 0, self.signal.classes) if self.signal.has_gaps else ids)

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put (B, N, 1) together to (B, L)."""
        return values.squeeze(-1)

    def decode(self, output: Tensor) -> Tensor:
        """Return the most likely ids (B, N, 1) of scores (B, N, K)."""
        return output.argmax(-1, keepdim=True)

    def tied_weight(self) -> Tensor:
        """Return the rows of real ids (K, D)."""
        return self.table.weight[: self.signal.classes]
