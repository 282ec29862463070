"""Files of point clouds: PLY, PCD, NumPy arrays and text, read into one table.

Nothing is allocated on a header's word: what it claims is compared with the bytes that are there.
Letters: P points, C = 3 + other columns.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from m3.errors import M3Error
from m3.plugins import File, ending

COLOURS = ("red", "green", "blue")

EXPANSION = 100
"""A compressed array may be this many times larger than its file."""

# Names of PLY's number types and their NumPy types without byte order.
_PLY_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "int8": "i1",
    "uint8": "u1",
    "int16": "i2",
    "uint16": "u2",
    "int32": "i4",
    "uint32": "u4",
    "float": "f4",
    "double": "f8",
    "float32": "f4",
    "float64": "f8",
}
_PLY_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}

_PCD_TYPES = {f"{kind}{size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)}
_PCD_TYPES |= {"F4": np.dtype("f4"), "F8": np.dtype("f8")}

Field = tuple[str, np.dtype, int]
"""A column of a file: its name, the type it is declared with, and how many numbers it holds per point."""


def read_cloud(file: File) -> np.ndarray:
    """Read a file into (P, C) float64: x, y, z, then red, green, blue where there are such, then other floats.

    Integer colours are divided by the largest number of their type; other integers (labels, rings) are left
    out, and so are all elements of a PLY file but `vertex`.

    Raises:
        M3Error: the file has another ending, is damaged or lacks x, y and z.
    """
    readers = {".ply": _ply, ".pcd": _pcd, ".npy": _npy, ".npz": _npz, ".xyz": _text, ".txt": _text}
    name = Path(file.name).name
    reader = readers.get(ending(file))
    if reader is None:
        raise M3Error(f"{name}: a point cloud is read from {', '.join(readers)}; convert the file to one of them.")
    data = file.read_bytes() if isinstance(file, Path) else file.read()
    try:
        return reader(data)
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, OverflowError, RuntimeError) as error:
        raise M3Error(f"{name} can't be read as a point cloud: {str(error).rstrip('.')}.") from error


# -- PLY ------------------------------------------------------------------------------------------------


def _ply(data: bytes) -> np.ndarray:
    lines, body = _header(data, b"end_header")
    if lines[0] != ["ply"]:
        raise ValueError("it does not begin with `ply`; check that it is a PLY file")
    order, elements = _ply_header(lines[1:])
    rows = _rows(body) if order == "" else []
    start = 0
    for name, count, fields in elements:
        if name != "vertex":
            start = start + count if order == "" else _after(body, start, count, fields, order)
        elif order == "":
            return _assemble(_ascii_fields(rows[start:], fields, count))
        else:
            return _assemble(_binary_fields(body[start:], fields, count, order))
    raise ValueError("it has no element `vertex`; export the points as vertices")


def _ply_header(lines: list[list[str]]) -> tuple[str, list[tuple[str, int, list[Field]]]]:
    """Return the byte order ("" for text) and the elements: name, count, fields; a list has the size -1 and the
    type of its length, followed by a field of the type of its items.
    """
    order, elements = None, []
    for words in lines:
        match words:
            case [] | ["end_header"] | ["comment" | "obj_info", *_]:
                pass
            case ["format", kind, "1.0"] if kind in _PLY_ORDERS:
                order = _PLY_ORDERS[kind]
            case ["element", name, count] if count.isdecimal():
                elements.append((name, int(count), []))
            case ["property", "list", length, item, name] if elements and {length, item} <= _PLY_TYPES.keys():
                elements[-1][2].append((name, np.dtype(_PLY_TYPES[length]), -1))
                elements[-1][2].append((name, np.dtype(_PLY_TYPES[item]), 0))
            case ["property", kind, name] if elements and kind in _PLY_TYPES:
                elements[-1][2].append((name, np.dtype(_PLY_TYPES[kind]), 1))
            case _:
                raise ValueError(f"its header line `{' '.join(words)[:80]}` is unknown; save it again as PLY 1.0")
    if order is None:
        raise ValueError("its header names no format; save it again as PLY 1.0")
    return order, elements


def _after(body: bytes, start: int, count: int, fields: list[Field], order: str) -> int:
    """Return where an element that begins at `start` ends."""
    if all(size == 1 for _, _, size in fields):
        return start + count * sum(kind.itemsize for _, kind, _ in fields)
    for _ in range(count):
        length = 0
        for _, kind, size in fields:
            if size == -1:
                if start + kind.itemsize > len(body):
                    raise ValueError("it ends in the middle of its data; copy or save it again")
                length = int(np.frombuffer(body, _stored(kind, order), 1, start)[0])
            start += kind.itemsize * (abs(size) or max(0, length))
    return start


# -- PCD ------------------------------------------------------------------------------------------------


def _pcd(data: bytes) -> np.ndarray:
    lines, body = _header(data, b"DATA")
    settings = {words[0]: words[1:] for words in lines if words and not words[0].startswith("#")}
    missing = {"FIELDS", "SIZE", "TYPE", "DATA"} - settings.keys()
    if missing or not {"POINTS", "WIDTH"} & settings.keys():
        raise ValueError(f"its header has no {min(missing, default='POINTS')}; save it again as PCD 0.7")
    if settings["DATA"] == ["binary_compressed"]:
        raise ValueError("its data is `binary_compressed`; save it as `ascii` or `binary`")
    names = settings["FIELDS"]
    columns = [names, settings["TYPE"], settings["SIZE"], settings.get("COUNT", ["1"] * len(names))]
    kinds = [f"{kind}{size}" for kind, size in zip(*columns[1:3], strict=False)]
    is_whole = len({len(column) for column in columns}) == 1 and all(x.isdecimal() for x in columns[3])
    if not is_whole or not _PCD_TYPES.keys() >= set(kinds):
        raise ValueError("FIELDS, SIZE, TYPE and COUNT of its header don't match; save it again as PCD 0.7")
    fields = [(n, _PCD_TYPES[kind], int(c)) for n, kind, c in zip(names, kinds, columns[3], strict=True)]
    count = math.prod(int(x) for x in settings.get("POINTS", settings.get("WIDTH", []) + settings.get("HEIGHT", [])))
    if settings["DATA"] == ["ascii"]:
        return _assemble(_ascii_fields(_rows(body), fields, count))
    if settings["DATA"] != ["binary"]:
        raise ValueError(f"its data is `{' '.join(settings['DATA'])[:80]}`; save it as `ascii` or `binary`")
    return _assemble(_binary_fields(body, fields, count, "<"))


# -- both -----------------------------------------------------------------------------------------------


def _header(data: bytes, last: bytes) -> tuple[list[list[str]], bytes]:
    """Split off the header, which ends with the line that starts with `last`: its lines as words, and the rest."""
    lines, start = [], 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        line = data[start:end]
        start = end + 1
        lines.append(line.decode("latin-1").split())
        if line.startswith(last):
            return lines, data[start:]
    raise ValueError(f"its header has no line `{last.decode()}`; copy or save it again")


def _rows(body: bytes) -> list[str]:
    return [line for line in body.decode("ascii").splitlines() if line.strip()]


def _ascii_fields(rows: list[str], fields: list[Field], count: int) -> dict[str, tuple[np.ndarray, np.dtype]]:
    _check(fields, count, len(rows))
    table = _numbers(rows[:count])
    widths = [size for _, _, size in fields]
    if table.shape[1] != sum(widths):
        raise ValueError(f"its lines have {table.shape[1]} numbers where the header names {sum(widths)}")
    starts = np.cumsum([0, *widths])
    return {n: (table[:, i], kind) for (n, kind, size), i in zip(fields, starts, strict=False) if size == 1}


def _binary_fields(body: bytes, fields: list[Field], count: int, order: str) -> dict[str, tuple[np.ndarray, np.dtype]]:
    width = sum(kind.itemsize * size for _, kind, size in fields)
    _check(fields, count, len(body) // max(1, width))
    kinds = [(str(i), _stored(kind, order), (size,)) for i, (_, kind, size) in enumerate(fields)]
    table = np.frombuffer(body, np.dtype(kinds), count)
    return {n: (table[str(i)][:, 0], kind) for i, (n, kind, size) in enumerate(fields) if size == 1}


def _stored(kind: np.dtype, order: str) -> np.dtype:
    """Return a type with byte order `<` or `>`."""
    return np.dtype(order + kind.str[1:])


def _check(fields: list[Field], count: int, there: int) -> None:
    if any(size < 0 for _, _, size in fields):
        raise ValueError("its vertices hold lists; save it without them")
    if count < 1:
        raise ValueError("it holds no points; leave it out")
    if there < count:
        raise ValueError(f"its header names {count} points and the data ends after {there}; copy or save it again")


def _assemble(fields: dict[str, tuple[np.ndarray, np.dtype]]) -> np.ndarray:
    if not {"x", "y", "z"} <= fields.keys():
        raise ValueError(f"it has no x, y and z but {', '.join(fields) or 'nothing'}; rename or add them")
    columns = [fields[axis][0] for axis in "xyz"]
    packed = fields.get("rgb") or fields.get("rgba")
    if packed is not None:  # the point cloud library packs three bytes into one number
        values, kind = packed
        with np.errstate(invalid="ignore"):
            bits = values.astype(kind if kind.itemsize == 4 else np.uint32).view(np.uint32)
        columns += [(bits >> shift & 255) / 255 for shift in (16, 8, 0)]
    if fields.keys() >= set(COLOURS):
        for values, kind in (fields[colour] for colour in COLOURS):
            columns.append(values if kind.kind == "f" else values / np.iinfo(kind).max)
    used = {"x", "y", "z", "rgb", "rgba", *COLOURS}
    columns += [values for name, (values, kind) in fields.items() if kind.kind == "f" and name not in used]
    with np.errstate(invalid="ignore"):  # some bit patterns of NaN would raise a warning
        return np.stack([column.astype(np.float64) for column in columns], 1)


# -- arrays and text ------------------------------------------------------------------------------------


def _npy(data: bytes) -> np.ndarray:
    """Read an array of numbers as it is stored, without a copy."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError("its array has named columns; save one plain array of numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, kind = read(stream)
    if kind.kind not in "fiub":
        raise ValueError(f"it holds an array of type {kind}; save numbers only")
    count = math.prod(shape)
    if min(shape, default=1) < 1 or count * kind.itemsize > len(data) - stream.tell():
        raise ValueError(f"its header names an array of shape {shape}, which its data does not fill; save it again")
    array = np.frombuffer(data, kind, count, stream.tell())
    return array.reshape(shape[::-1]).T if is_fortran else array.reshape(shape)


