"""Masks over space and time: tubes, running cells, dual masking.

Letters: B batch, N tokens, T, H, W tokens along time, rows and columns.
"""

import itertools
import json

import pytest
import torch

from m3 import masking
from m3.errors import M3Error
from m3.masker import Masker
from m3.plugins import View
from m3.positions import grid
from m3.random import Draws
from m3.scorers import RunningCell, Tube
from m3.types import MaskPlan, Tokens

CPU = torch.device("cpu")


def clip(batch: int, counts: tuple[int, ...], is_valid: torch.Tensor | None = None) -> dict[str, Tokens]:
    positions = grid(counts, counts, CPU)
    values = torch.arange(batch * positions.shape[1] * 2.0).reshape(batch, -1, 2)
    return {"clip": Tokens(values, positions, is_valid)}


def plan_of(settings: dict, tokens: dict[str, Tokens], keys: torch.Tensor | None = None, seed: int = 0) -> MaskPlan:
    keys = torch.arange(len(tokens["clip"].values)) if keys is None else keys
    return masking.build(View(tuple(tokens), json.dumps(settings)))(tokens, Draws(keys, seed))


def as_mask(index: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """Indices (B, S) -> (B, T, H, W) bool."""
    mask = torch.zeros(len(index), int(torch.tensor(counts).prod()), dtype=torch.bool)
    return mask.scatter(1, index, True).reshape(-1, *counts)


TUBES = {"type": "fixed", "visible": 160, "scorer": {"type": "tube"}}


def test_videomaes_mask_has_the_papers_numbers_and_is_the_same_at_all_times():
    """196 - int(0.9 x 196) = 20 of 196 places at 8 times: 160 of 1568 tokens."""
    plan = plan_of(TUBES, clip(40, (8, 14, 14)))
    assert (plan.visible["clip"].shape, plan.target["clip"].shape) == ((40, 160), (40, 1408))
    seen = as_mask(plan.visible["clip"], (8, 14, 14))
    assert torch.equal(seen, seen[:, :1].expand_as(seen))
    assert (seen[:, 0].flatten(1).sum(1) == 20).all()
    assert len({tuple(row.flatten().tolist()) for row in seen[:, 0]}) == 40
    assert not (seen & as_mask(plan.target["clip"], (8, 14, 14))).any()


def test_tubes_cover_all_places_evenly_and_in_all_pairs():
    batch = 20000
    plan = plan_of({**TUBES, "visible": 6}, clip(batch, (3, 2, 3)))
    seen = as_mask(plan.visible["clip"], (3, 2, 3))[:, 0].flatten(1).double()
    share = seen.mean(0)
    assert (share - 2 / 6).abs().max() < 4 * (2 / 6 * 4 / 6 / batch) ** 0.5
    pairs = seen.T @ seen / batch  # each of the 15 pairs of places equally often
    off = pairs[~torch.eye(6, dtype=torch.bool)]
    assert (off - 1 / 15).abs().max() < 4.5 * (1 / 15 * 14 / 15 / batch) ** 0.5


def test_a_budget_that_is_no_multiple_of_the_times_cuts_one_tube_only():
    seen = as_mask(plan_of({**TUBES, "visible": 11}, clip(30, (4, 3, 3))).visible["clip"], (4, 3, 3))
    per_place = seen.sum(1).flatten(1).sort(dim=1, descending=True).values
    assert per_place.tolist() == [[4, 4, 3, 0, 0, 0, 0, 0, 0]] * 30


def test_tubes_are_found_by_place_whatever_the_order_and_the_times_of_the_tokens():
    tokens = clip(6, (4, 3, 3))["clip"]
    order = torch.randperm(36, generator=torch.Generator().manual_seed(2))
    positions = tokens.positions[:, order].repeat(6, 1, 1)
    positions[..., 0] = positions[..., 0] * torch.arange(1.0, 7.0)[:, None] - 0.25  # clips sampled more slowly
    mixed = {"clip": Tokens(tokens.values[:, order], positions)}
    visible = plan_of({**TUBES, "visible": 8}, mixed).visible["clip"]
    for row in order[visible].tolist():
        places = sorted(number % 9 for number in row)
        assert places == sorted([places[0]] * 4 + [places[-1]] * 4)


def test_a_sample_alone_has_the_mask_it_has_in_a_batch():
    keys = torch.tensor([5, 9, 12])
    for settings in (TUBES, {**TUBES, "decode": {"share": 0.5, "scorer": {"type": "running_cell"}}}):
        settings = {**settings, "visible": 8}
        together = plan_of(settings, clip(3, (4, 4, 4)), keys)
        for row in range(3):
            alone = plan_of(settings, clip(1, (4, 4, 4)), keys[row : row + 1])
            assert torch.equal(alone.visible["clip"][0], together.visible["clip"][row])
            assert torch.equal(alone.target["clip"][0], together.target["clip"][row])


@pytest.mark.parametrize("scorer", ["tube", "running_cell"])
def test_tokens_over_fewer_axes_get_uniform_noise(scorer: str):
    tokens = {"clip": clip(3, (4, 5))["clip"]}
    one = plan_of({"type": "fixed", "visible": 7, "scorer": {"type": scorer}}, tokens)
    assert torch.equal(one.visible["clip"], plan_of({"type": "fixed", "visible": 7}, tokens).visible["clip"])


DUAL = {**TUBES, "decode": {"share": 0.5, "scorer": {"type": "running_cell"}}}


def test_running_cells_are_the_papers_pattern():
    """In every 2 x 2 cell the same two of four places, which move on by one each time slot, around the ring."""
    tokens = clip(50, (8, 4, 6))
    scores = RunningCell(RunningCell.Spec())(tokens, Draws(torch.arange(50), 1))["clip"]
    number = scores.floor().long().reshape(50, 8, 4, 6)
    starts = set()
    for sample in range(50):
        start = int(number[sample, 0, 0, 0])
        starts.add(start)
        for t, y, x in itertools.product(range(8), range(4), range(6)):
            assert number[sample, t, y, x] == (start + t + [[0, 1], [2, 3]][y % 2][x % 2]) % 4
    assert starts == {0, 1, 2, 3}


def test_dual_masking_has_the_papers_numbers():
    """784 of 1568 tokens are decoded, 392 / 4 = 98 in each slot; of the 160 visible ones half, so 704 are targets."""
    plan = plan_of(DUAL, clip(30, (8, 14, 14)))
    assert (plan.visible["clip"].shape, plan.target["clip"].shape) == ((30, 160), (30, 784))
    assert (plan.is_target["clip"].sum(1) == 704).all()
    decoded, seen = (as_mask(x["clip"], (8, 14, 14)) for x in (plan.target, plan.visible))
    assert (decoded.flatten(2).sum(2) == 98).all()
    assert (decoded.sum(1) == 4).all()  # every place four times in eight slots
    cells = decoded.unflatten(3, (7, 2)).unflatten(2, (7, 2))
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells))
    hidden = torch.zeros(30, 1568, dtype=torch.bool).scatter(1, plan.target["clip"], plan.is_target["clip"])
    assert torch.equal(hidden.reshape(seen.shape), decoded & ~seen)
    assert (plan.target["clip"].diff(dim=1) > 0).all()


