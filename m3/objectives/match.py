"""Image-text matching: does what a sample joins belong together? With word-region alignment as a second part.

UNITER (Chen et al. 2020, section 3.2), and any two modalities. Half of the samples borrow one modality from another
sample of their group; the class token tells which (cross-entropy of two classes). Alignment pulls the tokens of true
pairs together and pushes those of false ones apart, by the cost of the best transport of one set to the other.

Letters: B batch, V visible tokens, N tokens of a modality, D width.
"""

from __future__ import annotations

import json
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from m3.backbone import BackboneSpec
from m3.errors import M3Error
from m3.heads import restore_index
from m3.linear import Linear
from m3.objectives.reconstruct import check_modality
from m3.partners import Swap
from m3.plugins import Objective, Strict, Tokenizer, View
from m3.transport import transport_cost
from m3.types import Encoded, Loss, MaskPlan, Part, Tokens, take


class Match(Objective):
    """Mean over pairs of the cross-entropy of matched or not, plus weighted alignment."""

    class Spec(Strict):
        """Settings of `type: match`.

        Attributes:
            modalities: the two that are joined.
            swap: which one is borrowed and from whom, see `m3.partners.Swap`; `by` names an objective of type
                `contrast` for negatives that are hard to tell.
            pool: what tells: the class token, or the `first` token (BERT's [CLS], of a text that comes first).
            alignment: weight of the transport cost between the tokens of the two (UNITER: 0.1); 0: no such part.
        """

        modalities: tuple[str, str]
        swap: Swap
        pool: Literal["class", "first"] = "class"
        alignment: NonNegativeFloat = 0.0

    def __init__(self, spec: Spec, tokenizers: dict[str, Tokenizer], backbone: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        for name in spec.modalities:
            check_modality("modalities", name, tokenizers)
        tower = tokenizers[spec.modalities[0]].tower
        if spec.pool == "class" and not tower.class_tokens:
            raise M3Error("`match` reads the class token; set class_tokens: 1 in the backbone.")
        masking = json.dumps({"type": "fixed", "visible": 1.0}, sort_keys=True)
        self.view = View(spec.modalities, masking, json.dumps(spec.swap.model_dump(), sort_keys=True))
        self.views = (self.view,)
        self.part_names = ("match", "alignment") if spec.alignment else ("match",)
        self.pooler = Linear(tower.width, tower.width)
        self.output = Linear(tower.width, 2)

    def forward(self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]) -> Loss:
        """Return the part `match` and, if it has a weight, `alignment`."""
        view = encoded[self.view]
        partners = view.plan.partners
        assert partners is not None, "the view of `match` swaps"
        count = partners.is_pair.sum().float()
        losses = F.cross_entropy(self.scores(view).float(), (~partners.is_swapped).long(), reduction="none")
        parts = {"match": Part((losses * partners.is_pair).sum(), count)}
        if self.spec.alignment:
            sign = torch.where(partners.is_swapped, -1.0, 1.0) * partners.is_pair
            parts["alignment"] = Part((self._distances(view, tokens) * sign).sum(), count, self.spec.alignment)
        return Loss(parts)

    def counts(self, plans: dict[View, MaskPlan], tokens: dict[str, Tokens]) -> dict[str, Tensor]:
        """Return the number of samples that have both modalities and, if they borrow, found a lender."""
        partners = plans[self.view].partners
        assert partners is not None, "the view of `match` swaps"
        return dict.fromkeys(self.part_names, partners.is_pair.sum().float())

    def scores(self, encoded: Encoded) -> Tensor:
        """Return logits (B, 2): don't belong together, do."""
        state = encoded.prefix[:, 0] if self.spec.pool == "class" else encoded.states[:, 0]
        return self.output(self.pooler(state).tanh())

    def probability(self, encoded: Encoded) -> Tensor:
        """Return (B,) the probability in [0, 1] that what was encoded belongs together."""
        return self.scores(encoded).float().softmax(-1)[:, 1]

    def _distances(self, encoded: Encoded, tokens: dict[str, Tokens]) -> Tensor:
        """Return (B,) the transport cost between the states of the two modalities."""
        sides = []
        for name in self.spec.modalities:
            place = restore_index(encoded.plan, name, tokens[name].count)
            is_there = place < encoded.states.shape[1]
            sides.append((take(encoded.states, place.clamp(max=encoded.states.shape[1] - 1)), is_there))
        (x, is_x), (y, is_y) = sides
        return transport_cost(x, y, is_x, is_y)
