"""From scores to exactly as many visible and target tokens as the budget says.

A selection is a pure function of (tokens, scores, budget, draws): seeded, on the device, without a wait for the
host. It never looks at values, only at counts and validity. All the others, MAE's, MultiMAE's, are budgets.

Letters: B batch, M modalities, N tokens of a modality, S visible slots of a modality, V tokens the encoder
sees, T targets of a modality.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from m3.errors import M3Error, nearest
from m3.parts import build_spec
from m3.plugins import Strict, View
from m3.random import Draws, log_gamma_variates, stream_number
from m3.types import MaskPlan, Tokens, take

Amount = NonNegativeInt | Annotated[float, Field(gt=0, le=1)]
"""A whole number of tokens, or (a number with a point) a share of them in (0, 1]."""


def amount(visible: float, count: int) -> int:
    """Return how many of `count` tokens are meant: an int as it is, a float share rounded down, at least 1."""
    if isinstance(visible, int):
        return min(visible, count)
    return max(1, math.floor(visible * count + 1e-9))


class Decode(Strict):
    """The part of the tokens that a decoder predicts, of those that the encoder sees too.

    Attributes:
        share: of all tokens, rounded down.
        scorer: what ranks the tokens; those with low scores are decoded.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    scorer: dict = Field(default={"type": "running_cell"})


class Selection(Protocol):
    """What every selection of this file provides."""

    def check(self, names: tuple[str, ...]) -> None:
        """Raise M3Error when the settings contradict the modalities of the view."""
        ...

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> MaskPlan:
        """Choose visible and target tokens."""
        ...


class Fixed:
    """The same number of visible tokens in every sample: a share or a number for each modality.

    With `visible: 0.25` and 196 patches this is MAE's mask: 49 seen, 147 to be predicted (int(L * (1 - r))).
    """

    class Spec(Strict):
        """Settings of `type: fixed`.

        Attributes:
            visible: share in (0, 1] (rounded down) or number of tokens that the encoder sees, for all
                modalities or for each by name.
            whole: tokens that only make sense together (the pieces of a word) are seen or hidden together; a
                sample sees fewer tokens than the budget where the next group does not fit.
            scorer: what ranks the tokens.
            decode: ask for a part of the tokens only (VideoMAE V2's dual masking); no loss asks for those among them
                that the encoder sees. null: ask for all hidden tokens.
        """

        visible: Amount | dict[str, Amount] = 0.25
        whole: bool = False
        scorer: dict = Field(default={"type": "uniform"})
        decode: Decode | None = None

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.scorer = _scorer(spec.scorer)
        self.decoded = _scorer(spec.decode.scorer) if spec.decode else None

    def check(self, names: tuple[str, ...]) -> None:
        """Raise M3Error when a budget names a modality that is not there or leaves one out."""
        if isinstance(self.spec.visible, dict):
            _check_names("masking.visible", set(self.spec.visible), names)

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> MaskPlan:
        """Select. Shares are of the valid tokens where a sample has fewer than N."""
        scores = self.scorer(tokens, draws)
        is_visible, slots = {}, {}
        for name, part in tokens.items():
            visible = self.spec.visible[name] if isinstance(self.spec.visible, dict) else self.spec.visible
            slots[name] = amount(visible, part.count)
            quota = _valid_quota(visible, part)
            group = part.group if self.spec.whole else None
            is_visible[name] = _rank(scores[name], part.is_valid, group) < quota
        is_ragged = self.spec.whole and any(part.group is not None for part in tokens.values())
        plan = assemble(tokens, is_visible, slots, sum(slots.values()), is_ragged)
        if self.spec.decode is None or self.decoded is None:
            return plan
        # Noise of its own: under the same, a decoder would be asked for what the encoder sees.
        scores = self.decoded(tokens, Draws(draws.keys, stream_number(f"decode/{draws.seed}")))
        return thinned(plan, tokens, is_visible, scores, self.spec.decode.share)


