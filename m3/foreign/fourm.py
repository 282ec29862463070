"""What 4M's modalities are in ours: pixels, maps of codes, and sequences of words of one vocabulary.

A sequence is known by its 512 fixed positions, whatever it says: captions, boxes, metadata and palettes are all
sentences of the same 30000 entries, among which the sentinels stand. So each is a `text` with `first_sentinel`.
Letters: D width, n places, K codes or entries, C channels.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from m3.data.words import describe, open_vocabulary
from m3.errors import M3Error, nearest
from m3.foreign import vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import get
from m3.positions import sincos

PLACES = 512
"""Positions of every sequence, however long it may be."""

LENGTHS = {"metadata": 40, "human_poses": 275, "color_palette": 23, "sam_instance": 290}
"""Most tokens of a sequence, where they are not 256."""

FIRST, COUNT, END = 5, 199, 3
"""4M's first sentinel ([S_1]; [S_0] is never used), how many there are, and the entry behind every sequence."""


def names_of(foreign: Foreign, part: str) -> list[str]:
    """Return the modalities of one side, `encoder` or `decoder`."""
    beginning = f"{part}_embeddings."
    return list(dict.fromkeys(name.split(".")[1] for name in foreign.shapes if name.startswith(beginning)))


def obstacles(foreign: Foreign) -> dict[str, str]:
    """Return the modalities that ours can't hold, each with the reason."""
    inputs = names_of(foreign, "encoder")
    found = {}
    for name in dict.fromkeys([*inputs, *names_of(foreign, "decoder")]):
        why = (
            _obstacle(foreign, name) if name in inputs else "it is predicted and not read; ours reads what it predicts"
        )
        if why:
            found[name] = why
    return found


def _obstacle(foreign: Foreign, name: str) -> str:
    """Say why ours has no such modality; empty where it has."""
    shapes, theirs = foreign.shapes, f"encoder_embeddings.{name}"
    places = shapes.get(f"{theirs}.pos_emb", (0, 0, 0))[1]
    if any(own.startswith(f"{theirs}.emb_proj.") for own in shapes):
        return "a sequence of embeddings instead of words, for which there is no modality"
    if f"{theirs}.token_emb.weight" in shapes:
        is_odd = places == PLACES and not is_sequence(foreign, name)
        return "a sequence with learned positions, which ours counts in another way" if is_odd else ""
    if f"{theirs}.proj.weight" not in shapes:
        return "nothing embeds its tokens that ours knows"
    is_square = _is_fixed(foreign.tensors[f"{theirs}.pos_emb"]) and _patch(foreign, name)
    return "" if is_square else "it is not of square patches with fixed positions"


def chosen(foreign: Foreign, wanted: list[str] | None) -> list[str]:
    """Return the modalities that are taken: all, or those of `modalities=a,b`, where `@224` may be left out.

    Raises:
        M3Error: there is none of a name, or one that is taken does not fit.
    """
    every = list(dict.fromkeys([*names_of(foreign, "encoder"), *names_of(foreign, "decoder")]))
    bad = obstacles(foreign)
    if wanted is None:
        if bad:
            name, why = next(iter(bad.items()))
            fit = ",".join(other for other in every if other not in bad)
            raise M3Error(f"`{name}` does not fit: {why}. Leave it out with modalities={fit}")
        return every
    for name in wanted:
        if name not in every and not any(_base(own) == name for own in every):
            raise M3Error(f"modalities names `{name}`, which it has not.{_near(name, every)}")
    taken = [own for own in every if own in wanted or _base(own) in wanted]
    for name in taken:
        if name in bad:
            raise M3Error(f"`{name}` does not fit: {bad[name]}. Leave it out of `modalities`.")
    return taken


def _base(name: str) -> str:
    return name.partition("@")[0]


def _near(name: str, every: list[str]) -> str:
    return nearest(name, [*every, *(_base(own) for own in every)])


