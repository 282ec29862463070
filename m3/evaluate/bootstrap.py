"""How sure a held-out figure is: percentile intervals over samples that are drawn again (Efron 1979).

A figure is made of sums over samples: errors and their number, hits and queries, intersections and unions. Drawing
samples again draws what they add to these sums, so a ratio of sums and a root of one have intervals as a mean has.

Letters: n samples, S shape of what a sample adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DRAWS = 1000
LEVEL = 0.95
"""Share of the drawn figures that lie within an interval."""
Interval = tuple[float, float]
Finish = Callable[[Tensor], float]
"""Makes a figure of sums (S)."""


def ratio(sums: Tensor) -> float:
    """Return the first of two sums over the second: a mean where that is a number of things."""
    return float(sums[0] / sums[1])


@dataclass(frozen=True)
class Scores:
    """What single samples add to a figure of the model and to that of its baseline.

    Attributes:
        keys: (n,) int64 `Batch.keys` of the samples, each once.
        own: (n, S) float64, the model's.
        theirs: (n, S) float64, the baseline's.
        finish: makes a figure of their sums.
    """

    keys: Tensor
    own: Tensor
    theirs: Tensor
    finish: Finish

    def figures(self) -> tuple[float, float]:
        """Return the figure of the model and that of the baseline."""
        return self.finish(self.own.sum(0)), self.finish(self.theirs.sum(0))

    def intervals(self, seed: int) -> tuple[Interval | None, Interval | None]:
        """Return the 95 % interval of the model's figure, and that of its difference from the baseline's."""
        own, theirs = (drawn(sums, self.finish, seed) for sums in (self.own, self.theirs))
        return bounds(own), bounds(own - theirs)


class Tally:
    """What samples add to a figure, kept batch by batch."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, keys: Tensor, own: Tensor, theirs: Tensor) -> None:
        """Keep what the samples with these keys (B,) add: (B, S) of the model and of the baseline."""
        self._kept.append((keys.cpu(), own.detach().double().cpu(), theirs.detach().double().cpu()))

    def scores(self, finish: Finish) -> Scores | None:
        """Return what was kept and begin anew; None: nothing was."""
        kept, self._kept = self._kept, []
        if not sum(len(keys) for keys, _, _ in kept):
            return None
        keys, own, theirs = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return Scores(keys, own, theirs, finish)


def of_hits(keys: Tensor, own: Tensor, theirs: Tensor) -> Scores:
    """Return the scores of a share: each sample (n,) counts once and is right, wrong or, from 0 to 1, half right."""
    one, other = (torch.stack([x.double(), torch.ones_like(x, dtype=torch.float64)], 1) for x in (own, theirs))
    return Scores(keys, one, other, ratio)


def drawn(sums: Tensor, finish: Finish, seed: int) -> np.ndarray:
    """Return the figures (1000,) of samples that are drawn again with what they add (n, S).

    The same seed draws the same samples, so figures of several models on the same samples may be subtracted. A draw
    without anything that counts is NaN, and so is all of a single sample, which says nothing of others.
    """
    random, count = np.random.default_rng(seed), len(sums)
    if count < 2:
        return np.full(DRAWS, np.nan)
    flat = sums.flatten(1).numpy()
    figures = np.empty(DRAWS)
    for turn in range(DRAWS):
        times = np.bincount(random.integers(0, count, count), minlength=count)
        figures[turn] = finish(torch.from_numpy(times @ flat).view(sums.shape[1:]))
    return figures


def bounds(figures: np.ndarray) -> Interval | None:
    """Return the 95 % interval of drawn figures, those that are NaN left out; None: all of them are."""
    known = figures[np.isfinite(figures)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired(one: Scores, other: Scores, seed: int) -> tuple[float, Interval | None, int]:
    """Compare two models on the samples that both were measured on.

    Returns:
        The figure of `other` minus that of `one`, its 95 % interval, and the number of these samples.
    """
    shared = one.keys[torch.isin(one.keys, other.keys)]
    if not len(shared):
        return float("nan"), None, 0
    rows = [scores.own[_places(scores.keys, shared)] for scores in (one, other)]
    first, second = rows[0], rows[1]
    figures = drawn(second, other.finish, seed) - drawn(first, one.finish, seed)
    return other.finish(second.sum(0)) - one.finish(first.sum(0)), bounds(figures), len(shared)


def _places(keys: Tensor, wanted: Tensor) -> Tensor:
    """Return where each of the wanted keys stands, (w,) int64."""
    order = keys.argsort()
    return order[torch.searchsorted(keys[order], wanted)]
