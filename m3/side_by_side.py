"""`m3 compare MODEL MODEL`: models measured by the same tasks on the same held-out samples, and their differences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from m3.data.loader import first_batches
from m3.errors import M3Error
from m3.evaluate.bootstrap import Interval, paired
from m3.evaluate.task import Row, build_tasks
from m3.evaluate.tasks.predict import objective_of
from m3.held_out import AS_THEY_ARE, HeldOut
from m3.measure import facts_of, hold_out, measuring_recipe, name_of, open_measured, settings_of
from m3.model import M3Model
from m3.recipe import Recipe
from m3.report import difference_text, interval_text, table_of, write_page
from m3.show import BASELINES, between, draw, predicted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = 3
"""Samples of which all models' predictions are drawn."""


@dataclass(frozen=True)
class Line:
    """One measure of several models.

    Attributes:
        rows: model -> what it reached; a model that was not measured by it is left out.
        differences: model -> its figure minus the first model's, with the 95 % interval of that on the same samples.
    """

    rows: dict[str, Row]
    differences: dict[str, tuple[float, Interval | None]]

    @property
    def first(self) -> Row:
        """The row of the first model that has one."""
        return next(iter(self.rows.values()))

    def is_better(self, name: str) -> bool:
        """True where a model is better than the first one."""
        return (self.differences[name][0] > 0) == self.first.higher_is_better


def compare_models(
    paths: Sequence[str], overrides: list[str], tasks: list[str], data: str | None, out: Path
) -> list[Line]:
    """Measure models on the same samples, print the table and write `report.html` and `report.json`.

    Args:
        paths: folders of models or of their runs, or Hub ids.
        overrides: `a.b=c`, changes to the sections `data`, `evaluate` and `seed` of the first model's recipe.
        tasks: as in `m3 eval`; none: those of the first model's recipe that all models can be measured by.
        data: as in `m3 eval`; None: what the first model was trained on.
        out: folder of the report.

    Raises:
        M3Error: fewer than two models, no task that suits all of them, or samples that are not the same.
    """
    console, names = Console(), _names(paths)
    opened = dict(zip(names, (open_measured(path, overrides) for path in paths), strict=True))
    models = {name: model for name, (_, model) in opened.items()}
    recipe = measuring_recipe(Path(paths[0]), models[names[0]], overrides, tasks, data)
    usual = measuring_recipe(Path(paths[0]), models[names[0]], [], [], None).evaluate.tasks
    # How the first one was trained, mirrored pictures and all, need not suit what the others read.
    plain = {key: value for key, value in AS_THEY_ARE.items() if key != "augment"}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=plain)})
    recipe, left_out = _shared(recipe, models, usual)
    held_out = {
        name: hold_out(recipe, model, build_tasks(recipe.evaluate.tasks, model, recipe.seed), out, console)
        for name, model in models.items()
    }
    _check_same_samples(held_out)
    lines = _lines({name: one.measure() for name, one in held_out.items()}, recipe.seed)
    remarks = dict.fromkeys(row.remark for line in lines for row in line.rows.values() if row.remark)
    notes = [*left_out, *_notes(recipe, models), *remarks]
    console.print(_table(lines, names))
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False)
    first = held_out[names[0]]
    facts = {
        "models": ", ".join(f"{name} ({path})" for name, (path, _) in opened.items()),
        **facts_of(first),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps({"facts": facts, "rows": [_facts(line) for line in lines]}, indent=2))
    title = f"{' and '.join(names)} on the same held-out samples"
    pictures = _pictures(held_out, recipe, out / "predictions.png")
    page = write_page(out, title, facts, _html(lines, names, notes), pictures, settings_of(recipe))
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)
    return lines


def _names(paths: Sequence[str]) -> list[str]:
    """Return short names, or the paths themselves where these are the same."""
    names = [name_of(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < max(2, len(names)):
        raise M3Error("give at least two models, each once.")
    return names


def _shared(recipe: Recipe, models: dict[str, M3Model], usual: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """Leave the tasks that all models can be measured by; those that are not the usual ones must be among them."""
    tasks, left_out = {}, []
    for task, entry in recipe.evaluate.tasks.items():
        for name, model in models.items():
            try:
                build_tasks({task: entry}, model, recipe.seed)
            except M3Error as error:
                if usual.get(task) != entry:
                    raise M3Error(f"{name}: {error}") from error
                left_out.append(f"{task} is left out, since {name} can't be measured by it: {str(error).rstrip('.')}")
                break
        else:
            tasks[task] = entry
    if not tasks:
        why = f" ({left_out[0]})" if left_out else ""
        raise M3Error(f"there is no task that all models can be measured by{why}; give e.g. --task knn:LABEL.")
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"tasks": tasks})}), left_out


def _check_same_samples(held_out: dict[str, HeldOut]) -> None:
    """Raise M3Error where the samples that the models are measured on have other names."""
    first, *others = held_out
    count = held_out[first].recipe.evaluate.samples

    def ids(name: str) -> list[str]:
        source = held_out[name].samples.source
        return [source.name(source.at(0, number)) for number in range(min(count, len(source)))]

    for name in others:
        if ids(name) != ids(first):
            raise M3Error(
                f"{first} and {name} would be measured on different samples, since not all samples have the modalities "
                f"of both; set data.missing=allow, or give --data whose samples have all of them."
            )


