"""Pictures and tables for people: what the model saw, what it predicted, the truth."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from m3.evaluate.task import Row
from m3.evaluate.tasks.predict import predictors, targets_of
from m3.model import M3Model, Reconstruction
from m3.types import Batch

BASELINES = {
    "neighbours": "neighbours: mean of the visible patches around a hidden one",
    "nearest": "nearest: the visible token nearest to a hidden one, in space and time, once more",
    "constant": "constant: the training mean, median or most frequent class",
    "average_map": "average map: the training mean, median or most frequent class of each place",
    "patch_mean": "patch mean: the hidden patch's own mean",
    "chance": "chance: a guess, candidates in random order",
    "majority": "majority: the most frequent class of these samples, for all of them",
    "without": "without: the same model, not shown another modality",
    "unigram": "unigram: how often each id is asked for in training samples",
    "nothing": "nothing: the same model, which is shown nothing",
    "raw": "raw: the same on the normalised values themselves",
    "pca": "pca: the same on the first principal components of these values, as many as the model has features",
    "random": "random: the same on the network with fresh weights",
    "one_code": "one code: a collapsed codebook that says the same of everything",
}


def preview(model: M3Model, batch: Batch, views: dict[str, dict[str, float] | None], path: Path, seed: int = 0) -> None:
    """Draw one row per sample and view; columns: for every modality what was seen, predicted, and the truth.

    Args:
        model: in evaluation mode.
        batch: the samples.
        views: label -> `visible` as in `M3Model.reconstruct`; the samples are dealt out over the views in turn.
        path: PNG file.
        seed: of the masks.
    """
    able = [name for name, objective in model.objectives.items() if objective in predictors(model)]
    labels = {(label if len(able) == 1 else f"{label}, {name}"): (label, name) for name in able for label in views}
    results = {
        title: model.reconstruct(batch, views[label], seed, objective) for title, (label, objective) in labels.items()
    }
    rows = []
    for sample in range(len(batch)):
        title = list(labels)[sample % len(labels)]
        rows.append((title, _pictures(model, batch, results[title], sample)))
    draw(rows, path)


def predicted(
    model: M3Model, batch: Batch, visible: dict[str, float] | None, seed: int, objective: str | None = None
) -> dict[str, np.ndarray]:
    """Return column title -> picture of a batch of one sample; arguments as of `M3Model.reconstruct`."""
    return _pictures(model, batch, model.reconstruct(batch, visible, seed, objective), 0)


def draw(rows: list[tuple[str, dict[str, np.ndarray]]], path: Path) -> None:
    """Write labelled rows of pictures (column title -> uint8 (H, W, 3)) as one PNG."""
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(title for _, pictures in rows for title in pictures))
    heads = {title: fill(title, 20, break_long_words=False) for title in titles}  # 20 letters are as wide as a picture
    lines = 1 + max((head.count("\n") for head in heads.values()), default=0)
    size = (1.45 * len(titles) + 0.4, 1.45 * len(rows) + 0.35 + 0.15 * lines)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (label, pictures) in zip(axes, rows, strict=True):
        for axis, title in zip(line, titles, strict=True):
            if title in pictures:
                axis.imshow(pictures[title], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_visible(False)
            if axis in axes[0]:
                axis.set_title(heads[title], fontsize=9)
        line[0].set_ylabel(fill(label, 22, break_long_words=False), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def metrics_table(rows: list[Row]) -> Table:
    """Make the table model, baseline, difference; an arrow tells which direction is better."""
    used = dict.fromkeys(row.baseline_name for row in rows)
    table = Table(title="Held-out samples", title_justify="left", caption_justify="left", caption_style="")
    table.caption = "Baselines: " + "\n".join(BASELINES.get(name, name) for name in used)
    for column in ("task", "measure", "model", "baseline", "difference"):
        is_number = column in ("model", "baseline", "difference")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number)
    if any(row.interval for row in rows):
        table.caption += "\nBelow a figure: its 95 % interval over the samples (bootstrap)"
    if any(row.is_sure is False for row in rows):
        table.caption += "\n(?): no more than chance among the samples may make"
    for remark in dict.fromkeys(row.remark for row in rows if row.remark):
        table.caption += f"\n[yellow]{escape(remark)}[/]"
    for row in rows:
        arrow, colour = ("\u2191" if row.higher_is_better else "\u2193"), ("green" if row.is_won else "red")
        difference = f"[{colour}]{row.model - row.baseline:+.3f}[/]" + (" (?)" if row.is_sure is False else "")
        numbers = (
            f"{row.model:.3f}{between(row.interval)}",
            f"{row.baseline:.3f}\n[dim]{row.baseline_name.replace('_', ' ')}[/]",
            f"{difference}{between(row.difference)}",
        )
        table.add_row(row.task, f"{row.measure} {arrow}", *numbers)
    return table


def between(interval: tuple[float, float] | None) -> str:
    """Return an interval as a line below its figure, for terminals; empty where there is none."""
    return "" if interval is None else f"\n[dim]{interval[0]:.3g}..{interval[1]:.3g}[/]"


def _pictures(model: M3Model, batch: Batch, result: Reconstruction, sample: int) -> dict[str, np.ndarray]:
    """Return column title -> picture of one sample."""
    modality_of = targets_of(model)
    relative = {name: flag for predictor in predictors(model) for name, flag in predictor.is_relative.items()}
    pictures = {}
    for name in model.modalities:
        tokens = result.tokens.get(name)
        draw_values = partial(_draw_values, model, name, batch, result, sample)
        is_seen = result.is_visible.get(name)
        if tokens is not None:
            if is_seen is None:
                is_seen = torch.zeros(tokens.values.shape[:2], dtype=torch.bool, device=tokens.values.device)
            if result.plan.visible:
                pictures[f"{name}: seen"] = draw_values(tokens.values, is_seen)
        for target in (t for t, m in modality_of.items() if m == name and t in result.predicted):
            note = " (true contrast)" if relative.get(target) else ""
            values = result.values[target]
            if tokens is not None and is_seen is not None:  # no loss asks for what was seen, so the truth is kept there
                values = torch.where(is_seen.unsqueeze(-1), tokens.values.to(values.dtype), values)
            pictures[f"{target}: predicted{note}"] = draw_values(values, None)
        if tokens is not None:
            pictures[f"{name}: truth"] = draw_values(tokens.values, None)
    return pictures


def _draw_values(
    model: M3Model,
    name: str,
    batch: Batch,
    result: Reconstruction,
    sample: int,
    values: Tensor,
    is_known: Tensor | None,
) -> np.ndarray:
    """Draw the token values (B, N, P) of one sample; grey where is_known (B, N) is False or nothing is there."""
    modality = model.modalities[name]
    tokens = result.tokens.get(name)
    if tokens is None:  # the batch holds no such signal
        tokens, size = model.blank_tokens(name, len(batch)), modality.signal.size
    else:
        size = modality.signal.extent(modality.normalise(batch.signals[name][:1]))
    known = tokens.is_valid if is_known is None else is_known
    spread = None if known is None else model.spread(name, known, tokens, size)[sample]
    signal = model.detokenize(name, values, tokens, size)
    return modality.show(signal[sample], spread)


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of trained values."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