def modality_of(foreign: Foreign, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return our settings of one of its inputs."""
    theirs = f"encoder_embeddings.{name}"
    if is_sequence(foreign, name):
        return _sequence(name, foreign.shapes[f"{theirs}.token_emb.weight"][0], given)
    table = foreign.tensors[f"{theirs}.pos_emb"]
    side = isqrt(table.shape[1])
    if f"{theirs}.token_emb.weight" in foreign.shapes:
        is_fixed = _is_fixed(table)
        learned = {} if is_fixed else {"positions": {"type": "learned"}}
        size, classes = (
            (side, side) if is_fixed else (table.shape[1], 1),
            foreign.shapes[f"{theirs}.token_emb.weight"][0],
        )
        codes = {"type": "semantic_map", "size": size, "classes": classes, "tokenizer": {"type": "embedding"}}
        return codes | learned
    patch = _patch(foreign, name)
    channels = foreign.shapes[f"{theirs}.proj.weight"][1] // patch**2
    return {"type": "image", "size": side * patch, "channels": channels, "tokenizer": {"type": "patch", "size": patch}}


def _sequence(name: str, entries: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return a `text` of the vocabulary that was given, or one whose words are the entries' numbers.

    Raises:
        M3Error: the vocabulary is another one.
    """
    path = get(given, f"modalities.{name}.vocabulary")
    settings: dict[str, Any] = {"type": "text", "length": LENGTHS.get(_base(name), 256)}
    settings["tokenizer"] = {"type": "embedding"}
    if path is None:
        words = "words:" + " ".join(map(str, range(1, entries)))
        sentinels = {"sentinels": min(COUNT, entries - FIRST), "first_sentinel": FIRST}
        return settings | {"vocabulary": words, "end": str(END)} | sentinels
    description = describe(path)
    vocabulary = open_vocabulary(description)
    numbers = [vocabulary.number(f"[S_{i}]") for i in range(1, entries)]
    first = numbers[0]
    if vocabulary.size != entries or first is None or vocabulary.number("[EOS]") is None:
        raise M3Error(
            f"modalities.{name}.vocabulary is not 4M's: there must be {entries} entries, among them [S_1] and [EOS]; "
            f"give the file of its text tokenizer."
        )
    count = next((i for i, number in enumerate(numbers) if number != first + i), len(numbers))
    sentinels = {"sentinels": count, "first_sentinel": first}
    return settings | {"vocabulary": description, "end": "[EOS]"} | sentinels


def is_sequence(foreign: Foreign, name: str) -> bool:
    """True for words with fixed positions in one row."""
    theirs = f"encoder_embeddings.{name}"
    if f"{theirs}.token_emb.weight" not in foreign.shapes:
        return False
    table = foreign.tensors[f"{theirs}.pos_emb"]
    # Theirs is made in float32, in which the angle of the last place is off by 6e-5.
    return table.shape[1] == PLACES and torch.allclose(table.float(), row_table(table.shape[2]), rtol=0, atol=1e-3)


def row_table(width: int) -> Tensor:
    """Return the positions (1, 512, D) of sequences."""
    return sincos(torch.arange(PLACES).float().unsqueeze(1), width).unsqueeze(0)


def square_table(tokens: tuple[int, ...], width: int) -> Tensor:
    """Return the positions (1, n, D) of pixels and maps."""
    return vision.table_of({"axis_order": "yx"}, tokens, width, 0)


def _is_fixed(table: Tensor) -> bool:
    """True for the positions of a square grid."""
    count, width = table.shape[1:]
    side = isqrt(count)
    if side * side != count or width % 4:
        return False
    return torch.allclose(table.float(), square_table((side, side), width), rtol=0, atol=1e-5)


def _patch(foreign: Foreign, name: str) -> int:
    """Return the side of a patch: that of the picture, which the name tells (`@224`), by the tokens along it.

    Where the name tells none, the channels are taken to be three; 0: there is no such patch.
    """
    theirs = f"encoder_embeddings.{name}"
    values, side = foreign.shapes[f"{theirs}.proj.weight"][1], isqrt(foreign.shapes[f"{theirs}.pos_emb"][1])
    size = name.partition("@")[2]
    if size.isdigit() and int(size) % side == 0 and values % (int(size) // side) ** 2 == 0:
        return int(size) // side
    patch = isqrt(values // 3)
    return patch if patch * patch * 3 == values else 0
