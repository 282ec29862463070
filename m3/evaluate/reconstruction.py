"""Predictions of hidden tokens on held-out samples, in the signal's own measure, beside a baseline.

Letters: B batch, N tokens of a modality, P values per token, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m3.errors import M3Error, nearest
from m3.model import M3Model, Reconstruction
from m3.plugins import Modality, Predictor, Signal
from m3.recipe import TaskSpec
from m3.types import Batch, Tokens


@dataclass(frozen=True)
class Row:
    """One line of the table of metrics.

    Attributes:
        task: name in the recipe.
        measure: name and unit of the two numbers.
        model: what the model reaches.
        baseline: what the baseline reaches on the same positions.
        baseline_name: which baseline.
        higher_is_better: direction of the measure.
    """

    task: str
    measure: str
    model: float
    baseline: float
    baseline_name: str
    higher_is_better: bool

    @property
    def is_won(self) -> bool:
        """True when the model is better than the baseline."""
        return (self.model > self.baseline) == self.higher_is_better


@dataclass(frozen=True)
class Average:
    """What is best to say about a modality without looking.

    Attributes:
        place: (N, P) token values, each place for itself.
        overall: (P,) token values, one per channel, or one class, for all places.
    """

    place: Tensor
    overall: Tensor


def fit_averages(model: M3Model, batches: Iterable[Batch]) -> dict[str, Average]:
    """Average the tokens of training samples: the mean, the median or the most frequent class."""
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, part in model.tokenise(batch.to(model.device)).items():
            values = part.values
            if part.is_valid is not None:
                unknown = torch.nan if values.is_floating_point() else -1
                values = values.masked_fill(~part.is_valid.unsqueeze(-1), unknown)
            found.setdefault(name, []).append(values)
    return {name: _average(values, model.tokens_hold(name), model.modalities[name]) for name, values in found.items()}


def _average(batches: list[Tensor], signal: Signal, modality: Modality) -> Average:
    """Average token values (B, N, P) that hold `signal`; batches may be of different N."""
    length = max(values.shape[1] for values in batches)
    unknown = torch.nan if signal.kind == "values" else -1
    values = torch.cat([F.pad(x, (0, 0, 0, length - x.shape[1]), value=unknown) for x in batches])
    if signal.kind == "classes":
        counts = torch.zeros(*values.shape[1:], signal.classes + 1, device=values.device)
        for sample in values:  # one by one: the counts of a whole vocabulary are large
            counts += F.one_hot(sample + 1, signal.classes + 1)
        counts = counts[..., 1:]
        return Average(counts.argmax(-1), counts.sum((0, 1)).argmax(-1).expand(values.shape[-1]))
    middle = (lambda x: x.nanmedian(0).values) if modality.centre == "median" else (lambda x: x.nanmean(0))
    channels = signal.channels
    if signal.channel_axis == 1:  # (channel, position) within a token
        overall = middle(values.unflatten(-1, (channels, -1)).movedim(2, -1).reshape(-1, channels))
        overall = overall.repeat_interleave(values.shape[-1] // channels)
    else:
        overall = middle(values.reshape(-1, channels)).repeat(values.shape[-1] // channels)
    return Average(middle(values).nan_to_num(0.0), overall.nan_to_num(0.0))


def check_tasks(model: M3Model, tasks: dict[str, TaskSpec]) -> None:
    """Raise M3Error for a task that can't be measured on this model; called before the first step of a run."""
    modality_of = targets_of(model)
    inputs = [name for part in predictors(model) if part.view for name in part.view.modalities]
    for name, task in tasks.items():
        where = f"evaluate.tasks.{name}"
        if task.target not in modality_of:
            raise M3Error(f"{where}.target: the model predicts no `{task.target}`.{nearest(task.target, modality_of)}")
        modality, visible = modality_of[task.target], task.visible or {}
        unknown = [other for other in visible if other not in inputs]
        if unknown:
            raise M3Error(f"{where}.visible: `{unknown[0]}` is no input of the objective.{nearest(unknown[0], inputs)}")
        if visible.get(modality) == 1.0 and isinstance(visible[modality], float):  # the number 1 is one token
            raise M3Error(f"{where}.visible: all of `{modality}` is seen, so nothing is left to predict; lower it.")
        is_relative = any(predictor.is_relative.get(task.target) for predictor in predictors(model))
        if is_relative != (task.baseline == "patch_mean"):
            raise M3Error(
                f"{where}.baseline: `{task.baseline}` can't be compared with target `{task.target}`; use "
                f"`patch_mean` for targets of normalised patches, and only for them."
            )
        has_values = model.modalities[modality].signal.kind == "values"
        if task.baseline == "neighbours" and not (has_values and modality in inputs):
            raise M3Error(
                f"{where}.baseline: `neighbours` averages visible values, but `{task.target}` holds classes or is no "
                f"input of the objective; use `constant`."
            )


