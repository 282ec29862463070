"""How often the model tells pairs that belong together from pairs that do not.

Letters: B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3.evaluate.bootstrap import Tally, ratio
from m3.evaluate.task import Row, Task
from m3.model import M3Model
from m3.partners import swapped
from m3.plugins import Strict
from m3.types import Batch, Partners, Tokens


class MatchAccuracy(Task):
    """Share of right answers on held-out pairs, each shown once as it is and once with its neighbour's modality.

    Half of the pairs are false, so chance is 1/2. A false pair counts as false also where it happens to be true,
    e.g. where two scenes have the same caption.
    """

    class Spec(Strict):
        """Settings of `type: match_accuracy`.

        Attributes:
            objective: name of the objective of type `match`; null: the first one.
        """

        objective: str | None = None

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        self.part = model.matcher(spec.objective)
        self._tally = Tally()

    def add(self, batch: Batch) -> None:
        """Ask for the pairs of a batch, and for each with what the sample before it has."""
        if len(batch) < 2:  # nothing to mismatch with
            return
        tokens = self.model.tokenise(batch)
        other = borrowed(tokens, self.part.spec.swap.of, torch.arange(len(batch), device=self.model.device).roll(1))
        right = asked = torch.zeros(len(batch), device=self.model.device)
        for pairs, is_match in ((tokens, True), (other, False)):
            found = self.model.match_tokens(pairs, self.part)
            is_there = ~found.isnan()
            right, asked = right + (((found > 0.5) == is_match) & is_there), asked + is_there
        counts = asked > 0
        own, chance = (torch.stack([hits, asked], 1)[counts] for hits in (right, asked / 2))
        self._tally.add(batch.keys[counts], own, chance)

    def rows(self) -> list[Row]:
        """Return one row; none if there was no pair."""
        scores = self._tally.scores(ratio)
        return [Row.of(scores, self.name, "accuracy", "chance", True, self.seed)] if scores else []


def borrowed(tokens: dict[str, Tokens], of: str, index: Tensor) -> dict[str, Tokens]:
    """Return tokens in which each sample has the modality `of` of the sample that index (B,) names."""
    always = torch.ones_like(index, dtype=torch.bool)
    return swapped(tokens, Partners(of, index, always, always))
