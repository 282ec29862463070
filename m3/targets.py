"""Target providers: what the loss compares a prediction with. They always read the clean batch.

A provider of another package may leave out what is said in `Target`; then its target is like the modality's own values.

Letters: B batch, N tokens, T targets, P values per token, C channels, K classes.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from m3.errors import M3Error
from m3.plugins import Strict, Tokenizer
from m3.teachers import TeacherSpec
from m3.types import Tokens, take

if TYPE_CHECKING:
    from m3.tokenizer_model import M3Tokenizer


class Target:
    """What all providers say of themselves.

    Attributes:
        width: numbers per token that a decoder predicts.
        count: P, values per token that `__call__` returns.
        kind: `values`, `classes` or `probabilities`, for the choice of the loss.
        classes: K of class ids; 0 for values.
        has_gaps: some of its values may be unknown (NaN or -1).
        is_relative: its values say nothing of a token's mean and contrast.
        is_signal: `restore` turns predictions into what the modality's tokens hold, so that they can be drawn.
        pinned: settings that are known only once it is built, as those of `Tokenizer`; saved in the config.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.width, self.count = tokenizer.output_width, tokenizer.value_width
        self.kind, self.classes = tokenizer.signal.kind, tokenizer.signal.classes
        self.has_gaps = tokenizer.signal.has_gaps
        self.is_relative, self.is_signal = False, True
        self.pinned: dict[str, Any] = {}


