"""`m3 table`: finished runs side by side, as a table in Markdown."""

from __future__ import annotations

import json
from pathlib import Path

from m3.errors import M3Error
from m3.metrics import Line, duration, read_lines
from m3.model import M3Model
from m3.plugins import View
from m3.recipe import load_recipe
from m3.show import count_parameters

COLUMNS = ("recipe", "hides", "predicts", "parameters", "steps", "training time", "held out: model (baseline)")


def print_table(runs: list[str], first: int | None = None) -> None:
    """Print one line for each run folder, with all held-out figures or the `first` few.

    Raises:
        M3Error: a folder is no finished run.
    """
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(_row(Path(run), first) for run in runs)]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def _row(run: Path, first: int | None) -> tuple[str, ...]:
    if not (run / "model" / "config.json").is_file() or not (run / "metrics.jsonl").is_file():
        raise M3Error(f"{run} is no folder of a finished run; train it first (m3 train RECIPE).")
    recipe, model = load_recipe(run / "recipe.yaml"), M3Model.from_pretrained(run / "model")
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
