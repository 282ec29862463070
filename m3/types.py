"""The objects that one stage hands to the next. Nothing else crosses a stage.

    recipe -> modalities -> tokenizers -> masking -> backbone -> heads -> objectives -> trainer
     what      Batch         Tokens       MaskPlan   Encoded     preds    Loss          step, save

Letters, here and in every file that handles tensors:
B batch, N content tokens of a modality, S visible slots of a modality, V tokens the encoder sees,
T targets, P values per token, A position axes, R prefix tokens (class, registers), D width, K codes.

Three words that must not be confused: a token is *valid* when it exists (it is no padding and its modality
is present), *visible* when the encoder sees it, and a *target* when a loss asks for it. Every boolean is
called `is_*` and True means that the element takes part. Indices count content tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """Pick rows of each sample: x (B or 1, N, *rest), index (B, S) int64 in [0, N) -> (B, S, *rest).

    A row-wise `index_select`: several times faster than `gather` with an expanded index, and its gradient
    is a row-wise addition.
    """
    if len(x) == 1:
        return x[0].index_select(0, index.reshape(-1)).reshape(*index.shape, *x.shape[2:])
    batch, count = x.shape[:2]
    offset = torch.arange(batch, device=index.device).unsqueeze(1) * count
    rows = x.reshape(batch * count, *x.shape[2:]).index_select(0, (index + offset).reshape(-1))
    return rows.reshape(batch, index.shape[1], *x.shape[2:])


@dataclass(frozen=True)
class Batch:
    """Raw signals of B samples, as a source or the processor delivers them.

    Attributes:
        signals: modality -> (B, ...) raw tensor in the modality's own unit (uint8 pixels, metres, class ids).
        keys: (B,) int64, one number per sample and use; all randomness of the sample derives from it.
        is_present: modality -> (B,) bool, False where the sample lacks it. A modality that is not listed
            is present in every sample; a modality that is not in `signals` is present in none.
        labels: label name -> (B,) int64, for probes; never seen by the model.
        ids: B names for messages.
        skipped: sentences about samples that could not be read and were replaced.
        origins: for each of these sentences the part of the data that the sample lies in (a tar, a part of a mixture).
        times: modality -> (B, T) float32 seconds of the steps of a recording, for modalities that know them; NaN
            in samples that don't.
    """

    signals: dict[str, Tensor]
    keys: Tensor
    is_present: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    times: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """Copy all tensors to `device`, without waiting for pinned memory."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy all tensors to page-locked memory (called by the data loader)."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, move) -> Batch:
        moved = {
            name: {key: move(value) for key, value in getattr(self, name).items()}
            for name in ("signals", "times", "is_present", "labels")
        }
        return replace(self, keys=move(self.keys), **moved)


@dataclass(frozen=True)
class Tokens:
    """One modality of a batch as tokens.

    Attributes:
        values: (B, N, P) what each token holds: float values (normalised pixels of a patch) or int64 class ids.
            NaN or -1 is a value nobody knows (a hole in a depth map); no loss asks for it.
        positions: (1 or B, N, A) float coordinates in the units of the grid the model was built for;
            1 when all samples share them.
        is_valid: (B, N) bool, or None when every token exists.
        group: (B, N) int64 in [0, N): tokens of a sample with equal numbers only make sense together (the pieces
            of a word); None when every token stands alone.
        counts: tokens along each axis, the last one fastest, where they fill a grid; None where they don't.
        sentinels: class ids that stand for hidden spans and their end; None when the tokens are no sequence.
    """

    values: Tensor
    positions: Tensor
    is_valid: Tensor | None = None
    group: Tensor | None = None
    counts: tuple[int, ...] | None = None
    sentinels: range | None = None

    @property
    def count(self) -> int:
        """N, the number of content tokens, padding included."""
        return self.values.shape[1]


OWN, HIDDEN = -1, -2
"""What the encoder is shown in a slot: the token's own content, or a learned mask token."""


@dataclass(frozen=True)
class Partners:
    """Which sample of the batch lends each sample one of its modalities.

    Attributes:
        of: the modality that is lent.
        index: (B,) int64 place in the batch; the sample's own where it keeps its own.
        is_swapped: (B,) bool, True where it is another's.
        is_pair: (B,) bool, True where both the sample and its partner have what the view joins.
    """

    of: str
    index: Tensor
    is_swapped: Tensor
    is_pair: Tensor