class Dirichlet:
    """A fixed number V of visible tokens over all modalities, shared out by a Dirichlet draw per sample.

    MultiMAE (Bachmann et al. 2022, section 3.2): shares ~ Dirichlet(alpha), quotas = round(share * V), the
    first quota tokens in score order are seen. Rounding and full modalities leave a surplus or a deficit;
    it is levelled at random over all tokens, so that exactly V are seen.
    """

    class Spec(Strict):
        """Settings of `type: dirichlet`.

        Attributes:
            visible: V, number of tokens that the encoder sees, or a share of all.
            alpha: concentration for all modalities or for each by name; small: few modalities get nearly
                all, large: all get the same.
            subsets: first draw one of the non-empty sets of modalities uniformly, then share among those.
            surplus: of a modality with fewer tokens than its share: `others`: it goes to all other tokens at random,
                so that V are always seen (MultiMAE); `unused`: fewer are seen (4M), shares are rounded down, and a
                modality may be seen alone.
            whole: as in `Fixed`; then up to V are seen.
            scorer: what ranks the tokens.
        """

        visible: Amount
        alpha: float | dict[str, float] = 1.0
        subsets: bool = False
        surplus: Literal["others", "unused"] = "others"
        whole: bool = False
        scorer: dict = Field(default={"type": "uniform"})

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.scorer = _scorer(spec.scorer)
        alphas = spec.alpha.values() if isinstance(spec.alpha, dict) else [spec.alpha]
        if min(alphas) <= 0:
            raise M3Error(f"masking.alpha must be positive, got {spec.alpha}; use e.g. 1.0.")

    def check(self, names: tuple[str, ...]) -> None:
        """Raise M3Error when `alpha` names a modality that is not there or leaves one out."""
        if isinstance(self.spec.alpha, dict):
            _check_names("masking.alpha", set(self.spec.alpha), names)

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> MaskPlan:
        """Select; V is cut to the number of tokens there are."""
        counts = {name: part.count for name, part in tokens.items()}
        length = amount(self.spec.visible, sum(counts.values()))
        scores = self.scorer(tokens, draws)
        quotas = self._shares(tokens, draws) * length  # (B, M)
        quotas = quotas.round() if self.spec.surplus == "others" else (quotas + 1e-4).floor()
        groups = {name: part.group if self.spec.whole else None for name, part in tokens.items()}
        places = [_rank(scores[name], part.is_valid, groups[name]) for name, part in tokens.items()]
        wanted = {name: places[i] < quotas[:, i : i + 1] for i, name in enumerate(tokens)}
        slots = {name: min(length, n) for name, n in counts.items()}
        if self.spec.surplus == "unused":
            return assemble(tokens, {n: _existing(x, tokens[n]) for n, x in wanted.items()}, slots, length, True)
        is_wanted = torch.cat(list(wanted.values()), 1)
        # Wanted tokens come first, in random order; then the others, in random order; padding last.
        # Each modality draws for itself: how far another one is filled up must not change a sample's mask.
        level = torch.cat([draws.uniform(f"level/{name}", count) for name, count in counts.items()], 1)
        key = (~is_wanted).float() + level
        is_valid = _joined_validity(tokens)
        chosen = _rank(key, is_valid, _joined_groups(tokens, groups)) < length
        if is_valid is not None:
            chosen = chosen & is_valid
        is_visible = dict(zip(counts, chosen.split(list(counts.values()), dim=1), strict=True))
        is_ragged = any(group is not None for group in groups.values())
        return assemble(tokens, is_visible, slots, length, is_ragged)

    def _shares(self, tokens: dict[str, Tokens], draws: Draws) -> Tensor:
        """Draw (B, M) shares that sum to one; modalities that a sample lacks get none."""
        alpha = self.spec.alpha
        alphas = [alpha[name] if isinstance(alpha, dict) else alpha for name in tokens]
        device = draws.keys.device
        takes_part = torch.ones(len(draws.keys), len(tokens), dtype=torch.bool, device=device)
        for i, part in enumerate(tokens.values()):
            if part.is_valid is not None:
                takes_part[:, i] = part.is_valid.any(1)
        if self.spec.subsets:
            takes_part = _random_subset(takes_part, draws)
        logs = log_gamma_variates(torch.tensor(alphas, device=device), draws)
        return logs.masked_fill(~takes_part, -1e9).softmax(1)


def build(view: View) -> Selection:
    """Make the selection that a view asks for and check it against the view's modalities."""
    part, spec = build_spec("maskings", json.loads(view.masking), "masking")
    selection = part(spec)
    selection.check(view.modalities)
    return selection


