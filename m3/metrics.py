"""Read a run folder's `metrics.jsonl`: one JSON object per line, of training or of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3.errors import M3Error
from m3.progress import BASELINE, HELD_OUT, read_json_lines

NO_LOSS = frozenset(
    ("step", "lr", "gradient_norm", "samples_per_second", "data_wait", "seconds", "skipped", "padding", "utilisation")
)
"""What a line of training says besides its losses and watched values."""


@dataclass(frozen=True)
class Line:
    """One line of metrics.

    Attributes:
        step: optimizer steps done.
        seconds: of training until then, evaluations and checkpoints left out.
        values: of a line of training: losses, `lr`, `gradient_norm` and so on; empty in an evaluation.
        held_out: task -> what the model reached on held-out samples; empty in a line of training.
        baselines: task -> what the baseline reached.
    """

    step: int
    seconds: float
    values: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, float]:
        """Return the parts of the loss and watched values alone."""
        return {name: value for name, value in self.values.items() if name not in NO_LOSS}


def read_lines(run: Path) -> list[Line]:
    """Return the lines of a run, in order. A last line that a killed run left unfinished is left out.

    Raises:
        M3Error: the folder has no metrics, or a line in their middle can't be read.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise M3Error(f"{run} is no folder of a run: it has no metrics.jsonl; give e.g. runs/quickstart.")
    seconds, lines = 0.0, []
    for entry in read_json_lines(file):
        seconds += entry.get("seconds", 0.0)
        lines.append(_line(entry, seconds))
    return lines


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _line(entry: dict[str, Any], seconds: float) -> Line:
    held_out = {key.removeprefix(HELD_OUT): value for key, value in entry.items() if key.startswith(HELD_OUT)}
    baselines = {key.removeprefix(BASELINE): value for key, value in entry.items() if key.startswith(BASELINE)}
    if held_out:
        return Line(entry["step"], seconds, {}, held_out, baselines)
    return Line(entry["step"], seconds, {key: value for key, value in entry.items() if isinstance(value, int | float)})
