"""Frozen features of samples with a label, and simpler things in their place: what probes and neighbours are made of.

Letters: B batch, n samples, N tokens of a modality, P values per token, F features, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from m3.backbone import BackboneSpec
from m3.errors import M3Error, Unlabelled, nearest
from m3.evaluate.bootstrap import of_hits
from m3.evaluate.encodings import FeatureSpec, only
from m3.evaluate.task import Row, Task, check_classes
from m3.model import M3Model
from m3.types import Batch

Baseline = Literal["random", "pca", "raw", "majority"]


class LabelSpec(FeatureSpec):
    """Settings of every task that reads a label off frozen features.

    Attributes:
        label: name of the label.
        baseline: what the same is done with, one or several: `random`: the same network with fresh weights; `raw`: the
            normalised values themselves; `pca`: their first D principal components, where they are more than D;
            `majority`: the most frequent class of the training samples.
    """

    label: str
    baseline: tuple[Baseline, ...] = Field(default=("pca",), min_length=1)

    @field_validator("baseline", mode="before")
    @classmethod
    def _several(cls, baseline: Any) -> Any:
        return (baseline,) if isinstance(baseline, str) else baseline


@dataclass
class Kept:
    """What is kept of the samples of one split.

    Attributes:
        features: `model`, `random` or `raw` -> (B, F) float32 of every batch, on the host.
        labels: (B,) int64 of every batch.
        keys: (B,) int64 `Batch.keys` of every batch.
        ids: names of the samples.
        pictures: uint8 (H, W, 3) of the first samples.
    """

    features: dict[str, list[Tensor]] = field(default_factory=dict)
    labels: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)

    def matrix(self, name: str, filling: float = 0.0) -> np.ndarray:
        """Return (n, F); features of shorter recordings are filled up."""
        parts = self.features[name]
        width = max(part.shape[1] for part in parts)
        return torch.cat([F.pad(part, (0, width - part.shape[1]), value=filling) for part in parts]).numpy()


class LabelTask(Task):
    """A label that is read off frozen features: of training samples it learns, of held-out ones it guesses.

    The encoder sees everything. Samples without the label, or without all of the inputs, are left out. A subclass
    defines `guess` and its `Spec`.
    """

    PICTURES = 0
    """Samples of each split whose pictures are kept."""

    def __init__(self, spec: Any, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        self.inputs = check_features(model, spec, f"evaluate.tasks.{name}")
        self._labels_seen: set[str] = set()
        self._begin()

    @abstractmethod
    def guess(
        self, features: dict[str, np.ndarray], labels: np.ndarray, truth: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Learn from training samples and return the classes of held-out ones (m,), and what is worth a note.

        Args:
            features: `train` (n, F) and `held_out` (m, F).
            labels: of the training samples, (n,) int64.
            truth: of the held-out samples, (m,) int64; for a protocol that reports the best of several.
        """

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
        """Learn from the model's features and from every baseline's, and return a row for each baseline."""
        kept = self.kept = self._kept
        self._begin()
        self.encodings.forget()
        for split, part in kept.items():
            if not part.labels:
                raise (M3Error if any(other.labels for other in kept.values()) else Unlabelled)(
                    f"evaluate.tasks.{self.name}.label: no sample ({split}) has the label `{self.spec.label}` together "
                    f"with {', '.join(self.inputs)}.{nearest(self.spec.label, self._labels_seen)}"
                )
        labels, truth = (torch.cat(kept[split].labels).numpy() for split in ("train", "held_out"))
        remark = check_classes(
            f"evaluate.tasks.{self.name}", self.spec.label, set(labels.tolist()), set(truth.tolist())
        )
        self.truth, self.features = truth, self._matrices("model")
        self.guesses, notes = self.guess(self.features, labels, truth)
        unlearned = sorted(set(truth.tolist()) - set(labels.tolist()))
        notes |= {"samples": len(truth), "training samples": len(labels), "classes without training samples": unlearned}
        notes |= {"remark": remark} if remark else {}
        keys, right, rows = torch.cat(kept["held_out"].keys), torch.from_numpy(self.guesses == truth), []
        for baseline in self.spec.baseline:
            guesses, theirs = self._baseline(baseline, labels, truth)
            scores = of_hits(keys, right, torch.from_numpy(guesses == truth))
            measure, about = f"accuracy of {self.spec.label}", notes | {"baseline": theirs}
            rows.append(Row.of(scores, self.name, measure, baseline, True, self.seed, about))
        return rows

    def _matrices(self, name: str) -> dict[str, np.ndarray]:
        """Return the features (n, F) of both splits; states that do not exist are NaN."""
        filling = float("nan") if self.spec.pool == "attentive" else 0.0
        return {split: part.matrix(name, filling) for split, part in self.kept.items()}

    def _baseline(self, name: Baseline, labels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """Return a baseline's guesses (m,)."""
        if name == "majority":
            return np.full(len(truth), np.bincount(labels).argmax()), {}
        features = self._matrices("random" if name == "random" else "raw")
        if name == "raw":
            features = same_width(features)
        elif name == "pca":
            features = reduced(features, self.features["train"].shape[1], self.seed)
        return self.guess(features, labels, truth)

    def _begin(self) -> None:
        self._kept = {"train": Kept(), "held_out": Kept()}

    @torch.no_grad()
    def _keep(self, batch: Batch, split: str) -> None:
        self._labels_seen |= batch.labels.keys()
        label = batch.labels.get(self.spec.label)
        if label is None or not any(name in batch.signals for name in self.inputs):
            return
        own, is_there = self.encodings.of(batch, self.inputs, self.spec)
        found = {"model": own}
        if "random" in self.spec.baseline:
            found["random"] = self.encodings.of(batch, self.inputs, self.spec, is_fresh=True)[0]
        if {"raw", "pca"} & set(self.spec.baseline):
            found["raw"] = raw_values(self.model, only(batch, self.inputs))
        is_kept = (is_there & (label >= 0)).cpu()
        if not is_kept.any():
            return
        kept = self._kept[split]
        for name, features in found.items():
            kept.features.setdefault(name, []).append(features[is_kept])
        kept.labels.append(label.cpu()[is_kept])
        kept.keys.append(batch.keys.cpu()[is_kept])
        numbers = is_kept.nonzero().flatten().tolist()
        kept.ids += [batch.ids[i] if batch.ids else str(len(kept.ids)) for i in numbers]
        kept.pictures += self._pictures(batch, numbers[: max(0, self.PICTURES - len(kept.pictures))])

    def _pictures(self, batch: Batch, numbers: list[int]) -> list[np.ndarray]:
        """Draw one input of samples of a batch, a picture rather than words."""
        there = {name: self.model.modalities[name] for name in self.inputs if name in batch.signals}
        name = max(there, key=lambda name: len(there[name].signal.size) >= 2)
        part = there[name]
        return [part.show(part.normalise(batch.signals[name][i : i + 1])[0], None) for i in numbers]


def check_features(model: M3Model, spec: FeatureSpec, where: str) -> tuple[str, ...]:
    """Return the modalities that are encoded.

    Raises:
        M3Error: the model has no such features.
    """
    if not model.views:
        raise M3Error(f"{where}: the model has no encoder, so it has no features; remove this task.")
    inputs = spec.inputs or next(iter(model.views)).modalities
    known = dict.fromkeys(name for view in model.views for name in view.modalities)
    if unknown := [name for name in inputs if name not in known]:
        raise M3Error(f"{where}.inputs: the model encodes no `{unknown[0]}`.{nearest(unknown[0], known)}")
    towers = dict.fromkeys(model.tower_of[name] for name in inputs)
    if len(towers) > 1:
        raise M3Error(f"{where}.inputs: different towers read {', '.join(inputs)}; name those of one tower.")
    tower = tower_of(model, tuple(inputs))
    if spec.pool == "class" and not tower.class_tokens:
        raise M3Error(f"{where}.pool: the encoder has no class token; use `mean`.")
    if spec.pool == "attentive" and getattr(spec, "classifier", None) != "sgd":
        raise M3Error(f"{where}.pool: `attentive` is learned; use it with `type: probe, classifier: sgd`.")
    if spec.layer is not None and spec.layer >= tower.depth:
        raise M3Error(
            f"{where}.layer: there is no block {spec.layer}; the last of {tower.depth} is number {tower.depth - 1}."
        )
    return tuple(inputs)


def tower_of(model: M3Model, inputs: tuple[str, ...]) -> BackboneSpec:
    """Return the settings of the transformer that reads the inputs, all of them."""
    name = model.tower_of[inputs[0]]
    tower: Any = model.towers[name] if name else model.backbone
    return tower.spec


def raw_values(model: M3Model, batch: Batch) -> Tensor:
    """Return (B, F) float32 on the host: what the tokens of all modalities of a batch hold, one after the other.

    Unknown values and tokens that don't exist count as 0, the mean of the data. Of class ids it is the share of each
    class. Where tokens lie elsewhere in each sample (groups of points), their positions are values as well.
    """
    flat = []
    for name, part in model.tokenise(batch).items():
        is_valid = torch.ones(part.values.shape[:2]) if part.is_valid is None else part.is_valid.float().cpu()
        values = part.values.cpu()
        if not values.is_floating_point():
            ids = values.clamp(min=-1).flatten(1) + 1
            weight = (is_valid.unsqueeze(-1) * (values >= 0)).flatten(1)
            counts = torch.zeros(len(ids), model.tokens_hold(name).classes + 1).scatter_add_(1, ids, weight)
            flat.append(counts[:, 1:] / weight.sum(1, keepdim=True).clamp(min=1))
            continue
        if len(part.positions) > 1:
            values = torch.cat([values, part.positions.cpu()], -1)
        flat.append((values.nan_to_num(0.0) * is_valid.unsqueeze(-1)).flatten(1))
    return torch.cat(flat, 1).float()


def same_width(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fill up the features (n, F) of the split whose recordings are shorter with 0."""
    wide = max(x.shape[1] for x in features.values())
    return {split: np.pad(x, ((0, 0), (0, wide - x.shape[1]))) for split, x in features.items()}


def reduced(features: dict[str, np.ndarray], width: int, seed: int) -> dict[str, np.ndarray]:
    """Project both splits on the principal components of the training samples where they have more than `width`."""
    from sklearn.decomposition import PCA

    features = same_width(features)
    if features["train"].shape[1] <= width:
        return features
    count = min(width, len(features["train"]))
    project = PCA(count, svd_solver="randomized", random_state=seed).fit(features["train"])
    return {split: project.transform(x) for split, x in features.items()}
