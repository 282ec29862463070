"""Budgets of tokens to see and of tokens to predict, both shared out over the modalities at random (4M).

Letters: B batch, C components of the mixture, M modalities, N tokens of a modality, V tokens the encoder sees,
T tokens the decoder is asked for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from m3.errors import M3Error, nearest
from m3.masking import Selection, assemble, build_scorer, check_masks, existing, explicit, rank
from m3.plugins import Strict
from m3.random import Draws, log_gamma_variates
from m3.spans import Runs, Stream, draw_hidden, find_runs, stream
from m3.types import OWN, MaskPlan, Tokens

Alphas = PositiveFloat | dict[str, PositiveFloat]


class Component(Strict):
    """One way to share the budgets out.

    Attributes:
        inputs: concentrations of the Dirichlet draw over what is seen: one for all modalities, or one for each that
            takes part.
        targets: the same for what is predicted.
        weight: how often it is drawn, beside the others.
    """

    inputs: Alphas = 1.0
    targets: Alphas = 1.0
    weight: PositiveFloat = 1.0


class Budget(Selection):
    """A drawn number of tokens is seen, another is predicted, each shared out over the modalities by its own draw.

    4M (Mizrahi et al. 2023, section 2.3): every sample draws a component of the mixture, shares ~ Dirichlet for the
    inputs, quotas rounded down, the rest by argmax of further draws; then the same for the targets, among tokens that
    are not seen. Quotas beyond the tokens that exist stay unused.

    Modalities with sentinels are sequences, see `m3.spans`: each of their tokens is kept with a probability that is
    drawn uniformly and then shrunk until everything fits.
    """

    class Spec(Strict):
        """Settings of `type: budget`.

        Attributes:
            visible: V, or the least and most V, one of which is drawn for each sample.
            targets: T, or the least and most T.
            mixture: ways to share them out, one of which is drawn for each sample.
            whole: sequences of which tokens that only make sense together (a field of the metadata and its value) are
                seen or hidden together.
            counted: positions of the visible tokens of a sequence count these alone (4M), so that they don't tell how
                many are hidden; False: they are the tokens' own.
            scorer: what ranks tokens that are no sequence: the lowest are seen, the next ones predicted.
        """

        visible: PositiveInt | tuple[NonNegativeInt, PositiveInt]
        targets: PositiveInt | tuple[NonNegativeInt, PositiveInt]
        mixture: tuple[Component, ...] = Field(default=(Component(),), min_length=1)
        whole: tuple[str, ...] = ()
        counted: bool = False
        scorer: dict = Field(default={"type": "uniform"})

        @model_validator(mode="after")
        def _no_contradiction(self) -> Budget.Spec:
            for name in ("visible", "targets"):
                value = getattr(self, name)
                if isinstance(value, tuple) and value[0] > value[1]:
                    raise ValueError(f"`{name}` is least, then most: write [{value[1]}, {value[0]}]")
            return self

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.scorer = build_scorer(spec.scorer)
        self.visible = (spec.visible, spec.visible) if isinstance(spec.visible, int) else spec.visible
        self.targets = (spec.targets, spec.targets) if isinstance(spec.targets, int) else spec.targets

    def check(self, names: tuple[str, ...]) -> None:
        """Raise M3Error when an entry of the mixture names a modality that is not there."""
        given = [*self.spec.whole]
        for component in self.spec.mixture:
            given += [name for part in (component.inputs, component.targets) if isinstance(part, dict) for name in part]
        for name in given:
            if name not in names:
                raise M3Error(f"masking names `{name}`, which is no modality of the view.{nearest(name, names)}")

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> MaskPlan:
        """Select; at most V tokens are seen and at most T asked for, in every sample."""
        weights = torch.tensor([part.weight for part in self.spec.mixture], device=draws.keys.device)
        bounds = weights.cumsum(0) / weights.sum()
        component = (draws.uniform("mixture", 1) >= bounds[:-1]).sum(1)
        inputs = self._quotas("inputs", self.visible, component, tokens, draws)
        targets = self._quotas("targets", self.targets, component, tokens, draws)
        scores = self.scorer(tokens, draws)
        is_visible, asked, runs, most = {}, {}, {}, self.targets[1]
        for i, (name, part) in enumerate(tokens.items()):
            seen, wanted = inputs[:, i : i + 1], targets[:, i : i + 1]
            if part.sentinels is None:
                place = rank(scores[name], part.is_valid)
                is_visible[name] = existing(place < seen, part)
                asked[name] = existing((place >= seen) & (place < seen + wanted), part)
            else:
                hidden = self._hidden(name, part, seen, draws)
                runs[name] = find_runs(hidden)
                is_visible[name] = (_validity(part) & ~hidden) | (runs[name].is_first & (seen > 0))
                asked[name] = self._stream(part, runs[name], wanted, draws.uniform(f"first/{name}", 1))
        slots = {name: min(self.visible[1], part.count) for name, part in tokens.items()}
        plan = assemble(tokens, is_visible, slots, min(self.visible[1], sum(slots.values())), is_ragged=True)
        plan = self._ask(self._show(plan, tokens, runs), asked, self._rooms(tokens))
        is_asked = torch.cat(list(plan.is_target.values()), dim=1)
        return replace(plan, target_order=is_asked.argsort(dim=1, descending=True, stable=True)[:, :most])

    def explicit(self, tokens: dict[str, Tokens], is_visible: dict[str, Tensor]) -> MaskPlan:
        """Make the plan of given masks: all that is not seen is asked for; of a sequence of which nothing is seen not
        even a sentinel is shown.
        """
        check_masks(tokens, is_visible)
        shown, asked, runs = dict(is_visible), {}, {}
        for name, part in tokens.items():
            hidden = existing(~is_visible[name], part)
            if part.sentinels is None:
                asked[name] = hidden
                continue
            runs[name] = find_runs(hidden)
            is_any = existing(is_visible[name], part).any(1, keepdim=True)
            shown[name] = is_visible[name] | (runs[name].is_first & is_any)
            everything = torch.full_like(runs[name].total, _most(part))
            asked[name] = self._stream(part, runs[name], everything, torch.zeros_like(everything, dtype=torch.float32))
        rooms = {name: _most(part) for name, part in tokens.items()}
        return self._ask(self._show(explicit(tokens, shown), tokens, runs), asked, rooms)

    def _hidden(self, name: str, part: Tokens, budget: Tensor, draws: Draws) -> Tensor:
        """Return which tokens (B, N) of a sequence are hidden."""
        noise = draws.uniform(f"keep/{name}", part.count)
        if name in self.spec.whole and part.group is not None:
            index = torch.arange(part.count, device=noise.device).expand(noise.shape)
            first = torch.zeros_like(index).scatter_reduce(1, part.group, index, "amin", include_self=False)
            noise = noise.gather(1, first.gather(1, part.group))
        keep = torch.where(budget > 0, draws.uniform(f"share/{name}", 1), 0.0)
        return draw_hidden(noise, keep, _validity(part), budget)

    def _stream(self, part: Tokens, runs: Runs, budget: Tensor, lot: Tensor) -> Stream:
        """Write down what is asked of a sequence, at most `budget` (B, 1) elements."""
        assert part.sentinels is not None, "only sequences have a stream"
        if len(part.sentinels) < (part.count + 1) // 2 + 1:
            raise M3Error(
                f"a sequence of {part.count} tokens may have {(part.count + 1) // 2} hidden runs, but it has "
                f"{len(part.sentinels)} sentinels, one of which is for the end; give it "
                f"{(part.count + 1) // 2 + 1} `sentinels`."
            )
        there = _validity(part).any(1)
        return stream(runs, part.sentinels, there, budget, _most(part), lot)

    def _rooms(self, tokens: dict[str, Tokens]) -> dict[str, int]:
        """Return how many target slots each modality needs: none if no component asks for it."""
        asked = {name: any(_alpha(part.targets, name) for part in self.spec.mixture) for name in tokens}
        return {name: min(self.targets[1], _most(part)) if asked[name] else 0 for name, part in tokens.items()}

    def _show(self, plan: MaskPlan, tokens: dict[str, Tokens], runs: dict[str, Runs]) -> MaskPlan:
        """Put sentinels into the visible slots of hidden tokens."""
        shown, place = {}, {}
        for name, found in runs.items():
            sentinels, index = tokens[name].sentinels, plan.visible[name]
            assert sentinels is not None, "only sequences have runs"
            stand_in = torch.where(found.is_hidden, found.number + sentinels.start, OWN)
            shown[name] = stand_in.gather(1, index)
            if self.spec.counted:
                place[name] = torch.arange(index.shape[1], device=index.device).expand_as(index)
        return replace(plan, shown=shown, place=place)

    def _ask(self, plan: MaskPlan, asked: dict[str, Tensor | Stream], rooms: dict[str, int]) -> MaskPlan:
        """Put the targets into a plan: masks (B, N) of tokens without order, and streams of sequences."""
        target, is_target, said = {}, {}, {}
        for name, part in asked.items():
            if isinstance(part, Stream):
                room = 1 + rooms[name] if rooms[name] else 0
                target[name], is_target[name] = part.token[:, :room], part.is_target[:, :room]
                said[name] = part.asked[:, :room]
            else:
                target[name] = part.argsort(dim=1, descending=True, stable=True)[:, : rooms[name]]
                is_target[name] = part.gather(1, target[name])
        return replace(plan, target=target, is_target=is_target, asked=said)

    def _quotas(
        self, kind: str, bounds: tuple[int, int], component: Tensor, tokens: dict[str, Tokens], draws: Draws
    ) -> Tensor:
        """Return (B, M) int64 quotas whose sum is the drawn budget, 0 for modalities that a sample lacks.

        Args:
            kind: `inputs` or `targets`.
            bounds: least and most budget.
            component: (B,) int64 of the mixture.
            tokens: of the view.
            draws: of the batch.
        """
        alphas = [[_alpha(getattr(part, kind), name) for name in tokens] for part in self.spec.mixture]
        alpha = torch.tensor(alphas, device=component.device)[component]  # (B, M)
        takes_part = (alpha > 0) & torch.stack([_validity(part).any(1) for part in tokens.values()], dim=1)
        alpha = torch.where(takes_part, alpha, 1.0)
        low, high = bounds
        budget = low + (draws.uniform(f"{kind}/budget", 1) * (high - low + 1)).floor()
        batch, count = alpha.shape
        shares = log_gamma_variates(alpha, draws, f"{kind}/shares").masked_fill(~takes_part, -1e9).softmax(1)
        quotas = ((shares * budget + 1e-4).floor() * takes_part).long()
        # What rounding leaves, fewer than M, goes one by one to the modality with the largest share of a fresh draw.
        again = log_gamma_variates(alpha.repeat(1, count), draws, f"{kind}/rest").view(batch, count, count)
        winner = F.one_hot(again.masked_fill(~takes_part.unsqueeze(1), -1e9).argmax(-1), count)
        rest = budget.long() - quotas.sum(1, keepdim=True)
        is_left = torch.arange(count, device=rest.device) < rest
        return (quotas + (winner * is_left.unsqueeze(-1)).sum(1)) * takes_part


def _alpha(alphas: float | dict[str, float], name: str) -> float:
    """Return the concentration of a modality; 0: it takes no part."""
    return alphas.get(name, 0.0) if isinstance(alphas, dict) else alphas


def _most(part: Tokens) -> int:
    """Return how much can be asked of a modality: its tokens, and of a sequence that has any also where it ends."""
    return part.count + (part.sentinels is not None)


def _validity(part: Tokens) -> Tensor:
    """Return (B, N) bool, True for tokens that exist."""
    if part.is_valid is not None:
        return part.is_valid
    return torch.ones(part.values.shape[:2], dtype=torch.bool, device=part.values.device)
