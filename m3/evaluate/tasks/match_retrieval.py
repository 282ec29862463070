"""Retrieval by the score of a matching objective: every candidate is encoded together with the query.

Letters: B batch, C candidates.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

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
        self._clear()

    def _clear(self) -> None:
        self._right, self._chance, self._queries = torch.zeros(2, dtype=torch.float64), 0.0, 0

    def add(self, batch: Batch) -> None:
        """Score all pairs within the groups of a batch."""
        tokens = {name: part for name, part in self.model.tokenise(batch).items() if name in self.part.spec.modalities}
        for first in range(0, len(batch), self.spec.candidates):
            group = {name: _rows(part, first, first + self.spec.candidates) for name, part in tokens.items()}
            scores = self.scores(group)
            is_there = ~scores.diagonal().isnan()
            scores = scores[is_there][:, is_there]
            self._right += torch.stack([_recall(scores), _recall(scores.T)]).cpu()
            self._chance += float(len(scores) > 0)
            self._queries += len(scores)

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
        right, chance, queries = self._right.tolist(), self._chance, self._queries
        self._clear()
        if not queries:
            return []
        of = self.part.spec.swap.of
        other = next(name for name in self.part.spec.modalities if name != of)
        names = (f"{self.name}, {of} of {other}", f"{self.name}, {other} of {of}")
        return [
            Row(name, "recall@1", hits / queries, chance / queries, "chance", True)
            for name, hits in zip(names, right, strict=True)
        ]


def _rows(part: Tokens, start: int, stop: int) -> Tokens:
    """Return the tokens of samples start ... stop - 1."""
    positions = part.positions if len(part.positions) == 1 else part.positions[start:stop]
    return Tokens(part.values[start:stop], positions, None if part.is_valid is None else part.is_valid[start:stop])


def _recall(scores: Tensor) -> Tensor:
    """Return () the number of rows of (C, C) whose highest score is the diagonal's; equal ones share it."""
    if not len(scores):
        return torch.zeros((), dtype=torch.float64)
    is_best = scores == scores.amax(1, keepdim=True)
    return (is_best.diagonal() / is_best.sum(1)).sum().double()
