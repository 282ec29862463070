"""`m3 plot`: the curves of runs as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from m3.errors import M3Error, nearest
from m3.metrics import Line, read_lines

Axis = Literal["step", "time"]
Curve = list[tuple[float, float]]
COLUMNS = 3
SMOOTHED = 20
"""The running mean that is drawn over a loss forgets in a 20th of the curve's values."""


def plot(runs: list[Path], out: Path, names: list[str], by: Axis = "step") -> list[str]:
    """Draw one chart per metric with a curve for each run, and return the metrics drawn.

    Losses: the values in pale and their running mean; held-out figures: with the baseline as a dashed line.

    Args:
        runs: run folders.
        out: PNG file.
        names: metrics to draw, by the names in `metrics.jsonl` without `held_out/`; empty: losses and held-out figures.
        by: horizontal axis: steps, or minutes of training.

    Raises:
        M3Error: a folder without metrics, or a metric that no run has.
    """
    from matplotlib.figure import Figure

    lines = {_label(run, runs): read_lines(run) for run in runs}
    known = _known(lines)
    for name in names:
        if name not in known:
            raise M3Error(f"plot: no run has `{name}`.{nearest(name, list(known))}")
    chosen = names or [name for name, is_usual in known.items() if is_usual]
    if not chosen:
        raise M3Error("plot: these runs have no metrics yet; wait for their first line.")
    columns, height = min(COLUMNS, len(chosen)), -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(4.2 * columns, 2.9 * height + 0.4), layout="constrained", dpi=110)
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    for axis in axes[len(chosen) :]:
        axis.set_axis_off()
    for axis, name in zip(axes, chosen, strict=False):
        for number, (label, run) in enumerate(lines.items()):
            _draw(axis, run, name, by, f"C{number}", label)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step" if by == "step" else "minutes of training", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return chosen


def _label(run: Path, runs: list[Path]) -> str:
    return run.name if sum(other.name == run.name for other in runs) == 1 else str(run)


def _known(lines: dict[str, list[Line]]) -> dict[str, bool]:
    """Return every metric of the runs; True: drawn when nothing is chosen."""
    known: dict[str, bool] = {}
    for line in (line for run in lines.values() for line in run):
        known |= dict.fromkeys((name for name in line.losses), True)
        known |= dict.fromkeys((name for name in line.held_out), True)
        known |= {name: False for name in line.values if name not in line.losses and name != "step"}
    return known


def _draw(axis: Any, run: list[Line], name: str, by: Axis, colour: str, label: str) -> None:
    trained = _curve(run, name, by, "values")
    if trained:
        axis.plot(*zip(*trained, strict=True), color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(*zip(*_smooth(trained), strict=True), color=colour, label=label, linewidth=1.4)
    if measured := _curve(run, name, by, "held_out"):
        axis.plot(*zip(*measured, strict=True), color=colour, marker="o", markersize=3, label=label)
        axis.plot(*zip(*_curve(run, name, by, "baselines"), strict=True), color=colour, linestyle="--", linewidth=0.9)


def _curve(run: list[Line], name: str, by: Axis, kind: str) -> Curve:
    return [
        (line.step if by == "step" else line.seconds / 60, getattr(line, kind)[name])
        for line in run
        if name in getattr(line, kind)
    ]


def _smooth(curve: Curve) -> Curve:
    """Return the running mean, without a bias towards its start."""
    past = 1 - 1 / max(1.0, len(curve) / SMOOTHED)
    total, weight, smooth = 0.0, 0.0, []
    for x, y in curve:
        total, weight = past * total + y, past * weight + 1
        smooth.append((x, total / weight))
    return smooth
