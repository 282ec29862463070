"""One token per id: words, value tokens, codes on a grid.

Letters: B batch, L extents of the axes, N tokens (their product), K classes, D width.
"""

from __future__ import annotations

from pydantic import NonNegativeInt
from torch import Tensor, nn

from m3.errors import M3Error
from m3.plugins import Signal, Strict, Tokenizer
from m3.positions import grid
from m3.types import Tokens


class Embedding(Tokenizer):
    """A learned vector for every id; the place in the sequence or grid is the position."""

    class Spec(Strict):
        """Settings of `type: embedding`.

        Attributes:
            sentinels: further ids, behind those of the signal, that stand for hidden spans. They make it a sequence,
                whose tokens are predicted one after the other (a text may have its own).
        """

        sentinels: NonNegativeInt = 0

    value_width = 1

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        classes, sentinels = signal.classes + spec.sentinels, signal.sentinels + spec.sentinels
        super().__init__(spec, signal._replace(classes=classes, sentinels=sentinels), width)
        if signal.kind != "classes":
            raise M3Error(f"tokenizer `embedding` reads ids, got {signal.kind}; use `patch` for maps of values.")
        if spec.sentinels and signal.first_sentinel is not None:
            raise M3Error("the modality says where its sentinels are; remove those of the tokenizer `embedding`.")
        if sentinels and len(signal.size) != 1:
            raise M3Error(f"sentinels are for sequences, but this signal has {len(signal.size)} axes; remove them.")
        self.reference, self.axes, self.output_width = signal.size, len(signal.size), classes
        self.sentinels = self.signal.sentinel_ids
        # One more row for padding, which is never seen but must have a place to look up.
        self.table = nn.Embedding(classes + signal.has_gaps, width)

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Read (B, *L) int64 ids, -1 where there is none -> values (B, N, 1), the last axis fastest."""
        counts = tuple(signal.shape[1:])
        # A sequence of another length has other positions, a finer grid has some in between.
        reference = counts if self.axes == 1 else self.reference
        ids = signal.flatten(1)
        is_valid = ids >= 0 if self.signal.has_gaps else None
        positions = grid(counts, reference, signal.device)
        return Tokens(ids.unsqueeze(-1), positions, is_valid, sentinels=self.sentinels)

    def embed(self, values: Tensor) -> Tensor:
        """Look up (B, S, 1) -> (B, S, D)."""
        ids = values.squeeze(-1)
        return self.table(ids.masked_fill(ids < 0, self.signal.classes) if self.signal.has_gaps else ids)

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put (B, N, 1) together to (B, *L)."""
        return values.squeeze(-1) if self.axes == 1 else values.reshape(len(values), *size)

    def decode(self, output: Tensor) -> Tensor:
        """Return the most likely ids (B, N, 1) of scores (B, N, K), -1 where that is a sentinel: nothing is there."""
        ids = output.argmax(-1, keepdim=True)
        if self.sentinels is None:
            return ids
        return ids.masked_fill((ids >= self.sentinels.start) & (ids < self.sentinels.stop), -1)

    def tied_weight(self) -> Tensor:
        """Return the rows of real ids (K, D)."""
        return self.table.weight[: self.signal.classes]
