"""Missing modalities: what a label's probe is worth for every subset of the inputs.

Letters: B batch, n samples, D width, M inputs.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from m3.errors import M3Error, Unlabelled
from m3.evaluate.bootstrap import of_hits
from m3.evaluate.encodings import FeatureSpec
from m3.evaluate.features import check_features
from m3.evaluate.task import Row, Task, check_classes
from m3.evaluate.tasks.probe import best_strength, classify
from m3.model import M3Model
from m3.types import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 8
"""Most inputs: 255 subsets, each of which is encoded."""

Subset = tuple[str, ...]


class Subsets(Task):
    """Accuracy of linear probes when only some of the inputs are there (robustness, Ma et al. 2022).

    Two probes for each subset: one that was fitted on features of all inputs, and now meets those of the subset alone;
    and one that was fitted on the subset's own. Rows are given for single inputs, for all but one, and for all; the
    picture and the notes hold every subset. Samples that lack the label or one of the inputs are left out.
    """

    class Spec(FeatureSpec):
        """Settings of `type: subsets`.

        Attributes:
            label: name of the label.
        """

        label: str

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        self.inputs = check_features(model, spec, f"evaluate.tasks.{name}")
        if not 1 < len(self.inputs) <= LARGEST:
            raise M3Error(
                f"evaluate.tasks.{name}.inputs: subsets are of 2 to {LARGEST} inputs, the model has "
                f"{', '.join(self.inputs)}; name some of them, or use `probe`."
            )
        self.subsets = [s for size in range(1, len(self.inputs) + 1) for s in combinations(self.inputs, size)]
        self._begin()

    @property
    def wants_training_samples(self) -> bool:
        """True: the features change from evaluation to evaluation."""
        return True

    def fit(self, batch: Batch) -> None:
        """Keep features and labels of training samples."""
        self._keep(batch, "train")

    def add(self, batch: Batch) -> None:
        """Keep features and labels of held-out samples."""
        self._keep(batch, "held_out")

    def rows(self) -> list[Row]:
        """Fit the probes and return the rows."""
        features, labels, keys = self._features, self._labels, self._keys
        self._begin()
        self.encodings.forget()
        if empty := next((split for split, parts in labels.items() if not parts), None):
            raise (M3Error if any(labels.values()) else Unlabelled)(
                f"evaluate.tasks.{self.name}: no sample ({empty}) has the label `{self.spec.label}` and all of "
                f"{', '.join(self.inputs)}; name other inputs."
            )
        known, truth = (torch.cat(labels[split]).numpy() for split in ("train", "held_out"))
        place = f"evaluate.tasks.{self.name}"
        self.remark = check_classes(place, self.spec.label, set(known.tolist()), set(truth.tolist()))
        x = {split: {s: torch.cat(parts).numpy() for s, parts in kept.items()} for split, kept in features.items()}
        majority = truth == np.bincount(known).argmax()
        full = x["train"][self.inputs]
        strength = best_strength(full, known, "logistic")
        everything = np.concatenate([x["held_out"][subset] for subset in self.subsets])
        guesses = classify(full, known, everything, "logistic", strength).reshape(len(self.subsets), -1)
        self.matrix: dict[Subset, tuple[float, float]] = {}
        rows = []
        for subset, guessed in zip(self.subsets, guesses, strict=True):
            own_strength = best_strength(x["train"][subset], known, "logistic")
            own = classify(x["train"][subset], known, x["held_out"][subset], "logistic", own_strength) == truth
            right = guessed == truth
            self.matrix[subset] = (float(right.mean()), float(own.mean()))
            if len(subset) in (1, len(self.inputs) - 1, len(self.inputs)):
                rows.append(self._row(subset, torch.cat(keys), (right, majority), float(own.mean())))
        rows[-1].notes["every subset: probe of all inputs, own probe"] = {
            " + ".join(subset): found for subset, found in self.matrix.items()
        }
        return rows

    def _row(self, subset: Subset, keys: Tensor, hits: tuple[np.ndarray, np.ndarray], own: float) -> Row:
        """Make a row of the hits (m,) of the probe of all inputs and of the most frequent class."""
        missing = [name for name in self.inputs if name not in subset]
        what = " + ".join(subset) if len(subset) == 1 else f"all but {missing[0]}" if missing else "all"
        scores = of_hits(keys, *(torch.from_numpy(x) for x in hits))
        notes = {"fitted on": "all inputs", "fitted on this subset": own}
        notes |= {"remark": self.remark} if self.remark else {}
        return Row.of(
            scores, f"{self.name}, {what}", f"accuracy of {self.spec.label}", "majority", True, self.seed, notes
        )

    def figures(self) -> dict[str, Figure]:
        """Return every subset with both accuracies, the best on top."""
        from matplotlib.figure import Figure

        order = sorted(self.matrix, key=lambda subset: self.matrix[subset][0])
        figure = Figure(figsize=(8, 0.9 + 0.17 * len(order)), layout="constrained", dpi=110)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[len(self.inputs), 12])
        places = np.arange(len(order))
        for column, name in enumerate(self.inputs):
            is_there = np.array([name in subset for subset in order])
            left.scatter(np.full(is_there.sum(), column), places[is_there], s=18, color="0.2")
            left.scatter(np.full((~is_there).sum(), column), places[~is_there], s=4, color="0.8")
        left.set_xticks(range(len(self.inputs)), self.inputs, rotation=90, fontsize=8)
        left.tick_params(labeltop=True)
        left.set_yticks([])
        for side in left.spines.values():
            side.set_visible(False)
        right.barh(places, [self.matrix[subset][0] for subset in order], color="C0", label="probe of all inputs")
        right.plot(
            [self.matrix[subset][1] for subset in order], places, "o", color="C1", ms=3, label="the subset's own"
        )
        right.set_xlabel(f"accuracy of {self.spec.label}", fontsize=8)
        for side in (left, right):
            side.set_ylim(-1, len(order))
        right.legend(fontsize=8, loc="lower right")
        right.grid(axis="x", alpha=0.3)
        return {f"{self.name}: every subset of the inputs": figure}

    def _begin(self) -> None:
        self._features: dict[str, dict[Subset, list[Tensor]]] = {"train": {}, "held_out": {}}
        self._labels: dict[str, list[Tensor]] = {"train": [], "held_out": []}
        self._keys: list[Tensor] = []

    @torch.no_grad()
    def _keep(self, batch: Batch, split: str) -> None:
        label = batch.labels.get(self.spec.label)
        if label is None or not all(name in batch.signals for name in self.inputs):
            return
        is_kept = label >= 0
        for name in self.inputs:
            is_kept = is_kept & batch.is_present.get(name, torch.ones_like(is_kept))
        is_kept = is_kept.cpu()
        if not is_kept.any():
            return
        self._labels[split].append(label.cpu()[is_kept])
        if split == "held_out":
            self._keys.append(batch.keys.cpu()[is_kept])
        for subset in self.subsets:
            features, _ = self.encodings.of(batch, subset, self.spec)
            self._features[split].setdefault(subset, []).append(features[is_kept])