@torch.no_grad()
def measure(
    model: M3Model,
    batches: Iterable[Batch],
    tasks: dict[str, TaskSpec],
    averages: dict[str, Average],
    seed: int,
) -> list[Row]:
    """Measure every task on the same held-out batches.

    Args:
        model: in evaluation mode.
        batches: held-out samples.
        tasks: the recipe's `evaluate.tasks`.
        averages: from `fit_averages` over training samples.
        seed: of the masks.
    """
    modality_of = targets_of(model)
    sums: dict[str, list[Tensor]] = {}
    for batch in batches:
        batch = batch.to(model.device)
        for name, task in tasks.items():
            result = model.reconstruct(batch, task.visible, seed, objective_of(model, task.target))
            own, theirs = _score(model, batch, task, result, averages)
            old = sums.get(name)
            sums[name] = [own, theirs] if old is None else [old[0] + own, old[1] + theirs]
    rows = []
    for name, (own, theirs) in sums.items():
        modality = model.modalities[modality_of[tasks[name].target]]
        if tasks[name].baseline == "patch_mean":
            scores = (float(own[0] / own[1]), float(theirs[0] / theirs[1]))
            rows.append(Row(name, "MSE of patches", *scores, "patch_mean", higher_is_better=False))
            continue
        scores = (modality.finish_score(own), modality.finish_score(theirs))
        rows.append(Row(name, modality.measure, *scores, tasks[name].baseline, modality.higher_is_better))
    return rows


def predictors(model: M3Model) -> list[Predictor]:
    """Return the objectives that predict signals."""
    return [objective for objective in model.objectives.values() if isinstance(objective, Predictor)]


def objective_of(model: M3Model, target: str) -> str:
    """Return the name of the objective that predicts a target."""
    return next(n for n, o in model.objectives.items() if isinstance(o, Predictor) and target in o.modality_of)


def targets_of(model: M3Model) -> dict[str, str]:
    """Return target -> modality over all objectives that predict signals."""
    return {name: modality for predictor in predictors(model) for name, modality in predictor.modality_of.items()}


def _score(
    model: M3Model, batch: Batch, task: TaskSpec, result: Reconstruction, averages: dict[str, Average]
) -> tuple[Tensor, Tensor]:
    """Return the sums of the model and of the baseline over the positions that the encoder did not see."""
    name = targets_of(model)[task.target]
    modality, tokens = model.modalities[name], result.tokens[name]
    is_asked = torch.ones(tokens.values.shape[:2], dtype=torch.bool, device=model.device)
    if name in result.is_visible:
        is_asked = ~result.is_visible[name]
    if tokens.is_valid is not None:
        is_asked = is_asked & tokens.is_valid
    if task.baseline == "patch_mean":
        return _relative_errors(model, task.target, tokens, is_asked, result)
    if task.baseline == "neighbours":
        guess = neighbours(model.tokens_hold(name), tokens, result.is_visible[name])
    else:
        guess = constant(averages[name], task.baseline == "average_map", tokens)
    size = modality.signal.extent(modality.normalise(batch.signals[name][:1]))

    def signal(values: Tensor) -> Tensor:
        return model.tokenizers[name].detokenize(values, tokens.positions, size)  # type: ignore[operator]

    truth, weight = signal(tokens.values), model.spread(name, is_asked, tokens, size)
    return modality.score(result.predicted[task.target], truth, weight), modality.score(signal(guess), truth, weight)


def _relative_errors(
    model: M3Model, target: str, tokens: Tokens, is_asked: Tensor, result: Reconstruction
) -> tuple[Tensor, Tensor]:
    """Sum squared errors of normalised patches, and of 0 (the patch's mean) in their place, with their number."""
    predictor = next(p for p in predictors(model) if target in p.modality_of)
    wanted = predictor.truth(target, tokens)
    own = (result.output[target].float() - wanted).square().mean(-1)
    theirs = wanted.square().mean(-1)
    count = is_asked.sum()
    return (
        torch.stack([(own * is_asked).sum(), count]).double(),
        torch.stack([(theirs * is_asked).sum(), count]).double(),
    )


def constant(average: Average, by_position: bool, tokens: Tokens) -> Tensor:
    """Return the best token values (B, N, P) that are the same for all samples: everywhere, or place by place."""
    batch, count = tokens.values.shape[:2]
    if not by_position:
        return average.overall.expand(batch, count, -1)
    guess = average.place
    if len(guess) < count:  # longer than any that was averaged: the last place's
        guess = torch.cat([guess, guess[-1:].expand(count - len(guess), -1)])
    return guess[:count].expand(batch, -1, -1)


def neighbours(signal: Signal, tokens: Tokens, is_visible: Tensor) -> Tensor:
    """Predict each token as the mean, per channel, of the visible tokens next to it (diagonals included): (B, N, P).

    A token without a visible neighbour gets the mean of all visible tokens of its sample, or 0, the mean of
    the data, if there are none.
    """
    if signal.kind != "values":
        raise M3Error("baseline `neighbours` averages values, but the target holds classes; use `constant`.")
    colour = tokens.values.nan_to_num(0.0).unflatten(-1, (signal.channels, -1)).mean(-1)  # (B, N, C)
    seen = is_visible.float()
    steps = (tokens.positions[0].unsqueeze(1) - tokens.positions[0].unsqueeze(0)).abs()
    is_near = (steps < 1.5).all(-1).float()  # (N, N)
    near = torch.einsum("nm,bm,bmc->bnc", is_near, seen, colour)
    near_count = torch.einsum("nm,bm->bn", is_near, seen).unsqueeze(-1)
    everywhere = (colour * seen.unsqueeze(-1)).sum(1, keepdim=True) / seen.sum(1).clamp(min=1)[:, None, None]
    guess = torch.where(near_count > 0, near / near_count.clamp(min=1), everywhere)
    return guess.unsqueeze(-1).expand(-1, -1, -1, tokens.values.shape[-1] // signal.channels).flatten(2)
