"""Checkpoints on disk: written aside, then renamed, so that a folder with the right name is always whole.

`state.json` has the size and checksum of every other file, so that one that was damaged later is found out.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m3.errors import M3Error

STATE = "state.json"
CAN_OPEN_FOLDERS = os.name != "nt"
BLOCK = 1 << 22
Work = Callable[[], None]
Shapes = Mapping[str, tuple[int, ...]]
WRITTEN = (
    "recipe.yaml",
    "metrics.jsonl",
    "skipped.jsonl",
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
    target: Path, fill: Callable[[Path], None], state: dict[str, Any], is_main: bool, together: Callable[[Work], None]
) -> None:
    """Write a checkpoint so that it appears at once or not at all.

    Args:
        target: final folder.
        fill: writes everything into the folder it is given; called by every process.
        state: small facts (step, shape of the model) written as JSON with the checksums, by the main process.
        is_main: this process makes and renames the folder.
        together: does a piece of work in every process and returns when all have done it; what fails in one is raised
            in all, so that none waits for it.
    """
    aside = partial(target)

    def begin() -> None:
        remove(aside)
        aside.mkdir(parents=True)

    def end() -> None:
        files = {path.relative_to(aside).as_posix(): checksum(path) for path in _files(aside)}
        (aside / STATE).write_text(json.dumps({**state, "files": files}, indent=2), encoding="utf-8")
        for path in [*aside.rglob("*"), aside]:
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.replace(aside, target)
        _flush(target.parent)

    together(begin if is_main else lambda: None)
    together(lambda: fill(aside))
    together(end if is_main else lambda: None)


def partial(target: Path) -> Path:
    """Return where a checkpoint lies while it is written or removed."""
    return target.with_name(f".{target.name}.partial")


def remove(folder: Path) -> None:
    """Remove a folder as far as that is possible: the disk it lies on may be what failed."""
    shutil.rmtree(folder, ignore_errors=True)


def checksum(path: Path) -> str:
    """Return the size and CRC-32 of a file, e.g. `1024 bytes, crc32 0badcafe`."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return f"{size} bytes, crc32 {crc:08x}"


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, naming the file; None: it is as it was written."""
    try:
        files = read_state(checkpoint)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE} can't be read ({error!r})"
    for name, written in files.items():
        try:
            found = checksum(checkpoint / name)
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
        if found != written:
            return f"{name} is damaged (written: {written}; found: {found})"
    return None


def whole_ones(run: Path) -> list[Path]:
    """Return the checkpoints of a run that have a state, the newest first; their files may be damaged."""
    return sorted((path for path in (run / "checkpoints").glob("step-*") if (path / STATE).is_file()), reverse=True)


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run."""
    return next(iter(whole_ones(run)), None)


def newest_undamaged(run: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is as it was written; None where there never was one.

    A damaged one is moved to `damaged-NAME`, so that it neither counts nor is lost, and reported.

    Raises:
        M3Error: all are damaged.
    """
    found = whole_ones(run)
    reasons = []
    for path in found:
        reason = damage(path)
        if reason is None:
            return path
        aside = path.with_name(f"damaged-{path.name}")
        remove(aside)
        path.rename(aside)
        reasons.append(f"{path}: {reason}")
        report(f"{reasons[-1]}; it was moved to {aside.name}, and the checkpoint before it is tried")
    if reasons:
        raise M3Error(
            f"no checkpoint of {run} is undamaged; of the newest, {reasons[0]}. Repair the disk or bring the folder "
            f"back from a copy, or start anew without --resume."
        )
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON facts of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def prune(run: Path, keep: int, every: int | None = None, best: int | None = None) -> None:
    """Remove old checkpoints and what an interrupted write left behind.

    Args:
        run: run folder.
        keep: how many of the newest stay.
        every: those of steps that are multiples of it stay too.
        best: step of one more that stays.
    """
    folder = run / "checkpoints"
    for path in sorted(folder.glob("step-*"))[:-keep]:
        step = int(path.name.removeprefix("step-"))
        if step != best and not (every and step % every == 0):
            path.rename(partial(path))  # a name that tells a half removed one from a whole one
    for path in folder.glob(".step-*.partial"):
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


def check_same_weights(saved: Shapes, wanted: Shapes, checkpoint: Path) -> None:
    """Raise when a checkpoint's weights have other names or shapes than this version gives to those of its model."""
    others = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if others:
        reason = f"the names or shapes of {len(others)} weights are others, e.g. `{others[0]}`"
        raise another_version(checkpoint, reason)


def another_version(checkpoint: Path, reason: str) -> M3Error:
    """Return the error of a checkpoint that this version can't read."""
    return M3Error(
        f"{checkpoint} was written by another version of M3: {reason}; use the version that wrote it, which "
        f"{checkpoint.parent.parent / 'run.json'} names."
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


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


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
