"""From a source to batches, in an order that is a pure function of the seed and the position in the run.

Position p of a run is the p-th sample it trains on. Steps, micro-batches and processes only say who takes
which positions, so 1 x 8, 2 x 4 and two processes with 4 train on the same samples, and a run that continues
at step s needs to know nothing but s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m3.data.geometry import random_crop
from m3.data.source import Sample, Source
from m3.errors import M3Error
from m3.plugins import Crop, Modality
from m3.random import stream_number
from m3.recipe import DataSpec
from m3.types import Batch

TRIES = 16
"""Samples in a row that may be unreadable before the source is given up."""


@dataclass(frozen=True)
class Loaded:
    """One sample, cropped and sized, with the sentences about those that had to be skipped on the way."""

    signals: dict[str, Tensor]
    position: int
    id: str
    labels: dict[str, int]
    skipped: tuple[str, ...]


class Samples(Dataset[Loaded]):
    """Reads the sample of a (position, index) pair; runs in the loader's workers."""

    def __init__(self, source: Source, modalities: dict[str, Modality], spec: DataSpec, seed: int) -> None:
        if not len(source):
            raise M3Error(f"data: the source `{spec.source}` has no samples for `{source.split}`; add data.")
        self.source, self.modalities, self.spec, self.seed = source, modalities, spec, seed

    def __getitem__(self, at: tuple[int, int]) -> Loaded:
        """Read a sample; an unreadable one is replaced by the next and named in `skipped`."""
        position, index = at
        skipped: list[str] = []
        for shift in range(TRIES):
            number = (index + shift) % len(self.source)
            try:
                sample = self.source.read(number)
                return Loaded(self._fit(sample, position), position, sample.id, sample.labels, tuple(skipped))
            except Exception as error:  # whatever a broken file raises; it is counted, named and limited
                skipped.append(f"{self.source.name(number)}: {error}")
        raise M3Error(f"{TRIES} samples in a row can't be read; the first: {skipped[0]}")

    def _fit(self, sample: Sample, position: int) -> dict[str, Tensor]:
        raw = {name: self.modalities[name].to_raw(signal) for name, signal in sample.signals.items()}
        crop = Crop()
        if self.source.split == "train" and (self.spec.crop or self.spec.flip):
            key = stream_number(f"crop/{self.seed}/{position}")
            height, width = next((x.shape[-2:] for x in raw.values() if x.ndim >= 2), (1, 1))
            crop = random_crop(key, self.spec.crop, self.spec.flip, (height, width))
        return {name: self.modalities[name].fit(x, crop) for name, x in raw.items()}


def collate(samples: list[Loaded]) -> Batch:
    """Stack samples; where one lacks a modality that another has, a blank is stacked and `is_present` says so."""
    signals, is_present = {}, {}
    names = dict.fromkeys(name for sample in samples for name in sample.signals)
    for name in names:
        blank = torch.zeros_like(next(s.signals[name] for s in samples if name in s.signals))
        signals[name] = torch.stack([s.signals.get(name, blank) for s in samples])
        if not all(name in s.signals for s in samples):
            is_present[name] = torch.tensor([name in s.signals for s in samples])
    labels = {key: torch.tensor([s.labels[key] for s in samples]) for key in samples[0].labels}
    return Batch(
        signals=signals,
        keys=torch.tensor([s.position for s in samples]),
        is_present=is_present,
        labels=labels,
        ids=tuple(s.id for s in samples),
        skipped=tuple(message for s in samples for message in s.skipped),
    )


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
    """

    length: int
    seed: int
    micro_batch: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1
    start: int = 0
    stop: int = 1

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
                    if position // self.length != epoch:
                        epoch = position // self.length
                        order = shuffled(self.length, self.seed, epoch)
                    batch.append((position, int(order[position % self.length])))
                yield batch


def shuffled(length: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation (length,) int64 of the samples for one epoch."""
    generator = torch.Generator().manual_seed(stream_number(f"order/{seed}/{epoch}"))
    return torch.randperm(length, generator=generator)


def train_loader(samples: Samples, order: Order, workers: int) -> DataLoader[Loaded]:
    """Make the loader of one process."""
    return DataLoader(
        samples,
        batch_sampler=order,  # type: ignore[arg-type]  # yields (position, index) pairs instead of indices
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )


def first_batches(samples: Samples, count: int, batch_size: int) -> Iterator[Batch]:
    """Yield the first `count` samples in their own order, for evaluation; loaded in this process."""
    count = min(count, len(samples.source))
    for start in range(0, count, batch_size):
        yield collate([samples[(i, i)] for i in range(start, min(start + batch_size, count))])
