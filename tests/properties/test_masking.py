"""Masks: exact budgets, no overlap, every token reachable, uniform coverage, seed replay.

Chi-square tests fail at p = 1e-4; the draws are fixed by their keys, so nothing here
depends on chance between two runs.
"""

import pytest
import torch
from scipy.stats import chi2, chisquare

from m3 import masking
from m3.errors import M3Error
from m3.random import Draws
from m3.types import take
from tests.properties.masks import (
    SELECTIONS,
    SIZES,
    budget,
    build,
    make_tokens,
    presence,
    select,
    target_sets,
    valid_sets,
    visible_sets,
)


@pytest.mark.parametrize("kind", ["all present", "some missing", "padded", "one never missing"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_budget_is_exact_and_visible_and_target_share_out_the_valid_tokens(name, kind):
    settings = SELECTIONS[name]
    batch, is_valid = presence(kind)
    tokens = make_tokens(batch, SIZES, is_valid)
    plan = select(settings, tokens, torch.arange(batch) * 7 + 3)
    for seen, wanted, valid in zip(visible_sets(plan), target_sets(plan), valid_sets(tokens), strict=True):
        assert not seen & wanted
        assert seen | wanted == valid
        expected = budget(settings, tokens, valid)
        if isinstance(expected, int):
            assert len(seen) == expected
        else:
            assert {name: sum(n == name for n, _ in seen) for name in tokens} == expected


@pytest.mark.parametrize("kind", ["all present", "some missing", "padded"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_indices_are_ascending_per_modality(name, kind):
    batch, is_valid = presence(kind, 1)
    plan = select(SELECTIONS[name], make_tokens(batch, SIZES, is_valid), torch.arange(batch))
    names, index, modality = list(plan.visible), plan.packed_index(), plan.packed_modality()
    for sample in range(batch):
        for i in range(len(names)):
            own = modality[sample] == i
            if plan.is_valid is not None:
                own &= plan.is_valid[sample]
            rows = index[sample, own].tolist()
            assert rows == sorted(rows)
    for rows in plan.target.values():
        assert (rows.diff(dim=1) > 0).all()


@pytest.mark.parametrize("name", [name for name in SELECTIONS if name != "each"])
def test_every_token_is_seen_in_some_draw_and_hidden_in_another(name):
    tokens = make_tokens(400, SIZES)
    plan = select(SELECTIONS[name], tokens, torch.arange(400))
    everything = valid_sets(tokens)[0]
    assert set.union(*visible_sets(plan)) == everything
    assert set.union(*target_sets(plan)) == everything


def test_fixed_counts_of_mae():
    plan = select({"type": "fixed", "visible": 0.25}, make_tokens(3, {"image": 196}), torch.arange(3))
    assert plan.visible["image"].shape == (3, 49)
    assert plan.target["image"].shape == (3, 147)
    assert plan.order is None
    assert plan.is_valid is None


def test_fixed_covers_all_tokens_uniformly():
    batch, count, share = 4000, 196, 0.25
    plan = select({"type": "fixed", "visible": share}, make_tokens(batch, {"image": count}), torch.arange(batch))
    hits = torch.bincount(plan.visible["image"].flatten(), minlength=count).double()
    # Sampling without replacement: the hits of a token have variance n p (1 - p), and their sum is fixed.
    statistic = float(((hits - batch * share) ** 2).sum() / (batch * share * (1 - share)) * (count - 1) / count)
    assert statistic < chi2.ppf(1 - 1e-4, count - 1)
    assert statistic > 195 - 4 * (2 * 195) ** 0.5  # suspiciously even is not random either


def test_fixed_pairs_of_tokens_are_seen_together_as_often_as_chance_says():
    batch, count = 6000, 16
    plan = select({"type": "fixed", "visible": 4}, make_tokens(batch, {"image": count}), torch.arange(batch))
    is_seen = torch.zeros(batch, count).scatter_(1, plan.visible["image"], 1.0)
    together = (is_seen.T @ is_seen)[*torch.triu_indices(count, count, 1)]
    p = 4 * 3 / (count * (count - 1))
    assert ((together - batch * p).abs() < 4.5 * (batch * p * (1 - p)) ** 0.5).all()


@pytest.mark.parametrize("name", SELECTIONS)
def test_dirichlet_and_fixed_cover_each_modality_uniformly(name):
    batch = 3000
    plan = select(SELECTIONS[name], make_tokens(batch, SIZES), torch.arange(batch) + 10**6)
    index, modality = plan.packed_index(), plan.packed_modality()
    for number, count in enumerate(SIZES.values()):
        hits = torch.bincount(index[modality == number], minlength=count).double()
        assert chisquare(hits).pvalue > 1e-4


# -- replay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SELECTIONS if name != "each"])
def test_same_keys_and_seed_give_the_same_plan_and_others_another(name):
    batch = 32
    tokens, keys = make_tokens(batch, SIZES), torch.arange(batch) * 11
    first, again = (visible_sets(select(SELECTIONS[name], tokens, keys, seed=3)) for _ in range(2))
    other_seed = visible_sets(select(SELECTIONS[name], tokens, keys, seed=4))
    other_keys = visible_sets(select(SELECTIONS[name], tokens, keys + 1, seed=3))
    assert first == again
    assert sum(a != b for a, b in zip(first, other_seed, strict=True)) > batch // 2
    assert sum(a != b for a, b in zip(first, other_keys, strict=True)) > batch // 2


@pytest.mark.parametrize("kind", ["all present", "some missing", "padded"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_cutting_a_batch_changes_no_row(name, kind):
    batch, is_valid = presence(kind, 1)
    keys = torch.arange(batch) * 5 + 2
    whole = select(SELECTIONS[name], make_tokens(batch, SIZES, is_valid), keys)
    for size in (1, 2, 4):
        seen, wanted = [], []
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            tokens = make_tokens(size, SIZES, {name: mask[rows] for name, mask in is_valid.items()})
            plan = select(SELECTIONS[name], tokens, keys[rows])
            seen += visible_sets(plan)
            wanted += target_sets(plan)
        assert seen == visible_sets(whole)
        assert wanted == target_sets(whole)


# -- Dirichlet -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"type": "dirichlet", "visible": 4, "alpha": 0.0}, "masking.alpha must be positive"),
        (
            {"type": "dirichlet", "visible": 4, "alpha": {"image": 1.0}},
            "masking.alpha must name exactly .*image, depth",
        ),
        ({"type": "fixed", "visible": {"image": 1}}, "masking.visible must name exactly .*image, depth"),
        ({"type": "fixed", "visible": 1.5}, "visible"),
        ({"type": "fixed", "visible": -1}, "visible"),
        ({"type": "fixed", "ratio": 0.75}, "ratio"),
    ],
)
def test_wrong_settings_are_named(settings, text):
    with pytest.raises(M3Error, match=text):
        build(settings, ("image", "depth"))


# -- explicit masks, plans -----------------------------------------------------------------------------------


def uneven(batch: int = 5, is_valid: dict[str, torch.Tensor] | None = None):
    tokens = make_tokens(batch, SIZES, is_valid)
    threshold = torch.linspace(0.0, 0.9, batch).unsqueeze(1)  # the first sample sees nothing
    is_visible = {n: Draws(torch.arange(batch)).uniform(n, p.count) < threshold for n, p in tokens.items()}
    return tokens, is_visible


@pytest.mark.parametrize("with_missing", [False, True])
def test_explicit_shows_each_sample_exactly_its_own_tokens(with_missing):
    is_valid = {"depth": torch.tensor([True, False, True, True, False]).unsqueeze(1).expand(5, 9)}
    tokens, is_visible = uneven(is_valid=is_valid if with_missing else None)
    plan = masking.explicit(tokens, is_visible)
    seen, wanted, valid = visible_sets(plan), target_sets(plan), valid_sets(tokens)
    for sample in range(5):
        asked = {(n, i) for n, mask in is_visible.items() for i in range(SIZES[n]) if mask[sample, i]}
        assert seen[sample] == asked & valid[sample]
        assert wanted[sample] == valid[sample] - asked
    assert len({len(s) for s in seen}) > 2


def test_explicit_with_nothing_visible_keeps_one_slot_of_filling():
    tokens = make_tokens(2, SIZES)
    plan = masking.explicit(tokens, {n: torch.zeros(2, c, dtype=torch.bool) for n, c in SIZES.items()})
    assert visible_sets(plan) == [set(), set()]
    assert target_sets(plan) == valid_sets(tokens)
    assert plan.is_valid is not None
    assert plan.is_valid.tolist() == [[False], [False]]


def test_everything_shows_every_valid_token():
    for kind in ("all present", "some missing", "padded"):
        batch, is_valid = presence(kind, 1)
        tokens = make_tokens(batch, SIZES, is_valid)
        plan = masking.everything(tokens)
        assert visible_sets(plan) == valid_sets(tokens)
        assert target_sets(plan) == [set()] * batch


def test_explicit_refuses_masks_of_the_wrong_shape():
    tokens, is_visible = uneven()
    for wrong in (is_visible["depth"][:3], is_visible["depth"][:, :4]):
        shape = rf"\({wrong.shape[0]}, {wrong.shape[1]}\)"
        with pytest.raises(M3Error, match=rf"mask of `depth` must have shape \(5, 9\) .*got {shape}"):
            masking.explicit(tokens, is_visible | {"depth": wrong})


def test_masks_take_shares_numbers_and_tensors():
    tokens = make_tokens(3, SIZES)
    ready = torch.arange(27).reshape(3, 9) % 4 == 1
    is_visible = masking.masks(tokens, {"image": 0.5, "depth": ready}, Draws(torch.arange(3)))
    assert is_visible["image"].sum(1).tolist() == [8, 8, 8]
    assert torch.equal(is_visible["depth"], ready)
    assert not is_visible["semantic"].any()
    assert masking.masks(tokens, 2, Draws(torch.arange(3)))["semantic"].sum(1).tolist() == [2, 2, 2]
    with pytest.raises(M3Error, match=r"`visible` names `deph`, which the batch does not hold.*depth"):
        masking.masks(tokens, {"deph": 0.5}, Draws(torch.arange(3)))


@pytest.mark.parametrize("kind", ["fixed", "dirichlet", "missing", "explicit"])
def test_pack_and_its_indices_equal_a_loop(kind):
    batch, is_valid = presence("some missing", 1)
    if kind == "explicit":
        tokens, is_visible = uneven(batch)
        plan = masking.explicit(tokens, is_visible)
    else:
        tokens = make_tokens(batch, SIZES, is_valid if kind == "missing" else None)
        plan = select(SELECTIONS["share" if kind == "fixed" else "symmetric"], tokens, torch.arange(batch))
    slots = {name: take(tokens[name].values, index) for name, index in plan.visible.items()}
    packed, index, modality = plan.pack(slots), plan.packed_index(), plan.packed_modality()
    for sample in range(batch):
        joined = [(number, int(i)) for number, name in enumerate(slots) for i in plan.visible[name][sample]]
        order = range(len(joined)) if plan.order is None else plan.order[sample].tolist()
        assert packed.shape[1] == len(order)
        for place, origin in enumerate(order):
            number, i = joined[origin]
            assert (int(modality[sample, place]), int(index[sample, place])) == (number, i)
            assert torch.equal(packed[sample, place], tokens[list(slots)[number]].values[sample, i])
