"""How well a classifier that was trained with the network names held-out samples, beside the most frequent class.

Letters: B batch, n samples, K classes.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from m3.errors import M3Error
from m3.evaluate.bootstrap import of_hits
from m3.evaluate.task import Row, Task, check_classes
from m3.model import M3Model
from m3.plugins import Strict
from m3.signals import Look
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
            clips: of a recording, spread evenly from the first possible one to the last; 1: the middle one.
            crops: of a picture or video, spread evenly along its longer side; 1: the middle one.
            votes: random copies of each of them, changed by `data.augment` as in training; null: it stays as it is.

        The probabilities of all clips, crops and copies of a sample are averaged.
        """

        objective: str | None = None
        clips: PositiveInt = 1
        crops: PositiveInt = 1
        votes: PositiveInt | None = None

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        try:
            self.part = model.classifier(spec.objective)
        except M3Error as error:
            raise M3Error(f"evaluate.tasks.{name}: {error}") from error
        copies = [None] if spec.votes is None else range(spec.votes)
        self.looks = tuple(Look(*look) for look in product(spread(spec.clips), spread(spec.crops), copies))
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
        """Keep probabilities and labels of held-out samples."""
        truth, is_there = self._truth(batch)
        if not any(name in batch.signals for name in self.part.inputs):
            return
        logits = self.model.classify(batch, self.spec.objective).float()
        counts = is_there & ~logits.isnan().any(1)
        logits = logits[counts].double()  # in float32 unlikely classes would all be 0
        self._guesses.append((logits.sigmoid() if self.part.several else logits.softmax(1)).cpu())
        self._truths.append(truth[counts].cpu())
        self._keys.append(batch.keys[counts].cpu())

    def rows(self) -> list[Row]:
        """Return one row, or two."""
        where = f"evaluate.tasks.{self.name}"
        if self._seen:
            self._frequency = torch.stack(self._seen).sum(0)
        guesses, truth, keys = (
            torch.cat(x) if x else torch.empty(0) for x in (self._guesses, self._truths, self._keys)
        )
        frequency = self._frequency
        self._guesses, self._truths, self._keys, self._seen = [], [], [], []
        if not len(truth):
            raise M3Error(
                f"{where}: no held-out sample has a `{self.part.spec.label}` together with "
                f"{', '.join(self.part.inputs)}; label some, or remove this task."
            )
        guesses, truth = mean_of_looks(keys, guesses, truth)
        if self.part.several:
            return [self._several(keys.unique(), guesses, truth, frequency)]
        return self._accuracies(keys.unique(), guesses, truth.argmax(1), frequency)

    def _accuracies(self, keys: Tensor, guesses: Tensor, truth: Tensor, frequency: Tensor) -> list[Row]:
        learned = set(frequency.nonzero()[:, 0].tolist())
        remark = check_classes(
            f"evaluate.tasks.{self.name}", self.part.spec.label, learned, set(truth.unique().tolist())
        )
        notes = {"remark": remark} if remark else {}
        ranked, usual = guesses.argsort(1, descending=True), frequency.argsort(descending=True)
        rows = []
        for count in (1, TOP) if guesses.shape[1] > TOP else (1,):
            own, theirs = (ranked[:, :count] == truth.unsqueeze(1)).any(1), torch.isin(truth, usual[:count])
            name, measure = (self.name, "accuracy") if count == 1 else (f"{self.name} (top {count})", f"top-{count}")
            rows.append(Row.of(of_hits(keys, own, theirs), name, measure, "majority", True, self.seed, notes))
        return rows

    def _several(self, keys: Tensor, guesses: Tensor, truth: Tensor, frequency: Tensor) -> Row:
        """Return the row where samples, with these keys (n,), may have several classes: probabilities, truth (n, K)."""
        from sklearn.metrics import average_precision_score

        where = f"evaluate.tasks.{self.name}"
        known = (truth > 0.5).numpy()
        differs = known.any(0) & ~known.all(0)
        if not differs.any():
            raise M3Error(f"{where}: every class is in all held-out samples or in none; hold out more (data.held_out).")
        own = average_precision_score(known[:, differs], guesses.numpy()[:, differs], average="macro")
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
        self._guesses: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._truths: list[Tensor] = []


def spread(count: int) -> list[float]:
    """Return numbers from 0 to 1, evenly spread; the middle where there is one."""
    return [0.5] if count == 1 else [number / (count - 1) for number in range(count)]


def mean_of_looks(keys: Tensor, guesses: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Average the probabilities of each sample.

    Args:
        keys: (m,) int64, the same for all looks at a sample.
        guesses: (m, K).
        truth: (m, K).

    Returns:
        Probabilities and truth (n, K), samples in the order of their keys.
    """
    found, number, counts = keys.unique(return_inverse=True, return_counts=True)
    total = guesses.new_zeros(len(found), guesses.shape[1]).index_add_(0, number, guesses)
    same = truth.new_empty(len(found), truth.shape[1]).index_copy_(0, number, truth)
    return total / counts.unsqueeze(1), same
