"""Sequences with hidden runs, as T5 writes them (Raffel et al. 2020, section 3.1.4) and 4M after it.

The encoder is shown every hidden run as one sentinel. The decoder says, run by run, the sentinel and the words behind
it, and closes with the next sentinel: "a <S0> cube <S1>" and "<S0> small red <S1> left <S2>".

Letters: B batch, N tokens of the sequence, T elements that are asked for, W tries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from m3.types import OWN

SHRINK, TRIES = 0.9, 100
"""Factor on the probability to keep a token from try to try (4M), and number of tries before all are hidden."""


class Runs(NamedTuple):
    """Where the hidden runs of a sequence are.

    Attributes:
        is_hidden: (B, N) bool.
        is_first: (B, N) bool, True at the first token of each run.
        number: (B, N) int64, of hidden tokens the number of their run, from 0.
        offset: (B, N) int64, of hidden tokens their place in the run, from 0.
    """

    is_hidden: Tensor
    is_first: Tensor
    number: Tensor
    offset: Tensor

    @property
    def total(self) -> Tensor:
        """(B, 1) int64, runs of a sample."""
        return self.is_first.sum(1, keepdim=True)


class Stream(NamedTuple):
    """What the decoder says, in its order.

    Attributes:
        token: (B, 1 + T) int64, the token that each element is, or before which its sentinel stands.
        asked: (B, 1 + T) int64, OWN or the sentinel's class id.
        is_target: (B, 1 + T) bool; never the first, with which the decoder begins.
    """

    token: Tensor
    asked: Tensor
    is_target: Tensor


def find_runs(is_hidden: Tensor) -> Runs:
    """Divide hidden tokens (B, N) into runs of neighbours."""
    before = torch.cat([torch.zeros_like(is_hidden[:, :1]), is_hidden[:, :-1]], dim=1)
    is_first = is_hidden & ~before
    index = torch.arange(is_hidden.shape[1], device=is_hidden.device)
    start = torch.where(is_first, index, 0).cummax(dim=1).values
    return Runs(is_hidden, is_first, is_first.cumsum(1) - 1, index - start)


def draw_hidden(noise: Tensor, keep: Tensor, is_valid: Tensor, budget: Tensor) -> Tensor:
    """Hide tokens so that what is shown, with a sentinel for each run, fits the budget -> (B, N) bool.

    A token is kept with probability `keep`, which shrinks by a tenth until all fits; 4M draws anew at every try, here
    each token keeps its noise.

    Args:
        noise: (B, N) uniform in [0, 1); equal for tokens that belong together.
        keep: (B, 1) probability of the first try.
        is_valid: (B, N) bool.
        budget: (B, 1) int64, tokens and sentinels that the encoder may see.
    """
    tries = keep * SHRINK ** torch.arange(TRIES + 1, device=noise.device)
    tries[:, -1] = 0.0
    is_hidden = (noise.unsqueeze(1) >= tries.unsqueeze(-1)) & is_valid.unsqueeze(1)  # (B, W, N)
    before = torch.cat([torch.zeros_like(is_hidden[..., :1]), is_hidden[..., :-1]], dim=-1)
    shown = (is_valid.unsqueeze(1) & ~(is_hidden & before)).sum(-1)
    fits = shown <= budget
    fits[:, -1] = True
    first = fits.to(torch.uint8).argmax(1)
    return is_hidden[torch.arange(len(noise), device=noise.device), first]


def stream(runs: Runs, sentinels: range, is_there: Tensor, budget: Tensor, length: int, lot: Tensor) -> Stream:
    """Write down what is asked of a sequence; where it does not fit the budget it begins at a random sentinel.

    As in 4M: if from there it is too short, it begins at the first sentinel from which all the rest fits.

    Args:
        runs: the hidden runs.
        sentinels: class ids.
        is_there: (B,) bool, False for samples without the sequence, of which nothing is asked.
        budget: (B, 1) int64, elements that may be asked for.
        length: T, the largest budget.
        lot: (B, 1) uniform in [0, 1).
    """
    batch, count = runs.is_hidden.shape
    index = torch.arange(count, device=lot.device)
    # Two places for each token, its run's sentinel and itself, and one for the closing sentinel.
    exists = torch.stack([runs.is_first, runs.is_hidden], -1).flatten(1)
    exists = torch.cat([exists, torch.ones_like(exists[:, :1])], dim=1) & is_there.unsqueeze(1)
    asked = torch.stack([runs.number + sentinels.start, torch.full_like(runs.number, OWN)], -1).flatten(1)
    asked = torch.cat([asked, runs.total + sentinels.start], dim=1)
    index = torch.cat([index.repeat_interleave(2), index[-1:]]).expand(batch, -1)
    order = exists.argsort(dim=1, descending=True, stable=True)[:, : count + 2]
    asked, index, total = asked.gather(1, order), index.gather(1, order), exists.sum(1, keepdim=True)

    place = torch.arange(order.shape[1], device=lot.device)
    is_sentinel = (asked != OWN) & (place < total)
    chosen = (lot * runs.total.clamp(min=1)).floor().long()  # never the closing one
    at_random = (is_sentinel & (is_sentinel.cumsum(1) - 1 == chosen)).to(torch.uint8).argmax(1, keepdim=True)
    from_here = (is_sentinel & (total - place <= budget + 1)).to(torch.uint8).argmax(1, keepdim=True)
    start = torch.where(total - at_random >= budget + 1, at_random, from_here)
    start = torch.where(total <= budget + 1, 0, start)
    step = torch.arange(1 + length, device=lot.device)
    taken = (start + step).clamp(max=order.shape[1] - 1)
    is_target = (step > 0) & (step <= budget) & (start + step < total)
    return Stream(index.gather(1, taken), asked.gather(1, taken), is_target)