class Values(Target):
    """The token's own values: normalised pixels, depths, class ids; optionally normalised within each patch.

    `normalise: true` is MAE's target (He et al. 2021, section 4.2): (t - mean) / sqrt(variance + 1e-6) over
    all P values of a patch together, unbiased variance. `channel` takes mean and variance of each channel for itself:
    with `eps_on: variance` OmniMAE's target (Girdhar et al. 2022), with `eps_on: deviation` VideoMAE's (Tong et al.
    2022), (t - mean) / (sqrt(variance) + 1e-6). Both work on pixels in [0, 1]; a value here is such a pixel less the
    modality's mean over its std, which leaves the target as it is if eps is 1e-6 / std (on the variance: 1e-6 /
    std^2), channel by channel.
    """

    class Spec(Strict):
        """Settings of `type: values`.

        Attributes:
            normalise: within each patch: false: not; true: all values together; `channel`: each channel for itself.
            eps: keeps patches of one colour finite; for all channels, or for each.
            eps_on: what eps is added to: the variance, or its root.
            step: of a token that spans several steps along the first axis (frames of a tube), the only one that is
                predicted, 0 for the first (Feichtenhofer et al. 2022, section 4.1); null: all.
        """

        normalise: bool | Literal["channel"] = False
        eps: NonNegativeFloat | tuple[NonNegativeFloat, ...] = 1e-6
        eps_on: Literal["variance", "deviation"] = "variance"
        step: int | None = None

    def __init__(self, spec: Spec, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.spec = spec
        self.is_relative = bool(spec.normalise)
        signal = tokenizer.signal
        self.channels, self.steps = signal.channels, 1
        is_ordered = signal.kind == "values" and signal.channel_axis == 1
        if not is_ordered and (spec.normalise == "channel" or spec.step is not None):
            raise M3Error("target.normalise: channel and target.step need values (channel, ...); leave them out here.")
        if isinstance(spec.eps, tuple) and (spec.normalise != "channel" or len(spec.eps) != signal.channels):
            raise M3Error(
                f"target.eps: {len(spec.eps)} numbers are for `normalise: channel` and {len(spec.eps)} channels, got "
                f"`{spec.normalise}` and {signal.channels}; give one number or correct them."
            )
        if spec.step is not None:
            if len(signal.size) != len(tokenizer.reference):
                raise M3Error("target.step needs tokens on a grid; leave it out here.")
            self.steps = signal.size[0] // tokenizer.reference[0]
            if not 0 <= spec.step < self.steps:
                raise M3Error(f"target.step: a token spans steps 0 to {self.steps - 1}, got {spec.step}; choose one.")
            self.width = self.count = tokenizer.output_width // self.steps

    def __call__(self, tokens: Tokens, index: Tensor) -> Tensor:
        """Return the targets (B, T, P) of the tokens at index (B, T), as float values or int64 class ids."""
        values = self._chosen(take(tokens.values, index))
        if not self.spec.normalise:
            return values
        mean, deviation = self._statistics(values)
        return ((self._split(values) - mean) / deviation).reshape(values.shape)

    def restore(self, predicted: Tensor, tokens: Tokens) -> Tensor:
        """Undo the normalisation of predictions (B, N, P) for all tokens, with the truth's own statistics.

        For pictures only: a normalised prediction says nothing about a patch's mean and contrast. Where one step is
        predicted, it stands for the others.
        """
        if self.spec.normalise:
            mean, deviation = self._statistics(self._chosen(tokens.values))
            predicted = (self._split(predicted) * deviation + mean).reshape(predicted.shape)
        if self.spec.step is None:
            return predicted
        each = predicted.unflatten(-1, (self.channels, 1, -1))
        return each.expand(*each.shape[:-2], self.steps, -1).flatten(-3)

    def _chosen(self, values: Tensor) -> Tensor:
        """Take the predicted step of values (B, T, P), which are ordered (channel, step, ...)."""
        if self.spec.step is None:
            return values
        return values.unflatten(-1, (self.channels, self.steps, -1))[..., self.spec.step, :].flatten(-2)

    def _split(self, values: Tensor) -> Tensor:
        """Bring values (B, T, P) into the groups that are normalised: (B, T, 1 or C, P / C)."""
        return values.unflatten(-1, (self.channels if self.spec.normalise == "channel" else 1, -1))

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation (B, T, 1 or C, 1) of values (B, T, P)."""
        variance, mean = torch.var_mean(self._split(values.float()), dim=-1, keepdim=True)
        eps = _column(self.spec.eps, values) if isinstance(self.spec.eps, tuple) else self.spec.eps
        return mean, (variance + eps).sqrt() if self.spec.eps_on == "variance" else variance.sqrt() + eps


def _column(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """Return (C, 1) float32 on the device of another tensor, made there: a copy would wait for the device."""
    return torch.stack([torch.full((1,), number, device=like.device) for number in numbers])


class _Labels:
    """What a decoder predicts as logits over the values of a token."""

    is_relative = False

    def __init__(self, spec: Any, tokenizer: Tokenizer) -> None:
        self.width = tokenizer.output_width

    def restore(self, predicted: Tensor, tokens: Tokens) -> Tensor:
        """Turn logits (B, N, P) into probabilities."""
        return predicted.softmax(-1)


class SoftLabels(_Labels):
    """The token's values as probabilities of classes, for loss `kl` (UNITER's MRC-kl, Chen et al. 2020, section 3.2).

    Predictions are logits.
    """

    class Spec(Strict):
        """Settings of `type: soft_labels`; it has none."""

    kind = "probabilities"

    def __call__(self, tokens: Tokens, index: Tensor) -> Tensor:
        """Return the probabilities (B, T, P) of the tokens at index (B, T), NaN where nobody knows them."""
        return take(tokens.values, index)


class MostLikely(_Labels):
    """The most likely class of the token's values, as an id, for loss `cross_entropy` (UNITER's MRC)."""

    class Spec(Strict):
        """Settings of `type: most_likely`.

        Attributes:
            skip: classes at the front that are never the answer (1: the background of a detector).
        """

        skip: NonNegativeInt = 0

    kind = "classes"

    def __init__(self, spec: Spec, tokenizer: Tokenizer) -> None:
        super().__init__(spec, tokenizer)
        self.skip, self.classes = spec.skip, tokenizer.output_width
        if spec.skip >= self.classes:
            raise M3Error(f"target `most_likely` skips all of {self.classes} classes; lower `skip`.")

    def __call__(self, tokens: Tokens, index: Tensor) -> Tensor:
        """Return ids (B, T, 1) of the tokens at index (B, T), -1 where nobody knows the probabilities."""
        values = take(tokens.values, index)
        is_known = ~values.isnan().any(-1, keepdim=True)
        best = values[..., self.skip :].argmax(-1, keepdim=True) + self.skip
        return torch.where(is_known, best, -1)


class Teacher(Target):
    """Features of a frozen network, of the clean picture: one vector per token with mean 0 and deviation 1.

    MaskDistill (Peng et al. 2022) with CLIP; the layer norm without weights is its "whitening".
    """

    class Spec(TeacherSpec):
        """Settings of `type: teacher`; see `TeacherSpec`."""

    def __init__(self, spec: Spec, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.spec = spec
        self.width = self.count = spec.channels(tokenizer)
        self.pinned = {"width": self.width}
        self.kind, self.classes, self.has_gaps, self.is_signal = "values", 0, False, False

    def __call__(self, tokens: Tokens, index: Tensor) -> Tensor:
        """Return the features (B, T, C) of the tokens at index (B, T)."""
        features = self.spec.open(self.tokenizer)(self.spec.pictures(self.tokenizer, tokens))
        return take(F.layer_norm(features.flatten(2).transpose(1, 2), (self.width,)), index)

    def restore(self, predicted: Tensor, tokens: Tokens) -> Tensor:
        """Return the predictions; features can't be drawn."""
        return predicted


