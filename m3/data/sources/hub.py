"""Data sets of the Hugging Face library `datasets`: from its hub, saved by it on disk, or files that it reads."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from m3.data.files import Stored, encode
from m3.data.source import Sample, Source, Split, StoredSample, decode, numbers_of_split
from m3.errors import M3Error, nearest, read_settings
from m3.plugins import Modality, Strict
from m3.recipe import DataSpec

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


class Options(Strict):
    """`data.options` of source `hub`.

    Attributes:
        path: name on the hub, folder written by `save_to_disk`, one of the files above, or a folder of files.
        name: configuration of a data set that has several.
        split: of the data set; ours, train and held out, are made within it.
        streaming: not possible here, see `Hub`.
        columns: modality -> column; a modality that isn't listed has a column of its own name.
    """

    path: str
    name: str | None = None
    split: str = "train"
    streaming: bool = False
    columns: dict[str, str] = Field(default={})


class Hub(Source):
    """Rows of a table by their number. Images, sounds and videos are decoded by the modality, not by `datasets`.

    Columns of classes (`ClassLabel`) become labels. A stream has no numbers, so a run over it could neither be
    shuffled exactly nor continued: it is refused.
    """

    def __init__(self, spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> None:
        super().__init__(spec, modalities, seed, split)
        options = read_settings(Options, spec.options, "data.options")
        if options.streaming:
            raise M3Error(
                "data.options.streaming: a stream has no numbered samples, which order and resuming rest on; set it "
                "to false, or pack the data set once with `m3 data pack`."
            )
        rows = _open(options)
        self.columns = {name: options.columns.get(name, name) for name in modalities}
        for name, column in self.columns.items():
            if column not in rows.column_names:
                raise M3Error(
                    f"data.options.columns: {options.path} has no column `{column}` for the modality `{name}`."
                    f"{nearest(column, rows.column_names)}"
                )
        self.labels = [name for name, feature in rows.features.items() if type(feature).__name__ == "ClassLabel"]
        rows = _undecoded(rows.select_columns(list(dict.fromkeys([*self.columns.values(), *self.labels]))))
        there = _is_there(rows, self.columns)
        if spec.missing == "error":
            _check_complete(there, self.columns, options.path)
        self.ids = [f"{number:08d}" for number in range(len(rows))]
        numbers = numbers_of_split(self.ids, spec, split)
        self.ids = [self.ids[i] for i in numbers]
        self.rows = rows.select(numbers)
        self.is_there = {name: known[numbers] for name, known in there.items()}

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
        values = {name: row[column] for name, column in self.columns.items() if row[column] is not None}
        labels = {name: row[name] for name in self.labels if row[name] is not None}
        return {name: _value(value, self.modalities[name]) for name, value in values.items()}, labels


def _open(options: Options) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise M3Error(
            "data.source: `hub` needs the package `datasets`; run `pip install 'm3-multimodal[hub]'`."
        ) from error
    path = Path(options.path).expanduser()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            rows: Any = datasets.load_from_disk(str(path))
        elif path.is_file() and path.suffix in BUILDERS:
            rows = datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split=options.split)
        else:
            rows = datasets.load_dataset(options.path, options.name, split=options.split)
    except Exception as error:  # network, access, format: each has its own class there
        reason = " ".join(str(error).split())
        raise M3Error(f"data.options.path: `{options.path}` can't be opened: {reason}") from error
    if isinstance(rows, dict):
        if options.split not in rows:
            raise M3Error(f"data.options.split: {options.path} has no `{options.split}`.{nearest(options.split, rows)}")
        return rows[options.split]
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
        data = path.read_bytes() if value["bytes"] is None else value["bytes"]
        # What was added from memory has no name; decoders look at the bytes, so any ending they accept will do.
        return Stored(path.suffix.lower() or modality.extensions[0], data)
    return np.asarray(value) if isinstance(value, list) else value
