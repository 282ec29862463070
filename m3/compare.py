"""`m3 compare`: what several runs had reached after equally many steps, and after equally much time of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from m3.errors import M3Error
from m3.metrics import Line, read_lines


def is_to_measure(paths: list[str]) -> bool:
    """True for models, which have no metrics that could be compared; False for runs."""
    has_metrics = [(Path(path) / "metrics.jsonl").is_file() for path in paths]
    return not any(has_metrics) or any((Path(path) / "config.json").is_file() for path in paths)


def compare(runs: list[Path]) -> list[dict[str, Any]]:
    """Print what the runs had reached, a column for each, and return the same figures, one row per run.

    The steps are the most that all runs were evaluated at; the time is that of the run that trained the shortest, and
    counts the last evaluation of each run within it.

    Args:
        runs: folders of runs; evaluations during training (`evaluate.every`) make the comparison finer.

    Raises:
        M3Error: a folder without metrics or evaluations, or runs that share no task or step.
    """
    found = {run.name: _evaluations(run) for run in runs}
    if len(found) < 2 or len(found) < len(runs):
        raise M3Error("compare: give at least two runs of different names.")
    first = [run[0].held_out for run in found.values()]
    tasks = [task for task in first[0] if all(task in measured for measured in first)]
    steps = set.intersection(*({one.step for one in run} for run in found.values()))
    if not tasks or not steps:
        raise M3Error("compare: the runs have no task or no evaluated step in common; set the same `evaluate`.")
    step, seconds = max(steps), min(run[-1].seconds for run in found.values())
    rows = []
    for name, run in found.items():
        at_step = next(one for one in run if one.step == step)
        at_time = next((one for one in reversed(run) if one.seconds <= seconds), None)
        rows.append({"run": name, "at step": _row(at_step, tasks), "at time": _row(at_time, tasks)})
    _print(rows, tasks, step, seconds)
    return rows


def _row(one: Line | None, tasks: list[str]) -> dict[str, Any] | None:
    if one is None:
        return None
    return {"step": one.step, "seconds": one.seconds} | {task: one.held_out[task] for task in tasks}


def _evaluations(run: Path) -> list[Line]:
    """Read the evaluations of a run, in order."""
    found = {}
    for line in read_lines(run):
        if line.held_out:
            found[line.step] = line
    if not found:
        raise M3Error(f"compare: {run} was never evaluated; give its recipe `evaluate.tasks` and held-out samples.")
    return list(found.values())


def _print(rows: list[dict[str, Any]], tasks: list[str], step: int, seconds: float) -> None:
    console = Console()
    console.print(_table(f"after {step} steps", "seconds", "at step", rows, tasks))
    console.print(_table(f"after {seconds:.0f} s of training", "step", "at time", rows, tasks))
    console.print(
        "From metrics.jsonl; with --task, --data or a.b=c the models are measured on the same samples.",
        highlight=False,
        soft_wrap=True,
    )


def _table(title: str, first: str, when: str, rows: list[dict[str, Any]], tasks: list[str]) -> Table:
    """Make a table of a column per run: `first`, which is `step` or `seconds`, then the tasks."""
    table = Table(title=f"Held-out samples {title}", title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(row["run"], justify="right", overflow="fold")
    found = [row[when] for row in rows]
    table.add_row(first, *("none yet" if one is None else f"{one[first]:.0f}" for one in found))
    for task in tasks:
        table.add_row(task, *("" if one is None else f"{one[task]:.3f}" for one in found))
    return table
