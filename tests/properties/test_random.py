"""Draws are uniform, independent, and a pure function of key, seed, stream and column."""

import pytest
import torch
from scipy.stats import chisquare

from m3.random import Draws

KEYS = {
    "adjacent": torch.arange(400),
    "strided": torch.arange(400) * 1_000_003,
    "negative": -torch.arange(400) - 1,
    "huge": torch.arange(400) + (2**63 - 400),
    "powers": torch.cat([2 ** torch.arange(63), -(2 ** torch.arange(63))]),
}


@pytest.mark.parametrize("name", KEYS)
def test_draws_are_uniform(name):
    u = Draws(KEYS[name], 1).uniform("score", 300).double()
    n = u.numel()
    assert u.min() >= 0
    assert u.max() < 1
    assert (u.mean() - 0.5).abs() < 4 * (1 / 12 / n) ** 0.5
    assert (u.var() - 1 / 12).abs() < 4 * (1 / 180 / n) ** 0.5
    counts = torch.bincount((u * 64).long().flatten(), minlength=64).double()
    assert chisquare(counts).pvalue > 1e-4
    low_bits = torch.bincount((u * 2**24).long().flatten() % 64, minlength=64).double()
    assert chisquare(low_bits).pvalue > 1e-4


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two sets of uniform numbers, in standard errors."""
    a, b = a.double() - 0.5, b.double() - 0.5
    return float((a * b).mean().abs() * 12 * a.numel() ** 0.5)


@pytest.mark.parametrize("name", KEYS)
def test_draws_of_adjacent_keys_columns_streams_and_seeds_are_independent(name):
    keys = KEYS[name]
    u = Draws(keys).uniform("score/image", 300)
    assert correlation(u[1:], u[:-1]) < 4
    assert correlation(u[:, 1:], u[:, :-1]) < 4
    assert correlation(u[1:, 1:], u[:-1, :-1]) < 4
    assert correlation(u, Draws(keys).uniform("score/depth", 300)) < 4
    assert correlation(u, Draws(keys, 1).uniform("score/image", 300)) < 4
    assert correlation(u, Draws(keys + 1).uniform("score/depth", 300)) < 4


@pytest.mark.parametrize("name", KEYS)
def test_draws_repeat_no_row(name):
    rows = torch.cat([Draws(KEYS[name], seed).uniform(s, 8) for seed in (0, 1, -1) for s in ("a", "b")])
    assert len(rows.unique(dim=0)) == len(rows)


def test_draws_of_neighbouring_keys_share_no_shifted_row():
    u = Draws(torch.arange(2000)).uniform("score", 64)
    assert len(u.flatten().unique()) > 0.99 * u.numel() * (1 - u.numel() / 2 / 2**24)


def test_keys_differ_in_all_64_bits():
    keys = torch.tensor([5, 5 + 2**32, 5 + 2**62, 5 - 2**63])
    assert len(Draws(keys).uniform("score", 4).unique(dim=0)) == 4


def test_a_draw_depends_on_nothing_but_key_seed_stream_and_column():
    keys = torch.tensor([9, -4, 2**62, 0])
    u = Draws(keys, 2).uniform("score", 10)
    alone = torch.cat([Draws(key.reshape(1), 2).uniform("score", 10) for key in keys])
    assert torch.equal(u, alone)
    assert torch.equal(u[:, :3], Draws(keys, 2).uniform("score", 3))
