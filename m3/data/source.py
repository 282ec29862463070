"""Sources: where samples come from. A source knows files and scenes; nothing after it does."""

from __future__ import annotations

import hashlib
import heapq
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

from m3.data.files import Member, Stored, encode
from m3.errors import M3Error
from m3.parts import find
from m3.plugins import Modality
from m3.recipe import DataSpec

Split = Literal["train", "held_out"]
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One sample as read.

    Attributes:
        signals: modality -> what `Modality.to_raw` accepts; a modality may be lacking.
        id: name for messages.
        labels: label name -> class number; a label may be lacking.
    """

    signals: dict[str, Any]
    id: str
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredSample:
    """One sample as files, not yet decoded.

    Attributes:
        files: modality -> its file; a modality may be lacking.
        id: as in `Sample`.
        labels: as in `Sample`.
    """

    files: dict[str, Stored]
    id: str
    labels: dict[str, int] = field(default_factory=dict)


class Row(NamedTuple):
    """One sample of a stream, not yet decoded: what the process that reads the stream sends to a worker.

    Attributes:
        id: as in `Sample`.
        values: what the stream gave.
    """

    id: str
    values: dict[str, Any]


class Source(ABC):
    """Numbered samples. Reading one depends on nothing but its number, so workers may do it in any order."""

    stream: Stream | None = None
    """Where training gets its samples from if nobody knows how many there are; the numbered ones are its first."""

    def __init__(self, spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> None:
        self.spec = spec
        self.modalities = modalities
        self.seed = seed
        self.split: Split = split

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples of this split."""

    def at(self, epoch: int, index: int) -> int:
        """Return the number under which draw `index` of an epoch is read: the same in every epoch, if not a mixture."""
        return index

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Read sample `index`, 0 <= index < len. Raises any error whose text says what is wrong with it."""

    def name(self, index: int) -> str:
        """Return a sample's id without reading it."""
        return str(index)

    def origin(self, index: int) -> str:
        """Return the part of the data that a sample lies in, by which unreadable ones are counted, without reading."""
        return self.spec.source

    def stored(self, index: int) -> StoredSample:
        """Return the files of sample `index` as they are; a source without files makes them without loss."""
        sample = self.read(index)
        return StoredSample({name: encode(x) for name, x in sample.signals.items()}, sample.id, sample.labels)

    def coverage(self) -> dict[str, float] | None:
        """Return modality -> share in [0, 1] of the samples that have it; None: known only by reading them."""
        return None

    def known_labels(self, name: str) -> Sequence[int | None] | None:
        """Return label `name` of every sample, None where it has none. None: known only by reading them."""
        return None

    def lengths(self, name: str) -> Sequence[int] | None:
        """Return how long modality `name` of every sample is, in bytes as it is stored, 0 where the sample lacks it.

        None: known only by reading them.
        """
        return None


class Labelled(Source):
    """Some of the samples of another source, chosen by a hash of their ids, so that fewer are a part of more."""

    def __init__(self, source: Source, label: str | None, amount: float) -> None:
        """Choose the samples.

        Args:
            source: where they are from.
            label: name of the label whose classes get equally many, as far as they have them; None: no label counts.
            amount: a whole number of samples, or (a float) a share of them; of each class that is there at least one.

        Raises:
            M3Error: the source can't be counted, or knows its labels only by reading.
        """
        super().__init__(source.spec, source.modalities, source.seed, source.split)
        refuse_stream(source, "data.labelled")
        if type(source).at is not Source.at:
            raise M3Error("data.labelled: a mixture draws its samples anew in every epoch; choose one of its sources.")
        known = [0] * len(source) if label is None else source.known_labels(label)
        if known is None:
            raise M3Error(
                f"data.labelled: the source `{source.spec.source}` knows the label `{label}` only by reading every "
                f"sample; store the data as `folder`, with a manifest."
            )
        self.source, self.numbers = source, _balanced(source, known, amount)

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> Sample:
        """Read a chosen sample."""
        return self.source.read(self.numbers[index])

    def name(self, index: int) -> str:
        """Return a chosen sample's id."""
        return self.source.name(self.numbers[index])

    def stored(self, index: int) -> StoredSample:
        """Return the files of a chosen sample."""
        return self.source.stored(self.numbers[index])

    def known_labels(self, name: str) -> list[int | None] | None:
        """Return the labels of the chosen samples."""
        return self._chosen(self.source.known_labels(name))

    def lengths(self, name: str) -> list[int] | None:
        """Return the lengths of the chosen samples."""
        return self._chosen(self.source.lengths(name))

    def _chosen(self, known: Sequence[T] | None) -> list[T] | None:
        return None if known is None else [known[number] for number in self.numbers]


def _balanced(source: Source, known: Sequence[int | None], amount: float) -> list[int]:
    """Choose samples class by class in turn, those of the smallest hashes first; in the order of their numbers."""
    there = [number for number in range(len(source)) if known[number] is not None]
    hashes = {number: _hash(source.name(number)) for number in there}
    taken: Counter[int | None] = Counter()
    turn = {}
    for number in sorted(there, key=hashes.__getitem__):
        turn[number] = taken[known[number]]
        taken[known[number]] += 1
    count = amount if isinstance(amount, int) else max(len(taken), round(amount * len(there)))
    return sorted(sorted(there, key=lambda number: (turn[number], hashes[number]))[:count])