def everything(tokens: dict[str, Tokens]) -> MaskPlan:
    """Make the plan in which every token that exists is visible."""
    return explicit(
        tokens,
        {n: torch.ones(p.values.shape[:2], dtype=torch.bool, device=p.values.device) for n, p in tokens.items()},
    )


def masks(tokens: dict[str, Tokens], visible: float | Mapping[str, float | Tensor], draws: Draws) -> dict[str, Tensor]:
    """Return modality -> (B, N) bool visibility for inference.

    Args:
        tokens: the modalities that are there.
        visible: a share (float in [0, 1]) of the tokens that exist, or number (int) of tokens, for all modalities or
            for each by name, or ready masks; modalities that are not named are hidden.
        draws: which tokens, where only their number is given.
    """
    wanted = visible if isinstance(visible, Mapping) else dict.fromkeys(tokens, visible)
    for name in wanted:
        if name not in tokens:
            raise M3Error(f"`visible` names `{name}`, which the batch does not hold.{nearest(name, tokens)}")
    result = {}
    for name, part in tokens.items():
        value = wanted.get(name, 0)
        if isinstance(value, bool) or (not isinstance(value, Tensor) and not 0 <= value <= _most(value)):
            raise M3Error(
                f"`visible` of `{name}` is {value}; give a share from 0.0 to 1.0 or a whole number of tokens."
            )
        if isinstance(value, Tensor):
            result[name] = value.to(part.values.device)
        else:
            count = _valid_quota(value, part) if value else 0
            result[name] = _rank(draws.uniform(f"score/{name}", part.count), part.is_valid) < count
    return result


def _most(value: float) -> float:
    return math.inf if isinstance(value, int) else 1.0


def explicit(tokens: dict[str, Tokens], is_visible: dict[str, Tensor]) -> MaskPlan:
    """Make a plan from given masks, for inference; counts may differ between samples (the rest is filling).

    Args:
        tokens: the modalities that are there.
        is_visible: modality -> (B, N) bool, True where the encoder sees the token; all others are targets.
    """
    for name, mask in is_visible.items():
        shape = tokens[name].values.shape[:2]
        if mask.shape != shape:
            raise M3Error(
                f"the mask of `{name}` must have shape {tuple(shape)} (samples, tokens), got {tuple(mask.shape)}; "
                f"give one True or False for every token."
            )
    seen = {name: _existing(is_visible[name], part) for name, part in tokens.items()}
    counts = torch.stack([mask.sum(1) for mask in seen.values()])  # (M, B)
    slots = dict(zip(seen, counts.amax(1).tolist(), strict=True))
    totals = counts.sum(0)
    length, is_ragged = max(1, int(totals.max())), bool((counts != counts[:, :1]).any())
    if sum(slots.values()) < length:  # nothing is visible at all: one empty slot keeps the shapes alive
        slots[next(iter(slots))] = 1
    return assemble(tokens, seen, slots, length, is_ragged or not int(totals.min()))


def assemble(
    tokens: dict[str, Tokens],
    is_visible: dict[str, Tensor],
    slots: dict[str, int],
    length: int,
    is_ragged: bool = False,
) -> MaskPlan:
    """Turn masks into the indices of a `MaskPlan`.

    Args:
        tokens: modality -> tokens, for counts and validity.
        is_visible: modality -> (B, N) bool.
        slots: modality -> S, room for visible tokens; at least as many as any sample sees.
        length: V, room in the encoder.
        is_ragged: samples may see fewer than `length` tokens though all tokens are valid.
    """
    visible, target, is_target, is_filled = {}, {}, {}, {}
    all_valid = all(part.is_valid is None for part in tokens.values()) and not is_ragged
    is_exact = all_valid and sum(slots.values()) == length
    for name, part in tokens.items():
        mask, room = is_visible[name], slots[name]
        order = torch.argsort(~mask, dim=1, stable=True)
        visible[name] = order[:, :room]
        is_filled[name] = take(mask, visible[name])
        if is_exact:
            target[name] = order[:, room:]
        else:
            target[name] = torch.arange(part.count, device=mask.device).expand(mask.shape)
            is_target[name] = ~mask if part.is_valid is None else ~mask & part.is_valid
    if is_exact:
        return MaskPlan(visible, target)
    filled = torch.cat(list(is_filled.values()), dim=1)
    order = torch.argsort(~filled, dim=1, stable=True)[:, :length]
    return MaskPlan(visible, target, is_target, order, None if all_valid else take(filled, order))


