"""What the tables of image transformers share: patches, positions, blocks.

Letters: D width, C channels, h, w patch, N positions of the grid, R prefix tokens.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign.checkpoint import Foreign
from m3.foreign.rows import Change, Row, joined, one, same, shaped, without_key_bias, zeros
from m3.network import build_modalities
from m3.parts import build_spec
from m3.positions import grid, sincos

TIMM = {
    "norm1": "norm1",
    "attn.proj": "attention.projection",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Layers of a block in timm's names, which MAE, VideoMAE, MultiMAE and others share -> ours."""

NO_SCALE = 1e-30
"""Start of a LayerScale whose learned difference is the whole factor: published weights keep the factor itself."""


def pair(size: Any) -> tuple[int, int]:
    """Read one number as a square."""
    return (size, size) if isinstance(size, int) else tuple(size)


def blocks(theirs: str, ours: str, depth: int, names: dict[str, str]) -> list[Row]:
    """Rows of the layers of all blocks that are the same on both sides; `{}` in the prefixes is the block's number."""
    return [
        row
        for number in range(depth)
        for their_name, our_name in names.items()
        for row in same(f"{theirs.format(number)}.{their_name}", f"{ours.format(number)}.{our_name}")
    ]


def fused(theirs: str, ours: str, depth: int) -> list[Row]:
    """Rows of queries, keys and values that are one matrix in their names too."""
    return [row for n in range(depth) for row in same(f"{theirs.format(n)}", f"{ours.format(n)}.attention.qkv")]


def split(theirs: tuple[str, ...], ours: str, depth: int, parts: tuple[str, ...] = ("weight", "bias")) -> list[Row]:
    """Rows of queries, keys and values that have a matrix each in their names."""
    return [
        joined(tuple(f"{name.format(n)}.{part}" for name in theirs), f"{ours.format(n)}.attention.qkv.{part}")
        for n in range(depth)
        for part in parts
    ]


def unbiased_keys(query: str, value: str, ours: str, depth: int) -> list[Row]:
    """Rows of the biases of queries and values, where their keys have none."""
    return [
        without_key_bias(query.format(n), value.format(n), f"{ours.format(n)}.attention.qkv.bias") for n in range(depth)
    ]


def scales(theirs: tuple[str, str], ours: str, depth: int, start: float) -> list[Row]:
    """Rows of LayerScale, whose factors ours keeps as the differences from their start."""

    def move(by: float) -> Change:
        return lambda x: [x[0] if start == NO_SCALE else (x[0].double() + by).to(x[0].dtype)]

    return [
        Row((name.format(n),), (f"{ours.format(n)}.scale{branch}.difference",), move(-start), move(start))
        for n in range(depth)
        for branch, name in enumerate(theirs, start=1)
    ]


def patches(theirs: str, ours: str, width: int, kernel: tuple[int, ...], has_bias: bool = True) -> list[Row]:
    """Rows of a convolution (D, C, *kernel) that is our projection (D, C * values of the kernel)."""
    weight = shaped(f"{theirs}.weight", f"{ours}.weight", (width, *kernel), (width, prod(kernel)))
    return [weight, one(f"{theirs}.bias", f"{ours}.bias") if has_bias else zeros(f"{ours}.bias", (width,))]


class Classifier(NamedTuple):
    """A model of images that names their class.

    Attributes:
        name: of the objective.
        label: of the modality.
        classes: K.
        pool: what its vector is made of.
        several: an image may have several classes.
    """

    name: str
    label: str
    classes: int
    pool: str
    several: bool


def classifier_sections(classes: int, pool: str, several: bool = False) -> dict[str, dict[str, Any]]:
    """Return what a classifier adds to `modalities` and `objectives`."""
    label: dict[str, Any] = {"type": "label", "classes": classes, "tokenizer": {"type": "label"}}
    label |= {"several": True} if several else {}
    return {"modalities": {"label": label}, "objectives": {"classify": {"type": "classify", "pool": pool}}}


