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
from m3.plugins import Predictor
from m3.recipe import TaskSpec
from m3.types import Batch


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


def fit_averages(model: M3Model, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Average the training samples: modality -> mean signal (C, H, W), or class frequencies (K, H, W)."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, raw in batch.to(model.device).signals.items():
            modality = model.modalities[name]
            x = modality.normalise(raw)
            if modality.signal.kind == "classes":
                x = F.one_hot(x.clamp(min=-1) + 1, modality.signal.classes + 1)[..., 1:].movedim(-1, 1).float()
            sums[name] = sums.get(name, 0) + x.nan_to_num(0.0).sum(0)
            counts[name] = counts.get(name, 0) + (~x.isnan()).sum(0)
    return {name: total / counts[name].clamp(min=1) for name, total in sums.items()}


@torch.no_grad()
def measure(
    model: M3Model,
    batches: Iterable[Batch],
    tasks: dict[str, TaskSpec],
    averages: dict[str, Tensor],
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
    for name, task in tasks.items():
        if task.target not in modality_of:
            raise M3Error(
                f"evaluate.tasks.{name}.target: the model predicts no `{task.target}`."
                f"{nearest(task.target, modality_of)}"
            )
        is_relative = any(predictor.is_relative.get(task.target) for predictor in predictors(model))
        if is_relative != (task.baseline == "patch_mean"):
            raise M3Error(
                f"evaluate.tasks.{name}.baseline: `{task.baseline}` can't be compared with target `{task.target}`; use "
                f"`patch_mean` for targets of normalised patches, and only for them."
            )
    sums: dict[str, list[Tensor]] = {}
    for batch in batches:
        batch = batch.to(model.device)
        for name, task in tasks.items():
            result = model.reconstruct(batch, task.visible, seed)
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


def targets_of(model: M3Model) -> dict[str, str]:
    """Return target -> modality over all objectives that predict signals."""
    return {name: modality for predictor in predictors(model) for name, modality in predictor.modality_of.items()}


def _score(
    model: M3Model, batch: Batch, task: TaskSpec, result: Reconstruction, averages: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the sums of the model and of the baseline over the positions that the encoder did not see."""
    name = targets_of(model)[task.target]
    modality = model.modalities[name]
    truth = modality.normalise(batch.signals[name])
    size = truth.shape[-len(modality.signal.size) :]
    seen = result.is_visible.get(name)
    weight = torch.ones(len(batch), *size, device=truth.device) if seen is None else (~seen).float()
    if name in batch.is_present:
        weight = weight * batch.is_present[name].view(-1, *[1] * len(size))
    if task.baseline == "patch_mean":
        return _relative_errors(model, task.target, truth, weight, result)
    if task.baseline == "neighbours":
        guess = neighbours(model, batch, name, result)
    else:
        guess = constant(averages[name], modality.signal.kind, by_position=task.baseline == "average_map")
        guess = guess.expand_as(truth)
    return modality.score(result.predicted[task.target], truth, weight), modality.score(guess, truth, weight)


def _relative_errors(
    model: M3Model, target: str, truth: Tensor, weight: Tensor, result: Reconstruction
) -> tuple[Tensor, Tensor]:
    """Sum squared errors of normalised patches, and of 0 (the patch's mean) in their place, with their number."""
    predictor = next(p for p in predictors(model) if target in p.modality_of)
    tokenizer = model.tokenizers[predictor.modality_of[target]]
    tokens = tokenizer.tokenize(truth)  # type: ignore[operator]  # ModuleDict forgets the class of its values
    channels = model.modalities[predictor.modality_of[target]].signal.channels
    spread = weight.unsqueeze(1).expand(-1, channels, *weight.shape[1:])
    asked = tokenizer.tokenize(spread).values.mean(-1)  # type: ignore[operator]
    wanted = predictor.truth(target, tokens)
    own = (result.output[target].float() - wanted).square().mean(-1)
    theirs = wanted.square().mean(-1)
    count = asked.sum()
    return torch.stack([(own * asked).sum(), count]).double(), torch.stack([(theirs * asked).sum(), count]).double()


def constant(average: Tensor, kind: str, by_position: bool) -> Tensor:
    """Return the best constant (per channel, or per position) for averages (C or K, *size): a (1, ...) signal."""
    if not by_position:
        average = average.flatten(1).mean(1).view(-1, *[1] * (average.ndim - 1)).expand_as(average)
    return (average.argmax(0) if kind == "classes" else average).unsqueeze(0)


def neighbours(model: M3Model, batch: Batch, name: str, result: Reconstruction) -> Tensor:
    """Predict each token as the mean, per channel, of the visible tokens next to it (diagonals included).

    A token without a visible neighbour gets the mean of all visible tokens of its sample, or 0, the mean of
    the data, if there are none.
    """
    tokenizer, signal = model.tokenizers[name], model.modalities[name].signal
    if signal.kind != "values":
        raise M3Error(f"baseline `neighbours` averages values, but `{name}` holds classes; use `constant`.")
    truth = model.modalities[name].normalise(batch.signals[name])
    size = tuple(truth.shape[-len(signal.size) :])
    tokens = tokenizer.tokenize(truth)  # type: ignore[operator]  # ModuleDict forgets the class of its values
    colour = tokens.values.nan_to_num(0.0).unflatten(-1, (signal.channels, -1)).mean(-1)  # (B, N, C)
    spread = result.is_visible[name].unsqueeze(1).expand(-1, signal.channels, *size).float()
    seen = (tokenizer.tokenize(spread).values.mean(-1) > 0.5).float()  # type: ignore[operator]
    steps = (tokens.positions[0].unsqueeze(1) - tokens.positions[0].unsqueeze(0)).abs()
    is_near = (steps < 1.5).all(-1).float()  # (N, N)
    near = torch.einsum("nm,bm,bmc->bnc", is_near, seen, colour)
    near_count = torch.einsum("nm,bm->bn", is_near, seen).unsqueeze(-1)
    everywhere = (colour * seen.unsqueeze(-1)).sum(1, keepdim=True) / seen.sum(1).clamp(min=1)[:, None, None]
    guess = torch.where(near_count > 0, near / near_count.clamp(min=1), everywhere)
    values = guess.unsqueeze(-1).expand(-1, -1, -1, tokens.values.shape[-1] // signal.channels).flatten(2)
    return tokenizer.detokenize(values, size)  # type: ignore[operator]
