"""Where a token is: embeddings of its coordinates, chosen for each modality in the recipe.

Coordinates are measured in tokens of the grid that the model was built for, so a finer grid or a longer
recording lies between or beyond them and every kind below has a value there.

Letters: B batch, N tokens, A axes, D width, E width of an attention head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from m3.errors import M3Error
from m3.linear import Linear
from m3.parts import build_spec
from m3.plugins import Strict, Tokenizer
from m3.types import MaskPlan, Tokens, take


def sincos(positions: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """Embed coordinates: positions (..., A) -> (..., D) float32.

    Each axis gets the same number of channels, in the order of the axes, each [sines | cosines] with F = D // 2A
    frequencies temperature ** (-i / F), i = 0 ... F - 1; channels that are left over are 0. With A = 2 and
    (x, y) order this is the table of MAE (He et al. 2021), with (y, x) that of MultiMAE (Bachmann et al. 2022).

    Raises:
        M3Error: D is less than 2 A.
    """
    axes = positions.shape[-1]
    frequencies = width // (2 * axes)
    if not frequencies:
        raise M3Error(f"width {width} is too small for sin-cos positions over {axes} axes; use at least {2 * axes}.")
    angle = _angles(positions, frequencies, temperature)
    table = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(torch.float32)
    return F.pad(table, (0, width - table.shape[-1]))


def _angles(positions: Tensor, frequencies: int, temperature: float) -> Tensor:
    """Return (..., A, F): each coordinate times each of the frequencies temperature ** (-i / F)."""
    # Long axes need more than 24 bits of angle; Apple's GPUs have no float64.
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    exponent = torch.arange(frequencies, device=positions.device, dtype=exact) / frequencies
    return positions.to(exact).unsqueeze(-1) * temperature**-exponent


class Sincos(nn.Module):
    """Fixed sines and cosines of the coordinates: any number of axes, any size, nothing to learn."""

    class Spec(Strict):
        """Settings of `type: sincos`.

        Attributes:
            temperature: ratio of the longest wave to the shortest.
            grid: tokens along each axis of the grid whose coordinates are meant, if it is not the model's own: weights
                of another size go on seeing the same coordinates at the same places.
        """

        temperature: PositiveFloat = 10000.0
        grid: tuple[PositiveInt, ...] | None = None

    def __init__(self, spec: Spec, tokenizer: Tokenizer, width: int, axis_order: str) -> None:
        super().__init__()
        self.spec, self.width, self.axis_order = spec, width, axis_order
        self.scale: list[float] | None = None
        if spec.grid:
            if len(spec.grid) != tokenizer.axes:
                raise M3Error(f"positions.grid: {len(spec.grid)} numbers for {tokenizer.axes} axes; give one for each.")
            self.scale = [meant / own for meant, own in zip(spec.grid, tokenizer.reference, strict=True)]
        sincos(torch.zeros(1, tokenizer.axes), width)  # a width without room is refused here, not in the first step

    def forward(self, positions: Tensor) -> Tensor:
        """Embed (1 or B, N, A) -> (1 or B, N, D); `xy` encodes the last axis first, `yx` the first."""
        if self.scale:
            positions = (positions + 0.5) * positions.new_tensor(self.scale) - 0.5
        ordered = positions.flip(-1) if self.axis_order == "xy" else positions
        return sincos(ordered, self.width, self.spec.temperature)


class FlatSincos(nn.Module):
    """Fixed sines and cosines of the token's number, as in a sentence (Vaswani et al. 2017), interleaved.

    VideoMAE's table: number n = (t H + y) W + x on the grid the model was built for, channels sin(n / 10000^(2i / D))
    and cos(n / 10000^(2i / D)) in turn. Between the places of that grid numbers say little; use `sincos` for finer
    ones.
    """

    class Spec(Strict):
        """Settings of `type: flat_sincos`; it has none."""

    def __init__(self, spec: Spec, tokenizer: Tokenizer, width: int, axis_order: str) -> None:
        super().__init__()
        if len(tokenizer.reference) != tokenizer.axes:
            raise M3Error("positions `flat_sincos` number the places of a grid; use `sincos` or `coordinates` here.")
        self.grid, self.width = tokenizer.reference, width

    def forward(self, positions: Tensor) -> Tensor:
        """Embed (1 or B, N, A) -> (1 or B, N, D)."""
        number = positions[..., 0]
        for axis, extent in enumerate(self.grid[1:], start=1):
            number = number * extent + positions[..., axis]
        pairs = (self.width + 1) // 2
        angle = _angles(number, pairs, 10000.0 ** (2 * pairs / self.width))
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., : self.width].to(torch.float32)


class Learned(nn.Module):
    """A learned vector for every place of the grid; linear interpolation between them, the edge's beyond it."""

    class Spec(Strict):
        """Settings of `type: learned`; it has none."""

    def __init__(self, spec: Spec, tokenizer: Tokenizer, width: int, axis_order: str) -> None:
        super().__init__()
        if not 1 <= len(tokenizer.reference) <= 3:
            raise M3Error("learned positions need a grid of one to three axes; use `sincos` or `coordinates` here.")
        self.table = nn.Parameter(torch.empty(width, *tokenizer.reference))

    def forward(self, positions: Tensor) -> Tensor:
        """Embed (1 or B, N, A) -> (1 or B, N, D)."""
        return interpolated(self.table, positions)


