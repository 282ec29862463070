"""A linear probe: how well a label can be read off frozen features, beside the same probe on something simpler.

Letters: B batch, n samples, N tokens of a modality, P values per token, F features, K classes, D width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt
from torch import Tensor

from m3.errors import M3Error, nearest
from m3.evaluate.task import Row, Task
from m3.model import M3Model
from m3.plugins import Strict
from m3.types import Batch

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Values of scikit-learn's C that are tried, the strongest regularisation first."""


class Probe(Task):
    """Accuracy on held-out samples of a linear classifier that was fitted on training samples.

    The encoder sees everything. Features are standardised; the regularisation is the best of `STRENGTHS` on the last
    fifth of the training samples, for the model's features and for the baseline's alike. Samples without the label
    are left out.
    """

    class Spec(Strict):
        """Settings of `type: probe`.

        Attributes:
            label: name of the label.
            inputs: modalities that are encoded together; null: those of the model's first view.
            pool: `mean` of the tokens' states, or `class`: the class token's.
            layer: number of the block whose states are read (0 = the first); null: the encoder's result.
            classifier: `logistic` regression, or linear `svm`, as is usual for point clouds.
            baseline: `raw`: the normalised values themselves, their first D principal components where they are more
                than D; `random`: the same network with fresh weights; `majority`: the most frequent class.
        """

        label: str
        inputs: tuple[str, ...] | None = None
        pool: Literal["mean", "class"] = "mean"
        layer: NonNegativeInt | None = None
        classifier: Literal["logistic", "svm"] = "logistic"
        baseline: Literal["raw", "random", "majority"] = "raw"

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        self.inputs = self._check_inputs()
        self.other = _fresh(model, seed) if spec.baseline == "random" else None
        self._labels_seen: set[str] = set()
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
        """Fit both classifiers and return one row."""
        kept = self._kept
        self._begin()
        for split, parts in kept.items():
            if not parts:
                raise M3Error(
                    f"evaluate.tasks.{self.name}.label: no sample ({split}) has the label `{self.spec.label}` together "
                    f"with {', '.join(self.inputs)}.{nearest(self.spec.label, self._labels_seen)}"
                )
        truth = {split: torch.cat([part[2] for part in parts]).numpy() for split, parts in kept.items()}
        own, other = ({split: _joined([part[i] for part in parts]) for split, parts in kept.items()} for i in (0, 1))
        score = accuracy(own, truth, self.spec.classifier)
        if self.spec.baseline == "majority":
            theirs = float((truth["held_out"] == np.bincount(truth["train"]).argmax()).mean())
        elif self.spec.baseline == "raw":
            theirs = accuracy(_reduced(other, own["train"].shape[1], self.seed), truth, self.spec.classifier)
        else:
            theirs = accuracy(other, truth, self.spec.classifier)
        measure = f"accuracy of {self.spec.label}"
        return [Row(self.name, measure, score, theirs, self.spec.baseline, higher_is_better=True)]

    def _begin(self) -> None:
        self._kept: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"train": [], "held_out": []}

    @torch.no_grad()
    def _keep(self, batch: Batch, split: str) -> None:
        self._labels_seen |= batch.labels.keys()
        label = batch.labels.get(self.spec.label)
        if label is None or not any(name in batch.signals for name in self.inputs):
            return
        there = {name: x for name, x in batch.signals.items() if name in self.inputs}
        batch = replace(batch, signals=there)
        own, is_there = self._features(self.model, batch)
        other = self._baseline(batch, own)
        is_kept = (is_there & (label >= 0)).cpu()
        if is_kept.any():
            self._kept[split].append((own[is_kept], other[is_kept], label.cpu()[is_kept]))

    def _features(self, model: M3Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (B, D) float32 on the host, and (B,) bool, True for samples that have any of the inputs."""
        layer = self.spec.layer
        encoded = model.encode(batch, () if layer is None else (layer,))
        if layer is not None:
            encoded = replace(encoded, sequence=encoded.layers[layer])
        is_valid = encoded.plan.is_valid
        is_there = torch.ones_like(batch.keys, dtype=torch.bool) if is_valid is None else is_valid.any(1)
        pooled = encoded.prefix[:, 0] if self.spec.pool == "class" else encoded.pooled
        return pooled.float().cpu(), is_there

    def _baseline(self, batch: Batch, own: Tensor) -> Tensor:
        """Return (B, F) what the baseline's classifier reads."""
        if self.spec.baseline == "majority":
            return own[:, :0]
        if self.other is not None:
            self.other.to(self.model.device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
            return self._features(self.other, batch)[0]
        return raw_values(self.model, batch)

    def _check_inputs(self) -> tuple[str, ...]:
        model, where = self.model, f"evaluate.tasks.{self.name}"
        if not model.views:
            raise M3Error(f"{where}: the model has no encoder, so it has no features; remove this task.")
        inputs = self.spec.inputs or next(iter(model.views)).modalities
        known = dict.fromkeys(name for view in model.views for name in view.modalities)
        if unknown := [name for name in inputs if name not in known]:
            raise M3Error(f"{where}.inputs: the model encodes no `{unknown[0]}`.{nearest(unknown[0], known)}")
        towers = dict.fromkeys(model.tower_of[name] for name in inputs)
        if len(towers) > 1:
            raise M3Error(f"{where}.inputs: different towers read {', '.join(inputs)}; name those of one tower.")
        tower: Any = model.towers[next(iter(towers))] if any(towers) else model.backbone
        if self.spec.pool == "class" and not tower.spec.class_tokens:
            raise M3Error(f"{where}.pool: the encoder has no class token; use `mean`.")
        if self.spec.layer is not None and self.spec.layer >= tower.spec.depth:
            raise M3Error(
                f"{where}.layer: there is no block {self.spec.layer}; the last of {tower.spec.depth} is number "
                f"{tower.spec.depth - 1}."
            )
        return tuple(inputs)


def _fresh(model: M3Model, seed: int) -> M3Model:
    """Build the model of the same config with weights of another seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        fresh = M3Model(copy.deepcopy(model.config))  # type: ignore[arg-type]  # PreTrainedModel's is wider
    return fresh.eval()


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


def _joined(parts: list[Tensor]) -> np.ndarray:
    """Put features (B, F) of batches together -> (n, F); those of shorter recordings are filled up with 0."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts]).numpy()


def _reduced(features: dict[str, np.ndarray], width: int, seed: int) -> dict[str, np.ndarray]:
    """Project both splits on the principal components of the training samples where they have more than `width`."""
    from sklearn.decomposition import PCA

    wide = max(x.shape[1] for x in features.values())
    features = {split: np.pad(x, ((0, 0), (0, wide - x.shape[1]))) for split, x in features.items()}
    if wide <= width:
        return features
    count = min(width, len(features["train"]))
    project = PCA(count, svd_solver="randomized", random_state=seed).fit(features["train"])
    return {split: project.transform(x) for split, x in features.items()}


def accuracy(features: dict[str, np.ndarray], labels: dict[str, np.ndarray], classifier: str) -> float:
    """Fit a linear classifier on training samples and return its share of right answers on held-out ones.

    Args:
        features: `train` (n, F) and `held_out` (m, F).
        labels: of the same samples, (n,) and (m,) int64.
        classifier: `logistic` or `svm`.
    """
    train, known = features["train"], labels["train"]
    cut = len(known) * 4 // 5

    def on_the_rest(strength: float) -> float:
        return float((_classify(train[:cut], known[:cut], train[cut:], classifier, strength) == known[cut:]).mean())

    best = max(STRENGTHS, key=on_the_rest) if cut else STRENGTHS[0]
    guesses = _classify(train, known, features["held_out"], classifier, best)
    return float((guesses == labels["held_out"]).mean())


def _classify(train: np.ndarray, labels: np.ndarray, others: np.ndarray, kind: str, strength: float) -> np.ndarray:
    """Return the class (m,) of `others` (m, F)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    if len(np.unique(labels)) == 1:
        return np.full(len(others), labels[0])
    linear = LogisticRegression(C=strength, max_iter=1000) if kind == "logistic" else LinearSVC(C=strength, dual="auto")
    return make_pipeline(StandardScaler(), linear).fit(train, labels).predict(others)
