"""From a source to batches, in an order that is a pure function of the seed and the position in the run.

Position p of a run is the p-th sample it trains on. Steps, micro-batches and processes only say who takes
which positions, so 1 x 8, 2 x 4 and two processes with 4 train on the same samples, and a run that continues
at step s needs to know nothing but s.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import gcd
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m3.data.augment import Augmentation, check_geometry
from m3.data.geometry import random_crop
from m3.data.mixup import Mixup
from m3.data.source import Drawn, Sample, Source, check_labels, with_labels
from m3.errors import M3Error, nearest
from m3.plugins import Crop, Modality
from m3.preemption import prepare_worker
from m3.random import stream_number
from m3.recipe import DataSpec
from m3.signals import Look
from m3.types import Batch

GOLDEN = (5**0.5 - 1) / 2
TRIES = 16
"""Samples in a row that may be unreadable before the source is given up."""


@dataclass(frozen=True)
class Loaded:
    """One sample, cropped and sized, with (sentence, origin) of those that had to be skipped on the way."""

    signals: dict[str, Tensor]
    position: int
    id: str
    times: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()


class Samples(Dataset[Loaded]):
    """Reads the sample of a (position, index) pair; runs in the loader's workers."""

    def __init__(self, source: Source, modalities: dict[str, Modality], spec: DataSpec, seed: int) -> None:
        if not len(source):
            raise M3Error(f"data: the source `{spec.source}` has no samples for `{source.split}`; add data.")
        for name in spec.drop if isinstance(spec.drop, dict) else ():
            if name not in modalities:
                raise M3Error(f"data.drop names `{name}`, which is no modality.{nearest(name, modalities)}")
        check_geometry(spec, modalities)
        check_labels(source, modalities)
        self.source, self.modalities, self.spec, self.seed = source, modalities, spec, seed
        self.augmentation = Augmentation(spec.augment, modalities)
        is_training = source.split == "train"
        self.mixup = Mixup(spec.mixup, spec, modalities, seed) if spec.mixup and is_training else None
        self.look = Look()
        self._kept: dict[int, Sample] = {}

    def seen(self, look: Look) -> Samples:
        """Return the same held-out samples, looked at in another way."""
        other = copy.copy(self)
        other.look, other._kept = look, {}
        return other

    def __getitem__(self, at: tuple[int, int]) -> Loaded:
        """Read a sample; an unreadable one is replaced and named in `skipped`.

        Its neighbours may lie in the same broken shard, so the one that replaces it comes from far away.
        """
        position, index = at
        skipped: list[tuple[str, str]] = []
        reasons: set[str | None] = set()
        length = len(self.source)
        count, epoch = min(TRIES, length), position // self.spec.repeats // length
        for shift in range(count):
            number = self.source.at(epoch, far_away(index, shift, length))
            try:
                return self.fit(self._read(number), position, tuple(skipped))
            except Exception as error:  # whatever a broken file raises; it is counted, named and limited
                skipped.append((f"{self.source.name(number)}: {error}", self.source.origin(number)))
                reasons.add(str(error) if isinstance(error, M3Error) else None)
        reason = next(iter(reasons))
        if reason and len(reasons) == 1 and count > 1:  # a setting, not a broken file
            raise M3Error(f"the recipe does not fit the data, {count} samples in a row fail alike: {reason}")
        what = f"{count} samples in a row" if count < length else f"all {count} samples of the data"
        raise M3Error(f"{what} can't be read; the first: {skipped[0][0]}")

    def __getitems__(self, pairs: list[tuple[int, int]] | Drawn) -> Batch | M3Error:
        """Read and collate a micro-batch; called by torch's loader.

        A mistake is returned: raised in a worker process, it would reach the user inside a traceback.
        """
        if isinstance(pairs, Drawn):
            assert self.source.stream is not None, "rows of a stream come from a source that has one"
            own = copy.copy(self)
            own.source, own._kept = self.source.stream.source(pairs.rows), {}
            return own.__getitems__(pairs.pairs)
        try:
            batch = self.collate([self[pair] for pair in pairs])
            return batch if self.mixup is None else self.mixup(batch)
        except M3Error as error:
            return error

    def collate(self, samples: list[Loaded]) -> Batch:
        """Make a batch of samples that holds every modality, also one that all of them happen to lack."""
        return collate(samples, self.modalities, tuple(self.modalities))

    def _read(self, number: int) -> Sample:
        """Read a sample, or take one of the last that were read: repeated crops are decoded once."""
        if number not in self._kept:
            sample = self.source.read(number)
            self._kept[number] = with_labels(sample, self.modalities, self.spec.missing == "allow")
            if len(self._kept) > max(1, self.spec.keep):
                del self._kept[next(iter(self._kept))]
        return self._kept[number]

    def fit(self, sample: Sample, position: int, skipped: tuple[tuple[str, str], ...] = ()) -> Loaded:
        """Cut, check, crop and resize the signals of a sample, as its position in the run decides."""
        draws = Random(stream_number(f"crop/{self.seed}/{position}"))
        is_training = self.source.split == "train"
        there = [name for name in self.modalities if name in sample.signals]
        if is_training and self.spec.drop:
            there = _keep_some(there, self.spec.drop, draws)
        if not there:
            raise M3Error(f"{sample.id} has none of {', '.join(self.modalities)}; give every sample at least one.")
        moment = draws.random() if is_training else self.look.moment
        parts = {name: self.modalities[name].cut(sample.signals[name], moment) for name in there}
        raw = {name: self.modalities[name].to_raw(part) for name, part in parts.items()}
        crop = self._crop(raw, draws.getrandbits(63)) if is_training else self._part(raw)
        known = {name: self.modalities[name].times(part) for name, part in parts.items()}
        fitted = fit_together(raw, self.modalities, crop)
        key = f"{self.seed}/{position}" if is_training else f"vote {self.look.vote}/{self.seed}/{position}"
        return Loaded(
            self.augmentation(fitted, key) if is_training or self.look.vote is not None else fitted,
            position,
            sample.id,
            {name: times for name, times in known.items() if times is not None},
            sample.labels,
            skipped,
        )

    def _part(self, raw: dict[str, Tensor]) -> Crop:
        """Return the part of a held-out sample that is looked at: the middle, or another of the same size."""
        first = next((name for name in raw if self.modalities[name].is_map), None)
        if first is None or self.look.place == 0.5:
            return Crop()
        (height, width), size = raw[first].shape[-2:], self.modalities[first].signal.size[-2:]
        box = Crop().window(height, width, (size[0], size[1]))
        place = self.look.place
        return Crop(((1 - box[2]) * place, (1 - box[3]) * place, *box[2:]))

    def _crop(self, raw: dict[str, Tensor], key: int) -> Crop:
        """Draw the crop that all maps of a sample share."""
        maps = [x for name, x in raw.items() if self.modalities[name].is_map]
        if not maps or not (self.spec.crop or self.spec.flip):
            return Crop()
        height, width = maps[0].shape[-2:]
        return random_crop(key, self.spec.crop, self.spec.flip, (height, width))


