"""Weights for another size: more or fewer pixels, channels, frames, finer or coarser patches.

Letters: D width, C channels, P values of a patch.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3.errors import M3Error

Sections = dict[str, Any]


def adapt(tensors: dict[str, Tensor], old: Sections, new: Sections, shapes: dict[str, torch.Size]) -> list[str]:
    """Change the weights of one config to those of another, in place.

    Args:
        tensors: our name -> weight for `old`.
        old: `modalities` of the config that the weights are of, each with all its settings.
        new: the same of the config that is wanted.
        shapes: our name -> the shape that is wanted.

    Returns:
        A sentence for each thing that was changed.

    Raises:
        M3Error: a weight can't be changed to its shape by any rule.
    """
    said: dict[str, None] = {}  # once each: blocks may have a table of their own
    for name in [name for name, x in tensors.items() if name in shapes and x.shape != shapes[name]]:
        x, shape = tensors[name], tuple(shapes[name])
        is_as_wide = x.shape[:1] == shape[:1]  # rows of a projection and of our tables are D
        if is_as_wide and (match := re.fullmatch(r"positions\.(\w+)\.(table|first|others)", name)):
            tensors[name] = resized(x, shape[1:])
            said[f"{match[1]}: learned positions go from {_by(x.shape[1:])} to {_by(shape[1:])} (interpolated)"] = None
        elif is_as_wide and (match := re.fullmatch(r"(.+)\.relative_biases\.\d+\.table", name)):
            tensors[name] = resized(x, shape[1:])
            said[f"{match[1]}: relative biases go from {_by(x.shape[1:])} to {_by(shape[1:])} (interpolated)"] = None
        elif is_as_wide and (match := re.fullmatch(r"tokenizers\.(\w+)\.projection\.weight", name)):
            kernels = kernel_of(old[match[1]]), kernel_of(new[match[1]])
            tensors[name] = projected(x, *kernels)
            line = f"{match[1]}: the projection of patches goes from {_by(kernels[0])} to {_by(kernels[1])}"
            if kernels[0][0] != kernels[1][0]:
                line += f" (every channel gets the mean of the old ones x {kernels[0][0]} / {kernels[1][0]})"
            said[line] = None
        else:
            raise M3Error(
                f"`{name}` of shape {tuple(x.shape)} can't become {shape}; leave the part out (objectives=null) or "
                f"keep its size."
            )
    return list(said)


def resized(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Interpolate a table (D, *grid) to another grid: pictures bicubic, other axes linear; as timm does.

    Relative biases (H, 2 h - 1, 2 w - 1) are stretched likewise, the distance 0 stays in the middle.
    """
    x = table.float()
    if len(grid) == 1:
        return F.interpolate(x[None], grid[0], mode="linear", align_corners=False)[0].to(table.dtype)
    if len(grid) == 3:  # time by itself
        width, rows, columns = len(x), *x.shape[2:]
        x = F.interpolate(x.flatten(2).transpose(1, 2).flatten(0, 1)[None], grid[0], mode="linear", align_corners=False)
        x = x.reshape(width, rows * columns, grid[0]).transpose(1, 2).reshape(width * grid[0], 1, rows, columns)
        x = F.interpolate(x, grid[1:], mode="bicubic", antialias=True, align_corners=False)
        return x.reshape(width, *grid).to(table.dtype)
    return F.interpolate(x[None], grid, mode="bicubic", antialias=True, align_corners=False)[0].to(table.dtype)


def projected(weight: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Change a projection (D, P) of patches (C, *extents) to that of others.

    Channels: each new one gets the mean of the old ones times old / new, so that grey pictures give the same tokens.
    Extents: the pseudo-inverse of the interpolation (Beyer et al. 2022, FlexiViT, section 3.4), so that the tokens of
    interpolated patches stay the same where they can.
    """
    x = weight.float().reshape(len(weight), *old)
    if old[0] != new[0]:
        x = x.mean(1, keepdim=True) * (old[0] / new[0])
        x = x.expand(-1, new[0], *(-1 for _ in old[1:]))
    if old[1:] != new[1:]:
        matrix = _interpolation(old[1:], new[1:])
        x = (x.flatten(2).double() @ torch.linalg.pinv(matrix.double()).t()).float()
    return x.reshape(len(weight), -1).contiguous().to(weight.dtype)


def kernel_of(modality: Sections) -> tuple[int, ...]:
    """Return (C, *extents) of what a modality's tokenizer projects."""
    tokenizer, frames = modality["tokenizer"], ()
    if tokenizer["type"] not in ("patch", "tube"):
        raise M3Error(f"the tokenizer `{tokenizer['type']}` can't be changed; keep its settings.")
    if tokenizer["type"] == "tube":
        frames = (tokenizer.get("frames", 2),)
    size = tokenizer.get("size", 16)
    return (modality.get("channels", 3), *frames, *((size, size) if isinstance(size, int) else tuple(size)))


def keep_coordinates(old: Sections, new: Sections) -> list[str]:
    """Let fixed sin-cos positions mean the coordinates of the old grid, in place; return a sentence for each one."""
    said = []
    for name, entry in new.items():
        before, after = grid_of(old.get(name)), grid_of(entry)
        if before and after and before != after and entry.get("positions", {}).get("type", "sincos") == "sincos":
            entry["positions"] = {"type": "sincos", **entry.get("positions", {}), "grid": list(before)}
            said.append(f"{name}: {_by(after)} tokens stand at the coordinates of {_by(before)}")
    return said


def grid_of(modality: Sections | None) -> tuple[int, ...] | None:
    """Return the tokens along each axis; None where there is no grid of patches."""
    if not modality or modality.get("tokenizer", {}).get("type") not in ("patch", "tube") or "size" not in modality:
        return None
    _, *extents = kernel_of(modality)
    size = modality["size"]
    lengths = (size, size) if isinstance(size, int) else tuple(size)
    if len(extents) == 3:
        lengths = (modality.get("frames", 16), *lengths)
    return tuple(length // extent for length, extent in zip(lengths, extents, strict=True))


def _interpolation(old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Return the matrix (old values, new values) that interpolates a patch linearly."""
    basis = torch.eye(math.prod(old)).reshape(-1, 1, *old)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(old)]
    return F.interpolate(basis, new, mode=mode, align_corners=False).reshape(math.prod(old), -1)


def _by(sizes: Any) -> str:
    return " x ".join(map(str, sizes))
