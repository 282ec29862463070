"""Classification: fine-tuning of a pre-trained encoder, or training from scratch, with labels.

Everything is encoded, nothing hidden; the states become one vector, a linear layer says the class. As in He et al.
2022, appendix A.1: the vector is the mean of the tokens, normalised after it and
not before, and the layer starts near 0.

Letters: B batch, K classes, D width.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init

from m3.backbone import BackboneSpec
from m3.errors import M3Error
from m3.linear import Linear
from m3.objectives.reconstruct import check_modality
from m3.plugins import Predictor, Strict, Tokenizer, View
from m3.pooling import Kind, Pooling
from m3.types import Encoded, Loss, MaskPlan, Part, Tokens

START = 2e-5
"""Standard deviation of the head's weights at the start (MAE's fine-tuning; VideoMAE's 0.02 times 0.001)."""


class Classify(Predictor):
    """Mean over labelled samples of the cross-entropy, or where a label is several classes, of their mean log-loss."""

    class Spec(Strict):
        """Settings of `type: classify`.

        Attributes:
            label: the modality of type `label` that is predicted.
            inputs: modalities that are encoded together; all of the model's but the label if left out.
            pool: what becomes the vector, see `m3.pooling`. Where the transformer has no `final_norm`, the vector has a
                LayerNorm of its own (`fc_norm` of MAE and timm).
            smoothing: share of the truth that is spread evenly over all classes (Szegedy et al. 2016).
        """

        label: str = "label"
        inputs: tuple[str, ...] | None = Field(default=None, min_length=1)
        pool: Kind = "mean"
        smoothing: float = Field(default=0.0, ge=0, lt=1)

    def __init__(self, spec: Spec, tokenizers: dict[str, Tokenizer], backbone: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        check_modality("label", spec.label, tokenizers)
        signal = tokenizers[spec.label].signal
        if not signal.label:
            raise M3Error(f"label: `{spec.label}` holds no classes of samples; name a modality of `type: label`.")
        inputs = spec.inputs or tuple(name for name in tokenizers if name != spec.label)
        for name in inputs:
            check_modality("inputs", name, tokenizers)
        if not inputs or spec.label in inputs:
            raise M3Error("inputs: the label can't be what its own prediction is made of; name other modalities.")
        tower = tokenizers[inputs[0]].tower
        self.several = signal.label == "several"
        if self.several and spec.smoothing:
            raise M3Error("smoothing: several classes at once share no sum to smooth; set it to 0.")
        self.view = View(inputs, json.dumps({"type": "fixed", "visible": 1.0}, sort_keys=True))
        self.views = (self.view,)
        self.inputs = inputs
        self.part_names = (spec.label,)
        self.modality_of, self.is_relative = {spec.label: spec.label}, {spec.label: False}
        self.pool = Pooling(spec.pool, tower)
        has_norm = tower.norm == "pre" and not tower.final_norm
        self.norm = nn.LayerNorm(self.pool.width, eps=tower.norm_eps, bias=tower.bias) if has_norm else nn.Identity()
        self.head = Head(self.pool.width, signal.channels)

    def logits(self, encoded: Encoded) -> Tensor:
        """Return (B, K), for the softmax or, where there are several classes, the sigmoid of each."""
        return self.head(self.norm(self.pool(encoded)))

    def forward(self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]) -> Loss:
        """Return one part, named after the label; samples without label or without any input have no share in it."""
        view = encoded[self.views[0]]
        logits = self.logits(view).float()
        takes_part = self._takes_part(view.plan, tokens, len(logits))
        truth = self._truth(tokens, logits)
        if self.several:
            losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
        else:
            even = self.spec.smoothing / logits.shape[1]
            truth = truth * (1 - self.spec.smoothing) + even
            losses = -(truth * logits.log_softmax(1)).sum(1)
        return Loss({self.spec.label: Part((losses * takes_part).sum(), takes_part.sum().float())})

    def counts(self, plans: dict[View, MaskPlan], tokens: dict[str, Tokens]) -> dict[str, Tensor]:
        """Return the number of samples that have a label and any of the inputs."""
        plan = plans[self.views[0]]
        samples = len(next(iter(plan.visible.values())))
        return {self.spec.label: self._takes_part(plan, tokens, samples).sum().float()}

    def predict(self, name: str, encoded: Encoded, tokens: dict[str, Tokens], index: Tensor) -> Tensor:
        """Return the logits at the label's only token, (B, T, K)."""
        return self.logits(encoded).unsqueeze(1).expand(-1, index.shape[1], -1)

    def restore(self, name: str, output: Tensor, tokens: Tokens) -> Tensor:
        """Turn logits (B, N, K) into probabilities."""
        return output.sigmoid() if self.several else output.softmax(-1)

    def truth(self, name: str, tokens: Tokens) -> Tensor:
        """Return the share of each class (B, N, K)."""
        return tokens.values

    def _truth(self, tokens: dict[str, Tokens], logits: Tensor) -> Tensor:
        """Return the share of each class (B, K); 0 in samples without label."""
        label = tokens.get(self.spec.label)
        return torch.zeros_like(logits) if label is None else label.values[:, 0].to(logits.dtype)

    def _takes_part(self, plan: MaskPlan, tokens: dict[str, Tokens], samples: int) -> Tensor:
        """Return (B,) bool, True for samples that have a label and something to see."""
        device = next(iter(plan.visible.values())).device
        there = torch.ones(samples, dtype=torch.bool, device=device)
        label = tokens.get(self.spec.label)
        if label is None:
            return ~there
        if label.is_valid is not None:
            there = there & label.is_valid[:, 0]
        return there if plan.is_valid is None else there & plan.is_valid.any(1)


class Head(Linear):
    """The last linear layer, which starts near 0."""

    def init_own_weights(self) -> None:
        """Start at N(0, START), biases at 0."""
        init.normal_(self.weight, std=START)
        if self.bias is not None:
            init.zeros_(self.bias)