def far_away(index: int, turn: int, length: int) -> int:
    """Return the number at a turn, which begin at `index` and reach all in `length` turns, however few spread evenly.

    Steps of the golden section (Weyl's sequence), rounded to a number that has no divisor in common with `length`.
    """
    step = round(length * GOLDEN)
    while gcd(step, length) > 1:
        step += 1
    return (index + turn * step) % length


def fit_together(raw: dict[str, Tensor], modalities: dict[str, Modality], crop: Crop) -> dict[str, Tensor]:
    """Bring all signals of a sample to the sizes the model reads.

    Without a box, every map shows its largest centred part. What lies on a map but is none (boxes) can't know
    which part that is, so it is told the one of the first map.
    """
    maps = [name for name in raw if modalities[name].is_map]
    shown = crop
    if maps and crop.box is None:
        (height, width), size = raw[maps[0]].shape[-2:], modalities[maps[0]].signal.size[-2:]
        box = crop.window(height, width, (size[0], size[1]))
        shown = crop if min(box[2:]) > 1 - 1e-6 else Crop(box, crop.is_flipped)
    return {name: modalities[name].fit(x, crop if name in maps else shown) for name, x in raw.items()}


def _keep_some(names: list[str], drop: float | dict[str, float], draws: Random) -> list[str]:
    """Leave out each modality with its own probability, but never the last one."""
    chance = {name: drop.get(name, 0.0) if isinstance(drop, dict) else drop for name in names}
    kept = [name for name in names if draws.random() >= chance[name]]
    return kept or [draws.choice(names)] if names else []


