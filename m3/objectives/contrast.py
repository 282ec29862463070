"""Contrastive learning: what belongs together is alike, what does not is not.

CLIP and FLIP (softmax), SigLIP (sigmoid), LiT (a frozen tower), and any set of modalities, two or more.

The loss joins all samples of a step. A process has the rows of all of them as plain numbers, and its own with
gradient; it adds up what its own rows contribute to the gradient of the whole loss, so that the sum over processes
and micro-batches is the gradient of one large batch, exactly, without any communication in the backward pass.

Letters: B samples of the batch, G samples of the step, V visible tokens, D width, E width of the shared space.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from transformers import initialization as init

from m3.backbone import BackboneSpec
from m3.errors import M3Error, within
from m3.linear import Linear
from m3.objectives.reconstruct import check_modality
from m3.plugins import Coupled, Embedder, Pool, Strict, Tokenizer, View
from m3.pooling import Kind, Pooling
from m3.processes import gather, rank
from m3.types import Encoded, Loss, MaskPlan, Part, Tokens

NEVER = -1e9
"""Logit of a candidate that is not there; finite, so that a step without any gives zero gradients."""

CHUNK = 4096
"""Rows of the similarity matrix of a step that are computed at once."""


class Side(Strict):
    """One thing that is contrasted with the others.

    Attributes:
        modalities: what it is made of; the modality of the side's name if left out.
        masking: what its encoder sees; FLIP drops half of the patches.
        pool: what becomes its vector, see `m3.pooling`.
        projection: of the vector to the shared space: `linear`, `affine` (with bias; SigLIP's text), or `none`, where
            the tower's width is E (LiT's and SigLIP's image).
    """

    modalities: tuple[str, ...] | None = None
    masking: dict = Field(default={"type": "fixed", "visible": 1.0})
    pool: Kind = "mean"
    projection: Literal["linear", "affine", "none"] = "linear"


class Contrast(Coupled, Embedder):
    """Mean over samples of the loss of telling a sample's other side from those of all other samples."""

    class Spec(Strict):
        """Settings of `type: contrast`.

        Attributes:
            sides: name -> what is contrasted, two or more; every pair of them has a part of its own.
            width: E.
            loss: `softmax` (InfoNCE in both directions; Radford et al. 2021) or `sigmoid` (Zhai et al. 2023).
            temperature: at the start; the similarities are divided by it. Published: 0.07 (softmax), 0.1 (sigmoid).
            lowest: temperature below which it is not learned.
            bias: of the sigmoid loss at the start.
            smoothing: share of the softmax's target that is spread evenly over all candidates (ALIGN, Jia et al. 2021:
                0.1).
        """

        sides: dict[str, Side] = Field(min_length=2)
        width: PositiveInt = 512
        loss: Literal["softmax", "sigmoid"] = "softmax"
        temperature: PositiveFloat = 0.07
        lowest: PositiveFloat = 0.01
        bias: float = -10.0
        smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)

        @model_validator(mode="after")
        def _only_softmax_is_smoothed(self) -> Contrast.Spec:
            if self.smoothing and self.loss != "softmax":
                raise ValueError("smoothing is for loss softmax; remove it or change the loss")
            return self

    def __init__(self, spec: Spec, tokenizers: dict[str, Tokenizer], backbone: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.side_views: dict[str, View] = {}
        self.pools = nn.ModuleDict()
        self.projections = nn.ModuleDict()
        for name, side in spec.sides.items():
            modalities = side.modalities or (name,)
            for modality in modalities:
                check_modality(f"sides.{name}", modality, tokenizers)
            tower = tokenizers[modalities[0]].tower
            with within(f"sides.{name}"):
                pool = self.pools[name] = Pooling(side.pool, tower)
                self.projections[name] = _projection(side, pool.width, spec.width)
            self.side_views[name] = View(modalities, json.dumps(side.masking, sort_keys=True))
        self.views = tuple(dict.fromkeys(self.side_views.values()))
        self.pairs = tuple(itertools.combinations(spec.sides, 2))
        self.part_names = tuple(f"{a}-{b}" for a, b in self.pairs)
        # Both as published: of a converted model they are the very numbers of its file.
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = nn.Parameter(torch.empty(())) if spec.loss == "sigmoid" else None

    def init_own_weights(self) -> None:
        """Start the temperature and the bias of the sigmoid loss at their settings."""
        init.constant_(self.logit_scale, -math.log(self.spec.temperature))
        if self.logit_bias is not None:
            init.constant_(self.logit_bias, self.spec.bias)

    @property
    def predicts(self) -> str:
        """What it learns to say."""
        return f"which {' and '.join(self.spec.sides)} belong together"

    @property
    def scale(self) -> Tensor:
        """() factor on the similarities, 1 / temperature."""
        return self.logit_scale.exp()

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the temperature at or above its lowest (CLIP: logits scaled by 100 at most), and at or below 1."""
        self.logit_scale.clamp_(0, -math.log(self.spec.lowest))

    def embed(self, side: str, encoded: Encoded) -> Tensor:
        """Return unit vectors (B, E) of one side, in float32 or better."""
        x = self.projections[side](self.pools[side](encoded))
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    def similarity(self, encoded: dict[View, Encoded], of: str) -> Tensor:
        """Return logits (B, B): row, a sample's other side; column, a sample's side that holds the modality `of`."""
        lent = next((side for side, view in self.side_views.items() if of in view.modalities), None)
        if lent is None:
            raise M3Error(f"`{of}` is in no side of the contrast, so its likeness to others is not known; add one.")
        a, b = next(pair for pair in self.pairs if lent in pair)
        other = b if a == lent else a
        rows, columns = (self.embed(side, encoded[self.side_views[side]]) for side in (other, lent))
        return self.scale * rows @ columns.T

    def rows(self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]) -> dict[str, Tensor]:
        """Return side -> unit vectors (B, E), and `side is there` -> (B,) bool."""
        found = {side: self.embed(side, encoded[view]) for side, view in self.side_views.items()}
        there = {f"{side} is there": _there(encoded[view].plan) for side, view in self.side_views.items()}
        return found | there

    def forward(  # type: ignore[override]  # as in Coupled
        self, encoded: dict[View, Encoded], tokens: dict[str, Tokens], pool: Pool | None = None
    ) -> Loss:
        """Return one part per pair of sides, named `image-text`."""
        own = self.rows(encoded, tokens)
        if pool is None:
            is_alone = not self.training  # a process may evaluate by itself
            count = len(next(iter(own.values())))
            pool = Pool(own, 0) if is_alone else Pool(gather(own), rank() * count)
        device = next(iter(own.values())).device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):  # `m3 show` has no device
            return Loss({f"{a}-{b}": self._part(a, b, own, pool) for a, b in self.pairs})

    def counts(self, plans: dict[View, MaskPlan], tokens: dict[str, Tokens]) -> dict[str, Tensor]:
        """Return the number of samples that have both sides of each pair."""
        there = {side: _there(plans[view]) for side, view in self.side_views.items()}
        return {f"{a}-{b}": (there[a] & there[b]).sum().float() for a, b in self.pairs}

    def _part(self, a: str, b: str, own: dict[str, Tensor], pool: Pool) -> Part:
        """Return this batch's share of the loss of one pair."""
        others = {side: pool.rows[side].detach() for side in (a, b)}
        is_there = pool.rows[f"{a} is there"] & pool.rows[f"{b} is there"]  # (G,)
        mine = slice(pool.start, pool.start + len(own[a]))
        if self.spec.loss == "sigmoid":
            total = self._sigmoid(own[a], own[b], others[a], others[b], is_there, mine)
        else:
            total = self._softmax(own[a], own[b], others[a], others[b], is_there, mine)
        return Part(total, is_there[mine].sum().float())

    def _softmax(self, a: Tensor, b: Tensor, all_a: Tensor, all_b: Tensor, is_there: Tensor, mine: slice) -> Tensor:
        """Cross-entropy of the own rows in both directions, with the gradient of the whole loss to them."""
        scale, fixed, weight = self.scale, self.scale.detach(), is_there[mine].float()
        value, rest = torch.zeros((), device=a.device), torch.zeros((), device=a.device)
        for x, y, all_x, all_y in ((a, b, all_a, all_b), (b, a, all_b, all_a)):
            logits = (scale * x @ all_y.T).masked_fill(~is_there, NEVER)
            target = y.detach()
            if self.spec.smoothing:  # x meets the mean of all: as a row all candidates, as a candidate all rows
                target = target.lerp(_mean(all_y, is_there), self.spec.smoothing)
            right = (x * target).sum(-1)
            value = value + ((logits.logsumexp(-1) - scale * right).where(weight > 0, 0) * weight).sum() / 2
            # What the own rows add to the cross-entropies of all rows of the other side, whose candidates they are.
            with torch.no_grad():
                normaliser = _logsumexp(fixed * all_y, all_x, is_there)
                share = (logits.detach() - normaliser).exp() * is_there * weight.unsqueeze(1)
            rest = rest + fixed * ((share @ all_y * x).sum() - (right * weight).sum()) / 2
        return value + rest - rest.detach()

    def _sigmoid(self, a: Tensor, b: Tensor, all_a: Tensor, all_b: Tensor, is_there: Tensor, mine: slice) -> Tensor:
        """Log-loss of every pair of samples, of the own rows with all; the gradient to the own columns comes on top."""
        assert self.logit_bias is not None
        is_right = F.one_hot(torch.arange(mine.start, mine.stop, device=a.device), len(all_a)).bool()
        counts = is_there[mine].unsqueeze(1) & is_there

        def losses(x: Tensor, candidates: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            logits = scale * x @ candidates.T + bias
            return (-F.logsigmoid(torch.where(is_right, logits, -logits)) * counts).sum()

        rest = losses(b, all_a, self.scale.detach(), self.logit_bias.detach())
        return losses(a, all_b, self.scale, self.logit_bias) + rest - rest.detach()


def _mean(x: Tensor, is_there: Tensor) -> Tensor:
    """Return (E,) mean of the vectors (G, E) that are there; 0 of none."""
    return x.masked_fill(~is_there.unsqueeze(1), 0).sum(0) / is_there.sum().clamp(min=1)


def _logsumexp(x: Tensor, candidates: Tensor, is_there: Tensor) -> Tensor:
    """Return (G,) log of the sum of exp(x @ candidates^T) over the candidates that are there, chunk by chunk."""
    parts = [(piece @ candidates.T).masked_fill(~is_there, NEVER).logsumexp(-1) for piece in x.split(CHUNK)]
    return torch.cat(parts)


def _there(plan: MaskPlan) -> Tensor:
    """Return (B,) bool, True for samples of which the encoder sees anything."""
    if plan.is_valid is not None:
        return plan.is_valid.any(1)
    index = next(iter(plan.visible.values()))
    return torch.ones(len(index), dtype=torch.bool, device=index.device)


def _projection(side: Side, width: int, shared: int) -> nn.Module:
    """Make what leads from a tower's width to that of the shared space."""
    if side.projection != "none":
        return Linear(width, shared, bias=side.projection == "affine")
    if width != shared:
        raise M3Error(
            f"projection: `none` needs a tower of width {shared}, the contrast's `width`, but it has {width}."
        )
    return nn.Identity()
