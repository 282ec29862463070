"""Target providers: what the loss compares a prediction with. They always read the clean batch.

Letters: B batch, T targets, P values per token, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from m3.errors import M3Error
from m3.plugins import Strict, Tokenizer
from m3.types import Tokens, take


class Values:
    """The token's own values: normalised pixels, depths, class ids; optionally normalised within each patch.

    `normalise: patch` is MAE's target (He et al. 2021, section 4.2): (t - mean) / sqrt(variance + 1e-6) over
    all P values of a patch together, unbiased variance.
    """

    class Spec(Strict):
        """Settings of `type: values`.

        Attributes:
            normalise: `none` or `patch`.
        """

        normalise: bool = False

    eps = 1e-6

    def __init__(self, spec: Spec, tokenizer: Tokenizer) -> None:
        self.spec = spec
        self.width = tokenizer.output_width
        self.is_relative = spec.normalise

    def __call__(self, tokens: Tokens, index: Tensor) -> Tensor:
        """Return the targets (B, T, P) of the tokens at index (B, T), as float values or int64 class ids."""
        values = take(tokens.values, index)
        if not self.spec.normalise:
            return values
        mean, deviation = self._statistics(values)
        return (values - mean) / deviation

    def restore(self, predicted: Tensor, tokens: Tokens) -> Tensor:
        """Undo the normalisation of predictions (B, N, P) for all tokens, with the truth's own statistics.

        For pictures only: a normalised prediction says nothing about a patch's mean and contrast.
        """
        if not self.spec.normalise:
            return predicted
        mean, deviation = self._statistics(tokens.values)
        return predicted * deviation + mean

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.float()
        variance, mean = torch.var_mean(values, dim=-1, keepdim=True)
        return mean, (variance + self.eps).sqrt()


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
