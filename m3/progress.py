"""Speed, data wait and skipped samples of a run, and its `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from m3.errors import M3Error
from m3.types import Batch


class Clock:
    """Counts samples, seconds and skipped files between two lines of metrics."""

    def __init__(self, console: Console, start: int, batch_size: int, samples: int) -> None:
        self.console, self.batch_size, self.samples = console, batch_size, samples
        self.step, self.since, self.waited = start, time.perf_counter(), 0.0
        self.seen = 0
        self.skipped: dict[str, None] = {}

    def count_skipped(self, batches: list[Batch], limit: float) -> None:
        """Count the samples that this process could not read, each once; raise past the limit, naming the first."""
        self.seen += sum(len(batch) for batch in batches)
        for message in (message for batch in batches for message in batch.skipped):
            if message not in self.skipped and len(self.skipped) < 3:
                self.console.print(f"[yellow]skipped[/] {message}", highlight=False, soft_wrap=True)
            self.skipped[message] = None
        seen = min(self.seen, self.samples)
        if len(self.skipped) > 10 + limit * seen:
            raise M3Error(
                f"{len(self.skipped)} of {seen} samples can't be read, more than data.max_unreadable = {limit} allows; "
                f"the first: {next(iter(self.skipped))}. Repair the data or raise the limit."
            )

    def line(self, step: int, values: dict[str, float], lr: float, norm: float) -> dict[str, Any]:
        """Make one line of metrics for the steps since the last one.

        Raises:
            M3Error: the loss is not finite.
        """
        now = time.perf_counter()
        seconds, steps = now - self.since, step - self.step
        line = {"step": step, **values, "lr": lr, "gradient_norm": norm}
        line |= {"samples_per_second": steps * self.batch_size / seconds, "data_wait": self.waited / seconds}
        line["skipped"] = len(self.skipped)
        self.step, self.since, self.waited = step, now, 0.0
        if not all(map(math.isfinite, values.values())):
            raise M3Error(
                f"step {step}: the loss is not finite ({values}); lower train.lr, set train.clip, or resume from the "
                f"last checkpoint with --resume."
            )
        return line


def append(run: Path, line: dict[str, Any]) -> None:
    """Append a line to the `metrics.jsonl` of a run."""
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def cut(run: Path, start: int) -> None:
    """Drop the lines of metrics after the step that a run starts from."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] <= start] if start else []
    metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
