"""Checking shards: what is in them, what can't be read, what does not fit together. Needs no recipe."""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table

from m3.data.shards import LABELS, index_of, list_shards, read_member, split_name
from m3.errors import M3Error

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
TEXTS = ("txt", "text", "caption")


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes:
        root: folder or address.
        shards: number of shards.
        samples: number of different keys, shard by shard.
        coverage: modality, or ending of members without one -> samples that have it.
        unreadable: a sentence for each tar or member that can't be read.
        misaligned: a sentence for each shard that repeats a member, or whose tars don't hold the same keys (which
            is no fault where samples may lack modalities).
    """

    root: str
    shards: int
    samples: int
    coverage: dict[str, int]
    unreadable: tuple[str, ...]
    misaligned: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """True where everything can be read and fits together."""
        return not self.unreadable and not self.misaligned


def check(root: str) -> Report:
    """Read every member of every shard below `root`.

    Pictures, .npy, .json and .txt are decoded; of other members it is checked that they have all their bytes.

    Raises:
        M3Error: there are no shards.
    """
    shards = list_shards(root)
    coverage: dict[str, int] = {}
    unreadable: list[str] = []
    misaligned: list[str] = []
    samples = 0
    folders = sorted({folder for tars in shards.values() for folder in tars if folder})
    for shard, tars in shards.items():
        parts: dict[str, list[str]] = {folder: [] for folder in folders}
        for folder, address in tars.items():
            try:
                _check_tar(address, folder, parts, unreadable)
            except M3Error as error:
                unreadable.append(str(error))
        keys = set().union(*parts.values())
        samples += len(keys)
        for part, own in parts.items():
            coverage[part] = coverage.get(part, 0) + len(set(own))
        misaligned += _misaligned(f"{root}/{shard}", parts, keys, tars)
    return Report(root, len(shards), samples, dict(sorted(coverage.items())), tuple(unreadable), tuple(misaligned))


def print_report(report: Report, console: Console, shown: int = 20) -> None:
    """Print a table and the first `shown` faults of each kind."""
    console.print(f"{report.root}: {report.shards} shards, {report.samples} samples", highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("modality")
    table.add_column("samples", justify="right")
    table.add_column("coverage", justify="right")
    for name, count in report.coverage.items():
        table.add_row(name, str(count), f"{count / max(1, report.samples):.1%}")
    console.print(table)
    for title, faults in (("unreadable", report.unreadable), ("misaligned", report.misaligned)):
        for fault in faults[:shown]:
            console.print(f"[red]{title}[/] {fault}", highlight=False, soft_wrap=True)
        if len(faults) > shown:
            console.print(f"[red]{title}[/] and {len(faults) - shown} more")
    if report.is_sound:
        console.print("all members can be read and fit together")


def _check_tar(address: str, folder: str, parts: dict[str, list[str]], unreadable: list[str]) -> None:
    """Decode the members of a tar and note modality -> keys in `parts`."""
    index = index_of(address)
    for name, offset, size in zip(index.names, index.offsets, index.sizes, strict=True):
        key, rest = split_name(name)
        head, dot, _ = rest.partition(".")
        parts.setdefault(folder or (head if dot else f".{rest}"), []).append(key)
        try:
            _decode(read_member(address, index.stamp, offset, size), rest.rpartition(".")[2].lower())
        except Exception as error:  # whatever a broken file raises; it is named in the report
            unreadable.append(f"{address}: `{name}` can't be read: {' '.join(str(error).split())}")


def _decode(data: bytes, ending: str) -> None:
    if not data:
        raise ValueError("the file is empty")
    if ending in PICTURES:
        with warnings.catch_warnings(), PILImage.open(io.BytesIO(data)) as image:
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            image.load()
    elif ending == "npy":
        np.load(io.BytesIO(data), allow_pickle=False)
    elif ending == "json":
        json.loads(data)
    elif ending in TEXTS:
        data.decode()


def _misaligned(shard: str, parts: dict[str, list[str]], keys: set[str], tars: dict[str, str]) -> list[str]:
    """Describe repeated keys and, with one tar per modality, keys that some of them lack."""
    found = []
    for part, own in parts.items():
        repeated = sorted(key for key, count in Counter(own).items() if count > 1)
        if repeated:
            found.append(f"{shard}: `{repeated[0]}` is there more than once in `{part}` ({len(repeated)} such)")
        lacking = sorted(keys - set(own))
        if lacking and "" not in tars and part != LABELS:
            found.append(f"{shard}: `{part}` has no `{lacking[0]}` ({len(lacking)} such)")
    return found
