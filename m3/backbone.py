"""The shared transformer: a plain ViT over whatever tokens it is given.

Class and register tokens are added and removed here and nowhere else.
Letters: B batch, V visible tokens, R prefix tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from m3.attention import SelfAttention, key_mask
from m3.layer import Layer, recomputable
from m3.linear import Linear
from m3.plugins import Strict
from m3.random import Draws
from m3.relative import RelativeBias
from m3.types import Encoded, MaskPlan, take


class Size(NamedTuple):
    """Shape of a published ViT."""

    width: int
    depth: int
    heads: int


SIZES = {
    "ti": Size(192, 12, 3),
    "s": Size(384, 12, 6),
    "b": Size(768, 12, 12),
    "l": Size(1024, 24, 16),
    "h": Size(1280, 32, 16),
}


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]


class Style(NamedTuple):
    """What transformer blocks are made of.

    Attributes:
        mlp: `gelu`: Linear, GELU (erf), Linear; `gelu_tanh`: its approximation by tanh, JAX's default (FLIP, SigLIP);
            `quick_gelu`: x * sigmoid(1.702 x) (OpenAI's CLIP); `swiglu`: a gated one of two thirds of the hidden width
            (Shazeer 2020).
        bias: biases in all linear layers and norms.
        qk_norm: LayerNorm of queries and keys, per head.
        layer_scale: start of a learned factor per channel on each branch; None: no factor.
        norm: LayerNorm before each branch (`pre`), or after its sum with the residual (`post`; BERT).
    """

    mlp: Activation = "gelu"
    bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    norm: Literal["pre", "post"] = "pre"


PLAIN = Style()


class BackboneSpec(Strict):
    """The `backbone` section of a recipe.

    Attributes:
        width: D.
        depth: number of blocks.
        heads: attention heads; divides `width`.
        mlp_ratio: hidden width of the MLP over D.
        class_tokens: learned tokens in front that every modality can write to (MAE's class token,
            MultiMAE's global token).
        class_positions: learned positions of the class tokens beside these themselves, as in published weights (ViT,
            CLIP); a token and its position are only ever added up.
        final_norm: LayerNorm after the last block (MAE: yes, MultiMAE: no).
        input_norm: LayerNorm of the embedded tokens, class tokens included, before the first block (BERT; CLIP's
            `ln_pre` of images); `modality`: one for the tokens of each modality, and none for class tokens (UNITER).
        causal: every token attends to those before it only (CLIP's text); goes with class_tokens: 0.
        frozen: leave its weights, and those that lead into it, as they are (Zhai et al. 2021, LiT).
        norm_eps: LayerNorm's epsilon.
        axis_order: which axis the first sin-cos channels encode: `xy`, the last axis first (MAE), or `yx`,
            the axes in order (MultiMAE).
        modality_embedding: add a learned vector per modality to its tokens (MultiMAE: no, the projections'
            biases do it).
        positions_every_block: add the positions again before every block, here and in `self_decoder` (Point-MAE).
        drop_path: probability in training that a branch of the last block is left out for a sample, growing evenly
            from 0 in the first (Huang et al. 2016, stochastic depth); also in `self_decoder`.
        mlp: `gelu`, `gelu_tanh`, `quick_gelu` or `swiglu`; as the following ones also of the decoders, see `Style`.
        bias: biases in linear layers and norms.
        qk_norm: LayerNorm of queries and keys.
        layer_scale: start of a learned factor per channel on each branch; null: none.
        norm: `pre`, or `post` as in BERT; a post-norm transformer has no `final_norm`.
        relative_bias: learned numbers that are added to the scores of attention for the distance of two tokens, for a
            transformer of one modality on a grid of two axes: the same in all blocks (`shared`; BEiT and SimMIM in
            pre-training), or others in each (`per_block`; in their fine-tuning); null: none. With `positions:
            {type: relative}` of the modality, nothing else tells where tokens are.
    """

    width: PositiveInt = 768
    depth: PositiveInt = 12
    heads: PositiveInt = 12
    mlp_ratio: PositiveFloat = 4.0
    class_tokens: NonNegativeInt = 1
    class_positions: bool = False
    final_norm: bool = True
    input_norm: bool | Literal["modality"] = False
    causal: bool = False
    frozen: bool = False
    norm_eps: PositiveFloat = 1e-6
    axis_order: Literal["xy", "yx"] = "xy"
    modality_embedding: bool = False
    positions_every_block: bool = False
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    mlp: Activation = "gelu"
    bias: bool = True
    qk_norm: bool = False
    layer_scale: PositiveFloat | None = None
    norm: Literal["pre", "post"] = "pre"
    relative_bias: Literal["shared", "per_block"] | None = None

    @property
    def style(self) -> Style:
        """What the blocks are made of."""
        return Style(self.mlp, self.bias, self.qk_norm, self.layer_scale, self.norm)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> BackboneSpec:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}; change one of them")
        return self

    @model_validator(mode="after")
    def _class_tokens_see_something(self) -> BackboneSpec:
        if self.causal and self.class_tokens:
            raise ValueError("class tokens stand in front, where a causal tower sees nothing; set class_tokens: 0")
        return self


class TowerSpec(BackboneSpec):
    """An entry of the `towers` section: a transformer of its own for some modalities.

    Attributes:
        modalities: those that it reads.
    """

    modalities: tuple[str, ...] = Field(min_length=1)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), an approximation of GELU (Hendrycks and Gimpel 2016, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Linear, activation (GELU by erf), Linear."""

    def __init__(self, width: int, hidden: int, bias: bool = True, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, bias=bias)
        self.activation = activation or nn.GELU()
        self.fc2 = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.fc2(self.activation(self.fc1(x)))


class SwiGLU(nn.Module):
    """fc2(silu(fc1 x) * fc3 x), with two thirds of the hidden width, so that it has as many weights as an MLP."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        hidden = int(2 * hidden / 3)
        self.fc1 = Linear(width, hidden, bias=bias)
        self.fc3 = Linear(width, hidden, bias=bias)
        self.fc2 = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(Layer):
    """Transformer block: x + attention(norm(x)), then x + mlp(norm(x)); post-norm: norm(x + attention(x)), ..."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float, style: Style = PLAIN) -> None:
        super().__init__()
        self.is_post_norm = style.norm == "post"
        self.norm1 = nn.LayerNorm(width, eps=eps, bias=style.bias)
        self.attention = SelfAttention(width, heads, style.bias, eps if style.qk_norm else None)
        self.norm2 = nn.LayerNorm(width, eps=eps, bias=style.bias)
        self.mlp = feed_forward(width, mlp_ratio, style)
        self.scale1 = self.scale2 = None
        if style.layer_scale is not None:
            self.scale1, self.scale2 = Scale(width, style.layer_scale), Scale(width, style.layer_scale)

    @recomputable
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
        paths: Tensor | None = None,
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D).

        Args:
            x: the tokens.
            mask: as in `m3.attention.attend`.
            keep: (B, T) int64, tokens whose result is wanted -> (B, T, D); the others are still attended to.
            turn: cosines and sines (B, 1, N, E / 2) of rotary positions.
            paths: (B, 2) factors of both branches, see `path_factors`.
        """
        attended = self.attention(x if self.is_post_norm else self.norm1(x), mask, keep, turn)
        if self.scale1 is not None:
            attended = self.scale1(attended)
        if paths is not None:
            attended = attended * paths[:, 0].view(-1, 1, 1).to(attended.dtype)
        x = (x if keep is None else take(x, keep)) + attended
        if self.is_post_norm:
            x = self.norm1(x)
        changed = self.mlp(x if self.is_post_norm else self.norm2(x))
        if self.scale2 is not None:
            changed = self.scale2(changed)
        if paths is not None:
            changed = changed * paths[:, 1].view(-1, 1, 1).to(changed.dtype)
        return self.norm2(x + changed) if self.is_post_norm else x + changed


class Scale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021, LayerScale), kept as the difference from its start."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.difference = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (..., D)."""
        return x * (self.start + self.difference)


def feed_forward(width: int, ratio: float, style: Style) -> MLP | SwiGLU:
    """Make the part of a block that works on each token by itself."""
    hidden = int(width * ratio)
    if style.mlp == "swiglu":
        return SwiGLU(width, hidden, style.bias)
    kinds = {"gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh"), "quick_gelu": QuickGELU}
    return MLP(width, hidden, style.bias, kinds[style.mlp]())


def path_factors(keys: Tensor | None, rate: float, depth: int, stream: str) -> list[Tensor] | list[None]:
    """Return for each block the factors (B, 2) of its branches: 0 where one is left out for a sample.

    Those that stay are scaled up, so that the mean is that of the whole network.

    Args:
        keys: (B,) int64 that all randomness of a sample derives from; None: nothing is left out.
        rate: probability in the last block; it grows evenly from 0 in the first.
        depth: number of blocks.
        stream: name of the random numbers.
    """
    if keys is None or not rate:
        return [None] * depth
    rates = torch.linspace(0, rate, depth, device=keys.device).view(1, depth, 1)
    is_there = Draws(keys).uniform(stream, 2 * depth).view(-1, depth, 2) >= rates
    return list((is_there / (1 - rates)).unbind(1))


def _joined(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Let a bias of scores (1 or B, H, N, N) shut out the keys that take no part."""
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


class Backbone(nn.Module):
    """Prefix tokens, norm before, blocks, final norm."""

    def __init__(self, spec: BackboneSpec, grid: tuple[int, ...] | None = None) -> None:
        """Make it; `grid` are the places of the one modality that it reads, for `relative_bias`."""
        super().__init__()
        self.spec = spec
        self.head_width = spec.width // spec.heads
        # No batch axis: with two axes the tokens get weight decay, as MAE's (1, 1, D) class token does.
        self.prefix = nn.Parameter(torch.empty(spec.class_tokens, spec.width)) if spec.class_tokens else None
        has_places = self.prefix is not None and spec.class_positions
        self.prefix_positions = nn.Parameter(torch.empty(spec.class_tokens, spec.width)) if has_places else None
        has_norm = spec.input_norm is True  # those of modalities stand before, in the network
        self.input_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps, bias=spec.bias) if has_norm else None
        self.blocks = nn.ModuleList(
            [Block(spec.width, spec.heads, spec.mlp_ratio, spec.norm_eps, spec.style) for _ in range(spec.depth)]
        )
        tables = {None: 0, "shared": 1, "per_block": spec.depth}[spec.relative_bias]
        self.relative_biases = nn.ModuleList([RelativeBias(grid, spec.heads, spec.class_tokens) for _ in range(tables)])
        norm = nn.LayerNorm(spec.width, eps=spec.norm_eps, bias=spec.bias)
        self.norm = norm if spec.final_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        plan: MaskPlan,
        layers: Iterable[int] = (),
        angles: Tensor | None = None,
        places: Tensor | None = None,
        keys: Tensor | None = None,
        coordinates: Tensor | None = None,
    ) -> Encoded:
        """Encode packed visible tokens.

        Args:
            x: (B, V, D) embedded tokens with positions, in the order of `plan`.
            plan: says which of the V exist.
            layers: numbers of blocks (0 = first) whose output is kept in `Encoded.layers`.
            angles: (B, V, E / 2) of rotary positions; None: no modality has them.
            places: (B, V, D) positions that are added again before every block but the first.
            keys: (B,) int64 for `path_factors`; None: the whole network, as for inference.
            coordinates: (1 or B, V, 2) of the tokens, for `relative_bias`.
        """
        is_valid = plan.is_valid
        count = self.spec.class_tokens
        if self.prefix is not None:
            prefix = self.prefix if self.prefix_positions is None else self.prefix + self.prefix_positions
            x = torch.cat([prefix.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
            if is_valid is not None:
                is_valid = torch.cat([is_valid.new_ones(len(x), count), is_valid], dim=1)
        if self.input_norm is not None:
            x = self.input_norm(x)
        mask = key_mask(is_valid)
        if self.spec.causal:
            earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            mask = earlier[None, None] if mask is None else mask & earlier
        turn = None
        if angles is not None:  # prefix tokens are nowhere: angle 0
            angles = torch.cat([angles.new_zeros(len(x), count, angles.shape[-1]), angles], dim=1).unsqueeze(1)
            turn = (angles.cos(), angles.sin())
        masks = [mask]
        if self.relative_biases:
            masks = [_joined(bias(coordinates), mask) for bias in self.relative_biases]
        kept, wanted = {}, set(layers)
        paths = path_factors(keys, self.spec.drop_path, self.spec.depth, "backbone/paths")
        for number, block in enumerate(self.blocks):
            if places is not None and number:
                x = x + F.pad(places, (0, 0, count, 0))
            x = block(x, masks[number % len(masks)], turn=turn, paths=paths[number])
            if number in wanted:
                kept[number] = x
        x = self.norm(x)
        return Encoded(x, count, plan, kept, keys)
