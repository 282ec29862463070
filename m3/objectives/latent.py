"""Prediction of latent features: those that a moving average of the model itself has of the clean input.

I-JEPA (Assran et al. 2023) and data2vec 2.0 (Baevski et al. 2022) are this with different masks, decoders and targets.
The average is the one of `train.ema`; it is no part of the model.

Letters: B batch, N tokens of a modality, V visible tokens, T targets, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from m3.backbone import BackboneSpec
from m3.errors import M3Error, within
from m3.heads import restore_index
from m3.objectives.reconstruct import check_modality, reduce
from m3.parts import build_spec
from m3.plugins import Objective, Strict, Tokenizer, View
from m3.types import Encoded, Loss, MaskPlan, Part, Tokens, masked_mean, take

EVERYTHING = json.dumps({"type": "fixed", "visible": 1.0})
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


class Latent(Objective):
    """Mean loss of the predicted features of hidden tokens, over all masks of a sample."""

    class Spec(Strict):
        """Settings of `type: latent`.

        Attributes:
            inputs: modalities that are encoded together; all of the model's if left out.
            masking: what the model sees; the teacher sees everything.
            masks: different masks of every sample in a step, all with the same targets (data2vec 2.0: 16 for images).
            decoder: what predicts the features at hidden places.
            layers: 0: the features are the teacher's last, normed states (I-JEPA); K: the mean of the outputs of its
                last K blocks, each standardised over the tokens of the sample (data2vec 2.0). Then a layer norm without
                weights.
            loss: of single values.
            weight: factor on it.
            class_weight: factor on the same loss of the class token's state as a prediction of the mean feature of all
                tokens (data2vec 2.0: 0.01).
        """

        inputs: tuple[str, ...] | None = None
        masking: dict = Field(default={"type": "fixed", "visible": 0.25})
        masks: PositiveInt = 1
        decoder: dict = Field(default={"type": "self_decoder"})
        layers: NonNegativeInt = 0
        loss: Literal["mse", "l1", "smooth_l1"] = "smooth_l1"
        weight: PositiveFloat = 1.0
        class_weight: NonNegativeFloat = 0.0

    def __init__(self, spec: Spec, tokenizers: dict[str, Tokenizer], backbone: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.inputs = spec.inputs or tuple(tokenizers)
        for name in self.inputs:
            check_modality("inputs", name, tokenizers)
        tower = tokenizers[self.inputs[0]].tower
        self.width = tower.width
        if spec.layers > tower.depth:
            raise M3Error(f"layers: the encoder has {tower.depth} blocks, so the last {spec.layers} can't be averaged.")
        if spec.class_weight and not tower.class_tokens:
            raise M3Error("class_weight: the encoder has no class token; set class_tokens: 1.")
        branches = [{}, *({"branch": f"mask {number}/"} for number in range(1, spec.masks))]
        self.student_views = tuple(
            View(self.inputs, json.dumps(spec.masking | branch, sort_keys=True)) for branch in branches
        )
        kept = tuple(range(tower.depth - spec.layers, tower.depth))
        self.teacher_view = View(self.inputs, EVERYTHING, layers=kept, is_teacher=True)
        self.views = (*self.student_views, self.teacher_view)
        self.part_names = (*self.inputs, *(["class"] if spec.class_weight else []))
        self.decoders = nn.ModuleDict()
        for name in self.inputs:
            decoder, settings = build_spec("decoders", spec.decoder, "decoder")
            with within("decoder"):
                self.decoders[name] = decoder(settings, tower, tokenizers, self.inputs, name, tower.width)

    def forward(self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]) -> Loss:
        """Return one part per modality, and `class`."""
        parts, watched = {}, {}
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.inputs}
        for name, _, guess, answer, is_target in self.predictions(encoded, tokens):
            found[name].append(self.loss(guess, answer, is_target))
            watched[f"{name} predicted"] = guess.detach().flatten(0, 1)
            watched[f"{name} target"] = answer.flatten(0, 1)
        parts = {name: Part(*total(losses), self.spec.weight) for name, losses in found.items()}
        if self.spec.class_weight:
            seen = encoded[self.teacher_view]
            parts["class"] = self._class_part(encoded, masked_mean(self.targets(seen), seen.plan.is_valid), seen.plan)
        watched["pooled"] = encoded[self.student_views[0]].pooled.detach()
        return Loss(parts, watched)

    def predictions(
        self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor | None]]:
        """Yield modality, asked places (B, T), prediction and target (B, T, D), and which count, (B, T) or None."""
        for name in self.inputs:
            own = self.features(encoded[self.teacher_view], name, tokens[name].count)
            for view in self.student_views:
                for index, is_target in blocks(encoded[view].plan, name):
                    yield name, index, self.decoders[name](encoded[view], tokens, index), take(own, index), is_target

    def features(self, encoded: Encoded, name: str, count: int) -> Tensor:
        """Return the targets (B, N, D) of the `count` tokens of a modality, of which the teacher sees all."""
        truth = self.targets(encoded)
        return take(truth, restore_index(encoded.plan, name, count).clamp(max=truth.shape[1] - 1))

    def counts(self, plans: dict[View, MaskPlan], tokens: dict[str, Tokens]) -> dict[str, Tensor]:
        """Return the count of every part that `forward` will return."""
        counts = {}
        for name in self.inputs:
            if name not in tokens:
                raise M3Error(f"the batch has no `{name}`, whose features are to be predicted; add it to the data.")
            found = [self._count(index, t) for view in self.student_views for index, t in blocks(plans[view], name)]
            counts[name] = torch.stack(found).sum()
        if self.spec.class_weight:
            there = plans[self.teacher_view].is_valid
            samples = len(next(iter(tokens.values())).values) if there is None else there.any(1).sum()
            counts["class"] = torch.as_tensor(samples * len(self.student_views) * self.width).float()
            counts["class"] = counts["class"].to(next(iter(counts.values())).device)
        return counts

    @torch.no_grad()
    def targets(self, encoded: Encoded) -> Tensor:
        """Return the features (B, V, D) of the tokens that the teacher sees, in its order."""
        x = encoded.states
        if self.spec.layers:
            layers = [x[:, encoded.prefix_count :] for x in encoded.layers.values()]
            x = torch.stack([standardise(layer, encoded.plan.is_valid) for layer in layers]).mean(0)
        return F.layer_norm(exact(x), x.shape[-1:])

    def loss(self, guess: Tensor, answer: Tensor, is_target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return sum and count of the loss of predictions (B, T, D) over the values of the tokens that count."""
        losses = LOSSES[self.spec.loss](exact(guess), answer, reduction="none")
        return reduce(losses, None if is_target is None else is_target.unsqueeze(-1), "token")

    def _count(self, index: Tensor, is_target: Tensor | None) -> Tensor:
        empty = torch.zeros((*index.shape, self.width), device=index.device)
        return reduce(empty, None if is_target is None else is_target.unsqueeze(-1), "token")[1]

    def _class_part(self, encoded: dict[View, Encoded], mean: Tensor, plan: MaskPlan) -> Part:
        """Return the loss of the class tokens of all masks against the mean feature (B, D)."""
        there = None if plan.is_valid is None else plan.is_valid.any(1, keepdim=True)
        found = [self.loss(encoded[view].prefix[:, :1], mean.unsqueeze(1), there) for view in self.student_views]
        return Part(*total(found), self.spec.class_weight)


def blocks(plan: MaskPlan, name: str) -> list[tuple[Tensor, Tensor | None]]:
    """Return the blocks of targets of a modality: their indices (B, T) and which of them count."""
    index, is_target, count = plan.target[name], plan.is_target.get(name), plan.blocks.get(name, 1)
    counts = [None] * count if is_target is None else is_target.chunk(count, dim=1)
    return list(zip(index.chunk(count, dim=1), counts, strict=True))


def standardise(x: Tensor, is_valid: Tensor | None) -> Tensor:
    """Give each channel of each sample mean 0 and deviation 1 over its tokens (instance norm): x (B, V, D)."""
    x = exact(x)
    centred = x - masked_mean(x, is_valid).unsqueeze(1)
    return centred / (masked_mean(centred.square(), is_valid).unsqueeze(1) + 1e-5).sqrt()


def total(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Add up sums and counts."""
    sums, counts = (torch.stack(values).sum() for values in zip(*found, strict=True))
    return sums, counts


def exact(x: Tensor) -> Tensor:
    """Return x in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
