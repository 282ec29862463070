"""Does a representation collapse: are features that should tell samples apart becoming the same?

Letters: R rows of features (tokens or samples), D width.
"""

from __future__ import annotations

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
