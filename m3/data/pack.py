"""Packing: any source as tar shards that the source `shards` reads."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from m3.data.files import Stored
from m3.data.shards import LABELS, index_of, join_name, split_name
from m3.data.source import Source, StoredSample, refuse_stream
from m3.errors import M3Error
from m3.plugins import Modality

Layout = Literal["one", "modality"]


class Packed(NamedTuple):
    """What `pack` did in this process.

    Attributes:
        written: shards.
        kept: shards that were there already.
    """

    written: int
    kept: int


def pack(
    source: Source,
    modalities: dict[str, Modality],
    out: Path,
    per_shard: int = 1000,
    layout: Layout = "one",
    rank: int = 0,
    world: int = 1,
    track: Callable[[list[int]], Iterable[int]] = iter,
) -> Packed:
    """Write the samples of a source, in order, as out/<shard>.tar or out/<modality>/<shard>.tar.

    Files are copied byte for byte; signals without a file are stored without loss. A shard has its name only once
    it is complete and on the disk, so a run that was cut goes on where it was, and several processes may pack
    into one folder.

    Args:
        source: where the samples come from.
        modalities: those that are packed.
        out: a folder of its own.
        per_shard: samples in a tar.
        layout: `one` tar for all modalities, or one per `modality`.
        rank: of this process; it writes every `world`-th shard.
        world: number of processes.
        track: wraps the list of shards to show progress.

    Raises:
        M3Error: a sample can't be read or stored, or `out` holds tars of another pack; names it.
    """
    refuse_stream(source, "m3 data pack")
    folders = [""] if layout == "one" else list(modalities)
    count = -(-len(source) // per_shard)
    _refuse_others(out, {f"{number:06d}.tar" for number in range(count)}, folders)
    written = kept = 0
    for number in track(list(range(rank, count, world))):
        samples = range(number * per_shard, min((number + 1) * per_shard, len(source)))
        files = [out / folder / f"{number:06d}.tar" for folder in folders]
        if all(file.is_file() for file in files):
            _verify(source, samples, files)
            kept += 1
            continue
        _write_shard((_checked(source.stored(i), modalities) for i in samples), out, f"{number:06d}.tar", folders)
        written += 1
    return Packed(written, kept)


def _write_shard(samples: Iterable[StoredSample], out: Path, name: str, folders: list[str]) -> None:
    """Write the tars of one shard aside and name them when all are complete."""
    tars: dict[str, Writer] = {folder: Writer(out / folder / name) for folder in folders}
    ids: set[str] = set()
    try:
        for sample in samples:
            if sample.id in ids:
                raise M3Error(f"{sample.id}: this sample comes twice; pack the parts of a mixture one by one.")
            ids.add(sample.id)
            labels = {LABELS: Stored(".json", json.dumps(sample.labels).encode())} if sample.labels else {}
            for part, stored in (sample.files | labels).items():
                folder = "" if "" in tars else part
                if folder not in tars:
                    tars[folder] = Writer(out / folder / name)
                tars[folder].add(join_name(sample.id, stored.ending[1:] if folder else part + stored.ending), stored)
        # Labels come first: a shard counts as packed once all its modalities have their names.
        for folder in sorted(tars, key=lambda folder: folder != LABELS):
            tars[folder].finish()
    finally:
        for tar in tars.values():
            tar.discard()


class Writer:
    """A tar that appears under its name only when it is finished. Equal samples give equal bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        number, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        self.aside = Path(aside)
        self.file = os.fdopen(number, "wb")
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  closed below

    def add(self, name: str, stored: Stored) -> None:
        """Append a file."""
        member = tarfile.TarInfo(name)
        member.size = len(stored.data)
        self.tar.addfile(member, io.BytesIO(stored.data))

    def finish(self) -> None:
        """Bring everything to the disk, then give the tar its name and its index."""
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.aside.chmod(0o644)
        self.aside.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        index_of(str(self.path))

    def discard(self) -> None:
        """Remove what was not finished."""
        self.file.close()
        self.aside.unlink(missing_ok=True)


def _checked(sample: StoredSample, modalities: dict[str, Modality]) -> StoredSample:
    """Refuse what could not be read again."""
    for name, stored in sample.files.items():
        if stored.ending not in modalities[name].extensions:
            endings = ", ".join(modalities[name].extensions) or "no files"
            raise M3Error(
                f"{sample.id}: `{name}` would be stored as {stored.ending}, but it reads {endings}; "
                f"add the ending to the modality's `extensions`."
            )
    return sample


def _verify(source: Source, samples: range, files: list[Path]) -> None:
    """Raise unless the tars of a shard hold as many samples, with the first and the last of them."""
    found: set[str] = set()
    for file in files:
        found |= {split_name(name)[0] for name in index_of(str(file)).names}
    ends = {source.stored(i).id for i in (samples[0], samples[-1])}
    if len(found) != len(samples) or not ends <= found:
        raise M3Error(
            f"{files[0]} holds {len(found)} samples that are not the {len(samples)} of this shard; it was packed from "
            f"other data or with another --per-shard: remove it or pack into another folder."
        )


def _refuse_others(out: Path, expected: set[str], folders: list[str]) -> None:
    """Raise where tars lie that this pack won't write: they would be read with it."""
    for path in [*out.glob("*.tar"), *out.glob("*/*.tar")]:
        folder = path.parent.relative_to(out).as_posix().strip(".")
        if path.name not in expected or (folder not in folders and folder != LABELS):
            raise M3Error(f"{path} is not part of this pack; remove it or pack into another folder.")