class Separable(nn.Module):
    """Learned vectors for the places along the first axis and for those of the other axes, added up.

    MAE-ST's positions over time and space (Feichtenhofer et al. 2022); interpolated like `learned`.
    """

    class Spec(Strict):
        """Settings of `type: separable`; it has none."""

    def __init__(self, spec: Spec, tokenizer: Tokenizer, width: int, axis_order: str) -> None:
        super().__init__()
        if not 2 <= len(tokenizer.reference) <= 3:
            raise M3Error("separable positions need a grid of two or three axes; use `learned` or `sincos` here.")
        self.first = nn.Parameter(torch.empty(width, tokenizer.reference[0]))
        self.others = nn.Parameter(torch.empty(width, *tokenizer.reference[1:]))

    def forward(self, positions: Tensor) -> Tensor:
        """Embed (1 or B, N, A) -> (1 or B, N, D)."""
        return interpolated(self.first, positions[..., :1]) + interpolated(self.others, positions[..., 1:])


def interpolated(table: Tensor, positions: Tensor) -> Tensor:
    """Read a table (D, *grid) of vectors at positions (1 or B, N, axes), linearly between its places."""
    result, grid = table.new_zeros(()), table.shape[1:]
    low = [positions[..., a].clamp(0, n - 1).floor().clamp(max=max(0, n - 2)) for a, n in enumerate(grid)]
    for corner in range(2 ** len(grid)):
        flat, weight = torch.zeros_like(positions[..., 0]).long(), torch.ones_like(positions[..., 0])
        for axis, extent in enumerate(grid):
            is_high = corner >> axis & 1
            share = positions[..., axis].clamp(0, extent - 1) - low[axis]
            flat = flat * extent + (low[axis] + is_high).long().clamp(max=extent - 1)
            weight = weight * (share if is_high else 1 - share)
        # As in `take`: the gradient of indexing with [] sums in an order that differs from run to run.
        rows = table.flatten(1).t().index_select(0, flat.flatten()).unflatten(0, flat.shape)
        result = result + rows * weight.unsqueeze(-1)
    return result


