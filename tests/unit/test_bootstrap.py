"""Intervals of figures that are sums over samples, against scipy's bootstrap, coverage, and pairs by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from m3.evaluate.bootstrap import Scores, Tally, bounds, drawn, of_hits, paired, ratio
from m3.evaluate.task import Row

KEYS = torch.arange(4)


def interval_of(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    found = bounds(drawn(of_hits(torch.arange(len(values)), *[torch.from_numpy(values)] * 2).own, ratio, seed))
    assert found is not None
    return found


def test_an_interval_holds_the_true_mean_about_95_times_in_100():
    random, inside = np.random.default_rng(0), 0
    for turn in range(200):
        low, high = interval_of((random.random(60) < 0.7).astype(float), turn)
        inside += low <= 0.7 <= high
    assert 180 <= inside <= 198
    assert interval_of(np.full(5, 0.25)) == (0.25, 0.25)
    wide, narrow = (interval_of(np.arange(count) % 2) for count in (20, 2000))
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])


def test_the_interval_of_a_ratio_of_sums_is_scipys():
    """Samples of 1 to 9 tokens: the mean over tokens, drawn by samples."""
    random = np.random.default_rng(3)
    counts = random.integers(1, 10, 80)
    sums = counts * random.gamma(2.0, size=80)
    found = bounds(drawn(torch.from_numpy(np.stack([sums, counts], 1)), ratio, 0))
    wanted = stats.bootstrap(
        (sums, counts), lambda s, n, axis: s.sum(axis) / n.sum(axis), paired=True, method="percentile", random_state=1
    ).confidence_interval
    assert found == pytest.approx(wanted, rel=0.03)


def test_a_figure_may_be_any_function_of_the_sums():
    """Intersections and unions of two classes; the second class occurs in one sample only."""
    sums = torch.tensor([[[3.0, 0], [4, 0]], [[1, 0], [4, 0]], [[2, 0], [2, 0]], [[1, 1], [2, 4]]]).double()

    def finish(x: Tensor) -> float:
        return float((x[0] / x[1].clamp(min=1))[x[1] > 0].mean())

    scores = Scores(KEYS, sums, sums, finish)
    assert scores.figures()[0] == pytest.approx((7 / 12 + 1 / 4) / 2)
    interval, difference = scores.intervals(0)
    assert interval is not None
    assert 0.2 < interval[0] < interval[1] <= 1
    assert difference == (0.0, 0.0), "the same samples are drawn for both"


def test_a_difference_on_the_same_samples_is_surer_than_the_figures():
    own = torch.arange(100) % 2
    better = own.clone()
    better[:20] = 1  # ten more are right
    (low, high), difference = of_hits(torch.arange(100), better, own).intervals(1)
    assert low < 0.55 < 0.62 < high
    assert difference[0] > 0
    assert difference[1] - difference[0] < (high - low)


def test_one_sample_and_draws_without_anything_that_counts_say_nothing():
    assert of_hits(KEYS[:1], torch.ones(1), torch.zeros(1)).intervals(0) == (None, None)
    assert Scores(KEYS, torch.zeros(4, 2), torch.zeros(4, 2), ratio).intervals(0) == (None, None)
    some = torch.tensor([[0.0, 0], [0, 0], [0, 0], [3, 2]]).double()
    assert bounds(drawn(some, ratio, 0)) == (1.5, 1.5), "draws without the last sample are left out"


def test_models_are_compared_on_the_samples_that_both_were_measured_on():
    one = of_hits(torch.tensor([5, 7, 9, 11]), torch.tensor([1, 0, 0, 1]), torch.zeros(4))
    other = of_hits(torch.tensor([11, 9, 3, 7]), torch.tensor([1, 1, 0, 0]), torch.zeros(4))
    difference, interval, count = paired(one, other, 0)  # 7: 0 and 0, 9: 0 and 1, 11: 1 and 1
    assert difference == pytest.approx(2 / 3 - 1 / 3)
    assert interval == (0.0, 1.0)
    assert count == 3
    apart = of_hits(torch.tensor([1, 2]), torch.ones(2), torch.ones(2))
    nothing = paired(one, apart, 0)
    assert math.isnan(nothing[0])
    assert nothing[1:] == (None, 0)


def test_a_tally_joins_batches_and_begins_anew():
    tally = Tally()
    assert tally.scores(ratio) is None
    tally.add(torch.tensor([3, 4]), torch.tensor([[1.0, 2], [2, 2]]), torch.tensor([[0.0, 2], [0, 2]]))
    tally.add(torch.tensor([5]), torch.tensor([[6.0, 2]]), torch.tensor([[3.0, 2]]))
    scores = tally.scores(ratio)
    assert scores is not None
    assert scores.keys.tolist() == [3, 4, 5]
    assert scores.figures() == (1.5, 0.5)
    assert tally.scores(ratio) is None


def test_a_row_tells_all_but_the_single_samples():
    row = Row.of(of_hits(KEYS, torch.tensor([1, 1, 0, 1]), torch.zeros(4)), "a", "accuracy", "majority", True, 0)
    assert (row.model, row.baseline, row.is_won, row.is_sure) == (0.75, 0.0, True, True)
    told = json.loads(json.dumps(row.facts()))
    assert told.keys() == {
        *("task", "measure", "model", "baseline", "baseline_name", "higher_is_better"),
        *("interval", "difference", "notes"),
    }
    assert told["interval"] == list(row.interval or ())
