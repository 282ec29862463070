"""Shares of a Dirichlet budget: their distribution, what happens at the limits, subsets.

Chi-square tests fail at p = 1e-4; the draws are fixed by their keys.
"""

import itertools

import pytest
import torch
from scipy.stats import chisquare

from m3.random import Draws, log_gamma_variates
from m3.types import MaskPlan
from tests.properties.masks import (
    SIZES,
    make_tokens,
    presence,
    select,
    target_sets,
    valid_sets,
    visible_sets,
)


def share_of_visible(plan: MaskPlan) -> torch.Tensor:
    modality = plan.packed_modality()
    return torch.stack([(modality == i).double().mean(1) for i in range(len(plan.visible))], dim=1)


@pytest.mark.parametrize("alpha", [(1.0, 1.0, 1.0), (0.2, 0.2, 0.2), (0.5, 2.0, 5.0), (10.0, 1.0, 0.2)])
def test_dirichlet_shares_have_the_right_mean(alpha):
    batch, sizes = 4000, dict.fromkeys(SIZES, 64)
    settings = {"type": "dirichlet", "visible": 64, "alpha": dict(zip(sizes, alpha, strict=True))}
    shares = share_of_visible(select(settings, make_tokens(batch, sizes), torch.arange(batch)))
    expected = torch.tensor(alpha, dtype=torch.float64) / sum(alpha)
    error = shares.std(0) / batch**0.5
    assert ((shares.mean(0) - expected).abs() < 4 * error + 0.25 / 64).all()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_dirichlet_shares_have_the_right_variance(alpha):
    n = 20000
    alphas = torch.tensor([alpha, alpha, 2 * alpha])
    shares = log_gamma_variates(alphas, Draws(torch.arange(n)), "gamma").double().softmax(1)
    total = alphas.double().sum()
    expected = alphas * (total - alphas) / (total**2 * (total + 1))
    deviations = (shares - shares.mean(0)) ** 2
    error = deviations.std(0) / n**0.5
    assert ((deviations.mean(0) - expected).abs() < 4 * error).all()
    assert ((shares.mean(0) - alphas / total).abs() < 4 * shares.std(0) / n**0.5).all()


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 3.0, 10.0, 200.0])
def test_log_gamma_variates_follow_the_gamma_distribution(alpha):
    n, bins = 20000, 64
    logs = log_gamma_variates(torch.tensor([alpha, 1.0]), Draws(torch.arange(n)), "gamma")[:, 0].double()
    shape = torch.tensor(alpha, dtype=torch.float64)
    assert logs.isfinite().all()
    assert (logs.mean() - torch.digamma(shape)).abs() < 4 * logs.std() / n**0.5
    quantiles = torch.special.gammainc(shape, logs.exp())
    counts = torch.bincount((quantiles * bins).long().clamp(max=bins - 1), minlength=bins).double()
    assert chisquare(counts).pvalue > 1e-4


def test_log_gamma_variates_of_two_modalities_are_independent():
    logs = log_gamma_variates(torch.tensor([0.7, 0.7]), Draws(torch.arange(20000)), "gamma")
    assert torch.corrcoef(logs.T)[0, 1].abs() < 4 / 20000**0.5


def test_quotas_beyond_a_modality_go_to_the_others():
    batch, sizes = 50, {"image": 60, "depth": 4}
    settings = {"type": "dirichlet", "visible": 32, "alpha": {"image": 0.5, "depth": 500.0}}
    plan = select(settings, make_tokens(batch, sizes), torch.arange(batch))
    for seen in visible_sets(plan):
        assert {i for name, i in seen if name == "depth"} == {0, 1, 2, 3}
        assert len(seen) == 32


def test_budget_beyond_all_tokens_shows_everything():
    tokens = make_tokens(2, SIZES)
    for settings in ({"type": "dirichlet", "visible": 999}, {"type": "fixed", "visible": 999}):
        assert visible_sets(select(settings, tokens, torch.arange(2))) == valid_sets(tokens)


def test_missing_modalities_get_no_share_and_the_budget_stays():
    batch, is_valid = presence("some missing", repeats=40)
    sizes = SIZES
    plan = select(
        {"type": "dirichlet", "visible": 9, "alpha": 0.5}, make_tokens(batch, sizes, is_valid), torch.arange(batch)
    )
    for sample, seen in enumerate(visible_sets(plan)):
        there = {name for name in sizes if is_valid[name][sample].all()}
        assert {name for name, _ in seen} <= there
        assert len(seen) == (9 if there else 0)


@pytest.mark.parametrize("missing", [None, "depth"])
def test_subsets_occur_equally_often(missing):
    batch, sizes = 7000, {"image": 40, "depth": 40, "semantic": 40}
    is_valid = {missing: torch.zeros(batch, 40, dtype=torch.bool)} if missing else {}
    # A large alpha: every modality of the subset gets some of the 36 tokens.
    settings = {"type": "dirichlet", "visible": 36, "alpha": 1000.0, "subsets": True}
    plan = select(settings, make_tokens(batch, sizes, is_valid), torch.arange(batch))
    names = [frozenset(name for name, _ in seen) for seen in visible_sets(plan)]
    present = [name for name in sizes if name != missing]
    subsets = [frozenset(c) for k in range(1, len(present) + 1) for c in itertools.combinations(present, k)]
    counts = torch.tensor([names.count(subset) for subset in subsets]).double()
    assert len(subsets) == (3 if missing else 7)
    assert counts.sum() == batch
    assert chisquare(counts).pvalue > 1e-4


def test_a_surplus_that_stays_unused_lets_a_modality_be_seen_alone():
    """Shares are rounded down, at most V are seen, and nothing is seen of a modality beyond its share."""
    sizes = {"image": 64, "depth": 64, "text": 12}
    settings = {"type": "dirichlet", "visible": 96, "alpha": 0.2, "surplus": "unused"}
    tokens = make_tokens(2000, sizes)
    plan = select(settings, tokens, torch.arange(2000))
    others = select({**settings, "surplus": "others"}, tokens, torch.arange(2000))
    alone = dict.fromkeys(sizes, 0)
    for few, all_of_them in zip(visible_sets(plan), visible_sets(others), strict=True):
        assert len(few) <= len(all_of_them) == 96
        names = {name for name, _ in few}
        if len(names) == 1:
            alone[names.pop()] += 1
    assert min(alone.values()) > 0.02 * 2000
    hidden = [len(x) for x in target_sets(plan)]
    assert hidden == [sum(sizes.values()) - len(x) for x in visible_sets(plan)]
