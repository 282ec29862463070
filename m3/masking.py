"""From scores to exactly as many visible and target tokens as the budget says.

A selection is a pure function of (tokens, scores, budget, draws): seeded, on the device, without a wait for the
host. It never looks at values, only at counts and validity. All the others, MAE's, MultiMAE's, are budgets.

Letters: B batch, M modalities, N tokens of a modality, S visible slots of a modality, V tokens the encoder
sees, T targets of a modality.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from m3.errors import M3Error, nearest
from m3.parts import build_spec
from m3.plugins import View
from m3.random import Draws
from m3.types import MaskPlan, Tokens, take

Amount = NonNegativeInt | Annotated[float, Field(gt=0, le=1)]
"""A whole number of tokens, or (a number with a point) a share of them in (0, 1]."""


def amount(visible: float, count: int) -> int:
    """Return how many of `count` tokens are meant: an int as it is, a float share rounded down, at least 1."""
    if isinstance(visible, int):
        return min(visible, count)
    return max(1, math.floor(visible * count + 1e-9))


class Selection(ABC):
    """What every selection of `m3.maskings` provides."""

    def check(self, names: tuple[str, ...]) -> None:  # noqa: B027 (many settings name no modality)
        """Raise M3Error when the settings contradict the modalities of the view."""

    @abstractmethod
    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> MaskPlan:
        """Choose visible and target tokens."""

    def explicit(self, tokens: dict[str, Tokens], is_visible: dict[str, Tensor]) -> MaskPlan:
        """Make the plan of given masks, for inference, as the function `explicit` below does."""
        return explicit(tokens, is_visible)


def build(view: View) -> Selection:
    """Make the selection that a view asks for and check it against the view's modalities."""
    part, spec = build_spec("maskings", json.loads(view.masking), "masking")
    selection = part(spec)
    selection.check(view.modalities)
    return selection


def everything(tokens: dict[str, Tokens]) -> MaskPlan:
    """Make the plan in which every token that exists is visible; on the device `meta`, with room for all of them."""
    ones = {n: torch.ones(p.values.shape[:2], dtype=torch.bool, device=p.values.device) for n, p in tokens.items()}
    if any(part.is_valid is not None and not part.is_valid.is_meta for part in tokens.values()):
        return explicit(tokens, ones)  # no more room than the fullest sample needs
    slots = {name: part.count for name, part in tokens.items()}
    seen = {name: existing(ones[name], part) for name, part in tokens.items()}
    return assemble(tokens, seen, slots, sum(slots.values()))


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
            count = valid_quota(value, part) if value else 0
            result[name] = rank(draws.uniform(f"score/{name}", part.count), part.is_valid) < count
    return result


def _most(value: float) -> float:
    return math.inf if isinstance(value, int) else 1.0


def explicit(tokens: dict[str, Tokens], is_visible: dict[str, Tensor]) -> MaskPlan:
    """Make a plan from given masks, for inference; counts may differ between samples (the rest is filling).

    Args:
        tokens: the modalities that are there.
        is_visible: modality -> (B, N) bool, True where the encoder sees the token; all others are targets.
    """
    check_masks(tokens, is_visible)
    seen = {name: existing(is_visible[name], part) for name, part in tokens.items()}
    counts = torch.stack([mask.sum(1) for mask in seen.values()])  # (M, B)
    slots = dict(zip(seen, counts.amax(1).tolist(), strict=True))
    totals = counts.sum(0)
    length, is_ragged = max(1, int(totals.max())), bool((counts != counts[:, :1]).any())
    if sum(slots.values()) < length:  # nothing is visible at all: one empty slot keeps the shapes alive
        slots[next(iter(slots))] = 1
    return assemble(tokens, seen, slots, length, is_ragged or not int(totals.min()))


def check_masks(tokens: dict[str, Tokens], is_visible: dict[str, Tensor]) -> None:
    """Raise M3Error for given masks that do not have one True or False for every token."""
    for name, mask in is_visible.items():
        shape = tokens[name].values.shape[:2]
        if mask.shape != shape:
            raise M3Error(
                f"the mask of `{name}` must have shape {tuple(shape)} (samples, tokens), got {tuple(mask.shape)}; "
                f"give one True or False for every token."
            )


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
        is_asked = existing(rank(scores[name], part.is_valid) < valid_quota(share, part), part)
        order = torch.argsort(~is_asked, dim=1, stable=True)
        target[name] = order[:, : amount(share, part.count)]
        is_target[name] = take(is_asked & ~is_visible[name], target[name])
    return replace(plan, target=target, is_target=is_target)


def existing(mask: Tensor, part: Tokens) -> Tensor:
    """Return mask (B, N) without the tokens that don't exist."""
    return mask if part.is_valid is None else mask & part.is_valid


def build_scorer(settings: dict):
    """Make the scorer that the settings of a selection name."""
    part, spec = build_spec("scorers", settings, "masking.scorer")
    return part(spec)


def rank(scores: Tensor, is_valid: Tensor | None, group: Tensor | None = None) -> Tensor:
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
    place = rank(place.gather(1, first.gather(1, group)).float(), is_valid)
    return torch.zeros_like(place).scatter_reduce(1, group, place, "amax", include_self=False).gather(1, group)


def valid_quota(visible: float, part: Tokens) -> Tensor | int:
    """Return how many of the valid tokens are meant: (B, 1), or one number for all samples."""
    if part.is_valid is None:
        return amount(visible, part.count)
    there = part.is_valid.sum(1, keepdim=True)
    if isinstance(visible, float):
        return (there * visible + 1e-9).floor().clamp(min=1).minimum(there)
    return there.clamp(max=amount(visible, part.count))


def joined_validity(tokens: dict[str, Tokens]) -> Tensor | None:
    """Return (B, sum of N) which tokens of all modalities exist; None when all do."""
    if all(part.is_valid is None for part in tokens.values()):
        return None
    masks = [
        torch.ones(p.values.shape[:2], dtype=torch.bool, device=p.values.device) if p.is_valid is None else p.is_valid
        for p in tokens.values()
    ]
    return torch.cat(masks, dim=1)


def joined_groups(tokens: dict[str, Tokens], groups: dict[str, Tensor | None]) -> Tensor | None:
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


def check_names(where: str, given: set[str], names: tuple[str, ...]) -> None:
    """Raise M3Error when settings by name don't name exactly the modalities of the view."""
    if given != set(names):
        raise M3Error(
            f"{where} must name exactly the modalities of the view ({', '.join(names)}), "
            f"got {', '.join(sorted(given))}; add or remove entries."
        )
