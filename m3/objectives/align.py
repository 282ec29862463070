"""Alignment with a frozen teacher: the student's states of what it sees become like the teacher's of the whole picture.

MaskAlign (Xue et al. 2023): neither mask tokens nor a decoder; the student drops what is hidden, the teacher sees all.

Letters: B batch, N tokens, V visible tokens, R 1 with a class token, else 0; S blocks of the student, K aligned blocks
of the teacher, D width, C channels of the teacher.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from m3.backbone import BackboneSpec
from m3.errors import M3Error, within
from m3.linear import Linear
from m3.objectives.reconstruct import check_modality, reduce
from m3.plugins import Objective, Strict, Tokenizer, View
from m3.teachers import TeacherSpec
from m3.types import Encoded, Loss, MaskPlan, Part, Tokens, take

SPREAD = 0.01
"""What every block of the student contributes to every aligned one at the start, beside its own 1."""


class Align(Objective):
    """Smooth L1 between mixtures of the student's blocks and the last blocks of a teacher, at visible tokens."""

    class Spec(Strict):
        """Settings of `type: align`.

        Attributes:
            of: modality that both see.
            masking: what the student sees.
            teacher: the frozen network, see `TeacherSpec`.
            layers: K, the last blocks of the teacher that are aligned.
            weight: factor on the loss.
        """

        of: str
        masking: dict = Field(default={"type": "fixed", "visible": 0.3})
        teacher: TeacherSpec
        layers: PositiveInt = 5
        weight: PositiveFloat = 2.0

    def __init__(self, spec: Spec, tokenizers: dict[str, Tokenizer], backbone: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        check_modality("of", spec.of, tokenizers)
        self.tokenizer = {"of": tokenizers[spec.of]}  # in a plain dict, out of reach of `parameters`
        tower = tokenizers[spec.of].tower
        self.depth, self.prefix = tower.depth, min(1, tower.class_tokens)
        if spec.layers > tower.depth:
            raise M3Error(
                f"layers: {spec.layers} are to be aligned, but the student has {tower.depth} blocks; lower it."
            )
        if tower.final_norm:
            raise M3Error(
                "only states of blocks are aligned, so the last norm would learn nothing; set final_norm: false."
            )
        with within("teacher"):
            self.channels = spec.teacher.channels(tokenizers[spec.of])
        self.pinned = {"teacher": {"width": self.channels}}
        masking = json.dumps(spec.masking, sort_keys=True)
        self.view = View((spec.of,), masking, layers=tuple(range(tower.depth)))
        self.views, self.part_names = (self.view,), ("alignment",)
        # Flat, so that it starts at zero and gets no weight decay: what is learned is the difference from the start.
        self.mixture = nn.Parameter(torch.zeros(spec.layers * tower.depth))
        self.adaptors = nn.ModuleList([Linear(tower.width, self.channels) for _ in range(spec.layers)])

    def forward(self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]) -> Loss:
        """Return one part, `alignment`."""
        view, spec = encoded[self.view], self.spec
        guess, answer = self.aligned(view), self.targets(view.plan, tokens[spec.of])
        losses = F.smooth_l1_loss(guess.to(answer.dtype), answer, reduction="none")  # (K, B, R + V, C)
        total, count = reduce(losses.transpose(0, 1), self._weights(view.plan), "token")
        watched = {"predicted": guess[-1].detach().flatten(0, 1), "target": answer[-1].flatten(0, 1)}
        return Loss({"alignment": Part(total, count, spec.weight)}, watched)

    def counts(self, plans: dict[View, MaskPlan], tokens: dict[str, Tokens]) -> dict[str, Tensor]:
        """Return the number of aligned values."""
        index, weights = plans[self.view].packed_index(), self._weights(plans[self.view])
        shape = (len(index), self.spec.layers, self.prefix + index.shape[1], self.channels)
        return {"alignment": reduce(torch.zeros(shape, device=index.device), weights, "token")[1]}

    def aligned(self, encoded: Encoded) -> Tensor:
        """Return the student's side (K, B, R + V, C): of each aligned block a learned mixture of all its blocks."""
        first = encoded.prefix_count - self.prefix
        states = torch.stack([encoded.layers[number][:, first:] for number in range(self.depth)])
        start = torch.eye(self.depth, device=states.device)[-self.spec.layers :] + SPREAD
        mixture = self.mixture.view(self.spec.layers, self.depth) + start
        mixed = torch.einsum("ks,sbvd->kbvd", mixture.to(states.dtype), states)
        return torch.stack([adaptor(x) for adaptor, x in zip(self.adaptors, mixed, strict=True)])

    @torch.no_grad()
    def targets(self, plan: MaskPlan, tokens: Tokens) -> Tensor:
        """Return the teacher's side (K, B, R + V, C), layer-normed without weights, where the student has states."""
        tokenizer = self.tokenizer["of"]
        pixels = self.spec.teacher.pictures(tokenizer, tokens)
        layers = self.spec.teacher.open(tokenizer).layers(pixels, self.spec.layers)
        index = plan.packed_index() + 1
        if self.prefix:
            index = F.pad(index, (1, 0))
        return torch.stack([take(F.layer_norm(x, (self.channels,)), index) for x in layers])

    def _weights(self, plan: MaskPlan) -> Tensor | None:
        """Return (B, 1, R + V, 1) bool, True for states that count."""
        if plan.is_valid is None:
            return None
        there = plan.is_valid.any(1, keepdim=True).expand(-1, self.prefix)
        return torch.cat([there, plan.is_valid], dim=1)[:, None, :, None]
