"""`m3 table`: finished runs, or what labels can be read off their features, side by side, as a table in Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m3.errors import M3Error
from m3.inputs import open_model
from m3.measure import name_of
from m3.metrics import Line, duration, read_lines
from m3.plugins import View
from m3.recipe import load_recipe
from m3.show import count_parameters

BASELINES = {"random": "fresh weights", "raw": "raw values", "pca": "PCA", "majority": "most frequent"}
"""Baseline of a probe or of neighbours -> head of its column."""

ACCURACY = "accuracy of "
"""How the measure of a label begins."""

COLUMNS = ("recipe", "hides", "predicts", "parameters", "steps", "training time", "held out: model (baseline)")


def print_table(runs: list[str], first: int | None = None) -> None:
    """Print one line for each run folder, with all held-out figures or the `first` few.

    Raises:
        M3Error: a folder is no finished run.
    """
    _print([COLUMNS, *(_row(Path(run), first) for run in runs)])


def print_feature_table(folders: list[str]) -> None:
    """Print one line for each label and way to read it off features, with every baseline that was measured by it.

    Args:
        folders: what `m3 eval` wrote, or the models or runs that it measured.

    Raises:
        M3Error: a folder holds no such report, or no label was read off features.
    """
    lines: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for folder in folders:
        report = _report(Path(folder))
        facts = report["facts"]
        for row in report["rows"]:
            if row["baseline_name"] in BASELINES and row["measure"].startswith(ACCURACY):
                label = row["measure"].removeprefix(ACCURACY)
                way = row["task"].removesuffix(f" of {label}")
                key = (f"`{name_of(facts['model'])}`", facts["data"], label, way)
                lines.setdefault(key, {})[row["baseline_name"]] = row
        if not lines:
            raise M3Error(f"{folder}: no label was read off features; measure one (m3 eval RUN --task probe:LABEL).")
    shown = [name for name in BASELINES if any(name in rows for rows in lines.values())]
    table: list[tuple[str, ...]] = [
        ("model", "data", "label", "read by", "features", *(BASELINES[name] for name in shown))
    ]
    for about, rows in lines.items():
        own = next(iter(rows.values()))
        beside = (_beside(rows[name]) if name in rows else "" for name in shown)
        table.append((*about, _share(own["model"], own["interval"]), *beside))
    _print(table)
    print(
        "\nShares of held-out samples whose label is told, with the 95 % interval (bootstrap). After a baseline: + the "
        "features are better on the same samples, - worse, = the interval of the difference holds 0."
    )


def _print(rows: list[tuple[str, ...]]) -> None:
    head, *others = rows
    print("\n".join(f"| {' | '.join(row)} |" for row in [head, tuple("---" for _ in head), *others]))


def _report(folder: Path) -> dict[str, Any]:
    """Read what `m3 eval` wrote into a folder, or into `eval` in it."""
    for file in (folder / "eval" / "report.json", folder / "report.json"):
        if file.is_file():
            return json.loads(file.read_text())
    raise M3Error(f"{folder} has not been measured; do it first (m3 eval {folder} --task probe:LABEL).")


def _share(value: float, interval: tuple[float, float]) -> str:
    low, high = (f"{100 * bound:.1f}" for bound in interval)
    return f"**{100 * value:.1f}** ({low} to {high})"


def _beside(row: dict[str, Any]) -> str:
    low, high = row["difference"]
    return f"{100 * row['baseline']:.1f} {'+' if low > 0 else '-' if high < 0 else '='}"


def _row(run: Path, first: int | None) -> tuple[str, ...]:
    if not (run / "model" / "config.json").is_file() or not (run / "metrics.jsonl").is_file():
        raise M3Error(f"{run} is no folder of a finished run; train it first (m3 train RECIPE).")
    recipe, (model, _) = load_recipe(run / "recipe.yaml"), open_model(str(run / "model"))
    lines = read_lines(run)
    last = next((line for line in reversed(lines) if line.held_out), Line(0, 0.0))
    results = [f"{name}: {value:.3f} ({last.baselines[name]:.3f})" for name, value in last.held_out.items()]
    objectives = list(model.objectives.values())
    return (
        f"`{recipe.name}`",
        "; ".join(dict.fromkeys(hides(view) for part in objectives for view in part.views)) or "nothing",  # type: ignore[union-attr]
        "; ".join(dict.fromkeys(part.predicts for part in objectives)),  # type: ignore[misc]
        f"{count_parameters(model) / 1e6:.2f} M",
        str(max((line.step for line in lines), default=0)),
        duration(lines[-1].seconds if lines else 0.0),
        "; ".join(results[:first]) or "nothing measured",
    )


def hides(view: View) -> str:
    """Say in a few words what a view hides."""
    masking = json.loads(view.masking)
    visible, names = masking.get("visible", 0.25), ", ".join(view.modalities)
    if isinstance(visible, dict):
        hidden = ", ".join(_hidden(amount, name) for name, amount in visible.items() if amount != 1.0)
        text = hidden or "nothing"
    else:
        text = _hidden(visible, names)
    by = masking.get("scorer", {}).get("type", "uniform")
    how = masking.get("hidden", "drop")
    return (
        text + (f", by {by}" if by != "uniform" else "") + (", replaced" if how != "drop" and text != "nothing" else "")
    )


def _hidden(amount: float | list[int], names: str) -> str:
    if isinstance(amount, list):  # drawn between two budgets
        return f"all but {amount[0]} to {amount[1]} tokens of {names}"
    if isinstance(amount, int):
        return f"all but {amount} tokens of {names}"
    return f"{1 - amount:.0%} of {names}" if amount < 1 else "nothing"
