"""Fixed sin-cos position embeddings, computed from coordinates, so any grid, size or shape works.

Letters: N tokens, A axes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3.errors import M3Error


def sincos(positions: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """Embed coordinates: positions (..., A) -> (..., D) float32.

    Each axis gets D / A channels, in the order of the axes, each [sines | cosines] with frequencies
    temperature ** (-i / (D / 2A)), i = 0 ... D / 2A - 1. With A = 2 and (x, y) order this is the table of MAE
    (He et al. 2021), with (y, x) that of MultiMAE (Bachmann et al. 2022). At fractional coordinates it is the
    exact value between two table rows, so new sizes need no interpolation of a table.

    Raises:
        M3Error: D is not divisible by 2 A.
    """
    axes = positions.shape[-1]
    check_width(width, axes)
    frequencies = width // (2 * axes)
    # Long axes need more than 24 bits of angle; Apple's GPUs have no float64.
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    exponent = torch.arange(frequencies, device=positions.device, dtype=exact) / frequencies
    angle = positions.to(exact).unsqueeze(-1) * temperature**-exponent  # (..., A, D / 2A)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(torch.float32)


def check_width(width: int, axes: int) -> None:
    """Raise M3Error when D is not divisible by 2 A."""
    if width % (2 * axes):
        raise M3Error(
            f"width {width} must be divisible by {2 * axes} for sin-cos positions over {axes} axes; "
            f"choose a width that is a multiple of {2 * axes}."
        )


def embed_positions(positions: Tensor, width: int, axis_order: str) -> Tensor:
    """Embed coordinates (1 or B, N, A) -> (1 or B, N, D); `xy` encodes the last axis first, `yx` the first."""
    return sincos(positions.flip(-1) if axis_order == "xy" else positions, width)


def grid(rows: int, columns: int, reference: tuple[int, int], device: torch.device) -> Tensor:
    """Return (1, rows * columns, 2) float32 patch coordinates (y, x), row by row.

    They are measured in patches of the `reference` (rows, columns) grid that the model was built for, centre
    to centre: on the reference grid itself they are 0, 1, 2 ..., on a finer one they lie between.
    """

    def axis(count: int, built_for: int) -> Tensor:
        return (torch.arange(count, device=device, dtype=torch.float32) + 0.5) * (built_for / count) - 0.5

    y, x = torch.meshgrid(axis(rows, reference[0]), axis(columns, reference[1]), indexing="ij")
    return torch.stack([y.flatten(), x.flatten()], dim=-1).unsqueeze(0)
