"""`m3 tokenize`: a data source as tar shards of code numbers, which the source `shards` reads.

OUT/<train|val>/<modality>/000000.tar holds KEY.npy for each sample: unsigned integers on the grid of the codes, which
the modality `codes` reads. Several tokenizers may write into one OUT, each its own modality. Shards are shared out
among the processes of `accelerate launch`, which need not talk to each other.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm

from m3.data.loader import Loaded, collate
from m3.data.shards import join_name, write_aside
from m3.data.source import Source, Split, open_source, refuse_stream
from m3.errors import M3Error, nearest
from m3.network import build_modalities
from m3.plugins import Crop, Modality
from m3.recipe import Recipe
from m3.tokenizer_model import M3Tokenizer, fingerprint

FOLDERS: tuple[tuple[Split, str], ...] = (("train", "train"), ("held_out", "val"))
BATCH = 64

WHAT_DATA = {"source", "root", "options", "missing", "samples", "held_out"}
"""Settings of `data` that say which samples there are, and not how they are trained on."""

Files = Iterator[tuple[str, str, bytes]]
"""Key, ending with its dot, and content of each member of a shard."""


def tokenize(path: str, recipe: Recipe, out: Path, per_shard: int, copied: Sequence[str] = ()) -> None:
    """Write the codes of both splits of a recipe's data; shards that are there already are kept.

    Every sample is taken once, whole, without random crop or flip. Several tokenizers, one after the other, may
    write into one folder, each its own modality.

    Args:
        path: folder of the tokenizer.
        recipe: its `data` and `seed` are used; signals are read with the tokenizer's own modality.
        out: folder for the shards.
        per_shard: samples in a shard.
        copied: modalities of the recipe that are stored beside the codes as they are, such as captions.

    Raises:
        M3Error: `out` holds codes of another tokenizer or of other data, or too many samples can't be read.
    """
    # `accelerate launch` sets these. Every process takes its own shards, so there is nothing to exchange.
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = M3Tokenizer.from_pretrained(path)
    if torch.cuda.is_available():
        tokenizer.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    modalities = {tokenizer.name: tokenizer.modality, **_chosen(recipe, copied)}
    refuse_stream(open_source(recipe.data, modalities, recipe.seed, "train"), "tokenizing data")
    data = recipe.data.model_dump(mode="json", include=WHAT_DATA)
    _claim(out / "tokens.json", {"per_shard": per_shard, "seed": recipe.seed, "data": data})
    facts = {"tokenizer": fingerprint(path), "codes": tokenizer.codes, "grid": list(tokenizer.grid)}
    _claim(out / f"tokens.{tokenizer.name}.json", facts)
    written, skipped = 0, []
    for split, folder in FOLDERS:
        source = open_source(recipe.data, modalities, recipe.seed, split)
        shards = range(rank, -(-len(source) // per_shard), world)
        missing = {name: _missing(out / folder / name, shards) for name in modalities}
        for number in tqdm(sorted(set().union(*missing.values())), desc=f"{folder}, process {rank}", disable=None):
            samples = range(number * per_shard, min((number + 1) * per_shard, len(source)))
            for name in (name for name in modalities if number in missing[name]):
                is_coded = name == tokenizer.name
                files = _encoded(tokenizer, source, samples, skipped) if is_coded else _copied(name, source, samples)
                _write(out / folder / name / f"{number:06d}.tar", files)
                written += is_coded * len(samples)
            if len(skipped) > 10 + recipe.data.max_unreadable * written:
                raise M3Error(
                    f"{len(skipped)} of {written} samples can't be read, more than data.max_unreadable allows; "
                    f"the first: {skipped[0]}."
                )
    Console().print(f"process {rank} of {world}: {written - len(skipped)} samples tokenized into {out}")
    if skipped:
        Console().print(f"[yellow]{len(skipped)} unreadable samples were left out[/]: {skipped[0]}")


def _chosen(recipe: Recipe, names: Sequence[str]) -> dict[str, Modality]:
    for name in names:
        if name not in recipe.modalities:
            raise M3Error(
                f"--copy names `{name}`, which is no modality of the recipe.{nearest(name, recipe.modalities)}"
            )
    return build_modalities({name: recipe.modalities[name] for name in names})


def _missing(folder: Path, shards: range) -> set[int]:
    folder.mkdir(parents=True, exist_ok=True)
    return {number for number in shards if not (folder / f"{number:06d}.tar").is_file()}


def _copied(name: str, source: Source, samples: range) -> Files:
    """Yield the stored form of one modality of samples; those that lack it are left out."""
    for number in samples:
        sample = source.stored(number)
        if name in sample.files:
            yield sample.id, sample.files[name].ending, sample.files[name].data


def _encoded(tokenizer: M3Tokenizer, source: Source, samples: range, skipped: list[str]) -> Files:
    """Yield the code numbers of samples as .npy; those that can't be read are named in `skipped`."""
    kind = np.uint16 if tokenizer.codes <= 2**16 else np.uint32
    # Recordings of different lengths have different grids: each is encoded by itself.
    together = BATCH if tokenizer.modality.padding is None else 1
    for start in range(samples.start, samples.stop, together):
        loaded = []
        for number in range(start, min(start + together, samples.stop)):
            try:
                loaded.append(_load(tokenizer, source, number))
            except Exception as error:  # whatever a broken file raises; it is counted, named and limited
                skipped.append(f"{source.name(number)}: {str(error).rstrip('.')}")
        if loaded:
            codes = tokenizer.encode(collate(loaded, {tokenizer.name: tokenizer.modality}))
            for sample, own in zip(loaded, codes.cpu().numpy().astype(kind), strict=True):
                stored = io.BytesIO()
                np.save(stored, own.reshape(-1, *tokenizer.grid[1:]))
                yield sample.id, ".npy", stored.getvalue()


def _load(tokenizer: M3Tokenizer, source: Source, number: int) -> Loaded:
    """Read one sample and fit it: its middle, uncropped."""
    sample, modality = source.read(number), tokenizer.modality
    if tokenizer.name not in sample.signals:
        raise M3Error(f"{sample.id} has no `{tokenizer.name}`.")
    raw = modality.to_raw(modality.cut(sample.signals[tokenizer.name], 0.5))
    return Loaded({tokenizer.name: modality.fit(raw, Crop())}, number, sample.id)


def _write(path: Path, files: Files) -> None:
    """Write a tar aside and name it once it is complete and on the disk; equal samples give equal bytes."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for key, suffix, data in files:
                member = tarfile.TarInfo(join_name(key, suffix[1:]))
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    handle = os.open(path.parent, os.O_RDONLY)  # the new name must reach the disk too
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _claim(note: Path, facts: dict[str, Any]) -> None:
    """Note what the folder holds, or raise if it holds something else."""
    if note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        differing = [key for key in facts if found.get(key) != facts[key]]
        if differing:
            key = differing[0]
            raise M3Error(
                f"{note.parent} holds codes made with another `{key}` ({found.get(key)} there, {facts[key]} here); "
                f"choose another folder."
            )
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    write_aside(note, json.dumps(facts, indent=2).encode())  # all processes write the same
