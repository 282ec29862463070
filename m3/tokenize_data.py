"""`m3 tokenize`: a data source as tar shards of code numbers, which the source `shards` reads.

OUT/<train|val>/<modality>/000000.tar holds KEY.npy for each sample: unsigned integers on the grid of the codes.
Shards are shared out among the processes of `accelerate launch`, which need not talk to each other.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm

from m3.data.loader import Loaded, collate
from m3.data.source import Source, Split, refuse_stream
from m3.errors import M3Error
from m3.parts import find
from m3.plugins import Crop
from m3.recipe import Recipe
from m3.tokenizer_model import M3Tokenizer, fingerprint

FOLDERS: tuple[tuple[Split, str], ...] = (("train", "train"), ("held_out", "val"))
BATCH = 64


def tokenize(path: str, recipe: Recipe, out: Path, per_shard: int) -> None:
    """Write the codes of both splits of a recipe's data; shards that are there already are kept.

    Every sample is taken once, whole, without random crop or flip.

    Args:
        path: folder of the tokenizer.
        recipe: its `data` and `seed` are used; signals are read with the tokenizer's own modality.
        out: folder for the shards.
        per_shard: samples in a shard.

    Raises:
        M3Error: `out` holds codes of another tokenizer or of other data, or too many samples can't be read.
    """
    # `accelerate launch` sets these. Every process takes its own shards, so there is nothing to exchange.
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = M3Tokenizer.from_pretrained(path)
    if torch.cuda.is_available():
        tokenizer.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    modalities = {tokenizer.name: tokenizer.modality}
    build = find("sources", recipe.data.source)
    sources = {name: build(recipe.data, modalities, recipe.seed, split) for split, name in FOLDERS}
    refuse_stream(sources["train"], "tokenizing data")
    facts = {"tokenizer": fingerprint(path), "codes": tokenizer.codes, "grid": list(tokenizer.grid)}
    facts |= {"per_shard": per_shard, "seed": recipe.seed, "data": recipe.data.model_dump(mode="json")}
    _claim(out, json.loads(json.dumps(facts)), rank)
    written, skipped = 0, []
    for name, source in sources.items():
        folder = out / name / tokenizer.name
        folder.mkdir(parents=True, exist_ok=True)
        shards = range(rank, -(-len(source) // per_shard), world)
        missing = [number for number in shards if not (folder / f"{number:06d}.tar").is_file()]
        for number in tqdm(missing, desc=f"{name}, process {rank}", unit="shard", disable=None):
            samples = range(number * per_shard, min((number + 1) * per_shard, len(source)))
            _write(folder / f"{number:06d}.tar", _encoded(tokenizer, source, samples, skipped))
            written += len(samples)
            if len(skipped) > 10 + recipe.data.max_unreadable * written:
                raise M3Error(
                    f"{len(skipped)} of {written} samples can't be read, more than data.max_unreadable allows; "
                    f"the first: {skipped[0]}."
                )
    Console().print(f"process {rank} of {world}: {written - len(skipped)} samples tokenized into {out}")
    if skipped:
        Console().print(f"[yellow]{len(skipped)} unreadable samples were left out[/]: {skipped[0]}")


def _encoded(
    tokenizer: M3Tokenizer, source: Source, samples: range, skipped: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield key and code numbers of samples; those that can't be read are named in `skipped`."""
    kind = np.uint16 if tokenizer.codes <= 2**16 else np.uint32
    for start in range(samples.start, samples.stop, BATCH):
        loaded = []
        for number in range(start, min(start + BATCH, samples.stop)):
            try:
                loaded.append(_load(tokenizer, source, number))
            except Exception as error:  # whatever a broken file raises; it is counted, named and limited
                skipped.append(f"{source.name(number)}: {str(error).rstrip('.')}")
        if loaded:
            codes = tokenizer.encode(collate(loaded, {tokenizer.name: tokenizer.modality}))
            for sample, own in zip(loaded, codes.cpu().numpy().astype(kind), strict=True):
                yield sample.id, own.reshape(tokenizer.grid)


def _load(tokenizer: M3Tokenizer, source: Source, number: int) -> Loaded:
    """Read one sample and fit it: its middle, uncropped."""
    sample, modality = source.read(number), tokenizer.modality
    if tokenizer.name not in sample.signals:
        raise M3Error(f"{sample.id} has no `{tokenizer.name}`.")
    raw = modality.to_raw(modality.cut(sample.signals[tokenizer.name], 0.5))
    return Loaded({tokenizer.name: modality.fit(raw, Crop())}, number, sample.id)


def _write(path: Path, samples: Iterator[tuple[str, np.ndarray]]) -> None:
    """Write a tar aside and name it once it is complete and on the disk; equal samples give equal bytes."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for key, codes in samples:
                stored = io.BytesIO()
                np.save(stored, codes)
                # The key of a member ends at its first dot, so dots of the key are written as %2E.
                folder, slash, base = key.replace("%", "%25").rpartition("/")
                member = tarfile.TarInfo(f"{folder}{slash}{base.replace('.', '%2E')}.npy")
                member.size = stored.tell()
                stored.seek(0)
                tar.addfile(member, stored)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    _flush(path.parent)


def _claim(out: Path, facts: dict[str, Any], rank: int) -> None:
    """Note what the folder holds, or raise if it holds something else."""
    note = out / "tokens.json"
    if note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        differing = [key for key in facts if found.get(key) != facts[key]]
        if differing:
            key = differing[0]
            raise M3Error(
                f"{out} holds codes made with another `{key}` ({found.get(key)} there, {facts[key]} here); "
                f"choose another folder."
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    aside = note.with_name(f".{note.name}.{rank}.part")
    aside.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    os.replace(aside, note)  # all processes write the same
    _flush(out)


def _flush(folder: Path) -> None:
    """Force a rename to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
