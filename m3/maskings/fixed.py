"""The same share or number of visible tokens in every sample (MAE)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from m3.masking import Amount, Selection, amount, assemble, build_scorer, check_names, rank, thinned, valid_quota
from m3.plugins import Strict
from m3.random import Draws, stream_number
from m3.types import MaskPlan, Tokens


class Decode(Strict):
    """The part of the tokens that a decoder predicts, of those that the encoder sees too.

    Attributes:
        share: of all tokens, rounded down.
        scorer: what ranks the tokens; those with low scores are decoded.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    scorer: dict = Field(default={"type": "running_cell"})


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
            decode: ask for a part of the tokens only (VideoMAE V2's dual masking); no loss asks for those among them
                that the encoder sees. null: ask for all hidden tokens.
        """

        visible: Amount | dict[str, Amount] = 0.25
        whole: bool = False
        scorer: dict = Field(default={"type": "uniform"})
        decode: Decode | None = None

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.scorer = build_scorer(spec.scorer)
        self.decoded = build_scorer(spec.decode.scorer) if spec.decode else None

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
        plan = assemble(tokens, is_visible, slots, sum(slots.values()), is_ragged)
        if self.spec.decode is None or self.decoded is None:
            return plan
        # Noise of its own: under the same, a decoder would be asked for what the encoder sees.
        scores = self.decoded(tokens, Draws(draws.keys, stream_number(f"decode/{draws.seed}")))
        return thinned(plan, tokens, is_visible, scores, self.spec.decode.share)