class Codes(Target):
    """Code numbers that a trained, frozen tokenizer gives the clean signal, one per token (BEiT, Bao et al. 2021)."""

    class Spec(Strict):
        """Settings of `type: codes`.

        Attributes:
            tokenizer: model folder of the tokenizer's run. The modality must have the tokenizer's own settings.
            config: the tokenizer's, filled in when the model is built; tells the number of codes where there is none.
        """

        tokenizer: str
        config: dict[str, Any] | None = None

    def __init__(self, spec: Spec, tokenizer: Tokenizer) -> None:
        from m3.tokenizer_model import describe

        super().__init__(tokenizer)
        self.spec = spec
        described = describe(spec.tokenizer, spec.config)
        self.is_signal = described.is_two_way
        self.pinned = {"config": described.model.config.to_diff_dict()}
        if described.modality.signal != tokenizer.signal or prod(described.grid) != prod(tokenizer.reference):
            raise M3Error(
                f"the tokenizer in `{spec.tokenizer}` makes {prod(described.grid)} codes of "
                f"{described.modality.signal}, but the model {prod(tokenizer.reference)} tokens of {tokenizer.signal}; "
                f"give both the same modality and patches of one size."
            )
        self.width = self.classes = described.codes
        self.kind, self.count, self.has_gaps = "classes", 1, False
        self._frozen: M3Tokenizer | None = None

    def __call__(self, tokens: Tokens, index: Tensor) -> Tensor:
        """Return the code numbers (B, T, 1) int64 of the tokens at index (B, T)."""
        if tokens.values.is_meta:
            return torch.zeros((*index.shape, 1), dtype=torch.long, device="meta")
        size = self.tokenizer.signal.size
        codes = self._on(index.device).encode(self.tokenizer.detokenize(tokens.values, tokens.positions, size))
        return take(codes.unsqueeze(-1), index)

    def restore(self, predicted: Tensor, tokens: Tokens) -> Tensor:
        """Decode the most likely codes of scores (B, N, K) to the values of tokens (B, N, P)."""
        signal = self._on(predicted.device).decode(predicted.argmax(-1), self.tokenizer.signal.size)
        return self.tokenizer.tokenize(signal).values

    def _on(self, device: torch.device) -> Any:
        """Load the tokenizer when it is first used, and take it to where the signals are."""
        if self._frozen is None:
            from m3.tokenizer_model import M3Tokenizer

            self._frozen = M3Tokenizer.from_pretrained(self.spec.tokenizer)
        return self._frozen if self._frozen.model.device == device else self._frozen.to(device)
