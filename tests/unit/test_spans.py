"""Hidden runs of sequences: by hand, against a slow reading of T5 and 4M, and put together again.

Letters: B samples, N tokens, T asked elements.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m3.spans import TRIES, draw_hidden, find_runs, stream
from m3.types import OWN

FIRST = 100
SENTINELS = range(FIRST, FIRST + 10)


def flags(text: str) -> Tensor:
    """`.#` -> hidden where #."""
    return torch.tensor([[c == "#" for c in text]])


def said(text: str, budget: int, lot: float = 0.0, length: int | None = None) -> list[str]:
    """What is asked of one sequence, tokens as letters, sentinels as <0>, <1> ..."""
    hidden = flags(text)
    runs = find_runs(hidden)
    there = torch.ones(1, dtype=torch.bool)
    found = stream(runs, SENTINELS, there, torch.tensor([[budget]]), length or len(text) + 1, torch.tensor([[lot]]))
    words = []
    for token, asked, is_target in zip(found.token[0], found.asked[0], found.is_target[0], strict=True):
        word = "abcdefghij"[token] if asked == OWN else f"<{int(asked) - FIRST}>"
        if is_target or not words:
            words.append(word)
    return words


def test_runs_by_hand():
    runs = find_runs(flags("##.#..###"))
    assert runs.is_first.int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 0, 0]]
    assert runs.number[0, [0, 1, 3, 6, 7, 8]].tolist() == [0, 0, 1, 2, 2, 2]
    assert runs.offset[0, [0, 1, 3, 6, 7, 8]].tolist() == [0, 1, 0, 0, 1, 2]
    assert runs.total.tolist() == [[3]]
    assert find_runs(flags("....")).total.tolist() == [[0]]


def test_streams_by_hand():
    assert said("#..##.", budget=9) == ["<0>", "a", "<1>", "d", "e", "<2>"]
    assert said("######", budget=9) == ["<0>", "a", "b", "c", "d", "e", "f", "<1>"]
    assert said("......", budget=9) == ["<0>"], "nothing is hidden: there is only the end, and it is given"
    assert said("#..##.", budget=5) == ["<0>", "a", "<1>", "d", "e", "<2>"], "five are asked, the first is given"


def test_streams_beyond_the_budget_begin_at_a_random_sentinel():
    # <0> a <1> d e <2>: with four asked for, one must go. From <0> the window is full: it is taken as it is.
    assert said("#..##.", budget=4, lot=0.0) == ["<0>", "a", "<1>", "d", "e"]
    # From <1> there would be room left: the first sentinel is taken from which all the rest fits, <1> itself.
    assert said("#..##.", budget=4, lot=0.6) == ["<1>", "d", "e", "<2>"]
    # <0> a b c <1> e f g <2>, two asked: <1> e f, though the rest would not fit.
    assert said("###.###", budget=2, lot=0.99) == ["<1>", "e", "f"]
    assert said("###.###", budget=0, lot=0.0) == ["<0>"], "nothing is asked"
    # <0> a <1> c <2> e f g <3>, five asked: <2> e f g <3> is shorter, so is <1> ... longer; from <1> it is too long.
    assert said("#.#.###", budget=5, lot=0.99) == ["<2>", "e", "f", "g", "<3>"]


def test_samples_without_the_sequence_are_asked_nothing():
    runs = find_runs(torch.zeros(1, 4, dtype=torch.bool))
    found = stream(runs, SENTINELS, torch.tensor([False]), torch.tensor([[5]]), 5, torch.zeros(1, 1))
    assert not found.is_target.any()


def shown_length(hidden: list[bool], valid: list[bool]) -> int:
    length, before = 0, False
    for is_hidden, is_valid in zip(hidden, valid, strict=True):
        if is_valid and (not is_hidden or not before):
            length += 1
        before = is_hidden
    return length


def test_tokens_are_hidden_until_the_budget_is_kept():
    """Against the loop of 4M with one noise for all tries."""
    generator = torch.Generator().manual_seed(0)
    batch, count = 300, 11
    noise = torch.rand(batch, count, generator=generator)
    keep = torch.rand(batch, 1, generator=generator)
    lengths = torch.randint(0, count + 1, (batch, 1), generator=generator)
    valid = torch.arange(count) < lengths
    budget = torch.randint(0, count + 1, (batch, 1), generator=generator)
    found = draw_hidden(noise, keep, valid, budget)
    tries = set()
    for i in range(batch):
        p, turn = float(keep[i]), 0
        while True:
            p = float(keep[i] * 0.9**turn) if turn < TRIES else 0.0
            hidden = [bool(v) and float(u) >= p for u, v in zip(noise[i], valid[i], strict=True)]
            if turn == TRIES or shown_length(hidden, valid[i].tolist()) <= int(budget[i]):
                break
            turn += 1
        tries.add(turn)
        assert found[i].tolist() == hidden, (i, turn)
    assert {0, 1, TRIES} <= tries, "budgets that are kept at once, later, and only when all is hidden"


def test_what_is_kept_follows_the_probability():
    noise = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(1))
    room = torch.ones(len(noise), 1, dtype=torch.long)
    hidden = draw_hidden(noise, torch.full_like(noise, 0.3), torch.ones_like(noise, dtype=torch.bool), room)
    assert (~hidden).float().mean().item() == pytest.approx(0.3, abs=0.005)
