"""Patches of a class map: each position's class is embedded, then the patch is projected (MultiMAE).

Letters: B batch, H height, W width, N patches, P = h w positions per patch, K classes, E width of a class
embedding, D width.
"""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor, nn

from m3.errors import M3Error
from m3.linear import Linear
from m3.plugins import Signal, Strict, Tokenizer
from m3.positions import grid
from m3.tokenizers.patch import grid_of, pair, patchify, unpatchify
from m3.types import Tokens


class ClassPatch(Tokenizer):
    """MultiMAE's input adapter for semantic maps (Bachmann et al. 2022): 64-d class embeddings, then a projection."""

    class Spec(Strict):
        """Settings of `type: class_patch`.

        Attributes:
            size: patch height and width in positions of the map (MultiMAE: 4 on a map at a quarter of the image).
            class_width: E, width of a class embedding.
        """

        size: PositiveInt | tuple[PositiveInt, PositiveInt] = 4
        class_width: PositiveInt = 64

    axes = 2

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        if signal.kind != "classes":
            raise M3Error("tokenizer `class_patch` reads class maps, got values; use `patch` for values.")
        if len(signal.size) != 2:
            raise M3Error(
                f"tokenizer `class_patch` reads maps over 2 axes, got {len(signal.size)}; use `embedding` for words."
            )
        self.patch = pair(spec.size)
        self.reference = grid_of(signal.size, self.patch)
        self.value_width = self.patch[0] * self.patch[1]
        self.output_width = self.value_width * signal.classes
        # One more row for positions whose class nobody knows.
        self.class_embedding = nn.Embedding(signal.classes + signal.has_gaps, spec.class_width)
        self.projection = Linear(self.value_width * spec.class_width, width)

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Cut (B, H, W) int64 class ids into tokens with values (B, N, P)."""
        values = patchify(signal.unsqueeze(1), self.patch)
        counts = grid_of(signal.shape[1:], self.patch)
        return Tokens(values, grid(counts, self.reference, signal.device), counts=counts)

    def embed(self, values: Tensor) -> Tensor:
        """Project class ids (B, S, P) to (B, S, D)."""
        if self.signal.has_gaps:
            values = values.masked_fill(values < 0, self.signal.classes)
        return self.projection(self.class_embedding(values).flatten(2))

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put class ids (B, N, P) together to (B, H, W)."""
        return unpatchify(values, self.patch, size).squeeze(1)

    def decode(self, output: Tensor) -> Tensor:
        """Return the most likely class ids (B, N, P) of scores (B, N, P * K), ordered (position, class)."""
        return output.unflatten(-1, (self.value_width, self.signal.classes)).argmax(-1)