def thinned(
    plan: MaskPlan, tokens: dict[str, Tokens], is_visible: dict[str, Tensor], scores: dict[str, Tensor], share: float
) -> MaskPlan:
    """Ask for a share of all tokens only, those with the lowest scores; of these, hidden ones are targets.

    So every sample is asked for equally many, whatever its mask (Wang et al. 2023, equations 2 and 3).
    """
    target, is_target = {}, {}
    for name, part in tokens.items():
        is_asked = _existing(_rank(scores[name], part.is_valid) < _valid_quota(share, part), part)
        order = torch.argsort(~is_asked, dim=1, stable=True)
        target[name] = order[:, : amount(share, part.count)]
        is_target[name] = take(is_asked & ~is_visible[name], target[name])
    return replace(plan, target=target, is_target=is_target)


def _existing(mask: Tensor, part: Tokens) -> Tensor:
    """Return mask (B, N) without the tokens that don't exist."""
    return mask if part.is_valid is None else mask & part.is_valid


def _scorer(settings: dict):
    part, spec = build_spec("scorers", settings, "masking.scorer")
    return part(spec)


def _rank(scores: Tensor, is_valid: Tensor | None, group: Tensor | None = None) -> Tensor:
    """Return (B, N) the place of each token in ascending score order, tokens that don't exist last.

    With a `group` (B, N), its tokens follow one another, ordered by the score of its first one (which, unlike the
    lowest, does not depend on how many they are), and all have the place of the last: no threshold cuts a group.
    """
    if is_valid is not None:
        scores = scores.masked_fill(~is_valid, torch.inf)
    place = scores.argsort(dim=1, stable=True).argsort(dim=1)
    if group is None:
        return place
    index = torch.arange(place.shape[1], device=place.device).expand_as(place)
    first = torch.zeros_like(place).scatter_reduce(1, group, index, "amin", include_self=False)
    place = _rank(place.gather(1, first.gather(1, group)).float(), is_valid)
    return torch.zeros_like(place).scatter_reduce(1, group, place, "amax", include_self=False).gather(1, group)


def _valid_quota(visible: float, part: Tokens) -> Tensor | int:
    if part.is_valid is None:
        return amount(visible, part.count)
    there = part.is_valid.sum(1, keepdim=True)
    if isinstance(visible, float):
        return (there * visible + 1e-9).floor().clamp(min=1).minimum(there)
    return there.clamp(max=amount(visible, part.count))


def _joined_validity(tokens: dict[str, Tokens]) -> Tensor | None:
    if all(part.is_valid is None for part in tokens.values()):
        return None
    masks = [
        torch.ones(p.values.shape[:2], dtype=torch.bool, device=p.values.device) if p.is_valid is None else p.is_valid
        for p in tokens.values()
    ]
    return torch.cat(masks, dim=1)


def _joined_groups(tokens: dict[str, Tokens], groups: dict[str, Tensor | None]) -> Tensor | None:
    """Return (B, sum of N) groups over all modalities, numbered on from one to the next."""
    if all(group is None for group in groups.values()):
        return None
    joined, first = [], 0
    for name, part in tokens.items():
        group = groups[name]
        if group is None:
            group = torch.arange(part.count, device=part.values.device).expand(part.values.shape[:2])
        joined.append(group + first)
        first += part.count
    return torch.cat(joined, dim=1)


def _random_subset(takes_part: Tensor, draws: Draws) -> Tensor:
    """Choose uniformly one non-empty subset of the modalities that each sample has: (B, M) bool -> (B, M) bool."""
    modalities = takes_part.shape[1]
    numbers = torch.arange(1, 2**modalities, device=takes_part.device).unsqueeze(1)
    subsets = (numbers >> torch.arange(modalities, device=takes_part.device)) & 1 == 1  # (2^M - 1, M)
    is_possible = (takes_part.unsqueeze(1) | ~subsets).all(-1)  # (B, 2^M - 1)
    lot = draws.uniform("subset", len(subsets)).masked_fill(~is_possible, -1.0)
    return subsets[lot.argmax(1)]


def _check_names(where: str, given: set[str], names: tuple[str, ...]) -> None:
    if given != set(names):
        raise M3Error(
            f"{where} must name exactly the modalities of the view ({', '.join(names)}), "
            f"got {', '.join(sorted(given))}; add or remove entries."
        )
