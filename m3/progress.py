"""Speed, data wait and skipped samples of a run, and its `metrics.jsonl`."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers.utils import logging

from m3.errors import M3Error
from m3.types import Batch

METRICS, SKIPPED = "metrics.jsonl", "skipped.jsonl"
HELD_OUT = "held_out/"
"""What the names of measures on held-out samples begin with in `metrics.jsonl`."""
BASELINE = "baseline/"
"""What those of the baselines begin with."""


class Skipped:
    """The samples that could not be read, each counted once."""

    def __init__(self, console: Console, what: str, samples: int | None, limit: float) -> None:
        self.console, self.what, self.samples, self.limit = console, what, samples, limit
        self.seen = self.fitted = 0
        self.messages: dict[str, str] = {}
        """Sentence -> origin of the sample."""

    def count(self, batch: Batch, is_trained_on: bool = True) -> Batch:
        """Count what this process could not read and return the batch; raise past the limit, naming the first.

        Samples that a measure is fitted on are read once more by a run that resumes, so they are counted apart.
        """
        if is_trained_on:
            self.seen += len(batch)
        else:
            self.fitted += len(batch)
        for message, origin in zip(batch.skipped, batch.origins, strict=True):
            if message not in self.messages and len(self.messages) < 3:
                self.console.print(f"[yellow]skipped[/] {message}", highlight=False, soft_wrap=True)
            self.messages[message] = origin
        seen = self.seen + self.fitted
        seen = seen if self.samples is None else min(seen, self.samples)
        if len(self.messages) > 10 + self.limit * seen:
            raise M3Error(
                f"{len(self.messages)} of {seen} {self.what} can't be read, more than data.max_unreadable = "
                f"{self.limit} allows; the first: {next(iter(self.messages))}. Repair the data or raise the limit."
            )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted, for a checkpoint."""
        return {"seen": self.seen, "messages": self.messages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.seen, self.messages = state["seen"], dict(state["messages"])

    @property
    def by_origin(self) -> dict[str, int]:
        """How many were skipped of each part of the data, most first."""
        return dict(Counter(self.messages.values()).most_common())

    def report(self) -> None:
        """Say at the end of a run how many were skipped."""
        if self.messages:
            count, first = len(self.messages), next(iter(self.messages))
            self.console.print(f"[yellow]{count} unreadable {self.what} were skipped[/]: {first}", highlight=False)
            for origin, skipped in self.by_origin.items():
                self.console.print(f"  {skipped} of {origin}", highlight=False, soft_wrap=True)


class Clock:
    """Measures speed and waiting between two lines of metrics."""

    PATIENCE = 30.0
    """Seconds of training after which a run is worth the seconds that `highest` takes."""

    def __init__(self, start: int, batch_size: int, highest: Callable[[], float | None] | None = None) -> None:
        """Start measuring.

        Args:
            start: steps that are done.
            batch_size: samples of a step, on all processes.
            highest: measures the samples/s that utilisation is a share of; None, or from it: utilisation is not told.
        """
        self.batch_size, self.measure_highest = batch_size, highest
        self.highest: float | None = None
        self.trained = 0.0
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

    def line(
        self, step: int, values: dict[str, float], lr: float, norm: float, skipped: dict[str, int]
    ) -> dict[str, Any]:
        """Make one line of metrics for the steps since the last one; the first step of a run has no speed.

        Values that are not finite are left out: JSON has none, and the step was skipped. `seconds` are those of
        training alone; summed up over the lines of a run they are its time. `skipped` is the number of unreadable
        samples, `skipped_of` that of each part of the data.
        """
        seconds, steps = time.perf_counter() - self.since, step - self.step
        measured = {**values, "lr": lr, "gradient_norm": norm}
        line: dict[str, Any] = {"step": step, **{key: x for key, x in measured.items() if math.isfinite(x)}}
        if steps:
            line |= {"samples_per_second": steps * self.batch_size / seconds, "data_wait": self.waited / seconds}
            line["seconds"] = seconds
            line |= self._utilisation(line["samples_per_second"], seconds)
        line["skipped"] = sum(skipped.values())
        line |= {"skipped_of": skipped} if skipped else {}
        self.restart(step)
        return line

    def _utilisation(self, speed: float, seconds: float) -> dict[str, float]:
        """Return the share of the highest speed that is reached, once the run has lasted."""
        self.trained += seconds
        if self.measure_highest and self.trained > self.PATIENCE:
            self.highest, self.measure_highest = self.measure_highest(), None
        return {"utilisation": speed / self.highest} if self.highest else {}


def means(names: list[str], sums: Tensor, counts: Tensor) -> dict[str, float]:
    """Return the mean of every part in which anything counted."""
    known = zip(names, (sums / counts.clamp(min=1)).tolist(), counts.tolist(), strict=True)
    return {name: value for name, value, count in known if count}


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


class Lines:
    """A file of JSON lines. Those that the disk does not take wait and are written with the next ones."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path, self.console = path, console
        self.waiting: list[str] = []
        self.has_warned = False

    def append(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self.waiting.append(json.dumps(line) + "\n")
        try:
            self._write()
        except OSError as error:
            if not self.has_warned:
                self.console.print(
                    f"[red]{self.path} can't be written[/]: {error.strerror}; training goes on and its lines are kept "
                    f"for later. Make room.",
                    highlight=False,
                    soft_wrap=True,
                )
            self.has_warned = True

    def sync(self) -> None:
        """Force all lines to disk, before something that relies on them.

        Raises:
            OSError: some still wait for room.
        """
        if self.waiting:
            raise OSError(errno.ENOSPC, f"{len(self.waiting)} lines wait for room", str(self.path))
        if self.path.is_file():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())

    def _write(self) -> None:
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(self.waiting)
        except OSError:
            if self.path.is_file():
                os.truncate(self.path, size)  # half a line may have been written
            raise
        self.waiting = []


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of a file, [] where there is none; a last one that was cut off in writing is left out.

    Raises:
        M3Error: another line is damaged.
    """
    if not path.is_file():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if texts and not texts[-1].endswith("\n"):
        texts.pop()
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise M3Error(f"{path}: line {number} is no JSON ({error}); remove it.") from error
    return lines


def cut(run: Path, start: int, is_finished: bool) -> None:
    """Drop the lines of metrics and of skipped steps that a run will write again.

    Args:
        run: run folder.
        start: step that the run continues at.
        is_finished: no step is left, only the final measuring, whose line is then written again.
    """
    for name in (METRICS, SKIPPED):
        path = run / name
        kept = [line for line in read_json_lines(path) if _is_kept(line, start, is_finished)] if start else []
        if path.is_file() or name == METRICS:
            aside = path.with_name(f".{name}.partial")  # a kill between emptying and filling would lose all lines
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(aside, path)


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
