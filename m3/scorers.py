"""Scorers: a number for every token. Tokens with low scores are seen, tokens with high scores are hidden.

A new masking strategy is a new scorer: a class with a `Spec` and `__call__`; one that must see more than tokens has a
`bind` too (`Attention` in `m3.shaped_scorers`). Letters: B batch, N tokens.
"""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from m3.plugins import Strict
from m3.random import Draws
from m3.types import Tokens, take


class Uniform:
    """Independent uniform noise: random masking as in MAE (He et al. 2021, section 3)."""

    class Spec(Strict):
        """Uniform noise has no settings."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
        """Return modality -> (B, N) float scores."""
        return {name: draws.uniform(f"score/{name}", part.count) for name, part in tokens.items()}


class Cells:
    """Noise shared by the tokens of a cell, which are so seen or hidden together, where the budget is whole cells.

    SimMIM's mask units (Xie et al. 2021, section 3.2), larger than a patch.
    """

    class Spec(Strict):
        """Settings of `type: cells`.

        Attributes:
            unit: edge of a cell in tokens, along every axis of the positions.
        """

        unit: PositiveInt = 2

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
        """Return modality -> (B, N) float scores: those of the first token of each token's cell."""
        scores = {}
        for name, part in tokens.items():
            cell = ((part.positions + 0.5) / self.spec.unit).floor()  # (1 or B, N, A)
            is_same = (cell.unsqueeze(2) == cell.unsqueeze(1)).all(-1)
            first = is_same.to(torch.uint8).argmax(-1)
            scores[name] = draws.uniform(f"score/{name}", part.count).gather(1, first.expand(len(draws.keys), -1))
        return scores


class Span:
    """Hides runs of neighbouring tokens of a sequence, as T5 corrupts spans (Raffel et al. 2020, section 3.1.4).

    A sequence is divided at random into spans, of geometric lengths with mean `mean`, with one token between them,
    and turned by a random number of places as if it were a ring, so that all its places are hidden equally often.
    All tokens of a span have one score, above that of any token between spans. So whatever the budget, hidden tokens
    form separate spans (the last of them cut, so that the budget is exact) up to a share of mean / (mean + 1);
    beyond it, too few tokens are left to separate them. Tokens over more than one axis (patches of an image) are no
    sequence and get uniform noise, as in 4M (Mizrahi et al. 2023, section 2.3).
    """

    class Spec(Strict):
        """Settings of `type: span`.

        Attributes:
            mean: length of a hidden span, in tokens (T5: 3).
        """

        mean: float = Field(default=3.0, ge=1)

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
        """Return modality -> (B, N) float scores."""
        return {
            name: self._spans(name, part, draws)
            if part.positions.shape[-1] == 1
            else draws.uniform(f"score/{name}", part.count)
            for name, part in tokens.items()
        }

    def _spans(self, name: str, part: Tokens, draws: Draws) -> Tensor:
        """Score a sequence by the places of its tokens: those between spans first, then span by span."""
        index = torch.arange(part.count, device=draws.keys.device)
        is_between = self._gaps(draws.uniform(f"gap/{name}", part.count + 1))
        is_first = is_between | is_between.roll(1, dims=1) | (index == 0)
        first = (index * is_first).cummax(dim=1).values
        level = draws.uniform(f"score/{name}", part.count).gather(1, first) + (~is_between).float()
        place = level.argsort(dim=1, stable=True).argsort(dim=1).float()  # a span that is cut is cut in its order
        # Turn the tokens that exist, and only those: how far a sequence is filled up must not change its mask.
        is_valid = torch.ones_like(is_between) if part.is_valid is None else part.is_valid
        there = is_valid.sum(1, keepdim=True).clamp(min=1)
        shift = (draws.uniform(f"turn/{name}", 1) * there).floor().long()
        return place.gather(1, (is_valid.cumsum(1) - 1 + shift) % there)

    def _gaps(self, u: Tensor) -> Tensor:
        """Return (B, N) bool, True between spans, of noise u (B, N + 1).

        A chain that leaves a span with probability 1 / mean for exactly one token, in its stationary state: among
        tokens in a row whose noise says "leave", every second one is between spans.
        """
        says_leave = u < 1 / self.spec.mean
        says_leave[:, 0] = u[:, 0] < 1 / (1 + self.spec.mean)
        index = torch.arange(1, u.shape[1] + 1, device=u.device)
        in_a_row = index - (index * ~says_leave).cummax(dim=1).values
        return (in_a_row % 2 == 1)[:, 1:]


