"""Predictions of hidden tokens on held-out samples, in the signal's own measure, beside a baseline.

Letters: B batch, N tokens of a modality, P values per token, C channels, K classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from m3.errors import M3Error, nearest
from m3.evaluate.baselines import Average, average, constant, known_values, neighbours, repeated
from m3.evaluate.bootstrap import Tally, ratio
from m3.evaluate.task import Row, Task
from m3.masking import Amount
from m3.model import M3Model, Reconstruction
from m3.plugins import Modality, Predictor, Strict
from m3.types import Batch, Tokens


class Predict(Task):
    """A target that is predicted on held-out samples, against a baseline."""

    class Spec(Strict):
        """Settings of `type: predict`.

        Attributes:
            target: name of a target of the objective.
            visible: what the encoder sees, as in `M3Model.reconstruct`; null: the recipe's masking. Only positions
                that the encoder did not see count.
            baseline: `neighbours`: mean of the visible tokens around; `nearest`: the nearest visible token once more
                (for a target of normalised patches, that one's target); `constant`: the training mean or most
                frequent class; `average_map`: the same, position by position; `patch_mean`: the patch's own mean,
                for a target of normalised patches, where it has error 1; `without`: the same model, asked for the
                same positions, but not shown the modalities that `without` names.
            without: modalities that only the model sees, not the baseline; what they help.
        """

        target: str
        visible: dict[str, Amount] | None = None
        baseline: Literal["neighbours", "nearest", "constant", "average_map", "patch_mean", "without"] = "constant"
        without: tuple[str, ...] = ()

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        self._check()
        self.modality = targets_of(model)[spec.target]
        self.is_relative = any(predictor.is_relative.get(spec.target) for predictor in predictors(model))
        self.average: Average | None = None
        self._seen: list[Tensor] = []
        self._tally = Tally()

    @property
    def wants_training_samples(self) -> bool:
        """True until the baseline's average is known."""
        return self.average is None and self.spec.baseline in ("constant", "average_map")

    def fit(self, batch: Batch) -> None:
        """Keep the values that the baseline averages."""
        self._seen.append(known_values(self.model, batch, self.modality))

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Add up the scores of the model and of the baseline."""
        if self._seen:
            signal, modality = self.model.tokens_hold(self.modality), self.model.modalities[self.modality]
            self.average, self._seen = average(self._seen, signal, modality), []
        objective = objective_of(self.model, self.spec.target)
        result = self.model.reconstruct(batch, self.spec.visible, self.seed, objective)
        blind = self._blind(batch, objective) if self.spec.without else None
        self._tally.add(batch.keys, *self._score(batch, result, blind))

    def _blind(self, batch: Batch, objective: str) -> Tensor:
        """Predict the target from the same tokens, without the modalities that the baseline is not shown."""
        hidden, visible = self.spec.without, self.spec.visible
        signals = {name: raw for name, raw in batch.signals.items() if name not in hidden}
        shown = None if visible is None else {name: share for name, share in visible.items() if name not in hidden}
        return self.model.reconstruct(replace(batch, signals=signals), shown, self.seed, objective).predicted[
            self.spec.target
        ]

    def rows(self) -> list[Row]:
        """Return one row."""
        modality = self.model.modalities[self.modality]
        scores = self._tally.scores(ratio if self.is_relative else modality.finish_score)
        if scores is None:
            return []
        measure = ("MSE of patches", False) if self.is_relative else (modality.measure, modality.higher_is_better)
        return [Row.of(scores, self.name, measure[0], self.spec.baseline, measure[1], self.seed)]

    def _check(self) -> None:
        model, task = self.model, self.spec
        modality_of = targets_of(model)
        inputs = [name for part in predictors(model) if part.view for name in part.view.modalities]
        where = f"evaluate.tasks.{self.name}"
        if task.target not in modality_of:
            raise M3Error(f"{where}.target: the model predicts no `{task.target}`.{nearest(task.target, modality_of)}")
        modality, visible = modality_of[task.target], task.visible or {}
        unknown = [other for other in visible if other not in inputs]
        if unknown:
            raise M3Error(f"{where}.visible: `{unknown[0]}` is no input of the objective.{nearest(unknown[0], inputs)}")
        if visible.get(modality) == 1.0 and isinstance(visible[modality], float):  # the number 1 is one token
            raise M3Error(f"{where}.visible: all of `{modality}` is seen, so nothing is left to predict; lower it.")
        if (task.baseline == "without") != bool(task.without):
            raise M3Error(f"{where}: `baseline: without` and a list `without` belong together; give both or neither.")
        unknown = [other for other in task.without if other not in inputs or other == modality]
        if unknown:
            raise M3Error(
                f"{where}.without: `{unknown[0]}` is no other input of the objective.{nearest(unknown[0], inputs)}"
            )
        is_relative = any(predictor.is_relative.get(task.target) for predictor in predictors(model))
        if task.baseline != "nearest" and is_relative != (task.baseline == "patch_mean"):
            raise M3Error(
                f"{where}.baseline: `{task.baseline}` can't be compared with target `{task.target}`; use "
                f"`patch_mean` for targets of normalised patches, and only for them, or `nearest`."
            )
        if task.baseline == "nearest" and modality not in inputs:
            raise M3Error(f"{where}.baseline: `nearest` needs visible tokens of `{modality}`; use `constant`.")
        has_values = model.modalities[modality].signal.kind == "values"
        if task.baseline == "neighbours" and not (has_values and modality in inputs):
            raise M3Error(
                f"{where}.baseline: `neighbours` averages visible values, but `{task.target}` holds classes or is no "
                f"input of the objective; use `constant`."
            )

    def _score(self, batch: Batch, result: Reconstruction, blind: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what each sample adds, (B, S), over the positions that the encoder did not see: model and baseline."""
        model, task, name = self.model, self.spec, self.modality
        modality, tokens = model.modalities[name], result.tokens[name]
        is_asked = torch.ones(tokens.values.shape[:2], dtype=torch.bool, device=model.device)
        place = next(p for p in predictors(model) if task.target in p.modality_of).place_of(task.target)
        if place in result.is_visible:
            is_asked = ~result.is_visible[place]
        if tokens.is_valid is not None:
            is_asked = is_asked & tokens.is_valid
        if self.is_relative:
            is_visible = result.is_visible[name] if task.baseline == "nearest" else None
            return _relative_errors(model, task.target, tokens, is_asked, result, is_visible)
        size = modality.signal.extent(modality.normalise(batch.signals[name][:1]))

        def signal(values: Tensor) -> Tensor:
            return model.detokenize(name, values, tokens, size)

        if blind is not None:
            guess = blind
        elif task.baseline == "neighbours":
            guess = signal(neighbours(model.tokens_hold(name), tokens, result.is_visible[name]))
        elif task.baseline == "nearest":
            guess = signal(repeated(tokens, tokens.values, result.is_visible[name]))
        else:
            assert self.average is not None, "`fit` comes first"
            guess = signal(constant(self.average, task.baseline == "average_map", tokens))
        truth, weight = signal(tokens.values), model.spread(name, is_asked, tokens, size)
        own, theirs = (_each(modality, x, truth, weight) for x in (result.predicted[task.target], guess))
        return own, theirs


def _each(modality: Modality, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Return the modality's sums of each sample, (B, S)."""
    cuts = (x.split(1) for x in (predicted, truth, weight))
    return torch.stack([modality.score(*sample) for sample in zip(*cuts, strict=True)])


def predictors(model: M3Model) -> list[Predictor]:
    """Return the objectives that predict signals."""
    return [o for o in model.objectives.values() if isinstance(o, Predictor) and o.modality_of]


def objective_of(model: M3Model, target: str) -> str:
    """Return the name of the objective that predicts a target."""
    return next(n for n, o in model.objectives.items() if isinstance(o, Predictor) and target in o.modality_of)


def targets_of(model: M3Model) -> dict[str, str]:
    """Return target -> modality over all objectives that predict signals."""
    return {name: modality for predictor in predictors(model) for name, modality in predictor.modality_of.items()}


def _relative_errors(
    model: M3Model,
    target: str,
    tokens: Tokens,
    is_asked: Tensor,
    result: Reconstruction,
    is_visible: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sum squared errors of each sample's normalised patches, and of the baseline in their place: (B, 2), with counts.

    The baseline is 0, the patch's mean, or the target of the nearest of the tokens in `is_visible` (B, N).
    """
    predictor = next(p for p in predictors(model) if target in p.modality_of)
    wanted = predictor.truth(target, tokens)
    guess = torch.zeros_like(wanted) if is_visible is None else repeated(tokens, wanted, is_visible)
    count = is_asked.sum(1)
    sums = []
    for predicted in (result.output[target].float(), guess):
        errors = (predicted - wanted).square().mean(-1)
        sums.append(torch.stack([(errors * is_asked).sum(1), count], 1))
    return sums[0], sums[1]
