"""Dense decoders: maps (classes, depths) from the states of an encoder that sees the other modalities whole.

The states are laid out on the grid of their patches, a head makes a map of them in the size of the target, and the map
is cut into the target's own tokens. So the target may have any size; a loss or measure needs to know nothing.

Letters: B batch, N content tokens of the target, V visible tokens, R prefix tokens, T asked-for tokens, D width of the
encoder, d channels of a map, C channels or classes of the target, P numbers predicted per token, h and w of a grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from m3.backbone import MLP, BackboneSpec
from m3.errors import M3Error
from m3.heads import restore_index
from m3.linear import Linear
from m3.plugins import Strict, Tokenizer
from m3.types import Encoded, Tokens, take


class DenseSpec(Strict):
    """Settings of every dense decoder.

    Attributes:
        reads: inputs whose states are read, one behind the other at each place; all inputs if left out.
    """

    reads: tuple[str, ...] | None = Field(default=None, min_length=1)


class Dense(nn.Module, ABC):
    """What dense decoders share; a subclass defines `draw`, and in `layers` the blocks that it reads, if any."""

    layers: tuple[int, ...] = ()
    """Numbers of the blocks whose outputs are read; empty: the encoder's result."""

    def __init__(
        self,
        spec: DenseSpec,
        backbone: BackboneSpec,
        tokenizers: dict[str, Tokenizer],
        inputs: tuple[str, ...],
        modality: str,
        outputs: int,
    ) -> None:
        super().__init__()
        self.modality, self.reads = modality, spec.reads or inputs
        if unknown := [name for name in self.reads if name not in inputs]:
            raise M3Error(f"reads: `{unknown[0]}` is no input of the objective; name some of {', '.join(inputs)}.")
        if flat := [name for name in (*self.reads, modality) if len(tokenizers[name].reference) != 2]:
            raise M3Error(f"a dense decoder reads and makes maps, but `{flat[0]}` is none; use `cross_decoder`.")
        if len({tokenizers[name].reference for name in self.reads}) > 1:
            raise M3Error(f"reads: {', '.join(self.reads)} lie on different grids; name those of one grid.")
        target = tokenizers[modality]
        signal, grid = target.signal, target.reference
        self.is_classes = signal.kind == "classes"
        self.channels = signal.classes if self.is_classes else signal.channels
        self.patch = (signal.size[0] // grid[0], signal.size[1] // grid[1])
        if outputs != self.channels * self.patch[0] * self.patch[1]:
            raise M3Error(
                f"a dense decoder predicts {modality} itself, {self.channels} numbers at every place, but the target "
                f"wants {outputs} of each token; use a target of type `values`."
            )
        self.width = backbone.width * len(self.reads)

    def forward(self, encoded: Encoded, tokens: dict[str, Tokens], index: Tensor) -> Tensor:
        """Predict the tokens at index (B, T) -> (B, T, P)."""
        rows, columns = _grid(tokens[self.modality])
        size = (rows * self.patch[0], columns * self.patch[1])
        sequences = [encoded.layers[number] for number in self.layers] or [encoded.sequence]
        drawn = self.draw([self._laid_out(x[:, encoded.prefix_count :], encoded, tokens) for x in sequences], size)
        if self.layers:  # a final norm takes part in the graph of every step, or processes would wait for it
            drawn = drawn + 0.0 * encoded.sequence[:, :1].mean()
        cut = drawn.unflatten(3, (-1, self.patch[1])).unflatten(2, (-1, self.patch[0]))  # (B, C, rows, y, columns, x)
        order = (0, 2, 4, 3, 5, 1) if self.is_classes else (0, 2, 4, 1, 3, 5)  # scores lie class by class at each place
        return take(cut.permute(order).flatten(3).flatten(1, 2), index)

    @abstractmethod
    def draw(self, grids: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Make a map (B, C, *size) of the states of each layer (B, D times the inputs, h, w)."""

    def _laid_out(self, states: Tensor, encoded: Encoded, tokens: dict[str, Tokens]) -> Tensor:
        """Put states (B, V, D) in their places on the grid; a hidden token or an absent modality is 0 there."""
        rows = torch.cat([states, torch.zeros_like(states[:, :1])], dim=1)
        found = []
        for name in self.reads:
            if name not in encoded.plan.visible:
                raise M3Error(f"a dense decoder reads the encoder's states of {name}, which the batch lacks; give it.")
            placed = take(rows, restore_index(encoded.plan, name, tokens[name].count))
            found.append(placed.transpose(1, 2).unflatten(2, _grid(tokens[name])))
        return torch.cat(found, dim=1)


class LinearDense(Dense):
    """A linear layer for each patch, resized bilinearly: the simplest head of segmentation (Strudel et al. 2021)."""

    class Spec(DenseSpec):
        """Settings of `type: linear_dense`.

        Attributes:
            per_patch: predictions along each side of a patch.
        """

        per_patch: PositiveInt = 1

    def __init__(
        self,
        spec: Spec,
        backbone: BackboneSpec,
        tokenizers: dict[str, Tokenizer],
        inputs: tuple[str, ...],
        modality: str,
        outputs: int,
    ) -> None:
        super().__init__(spec, backbone, tokenizers, inputs, modality, outputs)
        self.output = Spread(self.width, self.channels, spec.per_patch)

    def draw(self, grids: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Make a map (B, C, *size) of one of h * per_patch x w * per_patch."""
        return F.interpolate(self.output(grids[0]), size=size, mode="bilinear", align_corners=False)


class ConvnextDense(Dense):
    """MultiMAE's head for segmentation (Bachmann et al. 2022, appendix B): a few ConvNeXt blocks on a finer grid."""

    class Spec(DenseSpec):
        """Settings of `type: convnext_dense`.

        Attributes:
            width: d (the paper's 6144 numbers of a patch are 384 at each of 16 places).
            per_patch: places along each side of a patch.
            depth: number of blocks.
        """

        width: PositiveInt = 384
        per_patch: PositiveInt = 4
        depth: PositiveInt = 4

    def __init__(
        self,
        spec: Spec,
        backbone: BackboneSpec,
        tokenizers: dict[str, Tokenizer],
        inputs: tuple[str, ...],
        modality: str,
        outputs: int,
    ) -> None:
        super().__init__(spec, backbone, tokenizers, inputs, modality, outputs)
        self.spread = Spread(self.width, spec.width, spec.per_patch)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(spec.width) for _ in range(spec.depth)])
        self.output = nn.Conv2d(spec.width, self.channels, 1)

    def draw(self, grids: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Make a map (B, C, *size) of one of h * per_patch x w * per_patch."""
        drawn = self.output(self.blocks(self.spread(grids[0])))
        return F.interpolate(drawn, size=size, mode="bilinear", align_corners=False)


class Dpt(Dense):
    """DPT (Ranftl et al. 2021, section 3) as MultiMAE has it: four layers of the encoder at 4, 2, 1 and 1/2 times the
    grid, joined from the coarsest to the finest.

    Of its two heads, that of depth makes values and that of segmentation classes; the latter without its dropout. What
    they double is brought to the size of the target, which is the same for patches of 16 and a target of the picture's
    size.
    """

    class Spec(DenseSpec):
        """Settings of `type: dpt`.

        Attributes:
            layers: numbers of the four blocks that are read (0 = the first), the finest first.
            widths: channels of the four before they are joined.
            width: d, channels from then on.
        """

        layers: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt] = (2, 5, 8, 11)
        widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (96, 192, 384, 768)
        width: int = Field(default=256, ge=2)

    def __init__(
        self,
        spec: Spec,
        backbone: BackboneSpec,
        tokenizers: dict[str, Tokenizer],
        inputs: tuple[str, ...],
        modality: str,
        outputs: int,
    ) -> None:
        super().__init__(spec, backbone, tokenizers, inputs, modality, outputs)
        if max(spec.layers) >= backbone.depth:
            raise M3Error(
                f"layers: there is no block {max(spec.layers)}; the last of {backbone.depth} is number "
                f"{backbone.depth - 1}."
            )
        self.layers, width, widths = spec.layers, spec.width, spec.widths
        scales = (
            nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
            nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
            nn.Identity(),
            nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
        )
        self.scaled = nn.ModuleList(
            nn.Sequential(nn.Conv2d(self.width, own, 1), scale, nn.Conv2d(own, width, 3, padding=1, bias=False))
            for own, scale in zip(widths, scales, strict=True)
        )
        self.fusions = nn.ModuleList(Fusion(width, is_first=number == 3) for number in range(4))
        inner = width if self.is_classes else width // 2
        self.first = nn.Conv2d(width, inner, 3, padding=1, bias=not self.is_classes)
        self.second = nn.Identity() if self.is_classes else nn.Conv2d(inner, 32, 3, padding=1)
        self.output = nn.Conv2d(inner if self.is_classes else 32, self.channels, 1)

    def draw(self, grids: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Make a map (B, C, *size) of one of 8 h x 8 w."""
        finer = [scale(x) for scale, x in zip(self.scaled, grids, strict=True)]
        x: Tensor | None = None
        for number in (3, 2, 1, 0):
            height, width = finer[max(0, number - 1)].shape[2:]
            x = self.fusions[number](x, finer[number], (height, width) if number else (2 * height, 2 * width))
        assert x is not None, "there are four layers"
        if self.is_classes:
            return _resized(self.output(F.relu(self.first(x))), size)
        return self.output(F.relu(self.second(_resized(self.first(x), size))))


class Spread(nn.Module):
    """A linear layer for each patch, whose outputs are k x k places of it."""

    def __init__(self, width: int, channels: int, count: int) -> None:
        super().__init__()
        self.linear, self.count = Linear(width, channels * count * count), count

    def forward(self, grid: Tensor) -> Tensor:
        """Turn (B, D, h, w) into (B, channels, h k, w k)."""
        x = self.linear(grid.movedim(1, -1)).unflatten(-1, (self.count, self.count, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class ConvNeXtBlock(nn.Module):
    """A ConvNeXt block (Liu et al. 2022, section 2): depthwise 7 x 7, norm, MLP; without layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, d, h, w) to the same."""
        return x + self.mlp(self.norm(self.depthwise(x).movedim(1, -1))).movedim(-1, 1)


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3 x 3, without norm (RefineNet's unit, Lin et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, d, h, w) to the same."""
        return x + self.second(F.relu(self.first(F.relu(x))))


class Fusion(nn.Module):
    """Joins what comes from the coarser layers with a layer, and brings both to the size of the next finer one."""

    def __init__(self, width: int, is_first: bool) -> None:
        super().__init__()
        self.own = None if is_first else Residual(width)
        self.both = Residual(width)
        self.output = nn.Conv2d(width, width, 1)

    def forward(self, coarser: Tensor | None, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Join (B, d, h, w) each -> (B, d, *size)."""
        joined = x if coarser is None or self.own is None else coarser + self.own(x)
        return self.output(_resized(self.both(joined), size))


def _grid(tokens: Tokens) -> tuple[int, int]:
    """Return rows and columns of patches."""
    assert tokens.counts is not None, "patches fill a grid"
    return tokens.counts[0], tokens.counts[1]


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as DPT does, corner to corner."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
