"""What the tables of image transformers share: patches, positions, blocks.

Letters: D width, C channels, h, w patch, N positions of the grid, R prefix tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3.foreign.rows import Row, joined, one, same, shaped, zeros
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


def scales(theirs: tuple[str, str], ours: str, depth: int) -> list[Row]:
    """Rows of LayerScale."""
    return [
        one(name.format(n), f"{ours.format(n)}.scale{branch}.difference")
        for n in range(depth)
        for branch, name in enumerate(theirs, start=1)
    ]


def patches(theirs: str, ours: str, width: int, kernel: tuple[int, ...], has_bias: bool = True) -> list[Row]:
    """Rows of a convolution (D, C, *kernel) that is our projection (D, C * values of the kernel)."""
    values = 1
    for extent in kernel:
        values *= extent
    weight = shaped(f"{theirs}.weight", f"{ours}.weight", (width, *kernel), (width, values))
    return [weight, one(f"{theirs}.bias", f"{ours}.bias") if has_bias else zeros(f"{ours}.bias", (width,))]


def table_of(config: dict[str, Any], tokens: tuple[int, ...], width: int, prefix: int) -> Tensor:
    """Return fixed sin-cos positions (1, R + N, D) in MAE's order, zero for prefix tokens."""
    places = grid(tokens, tokens, torch.device("cpu"))[0]
    table = sincos(places.flip(-1) if config.get("axis_order", "xy") == "xy" else places, width)
    return torch.cat([table.new_zeros(prefix, width), table]).unsqueeze(0)


def learned(
    theirs: str, ours: str, tokens: tuple[int, ...], prefix: str | None = None, batch: tuple[int, ...] = (1,)
) -> Row:
    """Row of a learned table (*batch, R + N, D) that is our (D, *grid), and our positions of prefix tokens."""
    count = 1
    for extent in tokens:
        count *= extent

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
