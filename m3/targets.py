"""Target providers: what the loss compares a prediction with. They always read the clean batch.

Letters: B batch, T targets, P values per token, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
