"""How far a predicted depth map is from the true one, in metres.

Letters: B batch, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from m3.errors import M3Error, nearest, within
from m3.evaluate.task import Row, Task
from m3.evaluate.tasks.predict import objective_of, predictors, targets_of
from m3.masking import Amount
from m3.model import M3Model
from m3.plugins import Strict
from m3.types import Batch

CLOSE = 1.25
"""delta1 is the share of places where the larger of prediction and truth is less than this many times the smaller."""

NEAREST = 1e-6
"""Metres; a prediction of less counts as this."""


class DepthInMetres(Task):
    """delta1, root mean square error and mean absolute error of all known places (Eigen et al. 2014, section 4.1).

    The baseline is the median of the training samples' depths.
    """

    class Spec(Strict):
        """Settings of `type: depth_in_metres`.

        Attributes:
            target: name of a target of an objective; of a modality of type `depth` with `normalise: fixed`, since depth
                without a scale is not in metres.
            visible: what the encoder sees, as in `M3Model.reconstruct`; null: the recipe's masking.
        """

        target: str = "depth"
        visible: dict[str, Amount] | None = None

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        known, where = targets_of(model), f"evaluate.tasks.{name}"
        if spec.target not in known:
            raise M3Error(f"{where}.target: the model predicts no `{spec.target}`.{nearest(spec.target, known)}")
        self.modality = known[spec.target]
        self.metres: Callable[[Tensor], Tensor] | None = getattr(model.modalities[self.modality], "metres", None)
        if self.metres is None:
            raise M3Error(f"{where}.target: `{spec.target}` is no depth; use `type: predict`.")
        with within(f"{where}.target"):
            self.metres(torch.zeros(1, 1, 1, 1))
        inputs = [
            one for p in predictors(model) if p.view and spec.target in p.modality_of for one in p.view.modalities
        ]
        if self.modality in (inputs if spec.visible is None else spec.visible):
            raise M3Error(f"{where}.visible: the encoder sees `{self.modality}` itself; name other modalities.")
        self.median: float | None = None
        self._seen: list[Tensor] = []
        self._sums = torch.zeros(2, 4, dtype=torch.float64)

    @property
    def wants_training_samples(self) -> bool:
        """True until the median is known."""
        return self.median is None

    def fit(self, batch: Batch) -> None:
        """Keep the known depths of training samples."""
        self._seen.append(self._truth(batch)[1].cpu())

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Add up the errors of the model and of the baseline."""
        if self.median is None:
            self.median = float(torch.cat(self._seen).median())
            self._seen = []
        assert self.metres is not None, "checked at the start"
        is_known, truth = self._truth(batch)
        objective = objective_of(self.model, self.spec.target)
        result = self.model.reconstruct(batch, self.spec.visible, self.seed, objective).predicted[self.spec.target]
        guesses = self.metres(result)[is_known], torch.full_like(truth, self.median)
        self._sums += torch.stack([errors(guess, truth) for guess in guesses]).cpu()

    def rows(self) -> list[Row]:
        """Return three rows."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        if not sums[0, 3]:
            raise M3Error(f"evaluate.tasks.{self.name}: no held-out sample has a known depth; remove this task.")
        close, squares, absolute = (sums[:, :3] / sums[:, 3:]).T.tolist()
        figures = {
            "delta1": (close, True),
            "RMSE, m": ([math.sqrt(x) for x in squares], False),
            "L1 error, m": (absolute, False),
        }
        return [
            Row(f"{self.name} ({measure.split(',')[0]})", measure, own, theirs, "median", higher_is_better=is_up)
            for measure, ((own, theirs), is_up) in figures.items()
        ]

    def _truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (B, H, W) bool, True where the depth is known, and the known depths (n,) in metres."""
        metres = batch.signals[self.modality].float()
        is_known = metres.isfinite()
        if self.modality in batch.is_present:
            is_known = is_known & batch.is_present[self.modality][:, None, None]
        return is_known, metres[is_known]


def errors(predicted: Tensor, truth: Tensor) -> Tensor:
    """Return (4,): places that are close, sum of squared and of absolute errors, number of places.

    Args:
        predicted: (n,) metres.
        truth: (n,) metres, above 0.
    """
    predicted, truth = predicted.double(), truth.double().clamp(min=NEAREST)
    ratio = torch.maximum(predicted / truth, truth / predicted.clamp(min=NEAREST))
    error = predicted - truth
    return torch.stack([(ratio < CLOSE).sum(), error.square().sum(), error.abs().sum(), error.new_tensor(len(error))])
