"""The same share or number of visible tokens in every sample (MAE)."""

from __future__ import annotations

from pydantic import Field

from m3.masking import Amount, Selection, amount, assemble, build_scorer, check_names, rank, valid_quota
from m3.plugins import Strict
from m3.random import Draws
from m3.types import MaskPlan, Tokens


class Fixed(Selection):
    """The same number of visible tokens in every sample: a share or a number for each modality.

    With `visible: 0.25` and 196 patches this is MAE's mask: 49 seen, 147 to be predicted (int(L * (1 - r))).
    """

    class Spec(Strict):
        """Settings of `type: fixed`.

        Attributes:
            visible: share in (0, 1] (rounded down) or number of tokens that the encoder sees, for all
                modalities or for each by name.
            whole: tokens that only make sense together (the pieces of a word) are seen or hidden together; a
                sample sees fewer tokens than the budget where the next group does not fit.
            scorer: what ranks the tokens.
        """

        visible: Amount | dict[str, Amount] = 0.25
        whole: bool = False
        scorer: dict = Field(default={"type": "uniform"})

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.scorer = build_scorer(spec.scorer)

    def check(self, names: tuple[str, ...]) -> None:
        """Raise M3Error when a budget names a modality that is not there or leaves one out."""
        if isinstance(self.spec.visible, dict):
            check_names("masking.visible", set(self.spec.visible), names)

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> MaskPlan:
        """Select. Shares are of the valid tokens where a sample has fewer than N."""
        scores = self.scorer(tokens, draws)
        is_visible, slots = {}, {}
        for name, part in tokens.items():
            visible = self.spec.visible[name] if isinstance(self.spec.visible, dict) else self.spec.visible
            slots[name] = amount(visible, part.count)
            quota = valid_quota(visible, part)
            group = part.group if self.spec.whole else None
            is_visible[name] = rank(scores[name], part.is_valid, group) < quota
        is_ragged = self.spec.whole and any(part.group is not None for part in tokens.values())
        return assemble(tokens, is_visible, slots, sum(slots.values()), is_ragged)
