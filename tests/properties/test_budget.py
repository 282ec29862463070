"""Budgets of 4M: never exceeded, shared out as the Dirichlet says, nothing lost of a sentence.

Chi-square tests fail at p = 1e-4; the draws are fixed by their keys.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from m3 import masking
from m3.errors import M3Error
from m3.plugins import View
from m3.random import Draws
from m3.types import OWN, MaskPlan, Tokens, take

CLASSES, LONGEST = 20, 12
SENTINELS = range(CLASSES, CLASSES + 7)
MIXTURE = [{"inputs": {"image": 1.0}, "targets": {"depth": 1.0, "text": 1.0}, "weight": 3}, {"inputs": 0.5}]


def tokens_of(batch: int, lengths: Tensor | None = None, has_groups: bool = False) -> dict[str, Tokens]:
    """An image of 16 tokens, depth of 9, a text of up to 12; values are the numbers of the tokens."""
    lengths = torch.full((batch,), LONGEST) if lengths is None else lengths
    made = {}
    for name, count in (("image", 16), ("depth", 9), ("text", LONGEST)):
        values = torch.arange(count).expand(batch, -1).unsqueeze(-1)
        made[name] = Tokens(values, torch.arange(2.0 * count).view(1, count, 2))
    there = torch.arange(LONGEST) < lengths.unsqueeze(1)
    group = (torch.arange(LONGEST) // 3).expand(batch, -1) if has_groups else None
    made["text"] = replace(made["text"], is_valid=there, group=group, sentinels=SENTINELS)
    return made


def select(tokens: dict[str, Tokens], keys: Tensor | None = None, **settings) -> MaskPlan:
    settings = {"type": "budget", "visible": 14, "targets": 12} | settings
    keys = torch.arange(len(tokens["image"].values)) if keys is None else keys
    return masking.build(View(tuple(tokens), json.dumps(settings)))(tokens, Draws(keys))


def slots_seen(plan: MaskPlan) -> list[list[tuple[str, int, int]]]:
    """Slow: (modality, token, shown) of everything the encoder sees of each sample."""
    names = list(plan.visible)
    shown = plan.pack({n: plan.shown.get(n, torch.full_like(i, OWN)) for n, i in plan.visible.items()})
    rows = zip(plan.packed_modality().tolist(), plan.packed_index().tolist(), shown.tolist(), strict=True)
    assert plan.is_valid is not None
    return [
        [(names[m], i, s) for m, i, s, there in zip(*row, valid, strict=True) if there]
        for row, valid in zip(rows, plan.is_valid.tolist(), strict=True)
    ]


def slots_asked(plan: MaskPlan) -> list[list[tuple[str, int, int]]]:
    """Slow: (modality, token, asked) of everything the decoder is asked for, in its order."""
    number = {name: torch.full_like(index, i) for i, (name, index) in enumerate(plan.target.items())}
    asked = {name: plan.asked.get(name, torch.full_like(index, OWN)) for name, index in plan.target.items()}
    wanted = plan.pack_targets({name: plan.asks(name) for name in plan.target})
    rows = zip(*(plan.pack_targets(x).tolist() for x in (number, plan.target, asked)), strict=True)
    names = list(plan.target)
    return [
        [(names[m], i, a) for m, i, a, is_wanted in zip(*row, flags, strict=True) if is_wanted]
        for row, flags in zip(rows, wanted.tolist(), strict=True)
    ]


LENGTHS = torch.arange(3000) % (LONGEST + 1)


@pytest.mark.parametrize("visible", [14, 1, [0, 20]])
@pytest.mark.parametrize("targets", [12, 1, [3, 30]])
def test_budgets_are_never_exceeded_and_what_is_asked_was_not_seen(visible, targets):
    tokens = tokens_of(len(LENGTHS), LENGTHS)
    plan = select(tokens, visible=visible, targets=targets, mixture=MIXTURE)
    most = max(visible) if isinstance(visible, list) else visible
    most_asked = max(targets) if isinstance(targets, list) else targets
    assert plan.packed_index().shape[1] == min(most, 37)
    assert plan.target_order is not None
    assert plan.target_order.shape[1] == min(most_asked, 16 + 9 + 1 + 13)
    for sample, (seen, asked) in enumerate(zip(slots_seen(plan), slots_asked(plan), strict=True)):
        assert len(seen) <= most
        assert len(asked) <= most_asked
        own = [(name, i) for name, i, s in seen if s == OWN]
        assert len(set(own)) == len(own)
        said = [(name, i) for name, i, a in asked if a == OWN]
        assert len(set(said)) == len(said)
        assert not set(own) & set(said), "a token that is seen is asked for"
        assert all(i < LENGTHS[sample] for name, i in own + said if name == "text"), "a word that is not there"
        # All that the decoder does not work on is no target.
        assert len(asked) == sum(int(plan.asks(name)[sample].sum()) for name in plan.target)


def test_a_sentence_is_put_together_again_from_what_is_seen_and_what_is_asked():
    tokens = tokens_of(len(LENGTHS), LENGTHS)
    plan = select(tokens, visible=37, targets=50, mixture=[{"inputs": {"text": 1.0}, "targets": {"text": 1.0}}])
    runs = set()
    for sample, (seen, asked) in enumerate(zip(slots_seen(plan), slots_asked(plan), strict=True)):
        length = int(LENGTHS[sample])
        if not length:
            assert (seen, asked) == ([], [])
            continue
        # The stream: sentinel 0 is given, then each run's words and the next sentinel.
        hidden: dict[int, list[int]] = {SENTINELS[0]: []}
        for _, token, sentinel in asked:
            if sentinel == OWN:
                list(hidden.values())[-1].append(token)
            else:
                hidden[sentinel] = []
        assert list(hidden) == list(SENTINELS[: len(hidden)])
        assert list(hidden.values())[-1] == [], "it is closed"
        sentence = []
        for _, token, shown in seen:
            sentence += [token] if shown == OWN else hidden.pop(shown)
        assert sentence == list(range(length))
        assert list(hidden.values()) == [[]], "only the closing sentinel is not in the input"
        runs.add(len([1 for _, _, shown in seen if shown != OWN]))
    assert runs >= {0, 1, 2, 3, 4, 5}


def test_quotas_follow_the_dirichlet_distribution():
    """Means alpha / sum, variances p (1 - p) / (sum + 1); nothing is clamped, so the budgets are used up."""
    batch, alphas = 5000, {"a": 0.5, "b": 1.5, "c": 3.0}
    values = torch.zeros(batch, 150, 1)
    tokens = {name: Tokens(values, torch.zeros(1, 150, 2)) for name in alphas}
    view = View(tuple(tokens), json.dumps({"type": "budget", "visible": 100, "targets": 50, "mixture": [
        {"inputs": alphas, "targets": {"a": 1.0, "b": 1.0, "c": 1.0}}]}))  # fmt: skip
    plan = masking.build(view)(tokens, Draws(torch.arange(batch)))
    assert plan.is_valid is not None
    assert plan.is_valid.all()
    assert plan.pack_targets({name: plan.asks(name) for name in tokens}).all()
    for number, alpha in enumerate(alphas.values()):
        share = (plan.packed_modality() == number).double().mean(1)
        p, variance = alpha / 5, alpha / 5 * (1 - alpha / 5) / 6
        assert share.mean().item() == pytest.approx(p, abs=4 * (variance / batch) ** 0.5 + 0.005)
        assert share.var().item() == pytest.approx(variance, rel=0.1)
    for name in tokens:
        share = plan.asks(name).double().sum(1) / 50
        assert share.mean().item() == pytest.approx(1 / 3, abs=0.02)
        assert share.var().item() == pytest.approx(1 / 18, rel=0.1)


def test_components_are_drawn_by_weight_and_budgets_uniformly():
    tokens = tokens_of(8000)
    only = [{"inputs": {"image": 1.0}, "weight": 3}, {"inputs": {"depth": 1.0}}]
    plan = select(tokens, visible=[2, 6], mixture=only)
    assert plan.is_valid is not None
    names = [next(iter({name for name, _, _ in seen})) for seen in slots_seen(plan)]
    assert chisquare([names.count("image"), names.count("depth")], [6000, 2000]).pvalue > 1e-4
    counts = torch.bincount(plan.is_valid.sum(1), minlength=7)
    assert counts[:2].sum() == 0
    assert chisquare(counts[2:]).pvalue > 1e-4


def test_every_token_is_seen_and_asked_for_and_equally_often():
    plan = select(tokens_of(6000), mixture=[{"inputs": 0.5, "targets": 0.5}])
    seen = [entry[:2] for sample in slots_seen(plan) for entry in sample if entry[2] == OWN]
    asked = [entry[:2] for sample in slots_asked(plan) for entry in sample if entry[2] == OWN]
    for name, count in (("image", 16), ("depth", 9)):
        for found in (seen, asked):
            assert chisquare([found.count((name, i)) for i in range(count)]).pvalue > 1e-4
    assert {i for name, i in seen if name == "text"} == {i for name, i in asked if name == "text"} == set(range(12))


def test_modalities_that_are_not_named_take_no_part():
    tokens = tokens_of(500)
    plan = select(tokens, mixture=[{"inputs": {"image": 1.0, "text": 0.5}, "targets": {"depth": 2.0, "text": 1.0}}])
    assert {name for sample in slots_seen(plan) for name, _, _ in sample} == {"image", "text"}
    assert {name for sample in slots_asked(plan) for name, _, _ in sample} == {"depth", "text"}
    assert plan.target["image"].shape == (500, 0), "no room for what is never asked for"


def test_a_modality_that_a_sample_lacks_gets_nothing():
    tokens = tokens_of(400)
    tokens["depth"] = replace(tokens["depth"], is_valid=(torch.arange(400) % 2 == 0).unsqueeze(1).expand(-1, 9))
    plan = select(tokens, mixture=[{"inputs": {"depth": 1.0, "image": 1.0}, "targets": {"depth": 1.0}}])
    for sample, (seen, asked) in enumerate(zip(slots_seen(plan), slots_asked(plan), strict=True)):
        if sample % 2:
            assert {name for name, _, _ in seen} == {"image"}
            assert asked == []
            assert len(seen) == 14, "the others get its share"


def test_whole_groups_are_hidden_together():
    tokens = tokens_of(1000, has_groups=True)
    only = {"visible": 8, "targets": 30, "mixture": [{"inputs": {"text": 1.0}, "targets": {"text": 1.0}}]}
    plan = select(tokens, whole=["text"], **only)
    for seen in slots_seen(plan):
        kept = {i for _, i, shown in seen if shown == OWN}
        assert all(len(kept & {3 * g, 3 * g + 1, 3 * g + 2}) in (0, 3) for g in range(4))
    cut = select(tokens, **only)
    assert any(len({i for _, i, s in seen if s == OWN}) % 3 for seen in slots_seen(cut))


def test_positions_count_what_is_seen_where_they_shall():
    tokens = tokens_of(200)
    assert select(tokens).place == {}
    plan = select(tokens, counted=True, mixture=[{"inputs": {"text": 1.0}}])
    assert list(plan.place) == ["text"]
    assert plan.place["text"].tolist() == [list(range(12))] * 200


def test_a_sample_is_masked_alike_in_every_batch_and_however_far_it_is_filled_up():
    keys, lengths = torch.arange(40), torch.arange(40) % 7
    settings = {"visible": [2, 9], "mixture": MIXTURE}
    whole = select(tokens_of(40, lengths), keys, **settings)
    half = select(tokens_of(20, lengths[20:]), keys[20:], **settings)
    assert slots_seen(half) == slots_seen(whole)[20:]
    assert slots_asked(half) == slots_asked(whole)[20:]
    other = select(tokens_of(40, lengths), keys + 1000, **settings)
    assert slots_seen(other) != slots_seen(whole)


def test_given_masks_show_a_sentinel_for_each_hidden_run_and_ask_for_all_that_is_hidden():
    tokens = tokens_of(2, torch.tensor([6, 4]))
    selection = masking.build(View(tuple(tokens), json.dumps({"type": "budget", "visible": 3, "targets": 2})))
    text = torch.zeros(2, 12, dtype=torch.bool)
    text[0, [0, 3]] = True
    plan = selection.explicit(
        tokens,
        {
            "image": torch.ones(2, 16, dtype=torch.bool),
            "depth": torch.zeros(2, 9, dtype=torch.bool),
            "text": text,
        },
    )
    seen, asked = slots_seen(plan), slots_asked(plan)
    assert [entry[1:] for entry in seen[0] if entry[0] == "text"] == [(0, OWN), (1, 20), (3, OWN), (4, 21)]
    assert [entry for entry in seen[1] if entry[0] == "text"] == [], "of nothing not even a sentinel is seen"
    words = [i if a == OWN else a for name, i, a in asked[0] if name == "text"]
    assert words == [1, 2, 21, 4, 5, 22]
    assert [i if a == OWN else a for name, i, a in asked[1] if name == "text"] == [0, 1, 2, 3, 21]
    assert [i for name, i, _ in asked[0] if name == "depth"] == list(range(9))
    assert plan.is_seen("text", 12)[0].nonzero().flatten().tolist() == [0, 3]


def test_packed_targets_keep_their_order():
    plan = select(tokens_of(50))
    values = plan.pack_targets({n: take(t.values, plan.target[n]).squeeze(-1) for n, t in tokens_of(50).items()})
    for sample, row in enumerate(slots_asked(plan)):
        assert [i for _, i, _ in row] == values[sample, : len(row)].tolist()
        assert [name for name, _, _ in row] == sorted([name for name, _, _ in row], key=list(plan.target).index)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixture": [{"inputs": {"imag": 1.0}}]}, "masking names `imag`.* Did you mean `image`"),
        ({"whole": ["texts"]}, "masking names `texts`.* Did you mean `text`"),
        ({"visible": [9, 3]}, r"`visible` is least, then most: write \[3, 9\]"),
        ({"mixture": [{"inputs": 0.0}]}, "greater than 0"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(M3Error, match=message):
        select(tokens_of(2), **settings)


def test_too_few_sentinels_are_refused():
    tokens = tokens_of(2)
    tokens["text"] = replace(tokens["text"], sentinels=range(20, 26))
    with pytest.raises(M3Error, match=r"may have 6 hidden runs, but it has 6 sentinels.*; give it 7 `sentinels`"):
        select(tokens)
