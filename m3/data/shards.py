"""Tar files as folders that can be read at any place: names of members, an index of each tar, reading by offset.

A shard holds samples the way WebDataset writes them: the key of a member's name ends at the first dot of its last
part, and all members with one key make one sample. A tar has no table of contents, so its headers are read once;
what was found is kept beside it as `NAME.tar.index.json`.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec

from m3.errors import M3Error

LABELS = "labels"
"""Name under which a shard holds the labels of a sample, as JSON: {"name": class number}."""

BLOCK = 512
"""Bytes of a tar header; members begin at multiples of it, and the archive ends with blocks of zeros."""

OPEN_FILES = 256
"""Tars that a process keeps open."""


@dataclass(frozen=True)
class Index:
    """Where the members of one tar lie.

    Attributes:
        size: bytes of the tar the index was made for.
        stamp: what changes when the tar is written again (time of modification, or the store's own mark).
        names: of the members, in order.
        offsets: of their first bytes.
        sizes: in bytes.
    """

    size: int
    stamp: str
    names: list[str]
    offsets: list[int]
    sizes: list[int]


def list_shards(root: str) -> dict[str, dict[str, str]]:
    """Return shard name -> folder -> address of the tar.

    The folder is "" where root/<shard>.tar holds all modalities, and the modality in root/<modality>/<shard>.tar.

    Raises:
        M3Error: no such folder or address, or no tar in it.
    """
    names = _names(root)
    folders = {"": names} if any(name.endswith(".tar") for name in names) else {n: _names(f"{root}/{n}") for n in names}
    shards: dict[str, dict[str, str]] = {}
    for folder, inside in folders.items():
        for name in inside:
            if name.endswith(".tar"):
                address = "/".join(part for part in (root.rstrip("/"), folder, name) if part)
                shards.setdefault(name.removesuffix(".tar"), {})[folder] = address
    if not shards:
        raise M3Error(f"{root} holds no .tar, neither directly nor in folders named after modalities; check data.root.")
    return dict(sorted(shards.items()))


def split_roots(root: str) -> dict[str, str]:
    """Return split -> folder where `root` has both `train` and `val`, else nothing."""
    names = _names(root)
    return {"train": f"{root}/train", "held_out": f"{root}/val"} if {"train", "val"} <= set(names) else {}


def split_name(name: str) -> tuple[str, str]:
    """Cut a member's name: `a/000123.depth.png` -> (`a/000123`, `depth.png`)."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    key, _, rest = base.partition(".")
    return f"{folder}{slash}{key}".replace("%2E", ".").replace("%25", "%"), rest


def join_name(key: str, rest: str) -> str:
    """Make a member's name that `split_name` cuts into the same parts: dots of the key are written as %2E.

    Raises:
        M3Error: no name gives this key back.
    """
    folder, slash, base = key.replace("%", "%25").rpartition("/")
    name = f"{folder}{slash}{base.replace('.', '%2E')}.{rest}"
    if split_name(name) != (key, rest) or not base:
        raise M3Error(f"the id `{key}` can't be the name of a file; change it.")
    return name


def index_of(address: str) -> Index:
    """Return the index of a tar: the one beside it where that is newer than the tar, else a new one.

    Raises:
        M3Error: the tar is not complete, not readable or holds links.
    """
    size, stamp = _state(address)
    beside = f"{address}.index.json"
    try:
        found = Index(**json.loads(_read(beside)))
    except (FileNotFoundError, ValueError, TypeError):  # none, or not one of ours: it is made anew
        found = None
    if found is None or (found.size, found.stamp) != (size, stamp):
        found = _scan(address, size, stamp)
        try:
            _write(beside, json.dumps(asdict(found), separators=(",", ":")).encode())
        except (OSError, NotImplementedError):
            return found  # where the data can't be written to, the index lives as long as the source
    return found


def read_member(address: str, stamp: str, offset: int, size: int) -> bytes:
    """Read `size` bytes from `offset` of a tar; local files stay open, addresses are asked for this range.

    Raises:
        M3Error: the tar is shorter than its index says, or was written again since.
    """
    path = _local(address)
    if path is None:
        store, inner = _store(address)
        data = store.cat_file(inner, start=offset, end=offset + size)
    else:
        data = os.pread(_descriptor(path, stamp).number, size, offset)
    if len(data) != size:
        raise M3Error(f"{address}: the tar ends within a member at byte {offset + len(data)}; copy or pack it again.")
    return data


class _Descriptor:
    """An open file that closes itself once nobody reads from it. `pread` moves no position, so forks may share it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=OPEN_FILES)
def _descriptor(path: str, stamp: str) -> _Descriptor:
    descriptor = _Descriptor(os.open(path, os.O_RDONLY))
    if str(os.fstat(descriptor.number).st_mtime_ns) != stamp:
        raise M3Error(f"{path}: the tar was written again while it was in use; start anew.")
    return descriptor


def _scan(address: str, size: int, stamp: str) -> Index:
    """Read the headers of a tar."""
    names, offsets, sizes = [], [], []
    end, cause = 0, ""
    with _open(address) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not (member.isreg() or member.isdir()) or member.issparse():
                        raise M3Error(f"{address}: `{member.name}` is a link or sparse; pack plain files.")
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if member.isreg():
                        names.append(member.name)
                        offsets.append(member.offset_data)
                        sizes.append(member.size)
        except tarfile.ReadError as error:
            cause = f" ({error})"
        # Where a header is cut off, tarfile takes it for the end of the archive.
        is_complete = not cause and file.seek(end) == end and file.read(BLOCK) == bytes(BLOCK)
    if not is_complete:
        place = f"after `{names[-1]}`" if names else "at its start"
        raise M3Error(f"{address}: not a complete tar file, it breaks off {place}{cause}; copy or pack it again.")
    return Index(size, stamp, names, offsets, sizes)


# Files on this machine are read directly, everything else through fsspec. Its file systems are looked up at each
# use: the look-up is cached per process, and one that was made before a fork must not be used after it.


def _local(address: str) -> str | None:
    address = address.removeprefix("file://")
    return None if "://" in address else address


def _store(address: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise M3Error(f"{address}: this kind of address can't be read: {error}.") from error


def _names(root: str) -> list[str]:
    """Return the names in a folder."""
    store, inner = _store(root)
    try:
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in store.ls(inner, detail=False))
    except NotADirectoryError:
        return []
    except FileNotFoundError as error:
        raise M3Error(f"data.root: the folder {root} does not exist; check the path.") from error


def _state(address: str) -> tuple[int, str]:
    """Return size in bytes and stamp."""
    path = _local(address)
    if path is not None:
        state = os.stat(path)
        return state.st_size, str(state.st_mtime_ns)
    store, inner = _store(address)
    return int(store.info(inner)["size"]), str(store.ukey(inner))


def _open(address: str) -> Any:
    path = _local(address)
    if path is not None:
        return Path(path).open("rb")
    store, inner = _store(address)
    return store.open(inner, "rb")


def _read(address: str) -> bytes:
    with _open(address) as file:
        return file.read()


def _write(address: str, data: bytes) -> None:
    path = _local(address)
    if path is None:
        store, inner = _store(address)
        store.pipe_file(inner, data)
        return
    write_aside(Path(path), data)


def write_aside(path: Path, data: bytes) -> None:
    """Write a file that is never seen half-written, also when several processes write it."""
    number, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
