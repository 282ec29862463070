"""Data sets of the library `datasets`: from Hugging Face's hub, saved by it on disk, or files that it reads."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from m3.data.files import Stored, encode
from m3.data.source import Row, Sample, Source, Split, StoredSample, Stream, decode, limited, numbers_of_split
from m3.errors import M3Error, nearest, read_settings
from m3.plugins import Modality, Strict
from m3.recipe import DataSpec

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


HEAD = 128
"""First training rows of a stream, for what needs samples by number: pictures, baselines, statistics."""


class Options(Strict):
    """`data.options` of source `hub`.

    Attributes:
        path: name on the hub, folder written by `save_to_disk`, one of the files above, or a folder of files.
        name: configuration of a data set that has several.
        split: of the data set.
        held_out_split: split whose first samples are held out; null: train and held out are both made of `split`.
        streaming: read the data set row after row, without a copy on this disk; see `Hub`.
        buffer: rows of a stream that are shuffled together; every process holds them in memory.
        columns: modality -> column; a modality that isn't listed has a column of its own name.
    """

    path: str
    name: str | None = None
    split: str = "train"
    held_out_split: str | None = None
    streaming: bool = False
    buffer: PositiveInt = 1000
    columns: dict[str, str] = Field(default={})


class Hub(Source):
    """Rows of a table by their number. Images, sounds and videos are decoded by the modality, not by `datasets`.

    Columns of classes (`ClassLabel`) become labels.

    Of a stream, the first rows are held out, or those of `held_out_split`, and kept in memory; training reads the
    others through `stream`. The numbered training samples, also in memory, are then the first `HEAD` of them. With
    `data.samples` there are that many instead and no stream: a small table that was not written to this disk.
    """

    def __init__(self, spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> None:
        super().__init__(spec, modalities, seed, split)
        options = read_settings(Options, spec.options, "data.options")
        apart = options.held_out_split if split == "held_out" else None
        rows = _open(options, apart or options.split)
        names = rows.column_names or list(next(iter(rows), {}))  # those of a stream may be known only by reading
        self.columns = {name: options.columns.get(name, name) for name in modalities}
        for name, column in self.columns.items():
            if column not in names:
                raise M3Error(
                    f"data.options.columns: {options.path} has no column `{column}` for the modality `{name}`."
                    f"{nearest(column, names)}"
                )
        features = rows.features or {}
        self.labels = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
        needed = list(dict.fromkeys([*self.columns.values(), *self.labels]))
        rows = _undecoded(rows.select_columns(needed)) if features else rows
        if options.streaming:
            self._begin(rows, options)
        else:
            self._choose(rows, options)

    def _choose(self, rows: Any, options: Options) -> None:
        """Take the rows of this split out of a table."""
        there = _is_there(rows, self.columns)
        if self.spec.missing == "error":
            _check_complete(there, self.columns, options.path)
        ids = [f"{number:08d}" for number in range(len(rows))]
        if options.held_out_split is None:
            numbers = numbers_of_split(ids, self.spec, self.split)
        else:
            numbers = limited(list(range(len(ids))), self.spec, self.split)
        self.ids = [ids[i] for i in numbers]
        self.rows = rows.select(numbers)
        self.is_there = {name: known[numbers] for name, known in there.items()}

    def _begin(self, rows: Any, options: Options) -> None:
        """Read the first rows of this split of a stream, and note where training begins in it."""
        stream = HubStream(rows, options, copy.copy(self))
        is_train = self.split == "train"
        skipped = self.spec.held_out if is_train and options.held_out_split is None else 0
        wanted = (self.spec.samples or HEAD) if is_train else self.spec.held_out
        walk = ((shard, number, row) for shard in range(stream.shards) for number, row in stream.rows(shard, 0))
        head = list(islice(walk, skipped, skipped + wanted))
        self.take([row for _, _, row in head])
        if is_train and head and self.spec.samples is None:
            self.stream = stream.beginning_at(*head[0][:2])

    def take(self, rows: list[Row]) -> None:
        """Hold these rows of a stream instead of others."""
        self.ids, self.rows = [row.id for row in rows], [row.values for row in rows]
        self.is_there = {
            name: np.array([row.values.get(column) is not None for row in rows], bool)
            for name, column in self.columns.items()
        }

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Sample:
        """Read a row and decode the files in it."""
        values, labels = self._row(index)
        files = {name: value for name, value in values.items() if isinstance(value, Stored)}
        loaded = decode(StoredSample(files, self.ids[index]), self.modalities)
        return Sample(values | loaded.signals, self.ids[index], labels)

    def stored(self, index: int) -> StoredSample:
        """Return the files of a row byte for byte; texts and arrays without loss."""
        values, labels = self._row(index)
        files = {name: value if isinstance(value, Stored) else encode(value) for name, value in values.items()}
        return StoredSample(files, self.ids[index], labels)

    def name(self, index: int) -> str:
        """Return the number of the row."""
        return self.ids[index]

    def coverage(self) -> dict[str, float]:
        """Count rows with a value, from the table's own marks."""
        return {name: float(there.mean()) if len(self) else 0.0 for name, there in self.is_there.items()}

    def _row(self, index: int) -> tuple[dict[str, Any], dict[str, int]]:
        row = self.rows[index]
        values = {name: row[column] for name, column in self.columns.items() if row.get(column) is not None}
        labels = {name: row[name] for name in self.labels if row.get(name) is not None}
        return {name: _value(value, self.modalities[name]) for name, value in values.items()}, labels


