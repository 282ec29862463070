"""Retrieval by the score of a matching objective: every candidate is encoded together with the query.

Letters: B batch, C candidates.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from m3.evaluate.bootstrap import Tally, ratio
from m3.evaluate.task import Row, Task
from m3.evaluate.tasks.match_accuracy import borrowed
from m3.model import M3Model
from m3.plugins import Strict
from m3.types import Batch, Tokens


class MatchRetrieval(Task):
    """Recall@1: how often a sample's own other modality gets the highest score among those of a few samples.

    Samples are taken in groups as they come; a smaller last group has fewer candidates, and its chance is higher.
    Equal scores share the answer, so a model that always says the same reaches chance.
    """

    class Spec(Strict):
        """Settings of `type: match_retrieval`.

        Attributes:
            candidates: C, samples of a group.
            objective: name of the objective of type `match`; null: the first one.
        """

        candidates: int = Field(default=16, ge=2)
        objective: str | None = None

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        self.part = model.matcher(spec.objective)
        self._ways = Tally(), Tally()

    def add(self, batch: Batch) -> None:
        """Score all pairs within the groups of a batch."""
        tokens = {name: part for name, part in self.model.tokenise(batch).items() if name in self.part.spec.modalities}
        for first in range(0, len(batch), self.spec.candidates):
            group = {name: _rows(part, first, first + self.spec.candidates) for name, part in tokens.items()}
            scores = self.scores(group)
            is_there = ~scores.diagonal().isnan()
            scores = scores[is_there][:, is_there]
            keys, asked = batch.keys[first : first + self.spec.candidates][is_there], scores.new_ones(len(scores))
            chance = torch.stack([asked / max(1, len(scores)), asked], 1)
            for tally, direction in zip(self._ways, (scores, scores.T), strict=True):
                tally.add(keys, torch.stack([_recall(direction), asked], 1), chance)

    def scores(self, tokens: dict[str, Tokens]) -> Tensor:
        """Return (C, C) the model's score of each sample (row) with the swapped modality of each (column)."""
        of = self.part.spec.swap.of
        count = len(tokens[of].values)
        columns = [
            self.model.match_tokens(borrowed(tokens, of, torch.full((count,), i, device=self.model.device)), self.part)
            for i in range(count)
        ]
        return torch.stack(columns, dim=1)

    def rows(self) -> list[Row]:
        """Return one row for each direction; none if there was no pair."""
        of = self.part.spec.swap.of
        other = next(name for name in self.part.spec.modalities if name != of)
        names = (f"{self.name}, {of} of {other}", f"{self.name}, {other} of {of}")
        found = [(name, tally.scores(ratio)) for name, tally in zip(names, self._ways, strict=True)]
        return [Row.of(scores, name, "recall@1", "chance", True, self.seed) for name, scores in found if scores]


def _rows(part: Tokens, start: int, stop: int) -> Tokens:
    """Return the tokens of samples start ... stop - 1."""
    positions = part.positions if len(part.positions) == 1 else part.positions[start:stop]
    return Tokens(part.values[start:stop], positions, None if part.is_valid is None else part.is_valid[start:stop])


def _recall(scores: Tensor) -> Tensor:
    """Return for each row of (C, C) whether its highest score is the diagonal's, (C,); equal ones share it."""
    if not len(scores):
        return scores.new_zeros(0)
    is_best = scores == scores.amax(1, keepdim=True)
    return is_best.diagonal() / is_best.sum(1)
