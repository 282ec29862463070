"""How a view is masked: which tokens are hidden, and what the encoder is shown in their place.

Dropped (MAE): the encoder gets the visible tokens alone. Replaced (SimMIM, BEiT, UNITER): it gets all tokens, hidden
ones as a learned mask token. Mixed (BERT): of the hidden ones 80 % as a mask token, 10 % as a random class, 10 % as
they are.

Letters: B batch, N tokens of a modality, S visible slots of a modality.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from m3 import masking
from m3.errors import M3Error, nearest
from m3.plugins import Tokenizer, View
from m3.random import Draws
from m3.types import HIDDEN, OWN, MaskPlan, Tokens, take

Hidden = Literal["drop", "replace", "mix"]
MASKED, RANDOM = 0.8, 0.9
"""Of hidden tokens, shares up to which a mask token and then a random class stand in (Devlin et al. 2018, 3.1)."""


class Masker:
    """The masking of one view: `masking: {type: ..., hidden: drop | replace | mix, branch: ...}`.

    Views that differ in `branch` alone have different masks of the same kind (data2vec 2.0's several per sample).
    """

    def __init__(self, view: View, classes: dict[str, int]) -> None:
        """Make the masking that a view asks for and check it against the view's modalities.

        Args:
            view: what is encoded together.
            classes: modality -> number of classes of its tokens; 0 for values.
        """
        settings = json.loads(view.masking)
        hidden = settings.pop("hidden", "drop")
        if hidden not in get_args(Hidden):
            raise M3Error(f"masking.hidden: `{hidden}` is not known.{nearest(str(hidden), get_args(Hidden))}")
        if hidden != "drop" and settings.get("decode"):
            raise M3Error(
                f"masking.decode: with `hidden: {hidden}` the targets say what is hidden, so all hidden tokens are "
                f"asked for; remove `decode` or use `hidden: drop`."
            )
        self.hidden: Hidden = hidden
        self.branch = str(settings.pop("branch", ""))
        self.classes = classes
        self.budget = settings.get("visible")
        self.select = masking.build(view._replace(masking=json.dumps(settings, sort_keys=True)))

    def bind(self, tokenizers: dict[str, Tokenizer]) -> None:
        """Tell a scorer that asks for it how the modalities of the view are cut."""
        scorer = getattr(self.select, "scorer", None)
        if hasattr(scorer, "bind"):
            scorer.bind(tokenizers)  # type: ignore[union-attr]  # `hasattr` says so

    def hides(self, name: str) -> bool:
        """Say whether a mask token stands in for hidden tokens of this modality; not where all of it is always seen."""
        share = self.budget.get(name) if isinstance(self.budget, dict) else self.budget
        return self.hidden != "drop" and not (isinstance(share, float) and share == 1.0)

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> MaskPlan:
        """Choose visible and target tokens, and what is shown of the hidden ones."""
        draws = replace(draws, branch=self.branch)
        return self._show(self.select(tokens, draws), tokens, draws)

    def explicit(
        self, tokens: dict[str, Tokens], visible: float | Mapping[str, float | Tensor], draws: Draws
    ) -> MaskPlan:
        """Make a plan from what the encoder shall see, for inference; `visible` as in `M3Model.reconstruct`."""
        plan = self.select.explicit(tokens, masking.masks(tokens, visible, draws))
        return self._show(plan, tokens, draws, is_mixed=False)

    def _show(self, plan: MaskPlan, tokens: dict[str, Tokens], draws: Draws, is_mixed: bool = True) -> MaskPlan:
        if self.hidden == "drop":
            return plan
        if plan.asked:
            raise M3Error(f"masking.hidden: `{self.hidden}` can't show runs of {', '.join(plan.asked)}; use `drop`.")
        if not is_mixed:  # what training never hides has no mask token: it is dropped
            tokens = {
                n: part if self.hides(n) else _without(part, _hidden(plan, n, part)) for n, part in tokens.items()
            }
        all_of_it = masking.everything(tokens)
        shown = {}
        for name, index in all_of_it.visible.items():
            is_hidden = _hidden(plan, name, tokens[name])
            stand_in = torch.full_like(is_hidden, HIDDEN, dtype=torch.long)
            if self.hidden == "mix" and is_mixed and self.classes[name]:
                stand_in = _mixed(draws, name, tokens[name].count, self.classes[name])
            shown[name] = torch.where(take(is_hidden, index), take(stand_in, index), OWN)
        return replace(all_of_it, target=plan.target, is_target=plan.is_target, shown=shown)


def _hidden(plan: MaskPlan, name: str, tokens: Tokens) -> Tensor:
    """Return (B, N) bool, True for the targets of a plan."""
    index = plan.target[name]
    is_target = plan.is_target.get(name, torch.ones_like(index, dtype=torch.bool))
    hidden = torch.zeros(tokens.values.shape[:2], dtype=torch.bool, device=index.device)
    return hidden.scatter(1, index, is_target)


def _without(tokens: Tokens, is_hidden: Tensor) -> Tokens:
    """Return tokens of which the hidden ones (B, N) don't exist."""
    return replace(tokens, is_valid=~is_hidden if tokens.is_valid is None else tokens.is_valid & ~is_hidden)


def _mixed(draws: Draws, name: str, count: int, classes: int) -> Tensor:
    """Return (B, N) int64 what stands in for each token if it is hidden."""
    lot = draws.uniform(f"mix/{name}", count)
    other = (draws.uniform(f"other/{name}", count) * classes).long()
    return torch.where(lot < MASKED, HIDDEN, torch.where(lot < RANDOM, other, OWN))
