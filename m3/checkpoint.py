"""Checkpoints on disk: written aside, then renamed, so that a folder with the right name is always whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3.errors import M3Error

STATE = "state.json"
CAN_OPEN_FOLDERS = os.name != "nt"
WRITTEN = (
    "recipe.yaml",
    "metrics.jsonl",
    "checkpoints",
    "model",
    "model_ema",
    "preview.png",
    "previews",
    "logs",
    "curves.png",
    "report.html",
    "report.json",
    "run.json",
    "eval",
)
"""What a run writes into its folder."""


def folder_of(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def write(
    target: Path, fill: Callable[[Path], None], state: dict[str, Any], is_main: bool, wait: Callable[[], None]
) -> None:
    """Write a checkpoint so that it appears at once or not at all.

    Args:
        target: final folder.
        fill: writes everything into the folder it is given; called by every process.
        state: small facts (step, shape of the model) written as JSON, by the main process.
        is_main: this process makes and renames the folder.
        wait: returns when all processes have called it.
    """
    aside = target.with_name(f".{target.name}.partial")
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    wait()
    fill(aside)
    wait()
    if is_main:
        (aside / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        for path in aside.rglob("*"):
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.replace(aside, target)
        _flush(target.parent)
    wait()


def newest(run: Path) -> Path | None:
    """Return the newest whole checkpoint of a run."""
    found = sorted(path for path in (run / "checkpoints").glob("step-*") if (path / STATE).is_file())
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON facts of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and what an interrupted write left behind."""
    folder = run / "checkpoints"
    for path in sorted(folder.glob("step-*"))[:-keep] + list(folder.glob(".step-*.partial")):
        shutil.rmtree(path)


def set_aside(run: Path) -> Path | None:
    """Move what an earlier run left in a run folder to `NAME.1`, `NAME.2`, ...; nothing is ever overwritten.

    Returns:
        Where it lies now, or None if there was nothing worth keeping.
    """
    metrics = run / "metrics.jsonl"
    has_metrics = metrics.is_file() and metrics.stat().st_size > 0
    if not (newest(run) or has_metrics or (run / "model").is_dir()):
        return None
    run = run.resolve()
    number = 1
    while (aside := run.with_name(f"{run.name}.{number}")).exists():
        number += 1
    aside.mkdir()
    for name in WRITTEN:
        if (run / name).exists():
            (run / name).rename(aside / name)
    return aside


def check_same_model(saved: dict[str, Any], wanted: dict[str, Any], checkpoint: Path) -> None:
    """Raise when a checkpoint belongs to another model than the recipe describes, naming the first difference."""
    difference = _first_difference(saved, wanted, "")
    if difference:
        raise M3Error(
            f"{checkpoint} was made by another recipe: {difference}; resume with {_own_recipe(checkpoint)} or choose "
            f"another `name`."
        )


def check_same_order(saved: dict[str, Any], wanted: dict[str, Any], checkpoint: Path) -> None:
    """Raise when the samples would come in another order than before, naming the first difference."""
    difference = _first_difference(saved, wanted, "")
    if difference:
        raise M3Error(
            f"{checkpoint} was trained on other data: {difference}, so some samples would be repeated and others left "
            f"out; resume with {_own_recipe(checkpoint)} or start anew without --resume."
        )


def _own_recipe(checkpoint: Path) -> str:
    return f"its own recipe ({checkpoint.parent.parent / 'recipe.yaml'})"


def _first_difference(saved: Any, wanted: Any, path: str) -> str | None:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        # Named parts (modalities, objectives, targets) are numbered in their order: tokens, shares, optimizer state.
        are_parts = all(isinstance(part, dict) for part in saved.values())
        if are_parts and list(saved) != list(wanted) and set(saved) == set(wanted):
            return f"`{path}` are in the order {', '.join(saved)} there and {', '.join(wanted)} here"
        for key in [*saved, *(k for k in wanted if k not in saved)]:
            inner = f"{path}.{key}".strip(".")
            difference = _first_difference(saved.get(key), wanted.get(key), inner)
            if difference:
                return difference
        return None
    return None if saved == wanted else f"`{path}` is {saved!r} there and {wanted!r} here"


def _flush(path: Path) -> None:
    """Force a file or folder to disk, so that the rename can't overtake its content."""
    is_folder = path.is_dir()
    if is_folder and not CAN_OPEN_FOLDERS:
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes only what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
