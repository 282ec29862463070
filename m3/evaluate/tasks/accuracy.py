"""How well a classifier that was trained with the network names held-out samples, beside the most frequent class.

Letters: B batch, n samples, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from m3.errors import M3Error
from m3.evaluate.task import Row, Task
from m3.model import M3Model
from m3.plugins import Strict
from m3.types import Batch

TOP = 5
"""Classes that are named for the second row."""


class Accuracy(Task):
    """Share of held-out samples whose class is the most likely one, and with more than 5 classes one of the first 5.

    Where a sample may have several classes: the mean over classes of the average precision (scikit-learn's). Classes
    that no held-out sample has, or that all have, are left out. Samples without label or without any input don't count.
    """

    class Spec(Strict):
        """Settings of `type: accuracy`.

        Attributes:
            objective: name of the objective of type `classify`; the first one if left out.
        """

        objective: str | None = None

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        try:
            self.part = model.classifier(spec.objective)
        except M3Error as error:
            raise M3Error(f"evaluate.tasks.{name}: {error}") from error
        self._begin()

    @property
    def wants_training_samples(self) -> bool:
        """True until it is known how often each class is there."""
        return not len(self._frequency)

    def fit(self, batch: Batch) -> None:
        """Keep the labels of training samples."""
        truth, is_there = self._truth(batch)
        self._seen.append(truth[is_there].sum(0).cpu())

    def add(self, batch: Batch) -> None:
        """Keep logits and labels of held-out samples."""
        truth, is_there = self._truth(batch)
        if not any(name in batch.signals for name in self.part.inputs):
            return
        logits = self.model.classify(batch, self.spec.objective).float()
        counts = is_there & ~logits.isnan().any(1)
        self._logits.append(logits[counts].cpu())
        self._truths.append(truth[counts].cpu())

    def rows(self) -> list[Row]:
        """Return one row, or two."""
        where = f"evaluate.tasks.{self.name}"
        if self._seen:
            self._frequency = torch.stack(self._seen).sum(0)
        logits, truth = (torch.cat(x) if x else torch.empty(0) for x in (self._logits, self._truths))
        frequency = self._frequency
        self._logits, self._truths, self._seen = [], [], []
        if not len(truth):
            raise M3Error(
                f"{where}: no held-out sample has a `{self.part.spec.label}` together with "
                f"{', '.join(self.part.inputs)}; label some, or remove this task."
            )
        if self.part.several:
            return [self._precision(logits, truth, where)]
        return self._accuracies(logits, truth.argmax(1), frequency, where)

    def _accuracies(self, logits: Tensor, truth: Tensor, frequency: Tensor, where: str) -> list[Row]:
        seen = torch.cat([frequency.nonzero()[:, 0], truth]).unique()
        if len(seen) == 1:
            raise M3Error(
                f"{where}: all samples have class {int(seen[0])}, so there is nothing to tell apart; check the labels "
                f"(data.samples, evaluate.fit_samples) or remove this task."
            )
        ranked, usual = logits.argsort(1, descending=True), frequency.argsort(descending=True)
        rows = []
        for count in (1, TOP) if logits.shape[1] > TOP else (1,):
            own = float((ranked[:, :count] == truth.unsqueeze(1)).any(1).float().mean())
            theirs = float(torch.isin(truth, usual[:count]).float().mean())
            name, measure = (self.name, "accuracy") if count == 1 else (f"{self.name} (top {count})", f"top-{count}")
            rows.append(Row(name, measure, own, theirs, "majority", higher_is_better=True))
        return rows

    def _precision(self, logits: Tensor, truth: Tensor, where: str) -> Row:
        from sklearn.metrics import average_precision_score

        known = (truth > 0.5).numpy()
        differs = known.any(0) & ~known.all(0)
        if not differs.any():
            raise M3Error(f"{where}: every class is in all held-out samples or in none; hold out more (data.held_out).")
        own = average_precision_score(known[:, differs], logits.sigmoid().numpy()[:, differs], average="macro")
        # A constant ranks nothing: its precision is the share of samples that have the class.
        theirs = known[:, differs].mean(0).mean()
        return Row(self.name, "mAP", float(own), float(np.float64(theirs)), "constant", higher_is_better=True)

    def _truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return shares of classes (B, K), and (B,) bool, True for samples that have a label."""
        label = self.part.spec.label
        is_there = torch.zeros_like(batch.keys, dtype=torch.bool)
        if label not in batch.signals:
            return torch.zeros(
                len(batch), self.model.modalities[label].signal.channels, device=batch.keys.device
            ), is_there
        return batch.signals[label], batch.is_present.get(label, ~is_there)

    def _begin(self) -> None:
        self._frequency: Tensor = torch.empty(0)
        self._seen: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._truths: list[Tensor] = []