class Stream(ABC):
    """Samples that can only be read one after the other, in shards, each from its beginning.

    Attributes:
        shards: how many there are.
        buffer: samples that are shuffled together.
    """

    shards: int
    buffer: int

    @abstractmethod
    def rows(self, shard: int, first: int) -> Iterator[tuple[int, Row]]:
        """Yield the rows of a shard, from number `first` on, with their numbers; the same ones every time."""

    @abstractmethod
    def source(self, rows: list[Row]) -> Source:
        """Return a source of these rows, numbered as they lie; called in the workers."""


class Drawn(NamedTuple):
    """A micro-batch of a stream on its way to a worker.

    Attributes:
        pairs: (position in the run, number among `rows`) of every sample.
        rows: those that it is made of.
    """

    pairs: list[tuple[int, int]]
    rows: list[Row]


def refuse_stream(source: Source, what: str) -> None:
    """Raise where samples are needed by their number and a source has them as a stream."""
    if source.stream:
        raise M3Error(f"{what} needs samples that can be counted, not a stream; set data.options.streaming=false.")


def open_source(spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> Source:
    """Open one split of what the `data` section of a recipe describes.

    It is asked for signals only; modalities that are made of labels come on top, see `with_labels`.
    """
    signals = {name: part for name, part in modalities.items() if part.from_label is None}
    if not signals:
        raise M3Error("modalities: all are made of labels, and no signal is left to learn from; add one.")
    source = find("sources", spec.source)(spec, signals, seed, split)
    if spec.labelled is None or split != "train":
        return source
    names = [part.from_label for part in modalities.values() if part.from_label is not None]
    return Labelled(source, names[0] if names else None, spec.labelled)


def with_labels(sample: Sample, modalities: dict[str, Modality], may_lack: bool = True) -> Sample:
    """Return the sample with the modalities that are made of its labels.

    Raises:
        M3Error: the sample has not the label, and may not lack it.
    """
    wanted = {name: part.from_label for name, part in modalities.items() if part.from_label is not None}
    absent = [(name, label) for name, label in wanted.items() if label not in sample.labels]
    if absent and not may_lack:
        name, label = absent[0]
        there = ", ".join(sample.labels) or "none"
        raise M3Error(
            f"the data give no label `{label}` for the modality `{name}` (labels there: {there}); set "
            f"modalities.{name}.of to one of them, add a manifest with a column `label`, or put the files into a "
            f"folder per class; data.missing=allow trains on samples without it as well."
        )
    made = {name: sample.labels[label] for name, label in wanted.items() if label in sample.labels}
    return replace(sample, signals={**sample.signals, **made})


def check_labels(source: Source, modalities: dict[str, Modality]) -> None:
    """Raise where a source that knows its labels shows that they can't be learned, before anything is read.

    Raises:
        M3Error: a sample has none though none may lack it, or all training samples have the same.
    """
    for name, label in ((name, part.from_label) for name, part in modalities.items()):
        known = None if label is None else source.known_labels(label)
        if label is None or not known or all(number is None for number in known):
            continue
        if source.spec.missing == "error" and None in known:
            raise M3Error(
                f"{source.name(known.index(None))} has no label `{label}`, which `{name}` is made of; label it, put "
                f"its class's folder among the training samples too, or set data.missing=allow."
            )
        if source.split == "train" and len(set(known) - {None}) == 1:
            raise M3Error(
                f"all {len(known)} training samples have the label `{label}` {next(iter(set(known) - {None}))}, so "
                f"there is nothing to tell apart; add samples of another class, or correct data.root."
            )


def coverage(source: Source, samples: int = 256) -> dict[str, float]:
    """Return modality -> share in [0, 1] of the samples that have it.

    Args:
        source: any source.
        samples: how many are read, evenly spread, where the source doesn't know without reading.
    """
    known = source.coverage()
    if known is not None:
        return known
    count = min(samples, len(source))
    read = [source.read(i * len(source) // count).signals for i in range(count)]
    return {name: sum(name in signals for signals in read) / max(1, count) for name in source.modalities}


def describe_coverage(source: Source) -> str:
    """Say in a line how many samples there are and which share of them has each modality, as far as it is known."""
    count = f"the first {len(source)} samples of the stream" if source.stream else f"{len(source)} training samples"
    have = ", ".join(f"{name} {share:.1%}" for name, share in (source.coverage() or {}).items())
    return f"{count}: {have}" if have else count


def decode(stored: StoredSample, modalities: dict[str, Modality]) -> Sample:
    """Load the files of a sample.

    Raises:
        M3Error: a file can't be read; names it and its modality.
    """
    signals = {}
    for name, file in stored.files.items():
        member = Member(file.data, f"{stored.id}{file.ending}")
        try:
            signals[name] = modalities[name].load(member)
        except Exception as error:  # whatever a broken file raises
            raise M3Error(f"{member.name} can't be read as `{name}`: {error}") from error
    return Sample(signals, stored.id, stored.labels)


def numbers_of_split(ids: Sequence[str], spec: DataSpec, split: Split) -> list[int]:
    """Choose the samples of one split, in order.

    Those with the smallest hashes of their ids are held out, `held_out` of them but at most a tenth, so that
    adding files moves none between the splits' ends.
    """
    count = min(spec.held_out, len(ids) // 10)
    kept = set(heapq.nsmallest(count, range(len(ids)), key=lambda i: _hash(ids[i])))
    return limited([i for i in range(len(ids)) if (i in kept) == (split == "held_out")], spec, split)


def limited(numbers: list[int], spec: DataSpec, split: Split) -> list[int]:
    """Keep as many samples of a split as the recipe asks for."""
    return numbers[: spec.samples] if split == "train" else numbers[: spec.held_out]


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()