def collate(samples: list[Loaded], modalities: dict[str, Modality], always: tuple[str, ...] = ()) -> Batch:
    """Stack samples; shorter ones are filled up with the modality's `padding`.

    Where a sample lacks a modality that another has, a blank is stacked and `is_present` says so; the same for
    modalities named in `always` that no sample has.
    """
    signals, is_present, times = {}, {}, {}
    for name in [n for n in modalities if n in always or any(n in s.signals for s in samples)]:
        known = next((s.signals[name] for s in samples if name in s.signals), None)
        blank = modalities[name].blank(1)[0] if known is None else torch.zeros_like(known)
        signals[name] = _stack([s.signals.get(name, blank) for s in samples], name, modalities[name].padding)
        if not all(name in s.signals for s in samples):
            is_present[name] = torch.tensor([name in s.signals for s in samples])
        seconds = [s.times.get(name) for s in samples]
        filling = next((t for t in seconds if t is not None), None)
        if filling is not None:
            times[name] = torch.stack([torch.full_like(filling, torch.nan) if t is None else t for t in seconds])
    kinds = dict.fromkeys(key for sample in samples for key in sample.labels)
    labels = {key: torch.tensor([s.labels.get(key, -1) for s in samples]) for key in kinds}
    return Batch(
        signals=signals,
        keys=torch.tensor([s.position for s in samples]),
        times=times,
        is_present=is_present,
        labels=labels,
        ids=tuple(s.id for s in samples),
        skipped=tuple(message for s in samples for message, _ in s.skipped),
        origins=tuple(origin for s in samples for _, origin in s.skipped),
    )


def _stack(values: list[Tensor], name: str, padding: float | None) -> Tensor:
    length = max(len(x) for x in values)
    if padding is not None and any(len(x) < length for x in values):
        values = [torch.cat([x, x.new_full((length - len(x), *x.shape[1:]), padding)]) for x in values]
    if any(x.shape != values[0].shape for x in values):
        shapes = sorted({tuple(x.shape) for x in values})
        raise M3Error(f"samples of `{name}` have the shapes {shapes}; give them one size.")
    return torch.stack(values)


class Buckets(NamedTuple):
    """What brings samples of similar length into one batch.

    Attributes:
        lengths: int64 of all samples of the source.
        batches: whose samples are sorted by length together.
    """

    lengths: Tensor
    batches: int