def _lines(measured: dict[str, list[Row]], seed: int) -> list[Line]:
    """Bring rows of the same task and measure together, in the order of the first model."""
    found: dict[tuple[str, str, bool], dict[str, Row]] = {}
    for name, rows in measured.items():
        for row in rows:
            same = found.setdefault((row.task, row.measure, row.higher_is_better), {})
            same.setdefault(name, row)  # against a second baseline it is the same figure
    lines = []
    for rows in found.values():
        first, *others = rows
        lines.append(Line(rows, {name: _difference(rows[first], rows[name], seed) for name in others}))
    return lines


def _difference(one: Row, other: Row, seed: int) -> tuple[float, Interval | None]:
    if one.scores is None or other.scores is None:
        return other.model - one.model, None
    return paired(one.scores, other.scores, seed)[:2]


def _notes(recipe: Recipe, models: dict[str, M3Model]) -> list[str]:
    """Name the tasks in which the models are shown different things."""
    notes = []
    for task, entry in recipe.evaluate.tasks.items():
        if "target" not in entry or entry.get("visible") is not None:
            continue
        views = [
            getattr(model.objectives[objective_of(model, entry["target"])], "view", None) for model in models.values()
        ]
        if len({view.masking for view in views if view is not None}) > 1:
            notes.append(
                f"{task}: each model is shown what its own recipe leaves visible, which is not the same; set "
                f"evaluate.tasks.NAME.visible."
            )
    return notes


def _pictures(held_out: dict[str, HeldOut], recipe: Recipe, file: Path) -> dict[str, Figure | Path]:
    """Return the predictions of all models for the same samples, and each model's own pictures."""
    views: list[tuple[str, Any, str | None]] = [
        (f"from {', '.join(entry['visible'])}", entry["visible"], entry["target"])
        for entry in recipe.evaluate.tasks.values()
        if entry.get("visible") and "target" in entry
    ]
    shown = {name: list(first_batches(one.samples, SAMPLES, 1)) for name, one in held_out.items() if one.has_picture}
    rows = []
    for number in range(min(map(len, shown.values()), default=0)):
        label, visible, target = [("", None, None), *views][number % (1 + len(views))]
        for name, batches in shown.items():
            model = held_out[name].model
            objective = objective_of(model, target) if target else None
            rows.append(
                (f"{name}\n{label}".strip(), predicted(model, batches[number], visible, recipe.seed, objective))
            )
    # What only one of them has is in its own report.
    common = set.intersection(*(set(pictures) for _, pictures in rows)) if len(shown) > 1 else set()
    found: dict[str, Figure | Path] = {}
    if common:
        draw([(label, {title: x for title, x in own.items() if title in common}) for label, own in rows], file)
        found["Predictions for the same samples"] = file
    for name, one in held_out.items():
        found |= {f"{name}: {title}": figure for title, figure in (one.figures() | one.attention()).items()}
    return found


# -- tables -----------------------------------------------------------------------------------------------


def _facts(line: Line) -> dict[str, Any]:
    """Return a line for JSON."""
    differences = {name: {"difference": x, "interval": between} for name, (x, between) in line.differences.items()}
    return {
        "task": line.first.task,
        "measure": line.first.measure,
        "higher_is_better": line.first.higher_is_better,
        "models": {name: row.facts() for name, row in line.rows.items()},
        "differences": differences,
    }


def _titles(line: Line) -> tuple[str, str]:
    return line.first.task, f"{line.first.measure} {'↑' if line.first.higher_is_better else '↓'}"


def _table(lines: list[Line], names: list[str]) -> Table:
    table = Table(title="The same held-out samples", title_justify="left", caption_justify="left", caption_style="")
    for column in ("task", "measure"):
        table.add_column(column)
    for column in (*names, *(f"{name}\nminus {names[0]}" for name in names[1:])):
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        figures = [f"{row.model:.3f}{between(row.interval)}" if (row := line.rows.get(n)) else "-" for n in names]
        table.add_row(*_titles(line), *figures, *(_terminal_difference(line, name) for name in names[1:]))
    table.caption = (
        "Below a figure: its 95 % interval over the samples (bootstrap); of a difference on the same samples\n"
        "(?): no more than chance among the samples may make"
    )
    return table


def _terminal_difference(line: Line, name: str) -> str:
    if name not in line.differences:
        return "-"
    value, interval = line.differences[name]
    colour = "green" if line.is_better(name) else "red"
    unsure = " (?)" if interval is not None and interval[0] <= 0 <= interval[1] else ""
    return f"[{colour}]{value:+.3f}[/]{unsure}{between(interval)}"


def _html(lines: list[Line], names: list[str], notes: list[str]) -> str:
    others = [f"{name} minus {names[0]}" for name in names[1:]]

    def cells(line: Line) -> list[str]:
        found = [escape(text) for text in _titles(line)]
        for name in names:
            row = line.rows.get(name)
            against = row and f" <br><small>{row.baseline_name.replace('_', ' ')} {row.baseline:.4g}</small>"
            found.append(f"{row.model:.4g}{interval_text(row.interval)}{against}" if row else "-")
        for name in names[1:]:
            has_one = name in line.differences
            value, interval = line.differences.get(name, (0.0, None))
            found.append(difference_text(value, line.is_better(name), interval) if has_one else "-")
        return found

    used = dict.fromkeys(row.baseline_name for line in lines for row in line.rows.values())
    told = [*notes, *(BASELINES.get(name, name) for name in used)]
    told.append("in brackets: 95 % interval over the samples (bootstrap); of a difference on the same samples")
    below = "".join(f'<p class="note">{escape(note)}</p>' for note in told)
    head = ("task", "measure", *names, *others)
    return f"<h2>The same held-out samples</h2>{table_of(head, map(cells, lines), (*names, *others))}{below}"
