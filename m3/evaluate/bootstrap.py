"""How sure a held-out figure is: percentile intervals of its mean over samples drawn again (Efron 1979)."""

from __future__ import annotations

import numpy as np

DRAWS = 1000
LEVEL = 0.95
"""Share of the drawn means that lie within an interval."""
Interval = tuple[float, float]


def interval(scores: np.ndarray, seed: int = 0) -> Interval:
    """Return the 95 % interval of the mean of scores (n,) of single samples; the difference of two for a comparison.

    The same seed draws the same samples, so intervals of several models on the same samples belong together.
    """
    random = np.random.default_rng(seed)
    scores = np.asarray(scores, dtype=np.float64)
    means = [scores[random.integers(0, len(scores), len(scores))].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
