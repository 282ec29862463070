"""Tar shards, read at any place: every sample by its number, so order, epochs and resuming are as with files.

Letters: n samples.
"""

from __future__ import annotations

import json
from functools import partial
from typing import NamedTuple

import numpy as np

from m3.data.files import Stored
from m3.data.remote import Patience, Remote
from m3.data.shards import LABELS, Index, index_of, list_shards, read_member, split_name, split_roots
from m3.data.source import Sample, Source, Split, StoredSample, decode, limited, numbers_of_split
from m3.errors import M3Error, read_settings
from m3.plugins import Modality
from m3.recipe import DataSpec

# Where a member lies: number of the tar, first byte, bytes (-1: the sample lacks it), number of the file ending.
PLACE = np.dtype([("tar", np.int32), ("offset", np.int64), ("size", np.int64), ("ending", np.uint8)])
NOWHERE = (0, 0, -1, 0)
Rows = dict[str, dict[str, tuple[int, int, int, int]]]
"""Of one shard: key -> modality -> place."""


class Tar(NamedTuple):
    """A tar and the mark of the state in which it was indexed."""

    address: str
    stamp: str


class Shards(Source):
    """Samples in root/<shard>.tar, or each modality in root/<modality>/<shard>.tar with equal keys.

    In one tar a member is called KEY.<modality>.<ext>, or KEY.<ext> where only one modality reads that ending;
    KEY.labels.json holds labels. `root/train` and `root/val` are the two splits when both exist. The root may be
    any address fsspec reads (s3://..., gs://..., memory://...). `data.options` says how patiently, see `Patience`.
    """

    def __init__(self, spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> None:
        super().__init__(spec, modalities, seed, split)
        if spec.root is None:
            raise M3Error("data.root: this key is required for source `shards`; name the folder of the tars.")
        root = spec.root.rstrip("/")
        self.remote = Remote(read_settings(Patience, spec.options, "data.options"))
        roots = self.remote.read(root, lambda: split_roots(root))
        table = Table(roots.get(split, root), modalities, spec.missing == "allow", self.remote)
        everything = list(range(len(table.ids)))
        numbers = limited(everything, spec, split) if roots else numbers_of_split(table.ids, spec, split)
        self.tars, self.endings = table.tars, list(table.endings)
        # Compact arrays: lists of strings and tuples would take ten times the memory, in every worker.
        self.ids = np.array([table.ids[i] for i in numbers], np.dtypes.StringDType())
        places = {name: np.concatenate(parts)[numbers] for name, parts in table.places.items()}
        self.places = {name: x for name, x in places.items() if name in modalities or (x["size"] >= 0).any()}

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Sample:
        """Load the members of one sample."""
        try:
            return decode(self.stored(index), self.modalities)
        except M3Error as error:
            address = self.origin(index)
            if str(error).startswith(address):
                raise
            raise M3Error(f"{address}: {error}") from error

    def stored(self, index: int) -> StoredSample:
        """Return the members of one sample byte for byte."""
        files = {}
        for name, places in self.places.items():
            number, offset, size, ending = places[index].item()
            if size >= 0:
                tar = self.tars[number]
                place = (tar.address, tar.stamp, offset, size)
                data = self.remote.read(tar.address, partial(read_member, *place))
                files[name] = Stored(self.endings[ending], data)
        labels = json.loads(files.pop(LABELS).data) if LABELS in files else {}
        return StoredSample(files, self.name(index), labels)

    def name(self, index: int) -> str:
        """Return the sample's key."""
        return str(self.ids[index])

    def origin(self, index: int) -> str:
        """Return the address of the first tar that holds members of the sample."""
        tar = next(self.tars[p[index]["tar"]] for p in self.places.values() if p[index]["size"] >= 0)
        return tar.address

    def coverage(self) -> dict[str, float]:
        """Count members; none is read."""
        return {name: float((self.places[name]["size"] >= 0).mean()) if len(self) else 0.0 for name in self.modalities}

    def lengths(self, name: str) -> list[int]:
        """Return the sizes of members; none is read."""
        return self.places[name]["size"].clip(min=0).tolist()


class Table:
    """What all shards of a root hold, in the order of the tars.

    Attributes:
        ids: keys of the n samples.
        tars: those that are read.
        endings: of the members -> their number in `PLACE`.
        places: modality (and `labels`) -> a `PLACE` array per shard, together (n,).

    Raises:
        M3Error: a tar is not complete, a sample lacks a modality (unless that `is_missing_allowed`), has two
            members for one, or a member may belong to several; names the shard and the key.
    """

    def __init__(self, root: str, modalities: dict[str, Modality], is_missing_allowed: bool, remote: Remote) -> None:
        if LABELS in modalities:
            raise M3Error(f"modalities.{LABELS}: shards hold the labels of samples under this name; choose another.")
        self.readers = {name: part.extensions for name, part in modalities.items()} | {LABELS: (".json",)}
        self.ids: list[str] = []
        self.tars: list[Tar] = []
        self.endings: dict[str, int] = {}
        self.places: dict[str, list[np.ndarray]] = {name: [] for name in self.readers}
        for shard, tars in remote.read(root, lambda: list_shards(root)).items():
            rows: Rows = {}
            read = {f: a for f, a in tars.items() if not f or f in self.readers}
            known = {f: (a, remote.read(a, partial(index_of, a))) for f, a in read.items()}
            # The tar with the most members first: where it holds every sample, theirs is the packed order.
            for folder in sorted(known, key=lambda folder: -len(known[folder][1].names)):
                self._add(rows, folder, *known[folder])
            rows = {key: row for key, row in rows.items() if row.keys() != {LABELS}}
            if not is_missing_allowed:
                self._check(rows, tars, f"{root}/{shard}")
            self.ids += rows
            for name, parts in self.places.items():
                parts.append(np.array([row.get(name, NOWHERE) for row in rows.values()], PLACE))
        for name in modalities:
            if not any((part["size"] >= 0).any() for part in self.places[name]):
                endings = ", ".join(self.readers[name])
                raise M3Error(f"{root}: no shard holds a member that `{name}` can read ({endings}); check data.root.")

    def _add(self, rows: Rows, folder: str, address: str, index: Index) -> None:
        """Enter the members of one tar."""
        number = len(self.tars)
        self.tars.append(Tar(address, index.stamp))
        owners: dict[str, tuple[str, str] | None] = {}
        for name, offset, size in zip(index.names, index.offsets, index.sizes, strict=True):
            key, rest = split_name(name)
            if rest not in owners:
                owners[rest] = self._owner(folder, rest, f"{address}: `{name}`")
            owner = owners[rest]
            if owner is None:
                continue
            part, ending = owner
            row = rows.setdefault(key, {})
            if part in row:
                raise M3Error(f"{address}: `{key}` has two members for `{part}`, one is `{name}`; remove one.")
            row[part] = (number, offset, size, self.endings.setdefault(ending, len(self.endings)))

    def _owner(self, folder: str, rest: str, where: str) -> tuple[str, str] | None:
        """Return the modality that a member belongs to and its ending; None where the recipe reads no such."""
        head, dot, tail = rest.lower().partition(".")
        ending = f".{rest.lower()}"
        if folder:
            owners = [folder] if ending in self.readers[folder] else []
        elif dot and head in self.readers:
            ending = f".{tail}"
            owners = [head] if ending in self.readers[head] else []
        else:
            owners = [name for name, endings in self.readers.items() if ending in endings and name != LABELS]
        if len(owners) > 1:
            raise M3Error(
                f"{where} may belong to {' or '.join(owners)}, which all read {ending}; "
                f"name such members KEY.{owners[0]}{ending}."
            )
        return (owners[0], ending) if owners else None

    def _check(self, rows: Rows, tars: dict[str, str], shard: str) -> None:
        for name in [name for name in self.readers if name != LABELS]:
            lacking = [key for key, row in rows.items() if name not in row]
            if lacking:
                address = tars.get("") or tars.get(name) or f"{shard}.tar"
                raise M3Error(
                    f"{address}: `{lacking[0]}` has no `{name}` ({', '.join(self.readers[name])}; {len(lacking)} such "
                    f"in this shard); pack it again with all modalities or set data.missing=allow."
                )
