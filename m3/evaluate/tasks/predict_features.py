"""Predictions of hidden features (`latent` objectives) on held-out samples, beside the average feature of each place.

Letters: B batch, N tokens of a modality, T targets, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3.evaluate.bootstrap import Tally, ratio
from m3.evaluate.task import Row, Task, chosen
from m3.model import M3Model
from m3.network import Prepared
from m3.objectives.latent import Latent
from m3.plugins import Strict
from m3.types import Batch


class PredictFeatures(Task):
    """The objective's own loss on held-out samples, with its own masks.

    The baseline predicts at every place the mean of the teacher's features there over training samples: it knows where,
    and not what. The teacher is the one in training; of a loaded model it is the model itself.
    """

    class Spec(Strict):
        """Settings of `type: predict_features`.

        Attributes:
            objective: name of the `latent` objective; the first one if left out.
        """

        objective: str | None = None

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        found = {n: o for n, o in model.objectives.items() if isinstance(o, Latent)}
        self.objective = chosen(name, "`latent`", spec.objective, found)
        self._begin()

    @property
    def wants_training_samples(self) -> bool:
        """True: the features change from evaluation to evaluation."""
        return True

    @torch.no_grad()
    def fit(self, batch: Batch) -> None:
        """Add up the features of each place."""
        prepared = self._prepare(batch)
        encoded = self.model.encode_views(prepared, [self.objective.teacher_view])[self.objective.teacher_view]
        for name in self.objective.inputs:
            tokens = prepared.tokens[name]
            x = self.objective.features(encoded, name, tokens.count).double()
            there = torch.ones(x.shape[:2], device=x.device) if tokens.is_valid is None else tokens.is_valid
            sums, counts = (x * there.unsqueeze(-1)).sum(0), there.sum(0).unsqueeze(-1).double()
            before = self._places.get(name)
            self._places[name] = (sums, counts) if before is None else (before[0] + sums, before[1] + counts)

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Add up the losses of the model and of the baseline."""
        prepared, part = self._prepare(batch), self.objective
        means = {name: (sums / counts.clamp(min=1)).float() for name, (sums, counts) in self._places.items()}
        encoded = self.model.encode_views(prepared, part.views)
        sums = torch.zeros(2, len(batch), 2, device=self.model.device)  # who, sample, sum and count
        for name, index, guess, answer, is_target in part.predictions(encoded, prepared.tokens):
            for number, values in enumerate((guess, means[name][index])):
                for i in range(len(batch)):
                    one = slice(i, i + 1)
                    found = part.loss(values[one], answer[one], None if is_target is None else is_target[one])
                    sums[number, i] += torch.stack(found)
        self._tally.add(batch.keys, *sums)

    def rows(self) -> list[Row]:
        """Return one row."""
        scores = self._tally.scores(ratio)
        self._begin()
        if scores is None or not scores.own[:, 1].sum():
            return []
        kind = self.objective.spec.loss.replace("_", " ")
        return [Row.of(scores, self.name, f"{kind} of features", "average_map", False, self.seed)]

    def _prepare(self, batch: Batch) -> Prepared:
        return self.model.prepare(batch, self.seed)

    def _begin(self) -> None:
        self._places: dict[str, tuple[Tensor, Tensor]] = {}
        self._tally = Tally()
