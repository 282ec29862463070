"""Manifests: a .csv or .jsonl file with one row per sample that says which file each modality is in."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from m3.errors import M3Error, nearest
from m3.plugins import Modality

ENDINGS = (".csv", ".jsonl")
SPLITS = {"train": "train", "held_out": "held_out", "val": "held_out"}


class Row(NamedTuple):
    """One sample.

    Attributes:
        id: from the column `id`, else the number of the row.
        values: modality -> its file, or the text itself where the modality is written inline.
        labels: from the columns `label` and `label:NAME`.
        split: from the column `split`; None where there is no such column.
        line: of the manifest, from 1; 0 where the sample comes from none.
    """

    id: str
    values: dict[str, Path | str]
    labels: dict[str, int]
    split: str | None
    line: int


def read_manifest(path: Path, modalities: dict[str, Modality]) -> list[Row]:
    """Read all rows. Columns that are neither modalities nor one of the above are left alone.

    Raises:
        M3Error: a row or the whole file is wrong; names the file and the line.
    """
    rows: list[Row] = []
    lines: dict[str, int] = {}
    columns: dict[str, None] = {}
    try:
        for line, cells in (_csv if path.suffix == ".csv" else _jsonl)(path):
            columns |= dict.fromkeys(cells)
            row = _row(cells, path, line, len(rows), modalities)
            if row.id in lines:
                raise M3Error(f"{path}, line {line}: the id `{row.id}` is taken by line {lines[row.id]}; change one.")
            lines[row.id] = line
            rows.append(row)
    except UnicodeDecodeError as error:
        raise M3Error(f"{path}: the manifest is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    if not rows:
        raise M3Error(f"{path}: the manifest has no rows; add one per sample.")
    for name in modalities:
        if not any(name in row.values for row in rows):
            raise M3Error(f"{path}: no row has a value for the modality `{name}`.{nearest(name, columns)}")
    for row in rows:
        if (row.split is None) != (rows[0].split is None):
            raise M3Error(f"{path}, line {row.line}: either every row names its `split` or none does.")
    return rows


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for cells in reader:
                if None in cells or None in cells.values():
                    raise M3Error(
                        f"{path}, line {reader.line_num}: the row has more or fewer values than the header has names "
                        f"({len(reader.fieldnames or ())}); put values that hold commas in quotes."
                    )
                yield reader.line_num, cells
        except csv.Error as error:
            raise M3Error(f"{path}, line {reader.reader.line_num}: not readable as CSV: {error}.") from error


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except json.JSONDecodeError as error:
                raise M3Error(f"{path}, line {line}: not readable as JSON: {error.msg}.") from error
            if not isinstance(fields, dict):
                raise M3Error(f"{path}, line {line}: a row is an object {{...}}, got {type(fields).__name__}.")
            yield line, {name: value for name, value in fields.items() if value is not None}


def _row(cells: dict[str, Any], path: Path, line: int, number: int, modalities: dict[str, Modality]) -> Row:
    where = f"{path}, line {line}"
    values: dict[str, Path | str] = {}
    for name, part in modalities.items():
        cell = cells.get(name, "")
        if part.is_structured and isinstance(cell, list | dict):
            cell = json.dumps(cell)
        if not isinstance(cell, str):
            raise M3Error(f"{where}: the value of `{name}` must be a string, got {cell!r}.")
        if cell:
            values[name] = cell if part.is_inline else _file(cell, name, part, path.parent, where)
    if not values:
        raise M3Error(f"{where}: the sample has none of {', '.join(modalities)}; give it one or remove the row.")
    split = cells.get("split") or None
    if split is not None and split not in SPLITS:
        raise M3Error(f"{where}: `{split}` is no split.{nearest(str(split), SPLITS)}")
    key = str(cells.get("id", "")) or f"{number:08d}"
    return Row(key, values, _labels(cells, where), SPLITS[split] if split else None, line)


def _file(cell: str, name: str, modality: Modality, folder: Path, where: str) -> Path:
    file = folder / cell
    if file.suffix.lower() not in modality.extensions:
        endings = ", ".join(modality.extensions)
        raise M3Error(f"{where}: `{cell}` is no file that `{name}` can read ({endings}); correct the path.")
    return file


def _labels(cells: dict[str, Any], where: str) -> dict[str, int]:
    labels = {}
    for column, cell in cells.items():
        if cell == "" or not (column == "label" or column.startswith("label:")):
            continue
        try:
            labels[column.partition(":")[2] or "label"] = int(str(cell))
        except ValueError as error:
            raise M3Error(f"{where}: `{column}` must be the number of a class, got {cell!r}.") from error
    return labels
