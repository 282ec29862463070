"""`m3 compare --by-step`: the losses of two runs, or of two revisions of this code, step by step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from m3.errors import M3Error
from m3.metrics import Line, read_lines


@dataclass(frozen=True)
class Difference:
    """How far two runs differ in one metric.

    Attributes:
        steps: how many steps both have it.
        first: first step at which the two are not equal bit for bit; None: none.
        largest: largest absolute difference.
        relative: largest difference relative to the larger of the two values.
    """

    steps: int
    first: int | None
    largest: float
    relative: float


def compare_steps(one: Path, other: Path, tolerance: float = 0.0) -> dict[str, Difference]:
    """Print how far the losses and gradient norms of two runs differ, and raise when it is too much.

    Args:
        one: a run folder.
        other: another.
        tolerance: largest relative difference that is allowed; 0: equal bit for bit.

    Raises:
        M3Error: no step or loss in common, or a difference above the tolerance.
    """
    left, right = _by_step(one), _by_step(other)
    steps = sorted(set(left) & set(right))
    names = [
        name for name in next(iter(left.values()), {}) if all(name in run[s] for run in (left, right) for s in steps)
    ]
    if not steps or not names:
        raise M3Error(f"compare: {one} and {other} have no step and loss in common; set the same `train.log_every`.")
    found = {name: _difference(name, left, right, steps) for name in names}
    console = Console()
    console.print(f"{len(steps)} steps in both, {steps[0]} to {steps[-1]}")
    for name, part in found.items():
        if part.first is None:
            console.print(f"  {name}: equal bit for bit", highlight=False)
        else:
            size = f"{part.largest:.3g} ({part.relative:.3g} of it)"
            console.print(f"  {name}: differs from step {part.first} on, by at most {size}", highlight=False)
    worst = max(found, key=lambda name: found[name].relative)
    if found[worst].relative > tolerance:
        raise M3Error(
            f"{one} and {other} are not the same: `{worst}` differs by {found[worst].relative:.3g} of its value, "
            f"more than --tolerance {tolerance:g} allows."
        )
    return found


def compare_revisions(revisions: list[str], recipe: str, overrides: list[str], steps: int, tolerance: float) -> None:
    """Train a recipe for a few steps with each of two git revisions of this code and compare the losses.

    Every step is logged, in float32 and one thread, so that equal code gives equal bits.

    Raises:
        M3Error: this code lies in no git checkout, there is no such revision, a run failed, or the losses differ.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        raise M3Error("compare: --revisions needs M3's own git checkout; this one is installed as a package.")
    with tempfile.TemporaryDirectory() as folder:
        one, other = (_run_of(root, revision, Path(folder), recipe, overrides, steps) for revision in revisions)
        compare_steps(one, other, tolerance)


def _run_of(root: Path, revision: str, folder: Path, recipe: str, overrides: list[str], steps: int) -> Path:
    """Train with one revision and return its run folder."""
    place = folder / revision.replace("/", "_")
    made = subprocess.run(
        ["git", "-C", str(root), "worktree", "add", "--detach", str(place / "code"), revision],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise M3Error(f"compare: git has no revision `{revision}`: {made.stderr.strip().splitlines()[-1]}")
    fixed = [f"train.steps={steps}", "train.log_every=1", "train.precision=fp32", "train.threads=1"]
    command = [
        sys.executable,
        "-m",
        "m3.cli",
        "train",
        recipe,
        *overrides,
        *fixed,
        f"out={place / 'run'}",
        "evaluate.tasks=",
    ]
    try:
        ran = subprocess.run(
            command,
            cwd=place / "code",
            env={**os.environ, "PYTHONPATH": str(place / "code")},
            capture_output=True,
            text=True,
        )
    finally:
        subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", str(place / "code")], check=True)
    if ran.returncode:
        raise M3Error(
            f"compare: training with {revision} failed: {(ran.stderr or ran.stdout).strip().splitlines()[-1]}"
        )
    return place / "run"


def _by_step(run: Path) -> dict[int, dict[str, float]]:
    return {line.step: _compared(line) for line in read_lines(run) if line.values}


def _compared(line: Line) -> dict[str, float]:
    return line.losses | {name: line.values[name] for name in ("gradient_norm",) if name in line.values}


def _difference(
    name: str, left: dict[int, dict[str, float]], right: dict[int, dict[str, float]], steps: list[int]
) -> Difference:
    pairs = [(step, left[step][name], right[step][name]) for step in steps]
    unequal = [(step, abs(a - b), abs(a - b) / max(abs(a), abs(b))) for step, a, b in pairs if a != b]
    first = unequal[0][0] if unequal else None
    return Difference(len(steps), first, *(max((row[i] for row in unequal), default=0.0) for i in (1, 2)))