def classifier_of(config: M3Config, title: str) -> Classifier | None:
    """Return the classifier of a model that reads images and may name their class; None: it only encodes.

    Raises:
        M3Error: it does anything else.
    """
    objectives, modalities = config.objectives or {}, config.modalities or {}
    names = [name for name in modalities if name != "image"]
    kinds = [entry.get("type") for entry in objectives.values()]
    if "image" in modalities and not config.towers and not names and not kinds:
        return None
    if config.towers or "image" not in modalities or kinds != ["classify"] or len(names) != 1:
        raise M3Error(
            f"{title} is one encoder of images, with a head that classifies or without objectives; choose a format "
            f"that holds more."
        )
    ((name, entry),) = objectives.items()
    spec: Any = build_spec("objectives", entry, f"objectives.{name}")[1]
    label = modalities[names[0]]
    if spec.pool not in ("mean", "class") or spec.inputs not in (None, ("image",)):
        raise M3Error(f"{title} classifies images by the mean of their tokens or the class token; this model does not.")
    return Classifier(name, names[0], label["classes"], spec.pool, label.get("several", False))


def table_of(config: dict[str, Any], tokens: tuple[int, ...], width: int, prefix: int) -> Tensor:
    """Return fixed sin-cos positions (1, R + N, D) in MAE's order, zero for prefix tokens."""
    places = grid(tokens, tokens, torch.device("cpu"))[0]
    table = sincos(places.flip(-1) if config.get("axis_order", "xy") == "xy" else places, width)
    return torch.cat([table.new_zeros(prefix, width), table]).unsqueeze(0)


def learned(
    theirs: str, ours: str, tokens: tuple[int, ...], prefix: str | None = None, batch: tuple[int, ...] = (1,)
) -> Row:
    """Row of a learned table (*batch, R + N, D) that is our (D, *grid), and our positions of prefix tokens."""
    count = prod(tokens)

    def read(x: list[Tensor]) -> list[Tensor]:
        table = x[0].reshape(-1, x[0].shape[-1])
        grid_part = table[len(table) - count :].t().reshape(-1, *tokens).contiguous()
        return [grid_part, table[: len(table) - count].clone()] if prefix else [grid_part]

    def write(x: list[Tensor]) -> list[Tensor]:
        table = x[0].flatten(1).t()
        if prefix:
            table = torch.cat([x[1], table])
        return [table.reshape(*batch, *table.shape)]

    return Row((theirs,), (ours, prefix) if prefix else (ours,), read, write)


class Cut(NamedTuple):
    """How a modality is cut into tokens.

    Attributes:
        channels: C.
        size: of the signal along its axes.
        patch: of a token along these axes.
        tokens: how many there are along these axes.
        positions: kind of the positions.
    """

    channels: int
    size: tuple[int, ...]
    patch: tuple[int, ...]
    tokens: tuple[int, ...]
    positions: str


def cut_of(config: M3Config, name: str, tokenizer: str = "patch") -> Cut:
    """Return how a modality of our config is cut.

    Raises:
        M3Error: the modality is not there, or has another tokenizer.
    """
    entry = (config.modalities or {}).get(name, {})
    if entry.get("tokenizer", {}).get("type") != tokenizer:
        raise M3Error(f"the format needs the modality `{name}` with the tokenizer `{tokenizer}`.")
    signal = build_modalities({name: entry})[name].signal
    spec: Any = build_spec("tokenizers", entry["tokenizer"], f"modalities.{name}.tokenizer")[1]
    patch = (spec.size, spec.size) if isinstance(spec.size, int) else tuple(spec.size)
    patch = (spec.frames, *patch) if tokenizer == "tube" else patch
    tokens = tuple(extent // own for extent, own in zip(signal.size, patch, strict=True))
    return Cut(signal.channels, signal.size, patch, tokens, entry.get("positions", {}).get("type", "sincos"))


def is_sound(foreign: Foreign) -> bool:
    """Return True for AudioMAE's ViT: one channel, and fixed positions on a grid of eight bands instead of a square.

    Eight times eight of them are taken for a grey picture, whose table is the same.
    """
    (_, channels, *_), (_, length, width) = (
        foreign.shapes.get(name, (0, 0, 0)) for name in ("patch_embed.proj.weight", "pos_embed")
    )
    if channels != 1 or length < 9 or length % 8 != 1 or length == 65 or width % 4:
        return False
    table = table_of({}, (length // 8, 8), width, 1)
    return torch.allclose(foreign.tensors["pos_embed"].float(), table, rtol=0, atol=1e-5)


def values_order(patch: tuple[int, ...], channels: int) -> Tensor:
    """Return where in an order with the channel last each value of our order with the channel first stands."""
    return torch.arange(channels * prod(patch)).reshape(*patch, channels).movedim(-1, 0).flatten()
