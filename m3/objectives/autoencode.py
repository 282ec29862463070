"""Autoencoding through a quantiser: what a discrete tokenizer is trained with.

What is decoded is the signal itself, or what a frozen teacher makes of it (VQ-KD).

The objective reads the tokens of one modality itself and declares no view, so a model that has no other objective
has no backbone: the coder is the network.
Letters: B batch, N content tokens, M codes, H code numbers per code, T asked-for tokens, D width, d width of a code.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from m3.backbone import BackboneSpec
from m3.coders import Coder
from m3.errors import M3Error
from m3.linear import Linear
from m3.objectives.reconstruct import check_loss, check_modality, elementwise_losses, reduce, said, value_weights
from m3.parts import build_spec
from m3.plugins import Predictor, Strict, Tokenizer, View
from m3.quantize import Quantiser
from m3.types import Encoded, Loss, MaskPlan, Part, Tokens, take


class Autoencode(Predictor):
    """Mean loss of all token values after a passage through the codes, and the quantiser's commitment."""

    class Spec(Strict):
        """Settings of `type: autoencode`.

        Attributes:
            of: the modality.
            coder: encoder and decoder; `vit` or `conv`.
            quantiser: `fsq` or `vq`.
            target: what the decoder makes of the codes, a target provider: the tokens' own `values`, or features of a
                frozen `teacher` (VQ-KD, Peng et al. 2022, section 3.2), which are no signal to come back to.
            loss: `mse`, `l1`, `smooth_l1`, `cosine` (values) or `cross_entropy` (class ids).
        """

        of: str
        coder: dict = Field(default={"type": "vit"})
        quantiser: dict = Field(default={"type": "fsq"})
        target: dict = Field(default={"type": "values"})
        loss: Literal["mse", "l1", "smooth_l1", "cosine", "cross_entropy"] = "mse"

    view = None
    views = ()

    def __init__(self, spec: Spec, tokenizers: dict[str, Tokenizer], backbone: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        check_modality("of", spec.of, tokenizers)
        tokenizer = tokenizers[spec.of]
        part, settings = build_spec("targets", spec.target, "autoencode.target")
        self.provider = part(settings, tokenizer)
        if notes := said(self.provider, "pinned", {}):
            self.pinned = {"target": notes}
        check_loss(spec.of, spec.loss, tokenizer, said(self.provider, "kind", None))
        self._tokenizers = tokenizers  # a plain dict: their parameters belong to the model
        coder, settings = build_spec("coders", spec.coder, "autoencode.coder")
        self.coder: Coder = coder(settings, backbone, tokenizer)
        quantiser, settings = build_spec("quantisers", spec.quantiser, "autoencode.quantiser")
        self.quantiser: Quantiser = quantiser(settings)
        self.to_code = Linear(backbone.width, self.quantiser.width)
        if self.coder.is_two_way:
            self.from_code = Linear(self.quantiser.width, backbone.width)
            self.output = Linear(backbone.width, self.provider.width)
        signal = tokenizer.signal
        self.classes = said(self.provider, "classes", signal.classes)
        self.has_gaps = said(self.provider, "has_gaps", signal.has_gaps)
        self.is_signal = said(self.provider, "is_signal", True)
        self.modality_of = {spec.of: spec.of} if self.is_signal else {}
        self.is_relative = {spec.of: False}
        if said(self.provider, "is_relative", False):
            raise M3Error("target: codes alone can't bring back what patches are normalised by; leave `normalise` out.")
        self._tokens_per_code = math.prod(tokenizer.reference) // math.prod(self.coder.reference)
        self.part_names = (spec.of, *(["commitment"] if self.quantiser.commitment else []))

    def forward(self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]) -> Loss:
        """Return a part named after the modality, and `commitment` where the quantiser has one."""
        own = self._own(tokens)
        quantised, _, distances = self._quantise(own)
        truth = self.truth(self.spec.of, own)
        weights = value_weights(truth, own.is_valid, self.has_gaps)
        known = truth.nan_to_num(0.0) if self.has_gaps else truth
        decoded = self._decode(quantised, own).float()
        losses = elementwise_losses(self.spec.loss, decoded, known, self.classes, self._tokenizer.signal.channels)
        parts = {self.spec.of: Part(*reduce(losses, weights, "token"))}
        if self.quantiser.commitment:
            is_valid = self.coder.is_valid(own)
            weights = None if is_valid is None else is_valid.unsqueeze(-1)
            total, count = reduce(distances.unsqueeze(-1), weights, "token")
            parts["commitment"] = Part(total, count, self.quantiser.commitment)
        return Loss(parts)

    def counts(self, plans: dict[View, MaskPlan], tokens: dict[str, Tokens]) -> dict[str, Tensor]:
        """Return the count of every part that `forward` will return."""
        own = self._own(tokens)
        if self.has_gaps or not hasattr(self.provider, "count"):
            truth = self.truth(self.spec.of, own)
        else:  # nothing but the shape matters, and a teacher need not look
            truth = own.positions.new_zeros(len(own.values), own.count, self.provider.count)
        weights = value_weights(truth, own.is_valid, self.has_gaps)
        counts = {self.spec.of: reduce(torch.zeros_like(truth, dtype=torch.float32), weights, "token")[1]}
        if self.quantiser.commitment:
            is_valid = self.coder.is_valid(own)
            codes = own.positions.new_zeros(len(own.values), own.count // self._tokens_per_code, 1)
            counts["commitment"] = reduce(codes, None if is_valid is None else is_valid.unsqueeze(-1), "token")[1]
        return counts

    @property
    def predicts(self) -> str:
        """What it learns to say."""
        what = self.spec.of if self.is_signal else f"features of {self.spec.of}"
        return f"{what} from {self.quantiser.codes} codes"

    def after_step(self) -> None:
        """Let the codebook follow the vectors of the step."""
        self.quantiser.update()

    def indices(self, tokens: Tokens) -> Tensor:
        """Return the code numbers (B, M * H) int64 in [0, K) of the modality's tokens."""
        return self._quantise(tokens)[1]

    def count_codes(self, tokens: Tokens) -> Tensor:
        """Return (H, K) how often each code occurs in the tokens that exist."""
        heads, codes = self.quantiser.heads, self.quantiser.codes
        indices = self.indices(tokens).unflatten(1, (-1, heads))
        is_valid = self.coder.is_valid(tokens)
        rows = indices.flatten(0, 1) if is_valid is None else indices[is_valid]
        return torch.stack([torch.bincount(rows[:, head], minlength=codes) for head in range(heads)])

    def reconstruct(self, indices: Tensor, places: Tokens) -> Tensor:
        """Turn code numbers (B, M * H) into token values (B, N, P); `places` has the positions of the N tokens.

        Raises:
            M3Error: there is no decoder to values.
        """
        if not self.is_signal:
            raise M3Error(
                f"this tokenizer of `{self.spec.of}` only makes codes: they stand for a teacher's features, which are "
                f"no signal; use it for those."
            )
        output = self._decode(self.quantiser.decode(indices), places)
        return self._tokenizer.decode(self.provider.restore(output, places))

    def predict(self, name: str, encoded: Encoded | None, tokens: dict[str, Tokens], index: Tensor) -> Tensor:
        """Pass the modality's tokens through the codes -> (B, T, output width) at index (B, T)."""
        own = self._own(tokens)
        return take(self._decode(self._quantise(own)[0], own), index)

    def restore(self, name: str, output: Tensor, tokens: Tokens) -> Tensor:
        """Return what the target provider makes of the prediction."""
        return self.provider.restore(output, tokens)

    def truth(self, name: str, tokens: Tokens) -> Tensor:
        """Return what the target provider says of all tokens (B, N, P)."""
        everything = torch.arange(tokens.count, device=tokens.values.device)
        return self.provider(tokens, everything.expand(len(tokens.values), -1))

    @property
    def is_two_way(self) -> bool:
        """False: it only makes codes."""
        return self.coder.is_two_way and self.is_signal

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._tokenizers[self.spec.of]

    def _quantise(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes (B, M, d), their numbers (B, M * H) and distances (B, M)."""
        x = self.coder.encode(self._tokenizer.embed(tokens.values), tokens)
        return self.quantiser(self.to_code(x), self.coder.is_valid(tokens))

    def _decode(self, quantised: Tensor, tokens: Tokens) -> Tensor:
        """Turn codes (B, M, d) into (B, N, output width).

        Raises:
            M3Error: there is no decoder.
        """
        if not self.coder.is_two_way:
            raise M3Error(
                f"this tokenizer of `{self.spec.of}` only makes codes: its decoder is null; use it for those."
            )
        return self.output(self.coder.decode(self.from_code(quantised), tokens))

    def _own(self, tokens: dict[str, Tokens]) -> Tokens:
        if self.spec.of not in tokens:
            raise M3Error(f"the batch has no `{self.spec.of}`, which `autoencode` needs; add it to the data.")
        return tokens[self.spec.of]