class HubStream(Stream):
    """Rows of a data set in the order in which its shards (files, as a rule) hold them."""

    def __init__(self, data: Any, options: Options, hub: Hub) -> None:
        """Begin at the first row.

        Args:
            data: an `IterableDataset`.
            options: of the source.
            hub: what its rows are read like.
        """
        self.data, self.hub, self.path, self.buffer = data, hub, options.path, options.buffer
        self.shards = data.num_shards
        self.begin = (0, 0)

    def beginning_at(self, shard: int, number: int) -> HubStream:
        """Return what is left of the stream from a row on; shards before it are counted no more."""
        rest = copy.copy(self)
        rest.begin, rest.shards = (shard, number), self.shards - shard
        return rest

    def rows(self, shard: int, first: int) -> Iterator[tuple[int, Row]]:
        """Yield rows, named <shard>-<row>."""
        first = max(first, self.begin[1]) if shard == 0 else first
        shard += self.begin[0]
        part = self.data.shard(num_shards=self.data.num_shards, index=shard)
        needed = [*self.hub.columns.values(), *self.hub.labels]
        for number, row in enumerate(part.skip(first), first):
            values = {column: row.get(column) for column in needed}
            name = f"{shard:05d}-{number:08d}"
            if self.hub.spec.missing == "error":
                self._check(values, name)
            yield number, Row(name, values)

    def source(self, rows: list[Row]) -> Hub:
        """Return a source that holds these rows."""
        hub = copy.copy(self.hub)
        hub.take(rows)
        return hub

    def _check(self, values: dict[str, Any], name: str) -> None:
        for modality, column in self.hub.columns.items():
            if values[column] is None:
                raise M3Error(
                    f"{self.path}: row {name} has no `{column}` for the modality `{modality}`; fill it or set "
                    f"data.missing=allow."
                )


def _open(options: Options, split: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise M3Error(
            "data.source: `hub` needs the package `datasets`; run `pip install 'm3-multimodal[hub]'`."
        ) from error
    path = Path(options.path).expanduser()
    is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if is_saved and options.streaming:
        raise M3Error(f"data.options.streaming: {path} is a table on this disk, read by number; set it to false.")
    more = {"streaming": True} if options.streaming else {}
    try:
        if is_saved:
            rows: Any = datasets.load_from_disk(str(path))
        elif path.is_file() and path.suffix in BUILDERS:
            rows = datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split=split, **more)
        else:
            rows = datasets.load_dataset(options.path, options.name, split=split, **more)
    except Exception as error:  # network, access, format: each has its own class there
        reason = " ".join(str(error).split())
        raise M3Error(f"data.options.path: `{options.path}` can't be opened: {reason}") from error
    if isinstance(rows, dict):
        if split not in rows:
            key = "split" if split == options.split else "held_out_split"
            raise M3Error(f"data.options.{key}: {options.path} has no `{split}`.{nearest(split, rows)}")
        return rows[split]
    return rows


def _undecoded(rows: Any) -> Any:
    """Ask for the bytes of images, sounds and videos instead of decoded objects."""
    for column, feature in rows.features.items():
        if getattr(feature, "decode", False) is True:
            feature = copy.copy(feature)
            feature.decode = False
            rows = rows.cast_column(column, feature)
    return rows


def _is_there(rows: Any, columns: dict[str, str]) -> dict[str, np.ndarray]:
    """Return modality -> bool (rows,): the row has a value. Arrow keeps this beside the values, which stay unread."""
    batches = list(_marks(rows, columns))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in columns}


def _marks(rows: Any, columns: dict[str, str]) -> Iterator[dict[str, np.ndarray]]:
    for table in rows.with_format("arrow").iter(batch_size=10_000):
        yield {name: table[column].is_valid().to_numpy() for name, column in columns.items()}


def _check_complete(is_there: dict[str, np.ndarray], columns: dict[str, str], path: str) -> None:
    for name, there in is_there.items():
        if not there.all():
            raise M3Error(
                f"{path}: {(~there).sum()} rows have no `{columns[name]}` for the modality `{name}`, the first is row "
                f"{there.argmin()}; fill them or set data.missing=allow."
            )


def _value(value: Any, modality: Modality) -> Any:
    """Turn a cell into a file, a text or an array."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        path = Path(value["path"] or "")
        data = _file(value["path"]) if value["bytes"] is None else value["bytes"]
        # What was added from memory has no name; decoders look at the bytes, so any ending they accept will do.
        return Stored(path.suffix.lower() or modality.extensions[0], data)
    return np.asarray(value) if isinstance(value, list) else value


def _file(address: str) -> bytes:
    """Read a file that a row names, on this disk or, in a stream, anywhere that fsspec reads."""
    if "://" not in address:
        return Path(address).read_bytes()
    fsspec = importlib.import_module("fsspec")
    with fsspec.open(address, "rb") as file:
        return file.read()
