"""One token per label, without parameters: for labels that are predicted, and that an encoder may see as well.

Letters: B batch, K classes, L labels of a sample, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3.errors import M3Error
from m3.plugins import Signal, Strict, Tokenizer
from m3.positions import grid, sincos
from m3.types import Tokens


class Label(Tokenizer):
    """A token enters the encoder as the sum of fixed sin-cos codes of its classes, each as often as its share says.

    A label that is only predicted leaves no weights in the model, so that it can be written in published formats. Use
    the tokenizer `vector` for codes that are learned.
    """

    class Spec(Strict):
        """Settings of `type: label`; it has none."""

    axes = 1

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        if not signal.label:
            raise M3Error("tokenizer `label` reads classes of whole samples; use `vector` for other lists of numbers.")
        self.reference = signal.size
        self.value_width = self.output_width = signal.channels

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Turn (B, K, L) float into tokens with values (B, L, K)."""
        counts = (signal.shape[2],)
        return Tokens(signal.transpose(1, 2), grid(counts, self.reference, signal.device))

    def embed(self, values: Tensor) -> Tensor:
        """Embed shares (B, S, K) -> (B, S, D)."""
        classes = torch.arange(self.value_width, device=values.device).unsqueeze(-1)
        return values.nan_to_num(0.0) @ sincos(classes, self.width).to(values.dtype)

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put (B, L, K) together to (B, K, L)."""
        return values.transpose(1, 2)

    def decode(self, output: Tensor) -> Tensor:
        """Return the prediction itself: a head predicts the shares."""
        return output
