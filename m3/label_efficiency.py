"""`m3 labels`: how many labels fine-tuning needs, from a pre-trained model and from scratch.

One recipe is trained with 1 %, 10 % and 100 % of the labelled training samples (or other shares), each time from both
starts and from several seeds; what they reach on the same held-out samples is a table and a curve.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from m3.errors import M3Error
from m3.evaluate.task import Row
from m3.recipe import Recipe, dump_recipe, load_recipe
from m3.report import Report
from m3.show import metrics_table
from m3.train import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = dict[tuple[str, bool], dict[float, list[Row]]]
"""(task, True if it began pre-trained) -> share of the labels -> the row of each seed."""


def label_efficiency(
    model: str, recipe: str, overrides: list[str], shares: Sequence[float], seeds: int, out: Path | None
) -> list[Row]:
    """Train a recipe with few and with many labels, print the table, write `report.html` and `report.json`.

    Args:
        model: folder of a model, or a published checkpoint, as for `init`.
        recipe: file or name of a recipe that fine-tunes.
        overrides: `a.b=c`, changes to the recipe, for both starts; those after `init:` only for the pre-trained one.
        shares: of the labelled training samples, in (0, 1].
        seeds: runs of each kind.
        out: folder for the runs and the report; None: `runs/NAME_labels`.

    Returns:
        A row for each share: the mean over seeds from the model, and as the baseline that from scratch.
    """
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise M3Error(f"labels: a share of the labels lies in (0, 1], got {wrong[0]}; correct --shares.")
    if seeds < 1:
        raise M3Error(f"labels: --seeds is how often each is trained, at least 1, got {seeds}.")
    both = [text for text in overrides if not text.startswith("init:")]
    own = [text.removeprefix("init:") for text in overrides if text.startswith("init:")]
    plain = load_recipe(recipe, both)
    folder = out or Path("runs") / f"{plain.name}_labels"
    console, curves = Console(), Curves()
    for share in sorted(shares):
        for is_trained in (False, True):
            changes = [*both, *([f"init={model}", *own] if is_trained else []), f"data.labelled={float(share)}"]
            for seed in range(plain.seed, plain.seed + seeds):
                name = f"{share:g}_{'init' if is_trained else 'scratch'}_{seed}"
                console.print(f"{share:.4g} of the labels, {'from ' + model if is_trained else 'from scratch'}: {name}")
                rows = train(load_recipe(recipe, [*changes, f"seed={seed}", f"out={folder / name}"]), is_shown=False)
                if not rows:
                    raise M3Error("labels: the recipe measures nothing on held-out samples; add `evaluate.tasks`.")
                for row in rows:
                    curves.setdefault((row.task, is_trained), {}).setdefault(share, []).append(row)
    rows = [row for task in dict.fromkeys(task for task, _ in curves) for row in table(curves, task)]
    console.print(metrics_table(rows))
    console.print(f"Report: {_report(plain, model, curves, rows, seeds).write(folder)}", soft_wrap=True)
    return rows


def table(curves: Curves, task: str) -> list[Row]:
    """Return a row for each share of the labels: means over seeds; `notes` hold the figure of every seed."""
    rows = []
    for share, trained in curves[task, True].items():
        scratch = curves[task, False][share]
        figures = {"from the model": [row.model for row in trained], "from scratch": [row.model for row in scratch]}
        own, theirs = (sum(x) / len(x) for x in figures.values())
        name = f"{task}, {share:.4g} of the labels"
        notes = {**figures, trained[0].baseline_name: trained[0].baseline}
        first = replace(trained[0], interval=None, difference=None)
        rows.append(replace(first, task=name, model=own, baseline=theirs, baseline_name="from scratch", notes=notes))
    return rows


def _report(recipe: Recipe, model: str, curves: Curves, rows: list[Row], seeds: int) -> Report:
    """Put table and curves together."""
    facts = {
        "recipe": recipe.name,
        "model": model,
        "data": f"{recipe.data.source} {recipe.data.root or ''}".strip(),
        "seeds": str(seeds),
        "command": shlex.join(["m3", *sys.argv[1:]]),
    }
    pictures = {task: _figure(curves, task) for task in dict.fromkeys(task for task, _ in curves)}
    return Report(f"{recipe.name}: how many labels it needs", facts, rows, pictures, dump_recipe(recipe))


def _figure(curves: Curves, task: str) -> Figure:
    """Draw what each start reaches over the share of labels: the mean of the seeds as a line, each seed as a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained", dpi=110)
    axis = figure.subplots()
    for colour, is_trained, label in (("C0", True, "from the model"), ("C1", False, "from scratch")):
        found = curves[task, is_trained]
        means = [sum(row.model for row in rows) / len(rows) for rows in found.values()]
        axis.plot(list(found), means, color=colour, label=label)
        for share, rows in found.items():
            axis.plot([share] * len(rows), [row.model for row in rows], "o", color=colour, markersize=4)
    first = list(curves[task, True].values())[-1][0]
    axis.axhline(first.baseline, color="grey", linestyle="--", linewidth=0.9, label=first.baseline_name)
    axis.set(xscale="log", xlabel="share of the labels", ylabel=first.measure, title=task)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