@dataclass(frozen=True)
class MaskPlan:
    """Which tokens the encoder sees and which ones a loss asks for.

    Attributes:
        visible: modality -> (B, S) int64, ascending: tokens that are embedded, an index into the modality's N.
        target: modality -> (B, T) int64: tokens that are predicted, an index into the modality's N; ascending, with
            several blocks of targets within each, or in the order of `asked`.
        is_target: modality -> (B, T) bool; a modality that is not listed has all its T targets.
        order: (B, V) int64, where in the concatenation of all visible slots each encoder token lies;
            None when the encoder takes all slots as they stand.
        is_valid: (B, V) bool, False for filling in samples with too few tokens; None when all V exist.
        shown: modality -> (B, S) int64, what the slots show where hidden tokens are replaced instead of dropped:
            OWN, HIDDEN, or k >= 0, class id k. A modality that is not listed shows its own content everywhere.
        partners: who lends whom a modality; None: every sample has its own.
        asked: modality -> (B, T) int64, of sequences that are predicted one after the other: OWN, the token's own
            content, or k >= 0, class id k. The first is where they begin and is given, all others are asked for.
        place: modality -> (B, S) int64, the token whose position a visible slot is given; a modality that is not
            listed has the tokens' own.
        target_order: (B, sum of T) int64, where in the concatenation of all target slots each token lies that the
            decoder works on, the targets first; None when it takes all slots as they stand.
        blocks: modality -> K: the T targets are K blocks of the same size, one behind the other; they may overlap, and
            an objective may predict each by itself. A modality that is not listed has one.
    """

    visible: dict[str, Tensor]
    target: dict[str, Tensor]
    is_target: dict[str, Tensor] = field(default_factory=dict)
    order: Tensor | None = None
    is_valid: Tensor | None = None
    shown: dict[str, Tensor] = field(default_factory=dict)
    partners: Partners | None = None
    asked: dict[str, Tensor] = field(default_factory=dict)
    place: dict[str, Tensor] = field(default_factory=dict)
    target_order: Tensor | None = None
    blocks: dict[str, int] = field(default_factory=dict)

    def pack(self, slots: dict[str, Tensor]) -> Tensor:
        """Bring per-modality slots into encoder order: modality -> (B, S, *rest) to (B, V, *rest)."""
        joined = torch.cat([slots[name] for name in self.visible], dim=1)
        return joined if self.order is None else take(joined, self.order)

    def pack_targets(self, slots: dict[str, Tensor]) -> Tensor:
        """Bring per-modality target slots into decoder order, as `pack` does for the encoder."""
        joined = torch.cat([slots[name] for name in self.target], dim=1)
        return joined if self.target_order is None else take(joined, self.target_order)

    def asks(self, modality: str) -> Tensor:
        """Return (B, T) bool, True for target slots of `modality` that a loss asks for."""
        index = self.target[modality]
        return self.is_target.get(modality, torch.ones_like(index, dtype=torch.bool))

    def is_seen(self, modality: str, count: int) -> Tensor:
        """Return (B, N) bool, True for the `count` tokens of `modality` whose own content the encoder sees."""
        index = self.packed_index()
        is_own = self.packed_modality() == list(self.visible).index(modality)
        content = self.packed_content()
        if content is not None:
            is_own = is_own & content
        seen = torch.zeros(len(index), count + 1, dtype=torch.bool, device=index.device)
        return seen.scatter(1, index.masked_fill(~is_own, count), True)[:, :count]

    def packed_index(self) -> Tensor:
        """Return (B, V) int64: for each encoder token its index within its own modality."""
        return self.pack(self.visible)

    def packed_content(self) -> Tensor | None:
        """Return (B, V) bool, True where the encoder sees a token's own content; None when it does everywhere."""
        if not self.shown and self.is_valid is None:
            return None
        slots = {name: self.shown.get(name, torch.full_like(index, OWN)) for name, index in self.visible.items()}
        is_own = self.pack(slots) == OWN
        return is_own if self.is_valid is None else is_own & self.is_valid

    def packed_modality(self) -> Tensor:
        """Return (B, V) int64: for each encoder token the number of its modality (in `visible`'s order)."""
        slots = {name: torch.full_like(index, i) for i, (name, index) in enumerate(self.visible.items())}
        return self.pack(slots)


