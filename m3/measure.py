"""`m3 eval`: measure a trained model on held-out samples, of its own data or of others, and write a report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from m3.data.source import open_source
from m3.errors import M3Error
from m3.evaluate.task import Row, Task, build_tasks
from m3.held_out import HeldOut
from m3.inputs import open_model
from m3.model import M3Model
from m3.overrides import with_overrides
from m3.progress import METRICS, Lines, Skipped
from m3.recipe import Recipe, load_recipe, recipe_from
from m3.report import Report
from m3.show import metrics_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = ("data", "evaluate", "seed")
"""Sections of a recipe that measuring may change; the rest belongs to the model."""


def measure(path: str, overrides: list[str], tasks: list[str], data: str | None, out: Path | None) -> list[Row]:
    """Measure a model, print the table and write `report.html` and `report.json`.

    Args:
        path: folder of a model or of its run, or Hub id.
        overrides: `a.b=c`, changes to the recipe's `data`, `evaluate` and `seed`.
        tasks: `TYPE`, `TYPE:LABEL` or `TYPE:LABEL:BASELINE,...` each, instead of the recipe's tasks.
        data: `world`, `digits` or another source, or a folder or manifest; None: what the model was trained on.
        out: folder of the report; None: `eval` in the model's folder.

    Raises:
        M3Error: no such model, a task or data that don't suit it, or nothing held out.
    """
    console = Console()
    measured, model = open_measured(path, overrides)
    recipe = measuring_recipe(Path(path), model, overrides, tasks, data)
    parts = build_tasks(recipe.evaluate.tasks, model, recipe.seed)
    if not parts:
        raise M3Error("nothing to measure; give e.g. --task spread, or --task knn:LABEL.")
    folder = out or _home(Path(path)) / "eval"
    measuring = hold_out(recipe, model, parts, folder, console)
    rows = measuring.measure()
    assert rows, "held-out samples and tasks give rows"
    console.print(metrics_table(rows))
    facts = {
        "model": measured,
        **facts_of(measuring),
    }
    measuring.draw(folder / "preview.png")
    pictures: dict[str, Figure | Path] = {"Predictions": folder / "preview.png"} if measuring.drawn else {}
    pictures |= measuring.figures() | measuring.attention()
    report = Report(f"{name_of(path)} on held-out samples", facts, rows, pictures, settings_of(recipe))
    console.print(f"Report: {report.write(folder)}", highlight=False, soft_wrap=True)
    return rows


def open_measured(path: str, overrides: list[str]) -> tuple[str, M3Model]:
    """Open a model; of a run whose recipe measures averaged weights (`evaluate.weights: ema`), the one that has them.

    Returns:
        Its folder, or Hub id, and the model.
    """
    model, _ = open_model(path)
    averaged, wanted = Path(path) / "model_ema", [text for text in overrides if text.startswith("evaluate.weights=")]
    if averaged.is_dir() and measuring_recipe(Path(path), model, wanted, [], None).evaluate.weights == "ema":
        return str(averaged), open_model(str(averaged))[0]
    return path, model


def hold_out(recipe: Recipe, model: M3Model, tasks: list[Task], folder: Path, console: Console) -> HeldOut:
    """Open the held-out samples of a recipe's data for a model, and training samples as they are.

    Raises:
        M3Error: nothing is held out, or the data don't suit the model.
    """
    data, seed = recipe.data, recipe.seed
    source, held_out = (open_source(data, model.modalities, seed, split) for split in ("train", "held_out"))
    if not len(held_out):
        raise M3Error(
            f"no sample of {len(source)} is held out (at most a tenth is, by data.held_out); give more data or a "
            f"manifest with a column `split`."
        )
    skipped = Skipped(console, "samples", len(source), data.max_unreadable)
    return HeldOut(recipe, model, tasks, source, held_out, skipped, console, Lines(folder / METRICS, console))


def facts_of(measuring: HeldOut) -> dict[str, str]:
    """Say on what was measured, and by which command."""
    data, spec = measuring.recipe.data, measuring.recipe.evaluate
    return {
        "data": f"{data.source} {data.root or ''}".strip(),
        "samples": f"{min(len(measuring.samples.source), spec.samples)} held out, "
        f"{min(len(measuring.train.source), spec.fit_samples)} training samples to learn from",
        "command": shlex.join(["m3", *sys.argv[1:]]),
    }


def settings_of(recipe: Recipe) -> str:
    """Return the sections of a recipe by which was measured, as YAML."""
    sections = recipe.model_dump(mode="json", include=set(OURS))
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=110)


def measuring_recipe(path: Path, model: M3Model, overrides: list[str], tasks: list[str], data: str | None) -> Recipe:
    """Return the recipe that the model was trained by, with other data and tasks."""
    if wrong := next((text for text in overrides if text.split("=")[0].split(".")[0] not in OURS), None):
        raise M3Error(f"`{wrong}` would change the model; only {', '.join(OURS)} can be set here.")
    changes = []
    if data is not None:
        is_file = Path(data).exists()
        changes += ["data.source=folder", f"data.root={data}"] if is_file else [f"data.source={data}", "data.root="]
        changes += ["data.options={}"] if is_file or data != "world" else []
    entries = dict(_task(text) for text in tasks)
    for place in (path / "recipe.yaml", path / "model" / "recipe.yaml"):
        if place.is_file():
            found = load_recipe(place).model_dump(mode="json")
            break
    else:
        found = {"name": path.name, "modalities": model.config.modalities, "train": {"steps": 1}}
        found |= {"objectives": model.config.objectives or {"none": {}}}
    if entries:
        found["evaluate"] = {**found.get("evaluate", {}), "tasks": entries}
    if data is not None:
        found["data"] = {**found.get("data", {}), "options": {}, "root": None, "repeats": 1, "bucket": None}
    return recipe_from(with_overrides(found, [*changes, *overrides]), str(path), default_name=path.name)


def _task(text: str) -> tuple[str, dict[str, Any]]:
    """Read `TYPE`, `TYPE:LABEL` or `TYPE:LABEL:BASELINE,BASELINE`."""
    kind, label, baselines, *_ = (*text.split(":", 2), "", "")
    entry: dict[str, Any] = {"type": kind}
    entry |= {"label": label} if label else {}
    entry |= {"baseline": baselines.split(",")} if baselines else {}
    return f"{kind} of {label}" if label else kind, entry


def _home(path: Path) -> Path:
    """Return the folder of a model or run; the working folder for one of the Hub."""
    return path if path.is_dir() else Path()


def name_of(path: str) -> str:
    """Return the name of a model or run, by its folder."""
    name = Path(path).resolve().name
    return Path(path).resolve().parent.name if name in ("model", "model_ema") else name
