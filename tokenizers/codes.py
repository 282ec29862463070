"""Codes of a trained, frozen tokenizer: the transformer sees and predicts code numbers, as in 4M.

Letters: B batch, N code numbers of a sample, K codes, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from m3.codebook import spread_codes
from m3.errors import M3Error
from m3.plugins import Signal, Strict, Tokenizer
from m3.positions import grid
from m3.types import Tokens

if TYPE_CHECKING:
    from m3.tokenizer_model import M3Tokenizer


class Codes(Tokenizer):
    """Every token is one code number with a learned embedding; the tokenizer itself stays outside the weights."""

    class Spec(Strict):
        """Settings of `type: codes`.

        Attributes:
            path: model folder of the tokenizer's run. The modality must have the tokenizer's own settings.
            hash: of its weights, filled in when the model is built, so that a later change is noticed.
            config: the tokenizer's, filled in likewise, which gives the shapes where the folder is gone.
        """

        path: str
        hash: str | None = None
        config: dict[str, Any] | None = None

    value_width = 1

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        from m3.tokenizer_model import pin

        described, self.pinned = pin(spec.path, spec.hash, spec.config)
        if described.modality.signal != signal:
            raise M3Error(
                f"the tokenizer in `{spec.path}` reads {described.modality.signal}, but the modality gives {signal}; "
                f"give the modality the settings that the tokenizer was trained with."
            )
        self.given = signal
        self.signal = Signal("classes", 1, described.grid, described.codes)
        self.reference, self.axes, self.output_width = described.grid, len(described.grid), described.codes
        self.embedding = nn.Embedding(described.codes, width)
        self._frozen: M3Tokenizer | None = None

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Encode a batch of normalised signals into tokens with values (B, N, 1), int64 in [0, K)."""
        counts = self._counts(self.given.extent(signal))
        places = grid(counts, self.reference, signal.device)
        if signal.is_meta:
            return Tokens(signal.new_zeros(len(signal), places.shape[1], 1, dtype=torch.long), places)
        return Tokens(self._on(signal.device).encode(signal).unsqueeze(-1), places)

    def embed(self, values: Tensor) -> Tensor:
        """Look up (B, S, 1) -> (B, S, D)."""
        return self.embedding(values.squeeze(-1))

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Decode code numbers (B, N, 1) to signals of `size`; booleans are spread over the places of their tokens."""
        if values.dtype != torch.bool:
            return self._on(values.device).decode(values.squeeze(-1), size)
        flags = spread_codes(values.reshape(len(values), *self._counts(size)), size)
        return flags if self.given.kind == "classes" else flags.unsqueeze(self.given.channel_axis)

    def decode(self, output: Tensor) -> Tensor:
        """Return the most likely code numbers (B, N, 1) of scores (B, N, K)."""
        return output.argmax(-1, keepdim=True)

    def _counts(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the code numbers along each axis for a signal of `size`."""
        places = self.reference[: len(size)]
        counts = (extent * n // usual for extent, n, usual in zip(size, places, self.given.size, strict=True))
        return (*counts, *self.reference[len(size) :])

    def _on(self, device: torch.device) -> Any:
        """Load the tokenizer when it is first used, and take it to where the signals are."""
        if self._frozen is None:
            from m3.tokenizer_model import load_pinned

            self._frozen = load_pinned(self.spec.path, self.pinned["hash"])
        return self._frozen if self._frozen.model.device == device else self._frozen.to(device)
