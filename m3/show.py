"""Pictures and tables for people: what the model saw, what it predicted, the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from m3.evaluate.reconstruction import Row, predictors, targets_of
from m3.model import M3Model, Reconstruction
from m3.types import Batch

BASELINES = {
    "neighbours": "neighbours: mean of the visible patches around a hidden one",
    "constant": "constant: the training mean, or the most frequent class",
    "average_map": "average map: the training mean or most frequent class of each position",
    "patch_mean": "patch mean: the hidden patch's own mean",
}

HIDDEN = 128
"""Grey of positions that the encoder did not see."""


def preview(model: M3Model, batch: Batch, views: dict[str, dict[str, float] | None], path: Path, seed: int = 0) -> None:
    """Draw one row per sample and view; columns: for every modality what was seen, predicted, and the truth.

    Args:
        model: in evaluation mode.
        batch: the samples.
        views: label -> `visible` as in `M3Model.reconstruct`; the samples are dealt out over the views in turn.
        path: PNG file.
        seed: of the masks.
    """
    results = {label: model.reconstruct(batch, visible, seed) for label, visible in views.items()}
    rows = []
    for sample in range(len(batch)):
        label = list(views)[sample % len(views)]
        rows.append((label, _pictures(model, batch, results[label], sample)))
    draw(rows, path)


def draw(rows: list[tuple[str, dict[str, np.ndarray]]], path: Path) -> None:
    """Write labelled rows of pictures (column title -> uint8 (H, W, 3)) as one PNG."""
    from matplotlib.figure import Figure

    titles = list(rows[0][1])
    figure = Figure(figsize=(1.45 * len(titles) + 0.4, 1.45 * len(rows) + 0.5), layout="constrained", dpi=110)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (label, pictures) in zip(axes, rows, strict=True):
        for axis, title in zip(line, titles, strict=True):
            axis.imshow(pictures[title], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_visible(False)
            if axis in axes[0]:
                axis.set_title(title, fontsize=9)
        line[0].set_ylabel(label, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def metrics_table(rows: list[Row]) -> Table:
    """Make the table model, baseline, difference; an arrow tells which direction is better."""
    used = dict.fromkeys(row.baseline_name for row in rows)
    table = Table(title="Held-out samples", title_justify="left", caption_justify="left", caption_style="")
    table.caption = "Baselines: " + "\n".join(BASELINES[name] for name in used)
    for column in ("task", "measure", "model", "baseline", "difference", ""):
        table.add_column(column, justify="right" if column in ("model", "baseline", "difference") else "left")
    for row in rows:
        arrow, colour = ("\u2191" if row.higher_is_better else "\u2193"), ("green" if row.is_won else "red")
        numbers = (f"{row.model:.3f}", f"{row.baseline:.3f}", f"[{colour}]{row.model - row.baseline:+.3f}[/]")
        table.add_row(row.task, f"{row.measure} {arrow}", *numbers, row.baseline_name.replace("_", " "))
    return table


def _pictures(model: M3Model, batch: Batch, result: Reconstruction, sample: int) -> dict[str, np.ndarray]:
    """Return column title -> picture of one sample."""
    modality_of = targets_of(model)
    relative = {name: flag for predictor in predictors(model) for name, flag in predictor.is_relative.items()}
    pictures = {}
    for name, modality in model.modalities.items():
        truth, drawn, seen = None, np.zeros(0), np.zeros(0)
        if name in batch.signals:
            truth = modality.normalise(batch.signals[name][sample : sample + 1].to(model.device))[0]
            drawn = modality.show(truth)
            seen = _seen(drawn, result.is_visible.get(name), sample)
            pictures[f"{name}: seen"] = np.where(seen, drawn, np.uint8(HIDDEN))
        for target in (t for t, m in modality_of.items() if m == name and t in result.predicted):
            guess = modality.show(result.predicted[target][sample])
            # No loss asks for what was seen, so the prediction there means nothing: the truth is kept.
            note = " (true contrast)" if relative.get(target) else ""
            pictures[f"{target}: predicted{note}"] = guess if truth is None else np.where(seen, drawn, guess)
        if truth is not None:
            pictures[f"{name}: truth"] = drawn
    return pictures


def _seen(picture: np.ndarray, is_visible: Tensor | None, sample: int) -> np.ndarray:
    """Return (H, W, 1) bool, True where the encoder saw the sample."""
    if is_visible is None:
        return np.zeros((*picture.shape[:2], 1), bool)
    return is_visible[sample].cpu().numpy()[..., None]


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of trained values."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
