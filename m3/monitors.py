"""Does a run go wrong: do its features collapse, its losses leap, its memory grow, does it wait for data?

Letters: R rows of features (tokens or samples), D width.
"""

from __future__ import annotations

import os
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from m3.processes import gather

ROWS = 1024
"""Rows of a feature matrix that are looked at, on each process, evenly spaced."""

LEAST = 0.01
"""Deviation of features over their root mean square below which they count as collapsed."""


@torch.no_grad()
def deviation(x: Tensor) -> Tensor:
    """Return () the deviation over the rows of x (R, D), mean over its columns (data2vec's collapse monitor)."""
    return (x.var(0) + 1e-12).sqrt().mean()


@torch.no_grad()
def effective_rank(x: Tensor) -> Tensor:
    """Return () in [1, min(R, D)]: RankMe (Garrido et al. 2023), the exponential of the singular values' entropy."""
    values = torch.linalg.svdvals(x)
    share = values / values.sum().clamp(min=1e-12)
    return torch.exp(-(share * (share + 1e-7).log()).sum())


class Watch:
    """Measures the features that objectives report, and warns once of those that collapse."""

    def __init__(self, console: Console, warmup: int) -> None:
        """Watch over a run.

        Args:
            console: where to warn.
            warmup: steps after which a warning makes sense; fresh networks say nearly the same of everything.
        """
        self.console, self.warmup = console, warmup
        self.warned: set[str] = set()

    def __call__(self, watched: dict[str, Tensor], step: int) -> dict[str, float]:
        """Return `NAME deviation` and `NAME rank` of the features of all processes, for a line of metrics."""
        rows = {name: x[:: max(1, -(-len(x) // ROWS))].float() for name, x in watched.items()}
        measured: dict[str, float] = {}
        for name, x in gather(rows).items():
            spread, size = float(deviation(x)), float(x.square().mean().sqrt())
            measured |= {f"{name} deviation": spread, f"{name} rank": float(effective_rank(x))}
            if step > self.warmup and spread < LEAST * size and name not in self.warned:
                self.warned.add(name)
                self.console.print(
                    f"[yellow]step {step}: `{name}` collapses[/]: its features differ by {spread:.2g} at a size of "
                    f"{size:.2g}, so the loss says nothing any more; raise train.ema, lower train.lr or change masks",
                    highlight=False,
                    soft_wrap=True,
                )
        return measured


class Health:
    """Looks at the lines of metrics and warns once of a loss that leaps, of growing memory and of slow data."""

    LINES = 30
    """Lines of metrics that a warning looks back on."""

    LEAP = 10.0
    """Median distances to its median at which a loss leaps; a normal value is that far out once in 10^11."""

    GROWTH = 1.25
    """Memory now, relative to that before half of the lines, at which it grows."""

    WAIT = 0.3
    """Share of the time spent on waiting for data at which the loader is too slow."""

    def __init__(self, console: Console, warmup: int) -> None:
        """Watch over a run.

        Args:
            console: where to warn.
            warmup: steps in which losses may leap.
        """
        self.console, self.warmup = console, warmup
        self.lines: deque[dict[str, Any]] = deque(maxlen=self.LINES)
        self.warned: set[str] = set()

    def __call__(self, line: dict[str, Any], losses: dict[str, float]) -> None:
        """Look at a line of metrics before it counts as normal.

        Args:
            line: of metrics.
            losses: the parts of the loss in it.
        """
        if len(self.lines) == self.LINES:
            for name in losses if line["step"] > self.warmup else ():
                self._look_at_loss(name, line)
            self._look_at_memory(line)
            self._look_at_data(line)
        self.lines.append({**line, "memory": resident_memory()})

    def _look_at_loss(self, name: str, line: dict[str, Any]) -> None:
        known = [x[name] for x in self.lines if name in x]
        if len(known) < self.LINES // 2 or name not in line:
            return
        middle = statistics.median(known)
        distance = statistics.median(abs(x - middle) for x in known)
        if line[name] - middle > self.LEAP * max(distance, 0.01 * abs(middle)):
            self._warn(
                name,
                f"the loss `{name}` leaps to {line[name]:.3g}; the median of the last {len(known)} lines is "
                f"{middle:.3g}. If it stays there, lower train.lr or set train.clip (e.g. 1.0)",
                line,
            )

    def _look_at_memory(self, line: dict[str, Any]) -> None:
        memory = [x["memory"] for x in self.lines]
        early, late = memory[: self.LINES // 2], memory[self.LINES // 2 :]
        if None not in memory and min(late) > max(early) and late[-1] > self.GROWTH * early[0]:
            steps = line["step"] - self.lines[0]["step"]
            self._warn(
                "memory",
                f"the memory of the training process grows: {early[0] / 2**20:.0f} MiB became {late[-1] / 2**20:.0f} "
                f"MiB in {steps} steps; look for a source or plugin that keeps what it has read",
                line,
            )

    def _look_at_data(self, line: dict[str, Any]) -> None:
        share = statistics.median(x.get("data_wait", 0.0) for x in self.lines)
        if share > self.WAIT:
            self._warn(
                "data",
                f"{share:.0%} of the time is spent waiting for data; raise data.workers or store it faster",
                line,
            )

    def _warn(self, what: str, sentence: str, line: dict[str, Any]) -> None:
        if what not in self.warned:
            self.warned.add(what)
            self.console.print(f"[yellow]step {line['step']}:[/] {sentence}", highlight=False, soft_wrap=True)


def resident_memory() -> int | None:
    """Return the bytes of memory that this process holds; None where the system does not say (only Linux does)."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else None