class Coordinates(nn.Module):
    """A small MLP on the coordinates, for positions that are no grid (Point-MAE, Pang et al. 2022: 3-128-D)."""

    class Spec(Strict):
        """Settings of `type: coordinates`.

        Attributes:
            hidden: width of the layer between.
        """

        hidden: PositiveInt = 128

    def __init__(self, spec: Spec, tokenizer: Tokenizer, width: int, axis_order: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(Linear(tokenizer.axes, spec.hidden), nn.GELU(), Linear(spec.hidden, width))

    def forward(self, positions: Tensor) -> Tensor:
        """Embed (1 or B, N, A) -> (1 or B, N, D)."""
        return self.layers(positions)


class Projected(nn.Module):
    """A linear layer and a norm on the coordinates, for boxes (UNITER, Chen et al. 2020, section 3.1)."""

    class Spec(Strict):
        """Settings of `type: projected`; it has none."""

    eps = 1e-12

    def __init__(self, spec: Spec, tokenizer: Tokenizer, width: int, axis_order: str) -> None:
        super().__init__()
        self.projection = Linear(tokenizer.axes, width)
        self.norm = nn.LayerNorm(width, eps=self.eps)

    def forward(self, positions: Tensor) -> Tensor:
        """Embed (1 or B, N, A) -> (1 or B, N, D)."""
        return self.norm(self.projection(positions.to(self.projection.weight.dtype)))


class Rotary(nn.Module):
    """Axial rotary embedding: queries and keys are turned by angles that grow with the coordinates.

    Su et al. 2021; for several axes the pairs of a head are shared out among them (Heo et al. 2024). It acts in
    the backbone's attention. Decoders, which attend across modalities, add sines and cosines instead.
    """

    class Spec(Strict):
        """Settings of `type: rotary`.

        Attributes:
            temperature: ratio of the longest wave to the shortest (100 for the short axes of images).
        """

        temperature: PositiveFloat = 100.0

    def __init__(self, spec: Spec, tokenizer: Tokenizer, width: int, axis_order: str) -> None:
        super().__init__()
        self.spec = spec

    def angles(self, positions: Tensor, head_width: int) -> Tensor:
        """Return (1 or B, N, E / 2) radians for the pairs (i, i + E / 2) of a head; left-over pairs stay."""
        axes = positions.shape[-1]
        frequencies = head_width // 2 // axes
        if head_width % 2:
            raise M3Error(f"heads of width {head_width} can't be turned by rotary positions; choose an even width.")
        if not frequencies:
            raise M3Error(f"heads of width {head_width} are too narrow for rotary positions over {axes} axes.")
        flat = _angles(positions, frequencies, self.spec.temperature).flatten(-2).to(torch.float32)
        return F.pad(flat, (0, head_width // 2 - flat.shape[-1]))


class Relative(nn.Module):
    """Nothing is added: the backbone's `relative_bias` alone tells how tokens lie to each other (BEiT, SimMIM).

    Decoders, which have no such bias, add sines and cosines instead.
    """

    class Spec(Strict):
        """Settings of `type: relative`; it has none."""

    def __init__(self, spec: Spec, tokenizer: Tokenizer, width: int, axis_order: str) -> None:
        super().__init__()
        if tokenizer.tower is None or not tokenizer.tower.relative_bias:
            raise M3Error(
                "positions `relative` add nothing, so the tokens' places would be unknown; set relative_bias of the "
                "backbone too, or use `sincos`."
            )

    def forward(self, positions: Tensor) -> Tensor:
        """Return zeros (1 or B, N, 1) for (1 or B, N, A)."""
        return positions.new_zeros(*positions.shape[:-1], 1)


class Marks(NamedTuple):
    """What the network adds to embedded tokens: where they are, and of which modality.

    Objectives may hold it to add the same once more; no module then has a parameter twice.

    Attributes:
        positions: modality -> position embedding.
        modalities: modality -> (1, D) learned vector, where the backbone has one.
    """

    positions: dict[str, nn.Module]
    modalities: nn.ParameterDict

    def place(self, name: str, tokens: Tokens, plan: MaskPlan) -> Tensor:
        """Return the position embedding of the visible slots of a modality (B, S, D); it must not be rotary."""
        return take(self.positions[name](tokens.positions), plan.place.get(name, plan.visible[name]))

    def of(self, name: str, tokens: Tokens, plan: MaskPlan) -> Tensor | float:
        """Return what is added to the visible slots of a modality (B, S, D); 0 where that is nothing."""
        mark: Tensor | float = 0.0
        if not isinstance(self.positions[name], Rotary):
            mark = self.place(name, tokens, plan)
        return mark + self.modalities[name] if name in self.modalities else mark


def build_positions(tokenizer: Tokenizer, width: int, axis_order: str) -> nn.Module:
    """Make the position embedding of one modality, as the `positions` of its recipe entry say."""
    part, spec = build_spec("positions", tokenizer.positions, "positions")
    return part(spec, tokenizer, width, axis_order)


def additive(tokenizer: Tokenizer, width: int, axis_order: str) -> nn.Module:
    """Make a position embedding that is added to tokens: the recipe's, or sin-cos for one that acts in attention."""
    built = build_positions(tokenizer, width, axis_order)
    is_inside = isinstance(built, Rotary | Relative)
    return Sincos(Sincos.Spec(), tokenizer, width, axis_order) if is_inside else built


def grid(counts: tuple[int, ...], reference: tuple[int, ...], device: torch.device) -> Tensor:
    """Return (1, N, A) float32 token coordinates, the last axis fastest.

    They are measured in tokens of the `reference` grid that the model was built for, centre to centre: on the
    reference grid itself they are 0, 1, 2 ..., on a finer one they lie between.
    """
    axes = [
        (torch.arange(count, device=device, dtype=torch.float32) + 0.5) * (built_for / count) - 0.5
        for count, built_for in zip(counts, reference, strict=True)
    ]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], dim=-1).unsqueeze(0)