def _npz(data: bytes) -> np.ndarray:
    """Join `points` or `xyz`, or the only array, with the other float and uint8 arrays of as many rows."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > EXPANSION * len(data):
            raise ValueError(f"it expands to more than {EXPANSION} times its size; save it uncompressed")
        arrays = {member.filename.removesuffix(".npy"): _npy(archive.read(member)) for member in members}
    first = next((name for name in ("points", "xyz") if name in arrays), None)
    if first is None and len(arrays) != 1:
        raise ValueError(f"it holds no `points` or `xyz` but {', '.join(arrays) or 'nothing'}; rename the array")
    points = _scaled(arrays.pop(first) if first else arrays.popitem()[1])
    others = [x for x in arrays.values() if (x.dtype.kind == "f" or x.dtype == np.uint8) and x.ndim in (1, 2)]
    attributes = [_scaled(x).reshape(len(x), -1) for x in others if points.ndim == 2 and len(x) == len(points)]
    return np.concatenate([points, *attributes], 1) if attributes else points


def _scaled(array: np.ndarray) -> np.ndarray:
    """Bytes are colours: 0 to 255 becomes 0 to 1."""
    return array / 255 if array.dtype == np.uint8 else array.astype(np.float64)


def _text(data: bytes) -> np.ndarray:
    rows = [line.partition("#")[0] for line in data.decode("utf-8-sig").splitlines()]
    rows = [row for row in rows if row.strip()]
    if not rows:
        raise ValueError("it holds no points; leave it out")
    return _numbers(rows, "," if "," in rows[0] else None)


def _numbers(rows: list[str], delimiter: str | None = None) -> np.ndarray:
    """Read lines of numbers (P, C); a comma that separates nothing is refused, since it would shift columns."""
    try:
        return np.loadtxt(rows, dtype=np.float64, comments=None, delimiter=delimiter, ndmin=2)
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise ValueError(f"its lines are not all the same number of plain numbers ({reason}); repair them") from error
