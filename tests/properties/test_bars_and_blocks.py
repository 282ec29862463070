"""Masks of whole steps and bands of a spectrogram, and of the tokens around one."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch

from m3 import masking
from m3.plugins import View
from m3.positions import grid
from m3.random import Draws
from m3.types import Tokens

CPU = torch.device("cpu")


def sound(count: int, steps: int, bands: int, lengths: list[int] | None = None) -> Tokens:
    """Tokens of a spectrogram; of sample i the first lengths[i] steps exist."""
    is_valid = None
    if lengths is not None:
        is_valid = (torch.arange(steps * bands) // bands).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    values = torch.arange(count * steps * bands, dtype=torch.float32).view(count, -1, 1)
    return Tokens(values, grid((steps, bands), (steps, bands), CPU), is_valid, counts=(steps, bands))


def cloud(count: int, groups: int, axes: int = 3) -> Tokens:
    places = torch.randn(count, groups, axes, generator=torch.Generator().manual_seed(1))
    return Tokens(torch.arange(count * groups).view(count, groups, 1).float(), places)


def seen(part: Tokens, visible: float, scorer: dict, seed: int = 0) -> torch.Tensor:
    """(B, N) bool, True where the encoder sees the token."""
    select = masking.build(View(("x",), json.dumps({"type": "fixed", "visible": visible, "scorer": scorer})))
    plan = select({"x": part}, Draws(torch.arange(len(part.values)), seed))
    mask = torch.zeros(part.values.shape[:2], dtype=torch.bool)
    index = plan.packed_index()
    is_own = torch.ones_like(index, dtype=torch.bool) if plan.is_valid is None else plan.is_valid
    for row, (places, flags) in enumerate(zip(index, is_own, strict=True)):
        mask[row, places[flags]] = True
    return mask


@pytest.mark.parametrize(
    ("steps", "bands", "time", "frequency", "visible"),
    [(64, 8, 0.2, 0.2, 51 * 6), (12, 4, 0.5, 0.25, 6 * 3), (10, 5, 0.3, 0.0, 7 * 5), (9, 4, 0.0, 0.6, 9 * 1)],
)
def test_exactly_whole_steps_and_bands_are_hidden(steps, bands, time, frequency, visible):
    scorer = {"type": "time_frequency", "time": time, "frequency": frequency}
    mask = seen(sound(40, steps, bands), visible, scorer).view(40, steps, bands)
    rows, columns = mask.any(2), mask.any(1)
    assert torch.equal(mask, rows.unsqueeze(2) & columns.unsqueeze(1))
    assert set(rows.sum(1).tolist()) == {int(steps * (1 - time) + 1e-9)}
    assert set(columns.sum(1).tolist()) == {int(bands * (1 - frequency) + 1e-9)}


def test_all_steps_and_bands_are_seen_equally_often():
    scorer = {"type": "time_frequency", "time": 0.5, "frequency": 0.5}
    mask = seen(sound(4000, 6, 4), 6, scorer).view(4000, 6, 4).float()
    torch.testing.assert_close(mask.any(2).float().mean(0), torch.full((6,), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(mask.any(1).float().mean(0), torch.full((4,), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(mask.mean((0, 1)), torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_a_smaller_budget_sees_a_part_of_what_a_larger_one_sees():
    scorer = {"type": "time_frequency"}
    masks = [seen(sound(20, 16, 8), visible, scorer) for visible in (3, 20, 57, 90, 128)]
    for small, large in pairwise(masks):
        assert not (small & ~large).any()
    assert [mask.sum(1).unique().tolist() for mask in masks] == [[3], [20], [57], [90], [128]]


def test_the_mask_of_a_recording_does_not_depend_on_how_far_it_is_filled_up():
    scorer = {"type": "time_frequency", "time": 0.5, "frequency": 0.5}
    short = seen(sound(3, 4, 4), 0.25, scorer)
    filled = seen(sound(3, 10, 4, [4, 4, 4]), 0.25, scorer)
    assert torch.equal(filled[:, :16], short)
    assert not filled[:, 16:].any()
    ragged = seen(sound(3, 10, 4, [4, 8, 0]), 0.25, scorer).view(3, 10, 4)
    assert ragged.any(2).sum(1).tolist() == [2, 4, 0]
    assert ragged.any(1).sum(1).tolist() == [2, 2, 0]


def test_tokens_without_a_grid_get_noise():
    mask = seen(cloud(500, 8), 4, {"type": "time_frequency"})
    torch.testing.assert_close(mask.float().mean(0), torch.full((8,), 0.5), atol=0.08, rtol=0)


@pytest.mark.parametrize("axes", [1, 3])
def test_the_hidden_tokens_are_those_nearest_to_one_of_them(axes):
    part = cloud(30, 20, axes)
    mask = seen(part, 8, {"type": "nearest"})
    assert set(mask.sum(1).tolist()) == {8}
    for places, is_seen in zip(part.positions, mask, strict=True):
        hidden = {i for i in range(20) if not is_seen[i]}
        fitting = [i for i in hidden if set(nearest_to(places, i, 12)) == hidden]
        assert fitting, "no hidden token has just the hidden ones around it"


def nearest_to(places: torch.Tensor, number: int, count: int) -> list[int]:
    distance = [float(((place - places[number]) ** 2).sum()) for place in places]
    return sorted(range(len(places)), key=lambda i: distance[i])[:count]


def test_every_token_that_exists_is_drawn_as_centre_equally_often():
    """With one hidden token, the centre alone is hidden."""
    places = torch.arange(5.0).view(1, 5, 1)
    is_valid = torch.tensor([True, False, True, True, False]).expand(6000, -1)
    part = Tokens(torch.zeros(6000, 5, 1), places, is_valid)
    mask = seen(part, 2, {"type": "nearest"})
    hidden = Counter((~mask & is_valid).nonzero()[:, 1].tolist())
    assert set(hidden) == {0, 2, 3}
    assert all(abs(count / 6000 - 1 / 3) < 0.02 for count in hidden.values())


def test_other_seeds_draw_other_masks_and_the_same_seed_the_same():
    for part, scorer in ((sound(8, 16, 8), "time_frequency"), (cloud(8, 32), "nearest")):
        masks = [seen(part, 0.5, {"type": scorer}, seed) for seed in (0, 0, 1)]
        assert torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[0], masks[2])