def test_every_hidden_token_is_a_target_equally_often():
    batch = 20000
    plan = plan_of({**DUAL, "visible": 8}, clip(batch, (4, 2, 4)))
    hits = torch.zeros(batch, 32).scatter(1, plan.target["clip"], plan.is_target["clip"].float()).mean(0)
    share = 0.5 * 6 / 8  # decoded half of the time, hidden with 6 of 8 places
    assert (hits - share).abs().max() < 4.5 * (share * (1 - share) / batch) ** 0.5


@pytest.mark.parametrize(
    ("counts", "share", "asked"), [((3, 3, 5), 0.5, 22), ((8, 4, 4), 0.25, 32), ((2, 4, 4), 0.3, 9)]
)
def test_the_budget_of_the_decoder_is_exact_on_any_grid(counts: tuple[int, ...], share: float, asked: int):
    plan = plan_of({**DUAL, "visible": 6, "decode": {"share": share}}, clip(9, counts))
    assert plan.target["clip"].shape == (9, asked)


def test_noise_of_the_decoder_is_its_own():
    """With the noise of the encoder's mask, uniform decoding would ask for what is seen."""
    settings = {"type": "fixed", "visible": 0.5, "decode": {"share": 0.5, "scorer": {"type": "uniform"}}}
    plan = plan_of(settings, clip(400, (2, 5, 5)))
    share = plan.is_target["clip"].double().mean()
    assert 0.47 < share < 0.53


def test_absent_tokens_are_never_asked_for():
    is_valid = torch.arange(32).expand(3, -1) < torch.tensor([[32], [20], [0]])
    plan = plan_of({**DUAL, "visible": 8}, clip(3, (4, 2, 4), is_valid))
    assert plan.target["clip"].shape == (3, 16)
    assert not (plan.is_target["clip"] & ~is_valid.gather(1, plan.target["clip"])).any()
    assert plan.is_target["clip"].sum(1).tolist()[2] == 0
    both = torch.zeros(3, 33, dtype=torch.bool)
    place = plan.visible["clip"].masked_fill(~plan.is_valid, 32) if plan.is_valid is not None else None
    assert place is not None
    both.scatter_(1, place, True)
    assert not (both[:, :32].gather(1, plan.target["clip"]) & plan.is_target["clip"]).any()


def test_dual_masking_is_refused_where_hidden_tokens_are_replaced():
    settings = json.dumps({**DUAL, "hidden": "replace"})
    with pytest.raises(
        M3Error, match=r"^masking.decode: with `hidden: replace` the targets say what is hidden, .*drop"
    ):
        Masker(View(("clip",), settings), {"clip": 0})


def test_no_two_tubes_share_a_score():
    scores = Tube(Tube.Spec())(clip(200, (2, 12, 12)), Draws(torch.arange(200)))["clip"]
    assert all(len(set(row.tolist())) == 144 for row in scores)