class Tube:
    """Hides the same places at all times: noise shared along time (VideoMAE, Tong et al. 2022, section 3.3).

    A place is all coordinates but the first. The tokens of a place lie next to one another in the order of the scores,
    so a budget that is a multiple of the time slots cuts no tube; another one cuts one. Tokens over fewer than three
    axes (images, text) are no recording of places and get uniform noise.
    """

    class Spec(Strict):
        """Noise shared along time has no settings."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
        """Return modality -> (B, N) float scores."""
        scores = {}
        for name, part in tokens.items():
            noise = draws.uniform(f"score/{name}", part.count)
            if part.positions.shape[-1] >= 3:
                # Places of a random order instead of the noise itself: two tubes never have the same score.
                order = noise.argsort(dim=1, stable=True).argsort(dim=1).float()
                noise = order.gather(1, _places(part.positions).expand(len(noise), -1))
            scores[name] = noise
        return scores


class RunningCell:
    """A pattern in cells of 2 x 2 places that moves on by one place each time slot (VideoMAE V2, Wang et al. 2023).

    The four places of a cell, row by row, are numbered 0 to 3 around a ring that turns by one each slot, from a
    random start; the score is that number plus noise below 1. So a share of 1/4, 1/2 or 3/4 takes the same pattern in
    every cell, and over four slots every place equally often; other shares, and grids of odd size, are levelled at
    random. Tokens over other than three axes get uniform noise.
    """

    class Spec(Strict):
        """The pattern has no settings."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
        """Return modality -> (B, N) float scores."""
        scores = {}
        for name, part in tokens.items():
            noise = draws.uniform(f"score/{name}", part.count)
            if part.positions.shape[-1] == 3:
                slot, row, column = (_numbered(part.positions[..., axis]) for axis in range(3))
                start = (draws.uniform(f"start/{name}", 1) * 4).long()
                noise = noise + (2 * (row % 2) + column % 2 + slot + start) % 4
            scores[name] = noise
        return scores


def _places(positions: Tensor) -> Tensor:
    """Return (1 or B, N) int64 in [0, N): equal for tokens at positions (1 or B, N, A) that differ in time alone."""
    count = positions.shape[1]
    place = torch.zeros(positions.shape[:2], dtype=torch.long, device=positions.device)
    for axis in range(1, positions.shape[-1]):
        place = _numbered(place * count + _numbered(positions[..., axis]))
    return place


def _numbered(x: Tensor) -> Tensor:
    """Number the different values of each row of (B, N) in ascending order from 0 -> (B, N) int64."""
    values, order = x.sort(dim=1)
    is_new = torch.cat([torch.zeros_like(order[:, :1]), (values.diff(dim=1) != 0).long()], dim=1)
    return torch.zeros_like(order).scatter(1, order, is_new.cumsum(1))


class TimeFrequency:
    """Hides whole steps of time and whole bands of frequency, as SpecAugment does and AudioMAE's fine-tuning.

    Both axes of a grid are put in random order, and the visible tokens are those of the first steps and first bands.
    They are exactly whole steps and bands where the budget is floor(T (1 - time)) * floor(F (1 - frequency)); another
    one takes more or fewer of both, in the same proportion, and cuts the last. Tokens that fill no grid of two axes
    get uniform noise.
    """

    class Spec(Strict):
        """Settings of `type: time_frequency`.

        Attributes:
            time: share of the steps along the first axis that is hidden.
            frequency: share of the bands along the second.
        """

        time: float = Field(default=0.2, ge=0, lt=1)
        frequency: float = Field(default=0.2, ge=0, lt=1)

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
        """Return modality -> (B, N) float scores."""
        return {
            name: self._bars(name, part, (part.counts[0], part.counts[1]), draws)
            if part.counts is not None and len(part.counts) == 2
            else draws.uniform(f"score/{name}", part.count)
            for name, part in tokens.items()
        }

    def _bars(self, name: str, part: Tokens, counts: tuple[int, int], draws: Draws) -> Tensor:
        """Score a token by the place of its step or of its band in their random orders, whichever is later."""
        is_there = torch.ones_like(part.values[..., 0], dtype=torch.bool) if part.is_valid is None else part.is_valid
        is_there = is_there.view(-1, *counts)
        step = self._places(draws.uniform(f"time/{name}", counts[0]), is_there.any(2)) / (1 - self.spec.time)
        band = self._places(draws.uniform(f"band/{name}", counts[1]), is_there.any(1)) / (1 - self.spec.frequency)
        return torch.maximum(step.unsqueeze(2), band.unsqueeze(1)).flatten(1)

    def _places(self, noise: Tensor, is_there: Tensor) -> Tensor:
        """Return (B, n) the place of each in random order, as a share of those that exist; the last has 1."""
        order = noise.masked_fill(~is_there, 1.0).argsort(dim=1, stable=True)
        place = order.argsort(dim=1) + 1
        return place / is_there.sum(1, keepdim=True).clamp(min=1)


class Nearest:
    """Hides the tokens nearest to one that is drawn at random, itself included: Point-MAE's block masking."""

    class Spec(Strict):
        """Settings of `type: nearest`; it has none."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
        """Return modality -> (B, N) float scores: minus the distance, in the units of the positions."""
        return {name: self._distances(name, part, draws) for name, part in tokens.items()}

    def _distances(self, name: str, part: Tokens, draws: Draws) -> Tensor:
        is_there = torch.ones_like(part.values[..., 0], dtype=torch.bool) if part.is_valid is None else part.is_valid
        number = (draws.uniform(f"centre/{name}", 1) * is_there.sum(1, keepdim=True)).floor()
        centre = (is_there.cumsum(1) > number).int().argmax(1, keepdim=True)  # the token that exists of this number
        place = part.positions.expand(len(is_there), -1, -1)
        return -(place - take(place, centre)).square().sum(-1).sqrt()