@dataclass(frozen=True)
class Order:
    """Who trains on what, when.

    Attributes:
        length: samples of the source.
        seed: of the shuffle; every epoch has its own.
        micro_batch: samples per process and forward pass.
        accumulation: forward passes per step.
        rank: of this process.
        world: number of processes.
        start: first step.
        stop: step after the last.
        repeats: times in a row that a sample is used before the next one (repeated augmentation).
        buckets: how samples of similar length come into one batch; None: they are drawn at random.
    """

    length: int
    seed: int
    micro_batch: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1
    start: int = 0
    stop: int = 1
    repeats: int = 1
    buckets: Buckets | None = None

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the micro-batches of this process as (position, index) pairs."""
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.stop):
            for turn in range(self.accumulation):
                first = ((step * self.accumulation + turn) * self.world + self.rank) * self.micro_batch
                batch = []
                for position in range(first, first + self.micro_batch):
                    number = position // self.repeats
                    if number // self.length != epoch:
                        epoch = number // self.length
                        order = self._order(epoch)
                    batch.append((position, int(order[number % self.length])))
                yield batch

    def _order(self, epoch: int) -> Tensor:
        """Return the permutation (length,) int64 of one epoch.

        By length, the samples of whole batches are sorted in windows and the batches shuffled; those that share a
        batch with the epoch before or after stay as they are drawn.
        """
        order = shuffled(self.length, self.seed, epoch)
        if self.buckets is None:
            return order
        lengths, window = self.buckets
        size = max(1, self.micro_batch * self.accumulation * self.world // self.repeats)
        first = -epoch * self.length % size
        count = max(0, self.length - first) // size
        body = order[first : first + count * size]
        windows = [part[lengths[part].argsort(stable=True)] for part in body.split(window * size)]
        generator = torch.Generator().manual_seed(stream_number(f"batches/{self.seed}/{epoch}"))
        batches = torch.cat(windows).reshape(count, size)[torch.randperm(count, generator=generator)]
        return torch.cat([order[:first], batches.flatten(), order[first + count * size :]])


def buckets_of(source: Source) -> Buckets | None:
    """Ask for the lengths of the modality that `data.bucket` names; None where it is not set.

    Raises:
        M3Error: there is no such modality, all its samples have one length, or the source does not know them.
    """
    bucket = source.spec.bucket
    if bucket is None:
        return None
    if bucket.by not in source.modalities:
        raise M3Error(
            f"data.bucket.by names `{bucket.by}`, which is no modality.{nearest(bucket.by, source.modalities)}"
        )
    if source.modalities[bucket.by].padding is None:
        raise M3Error(f"data.bucket.by: all samples of `{bucket.by}` have one length; name one that differs, as text.")
    lengths = source.lengths(bucket.by)
    if lengths is None:
        raise M3Error(
            f"data.bucket: the source `{source.spec.source}` knows the length of `{bucket.by}` only by reading every "
            f"sample; remove data.bucket or store the data as `folder` or `shards`."
        )
    return Buckets(torch.tensor(lengths), bucket.batches)


def shuffled(length: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation (length,) int64 of the samples for one epoch."""
    generator = torch.Generator().manual_seed(stream_number(f"order/{seed}/{epoch}"))
    return torch.randperm(length, generator=generator)


def train_loader(samples: Samples, order: Iterable[Any], workers: int, timeout: float = 0) -> Iterator[Batch]:
    """Yield the micro-batches of one process.

    Args:
        samples: read one by one.
        order: which of them, when.
        workers: processes that load; 0: this one.
        timeout: seconds after which workers that deliver nothing count as dead; 0: never.

    Raises:
        M3Error: too many samples in a row can't be read, or they don't fit together.
    """
    loader = DataLoader(
        samples,
        batch_sampler=order,  # type: ignore[arg-type]  # yields (position, index) pairs, or rows of a stream
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        timeout=timeout if workers else 0,
        worker_init_fn=prepare_worker,
        generator=torch.Generator().manual_seed(samples.seed),  # else starting it draws from the run's random numbers
    )
    for batch in loader:
        if isinstance(batch, M3Error):
            raise batch
        yield batch


def _as_it_is(batch: Any) -> Any:
    """Stand in for torch's collating, which `Samples` has done; a function that worker processes can be sent."""
    return batch


def first_batches(samples: Samples, count: int, batch_size: int) -> Iterator[Batch]:
    """Yield the first `count` samples in their own order, for evaluation; loaded in this process."""
    count = min(count, len(samples.source))
    for start in range(0, count, batch_size):
        yield samples.collate([samples[(i, i)] for i in range(start, min(start + batch_size, count))])
