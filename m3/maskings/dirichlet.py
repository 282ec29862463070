"""A number of visible tokens over all modalities, shared out at random (MultiMAE).

Letters: B batch, M modalities, N tokens of a modality, V tokens the encoder sees.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from m3.errors import M3Error
from m3.masking import (
    Amount,
    Selection,
    amount,
    assemble,
    build_scorer,
    check_names,
    existing,
    joined_groups,
    joined_validity,
    rank,
)
from m3.plugins import Strict
from m3.random import Draws, log_gamma_variates
from m3.types import MaskPlan, Tokens


class Dirichlet(Selection):
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
        self.scorer = build_scorer(spec.scorer)
        alphas = spec.alpha.values() if isinstance(spec.alpha, dict) else [spec.alpha]
        if min(alphas) <= 0:
            raise M3Error(f"masking.alpha must be positive, got {spec.alpha}; use e.g. 1.0.")

    def check(self, names: tuple[str, ...]) -> None:
        """Raise M3Error when `alpha` names a modality that is not there or leaves one out."""
        if isinstance(self.spec.alpha, dict):
            check_names("masking.alpha", set(self.spec.alpha), names)

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> MaskPlan:
        """Select; V is cut to the number of tokens there are."""
        counts = {name: part.count for name, part in tokens.items()}
        length = amount(self.spec.visible, sum(counts.values()))
        scores = self.scorer(tokens, draws)
        quotas = self._shares(tokens, draws) * length  # (B, M)
        quotas = quotas.round() if self.spec.surplus == "others" else (quotas + 1e-4).floor()
        groups = {name: part.group if self.spec.whole else None for name, part in tokens.items()}
        places = [rank(scores[name], part.is_valid, groups[name]) for name, part in tokens.items()]
        wanted = {name: places[i] < quotas[:, i : i + 1] for i, name in enumerate(tokens)}
        slots = {name: min(length, n) for name, n in counts.items()}
        if self.spec.surplus == "unused":
            return assemble(tokens, {n: existing(x, tokens[n]) for n, x in wanted.items()}, slots, length, True)
        is_wanted = torch.cat(list(wanted.values()), 1)
        # Wanted tokens come first, in random order; then the others, in random order; padding last.
        # Each modality draws for itself: how far another one is filled up must not change a sample's mask.
        level = torch.cat([draws.uniform(f"level/{name}", count) for name, count in counts.items()], 1)
        key = (~is_wanted).float() + level
        is_valid = joined_validity(tokens)
        chosen = rank(key, is_valid, joined_groups(tokens, groups)) < length
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
            takes_part = random_subset(takes_part, draws)
        logs = log_gamma_variates(torch.tensor(alphas, device=device), draws, "gamma")
        return logs.masked_fill(~takes_part, -1e9).softmax(1)


def random_subset(takes_part: Tensor, draws: Draws) -> Tensor:
    """Choose uniformly one non-empty subset of the modalities that each sample has: (B, M) bool -> (B, M) bool."""
    modalities = takes_part.shape[1]
    numbers = torch.arange(1, 2**modalities, device=takes_part.device).unsqueeze(1)
    subsets = (numbers >> torch.arange(modalities, device=takes_part.device)) & 1 == 1  # (2^M - 1, M)
    is_possible = (takes_part.unsqueeze(1) | ~subsets).all(-1)  # (B, 2^M - 1)
    lot = draws.uniform("subset", len(subsets)).masked_fill(~is_possible, -1.0)
    return subsets[lot.argmax(1)]
