"""Speed, data wait and skipped samples of a run, and its `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers.utils import logging

from m3.errors import M3Error
from m3.types import Batch

HELD_OUT = "held_out/"
"""What the names of measures on held-out samples begin with in `metrics.jsonl`."""
BASELINE = "baseline/"
"""What those of the baselines begin with."""


class Skipped:
    """The samples that could not be read, each counted once."""

    def __init__(self, console: Console, what: str, samples: int | None, limit: float) -> None:
        self.console, self.what, self.samples, self.limit = console, what, samples, limit
        self.seen = 0
        self.messages: dict[str, None] = {}

    def count(self, batch: Batch) -> Batch:
        """Count what this process could not read and return the batch; raise past the limit, naming the first."""
        self.seen += len(batch)
        for message in batch.skipped:
            if message not in self.messages and len(self.messages) < 3:
                self.console.print(f"[yellow]skipped[/] {message}", highlight=False, soft_wrap=True)
            self.messages[message] = None
        seen = self.seen if self.samples is None else min(self.seen, self.samples)
        if len(self.messages) > 10 + self.limit * seen:
            raise M3Error(
                f"{len(self.messages)} of {seen} {self.what} can't be read, more than data.max_unreadable = "
                f"{self.limit} allows; the first: {next(iter(self.messages))}. Repair the data or raise the limit."
            )
        return batch

    def report(self) -> None:
        """Say at the end of a run how many were skipped."""
        if self.messages:
            count, first = len(self.messages), next(iter(self.messages))
            self.console.print(f"[yellow]{count} unreadable {self.what} were skipped[/]: {first}", highlight=False)


class Clock:
    """Measures speed and waiting between two lines of metrics."""

    def __init__(self, start: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart(start)

    def restart(self, step: int) -> None:
        """Measure from here: called after the first step, which starts workers and compiles."""
        self.step, self.since, self.waited = step, time.perf_counter(), 0.0

    def leave_out(self, since: float) -> None:
        """Take the time from `since` (of `perf_counter`) until now out of the measure: saving, evaluating."""
        self.since += time.perf_counter() - since

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def line(self, step: int, values: dict[str, float], lr: float, norm: float, skipped: int) -> dict[str, Any]:
        """Make one line of metrics for the steps since the last one; the first step of a run has no speed.

        `seconds` are those of training alone; summed up over the lines of a run they are its time.
        """
        seconds, steps = time.perf_counter() - self.since, step - self.step
        line = {"step": step, **values, "lr": lr, "gradient_norm": norm}
        if steps:
            line |= {"samples_per_second": steps * self.batch_size / seconds, "data_wait": self.waited / seconds}
            line["seconds"] = seconds
        line["skipped"] = skipped
        self.restart(step)
        return line


def means(names: list[str], sums: Tensor, counts: Tensor) -> dict[str, float]:
    """Return the mean of every part in which anything counted."""
    known = zip(names, (sums / counts.clamp(min=1)).tolist(), counts.tolist(), strict=True)
    return {name: value for name, value, count in known if count}


def are_finite(values: dict[str, float]) -> bool:
    """Return True when no value is infinite or NaN."""
    return all(map(math.isfinite, values.values()))


def not_finite(step: int, what: str, newest: Path | None) -> M3Error:
    """Make the error of a run that has become infinite or NaN.

    Args:
        step: where it was found.
        what: that is not finite.
        newest: last checkpoint, which is from before.
    """
    remedy = f"go on from the last good checkpoint, {newest}, with --resume" if newest else "start again"
    return M3Error(
        f"step {step}: {what} are not finite, so nothing more is saved; lower train.lr or set train.clip (e.g. 1.0), "
        f"then {remedy}. With the same settings it will happen again."
    )


def append(run: Path, line: dict[str, Any]) -> None:
    """Append a line to the `metrics.jsonl` of a run."""
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def cut(run: Path, start: int, is_finished: bool) -> None:
    """Drop the lines of metrics that a run will write again.

    Args:
        run: run folder.
        start: step that the run continues at.
        is_finished: no step is left, only the final measuring, whose line is then written again.
    """
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    kept = [line for line in lines if _is_kept(json.loads(line), start, is_finished)] if start else []
    metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _is_kept(line: dict[str, Any], start: int, is_finished: bool) -> bool:
    is_measured = any(key.startswith(HELD_OUT) for key in line)
    return line["step"] < start or (line["step"] == start and not (is_finished and is_measured))


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars for files that are written or read in a moment."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
