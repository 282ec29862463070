"""Masks of structure: groups are never cut, spans have the asked length, and all is as random as it should be."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from m3 import masking
from m3.parts import build_spec
from m3.plugins import View
from m3.random import Draws
from m3.types import MaskPlan, Tokens

SAMPLES = 4000


def sequence(count: int, samples: int = SAMPLES, group: list[int] | None = None, lengths: Tensor | None = None):
    """Tokens of one sequence for each sample."""
    values = torch.arange(samples * count).reshape(samples, count, 1)
    is_valid = None if lengths is None else torch.arange(count) < lengths.unsqueeze(1)
    groups = None if group is None else torch.tensor(group).expand(samples, -1)
    return Tokens(values, torch.arange(float(count)).view(1, -1, 1), is_valid, groups)


def select(settings: dict, tokens: dict[str, Tokens], seed: int = 0, keys: Tensor | None = None) -> MaskPlan:
    keys = torch.arange(len(next(iter(tokens.values())).values)) * 3 + 1 if keys is None else keys
    return masking.build(View(tuple(tokens), json.dumps(settings)))(tokens, Draws(keys, seed))


def seen_by(plan: MaskPlan, tokens: dict[str, Tokens]) -> dict[str, Tensor]:
    """Modality -> (B, N) bool, True where the encoder sees the token; slow, token by token."""
    names = list(plan.visible)
    seen = {name: torch.zeros(part.values.shape[:2], dtype=torch.bool) for name, part in tokens.items()}
    index, modality = plan.packed_index().tolist(), plan.packed_modality().tolist()
    for sample in range(len(index)):
        for place, (i, m) in enumerate(zip(index[sample], modality[sample], strict=True)):
            if plan.is_valid is None or plan.is_valid[sample, place]:
                assert not seen[names[m]][sample, i]
                seen[names[m]][sample, i] = True
    return seen


# -- whole groups ---------------------------------------------------------------------------------------

GROUPS = [0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6]


def greedy(order: list[int], sizes: dict[int, int], budget: int) -> set[int]:
    """Take groups in order until one does not fit."""
    taken, used = set(), 0
    for group in order:
        if used + sizes[group] > budget:
            break
        taken.add(group)
        used += sizes[group]
    return taken


def test_fixed_takes_whole_groups_in_the_order_of_their_first_tokens() -> None:
    tokens = {"text": sequence(12, 200, GROUPS)}
    plan = select({"type": "fixed", "visible": 5, "whole": True}, tokens)
    seen = seen_by(plan, tokens)["text"]
    scores = Draws(torch.arange(200) * 3 + 1).uniform("score/text", 12).tolist()
    sizes = {g: GROUPS.count(g) for g in GROUPS}
    for sample in range(200):
        order = sorted(sizes, key=lambda g: scores[sample][GROUPS.index(g)])
        taken = greedy(order, sizes, 5)
        assert seen[sample].tolist() == [g in taken for g in GROUPS]
    assert 3 <= int(seen.sum(1).min()) < int(seen.sum(1).max()) == 5


@pytest.mark.parametrize("settings", [{"type": "fixed", "visible": 0.4}, {"type": "dirichlet", "visible": 9}])
@pytest.mark.parametrize("scorer", [{"type": "uniform"}, {"type": "span"}])
def test_a_group_is_never_cut_and_the_budget_is_never_passed(settings: dict, scorer: dict) -> None:
    lengths = torch.arange(400) % 13
    tokens = {
        "text": sequence(12, 400, GROUPS, lengths),
        "image": sequence(8, 400),
        "tags": sequence(5, 400, [4, 1, 4, 0, 1]),
    }
    # What is cut off at the end of a sentence leaves no half group: its numbers go on one by one.
    cut = torch.arange(12).expand(400, -1)
    is_there = cut < lengths.unsqueeze(1)
    tokens["text"] = replace(tokens["text"], group=torch.where(is_there, torch.tensor(GROUPS), cut))
    seen = seen_by(select({**settings, "whole": True, "scorer": scorer}, tokens), tokens)
    for name, part in tokens.items():
        for sample in range(400):
            there = set(range(part.count)) if part.is_valid is None else set(range(int(lengths[sample])))
            own = {i for i in range(part.count) if seen[name][sample, i]}
            assert own <= there
            numbers = part.group[sample].tolist() if part.group is not None else range(part.count)
            for _, members in itertools.groupby(sorted(there, key=lambda i: numbers[i]), key=lambda i: numbers[i]):
                members = set(members)
                assert not members & own or members <= own
            if settings["type"] == "fixed":
                most = max(1, int(len(there) * 0.4 + 1e-9)) if there else 0
                assert most - 2 <= len(own) <= most
    if settings["type"] == "dirichlet":
        total = torch.stack([x.sum(1) for x in seen.values()]).sum(0)
        assert int(total.max()) == 9
        assert int(total.min()) >= 7


def test_without_groups_whole_changes_nothing() -> None:
    tokens = {"a": sequence(9, 50), "b": sequence(6, 50)}
    for settings in ({"type": "fixed", "visible": 0.5}, {"type": "dirichlet", "visible": 7}):
        plain, whole = select(settings, tokens), select({**settings, "whole": True}, tokens)
        assert all(torch.equal(plain.visible[name], whole.visible[name]) for name in tokens)
        assert all(torch.equal(plain.target[name], whole.target[name]) for name in tokens)
        assert plain.is_valid is None
        assert whole.is_valid is None


def test_long_and_short_groups_come_first_equally_often() -> None:
    """Of a pair, a word of three pieces and one of one, each is the first in half of the samples."""
    tokens = {"text": sequence(4, SAMPLES, [0, 0, 0, 1])}
    seen = seen_by(select({"type": "fixed", "visible": 3, "whole": True}, tokens), tokens)["text"]
    share = seen[:, 0].float().mean()
    assert abs(float(share) - 0.5) < 4 * 0.5 / SAMPLES**0.5
    assert torch.equal(seen[:, 0], ~seen[:, 3])


# -- spans ----------------------------------------------------------------------------------------------


def hidden_by(mean: float, count: int, hidden: float, seed: int = 0) -> Tensor:
    """(B, N) bool, True where hidden: `hidden` of `count` tokens."""
    tokens = {"text": sequence(count)}
    settings = {"type": "fixed", "visible": count - round(hidden * count), "scorer": {"type": "span", "mean": mean}}
    plan = select(settings, tokens, seed)
    is_hidden = torch.zeros(SAMPLES, count, dtype=torch.bool)
    return is_hidden.scatter(1, plan.target["text"], True)


def runs(is_hidden: Tensor) -> Tensor:
    """(B,) number of runs on a ring, where the last token is followed by the first."""
    return (is_hidden & ~is_hidden.roll(1, 1)).sum(1)


@pytest.mark.parametrize(("mean", "count", "hidden"), [*itertools.product([1, 2, 3, 6], [64, 300], [0.15, 0.4])])
def test_hidden_spans_have_the_asked_mean_length(mean: int, count: int, hidden: float) -> None:
    """k hidden tokens lie in 1 + (k - 1) / mean spans on average: each but the last hidden one ends its span with
    chance 1 / mean. Where the ring is closed two spans may touch, or one is cut: less than one span off.
    """
    is_hidden = hidden_by(mean, count, hidden)
    k = round(hidden * count)
    assert bool((is_hidden.sum(1) == k).all())
    expected = 1 + (k - 1) / mean
    assert abs(float(runs(is_hidden).double().mean()) - expected) < 0.25


def test_the_mean_of_t5_on_a_long_sequence() -> None:
    is_hidden = hidden_by(3.0, 512, 0.15)
    length = is_hidden.sum() / runs(is_hidden).sum()
    assert abs(float(length) - 3) < 0.12


def test_more_than_mean_in_mean_plus_one_joins_spans() -> None:
    """At three quarters, spans of 3 are separated by single tokens; above it they join."""
    below, above = hidden_by(3.0, 300, 0.7), hidden_by(3.0, 300, 0.9)
    assert abs(float(below.sum() / runs(below).sum()) - 3) < 0.15
    assert float(above.sum() / runs(above).sum()) > 6


def test_lengths_of_spans_are_geometric() -> None:
    is_hidden = hidden_by(3.0, 300, 0.3)
    joined = "".join("x" if x else " " for row in is_hidden[:600].tolist() for x in [*row, False])
    found = [len(run) for run in joined.split()]
    shares = [sum(n == k for n in found) / len(found) for k in (1, 2, 3, 4)]
    assert shares == pytest.approx([1 / 3, 2 / 9, 4 / 27, 8 / 81], abs=0.02)


@pytest.mark.parametrize(("mean", "count", "hidden"), [(3.0, 30, 0.5), (5.0, 24, 0.25), (1.0, 17, 0.4)])
def test_every_place_is_hidden_equally_often_also_at_the_ends(mean: float, count: int, hidden: float) -> None:
    """Neighbours hang together, so the counts are compared place by place against their own deviation."""
    times = hidden_by(mean, count, hidden).double().sum(0)
    share = round(hidden * count) / count
    deviation = (SAMPLES * share * (1 - share)) ** 0.5
    assert float((times - SAMPLES * share).abs().max()) < 4.5 * deviation
    assert float(((times - SAMPLES * share) / deviation).square().sum()) < 4 * float(chi2.ppf(0.9999, count - 1))


def test_shorter_samples_keep_their_spans_when_they_are_filled_up_further() -> None:
    lengths = torch.arange(50) % 20 + 1
    plans = []
    for count in (20, 31):
        tokens = {"text": sequence(count, 50, lengths=lengths)}
        plan = select({"type": "fixed", "visible": 0.5, "scorer": {"type": "span"}}, tokens)
        plans.append(seen_by(plan, tokens)["text"][:, :20])
        assert bool((plans[-1].sum(1) == (lengths // 2).clamp(min=1)).all())
    assert torch.equal(*plans)


def test_patches_over_two_axes_are_no_sequence() -> None:
    tokens = {"text": sequence(12, 4), "image": Tokens(torch.zeros(4, 12, 1), torch.zeros(1, 12, 2))}
    part, spec = build_spec("scorers", {"type": "span"}, "scorer")
    draws = Draws(torch.arange(4), 3)
    scores = part(spec)(tokens, draws)
    assert torch.equal(scores["image"], draws.uniform("score/image", 12))
    assert sorted(scores["text"][0].tolist()) == list(range(12))


def test_spans_are_seeded() -> None:
    first, again, other = hidden_by(3.0, 40, 0.4), hidden_by(3.0, 40, 0.4), hidden_by(3.0, 40, 0.4, seed=1)
    assert torch.equal(first, again)
    assert float((first != other).float().mean()) > 0.4