@dataclass(frozen=True)
class Encoded:
    """What the encoder made of one view.

    Attributes:
        sequence: (B, R + V, D) states of the prefix (class and register tokens), then of the visible tokens
            in the order of `plan`.
        prefix_count: R, may be 0.
        plan: the plan that says which token each state belongs to.
        layers: block number -> (B, R + V, D) states after that block, for those that were asked for.
        keys: (B,) int64 that what is random in the network derives from; None: nothing is, as for inference.
    """

    sequence: Tensor
    prefix_count: int
    plan: MaskPlan
    layers: dict[int, Tensor] = field(default_factory=dict)
    keys: Tensor | None = None

    @property
    def prefix(self) -> Tensor:
        """(B, R, D) states of the class and register tokens."""
        return self.sequence[:, : self.prefix_count]

    @property
    def states(self) -> Tensor:
        """(B, V, D) one state per visible token."""
        return self.sequence[:, self.prefix_count :]

    @property
    def is_valid(self) -> Tensor | None:
        """(B, R + V) bool, False for filling; None when all exist."""
        if self.plan.is_valid is None:
            return None
        prefix = self.plan.is_valid.new_ones(len(self.sequence), self.prefix_count)
        return torch.cat([prefix, self.plan.is_valid], dim=1)

    @property
    def pooled(self) -> Tensor:
        """(B, D) mean over the visible tokens that exist."""
        return masked_mean(self.states, self.plan.is_valid)

    def of(self, modality: str) -> tuple[Tensor, Tensor]:
        """Return all states (B, V, D) and (B, V) bool, True where the state belongs to `modality`."""
        is_own = self.plan.packed_modality() == list(self.plan.visible).index(modality)
        return self.states, is_own if self.plan.is_valid is None else is_own & self.plan.is_valid


def masked_mean(states: Tensor, is_valid: Tensor | None) -> Tensor:
    """Mean of states (B, V, D) over V where is_valid (B, V) holds (None: everywhere) -> (B, D)."""
    if is_valid is None:
        return states.mean(1)
    weight = is_valid.to(states.dtype).unsqueeze(-1)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Part:
    """One summand of a loss: sum and count stay apart until the trainer divides once over all ranks.

    Attributes:
        sum: () sum of the losses of all elements, with gradient.
        count: () number of elements, without gradient.
        weight: factor on sum / count; a tensor when it is learned.
        average: `own`: sum / count is a summand of the loss; `parts`: the parts of an objective that say so are
            averaged, those without any element in the whole step left out; `elements`: they are averaged by their
            counts, so that every element weighs the same.
    """

    sum: Tensor
    count: Tensor
    weight: float | Tensor = 1.0
    average: Literal["own", "parts", "elements"] = "own"


@dataclass(frozen=True)
class Loss:
    """Named parts of a loss; its value is the weighted sum over parts of sum / count.

    Names are `objective/part`, or `part` where there is one objective only.

    Attributes:
        parts: name -> summand.
        watched: name -> (rows, D) features without gradient, whose spread the trainer logs: they must not all become
            the same (collapse).
    """

    parts: dict[str, Part]
    watched: dict[str, Tensor] = field(default_factory=dict)

    def total(self, counts: dict[str, Tensor] | None = None) -> Tensor:
        """Return () the loss with each part divided by `counts` (global counts), or by its own count."""
        counts = counts or {name: part.count for name, part in self.parts.items()}
        terms = [
            p.weight * self._share(name, counts) * p.sum / counts[name].clamp(min=1) for name, p in self.parts.items()
        ]
        return torch.stack(terms).sum()

    def _share(self, name: str, counts: dict[str, Tensor]) -> Tensor | float:
        """Return a part's share of the mean over the parts of its objective; 1 where it is a summand of its own."""
        kind, objective = self.parts[name].average, name.rpartition("/")[0]
        if kind == "own":
            return 1.0
        joined = [n for n, p in self.parts.items() if n.rpartition("/")[0] == objective and p.average == kind]
        own = {n: counts[n] if kind == "elements" else (counts[n] > 0).to(counts[n].dtype) for n in joined}
        return own[name] / torch.stack(list(own.values())).sum().clamp(min=1)
