"""Coders of autoencoders: from the embedded tokens of a modality to the vectors of its codes, and back.

A coder reads tokens after `Tokenizer.embed`, so images, depth, class maps, spectrograms, feature maps and vectors look
alike.
Letters: B batch, N content tokens, M codes, D width, R rows and C columns of a grid of tokens.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from m3.backbone import MLP, Backbone, BackboneSpec, Block
from m3.errors import M3Error
from m3.plugins import Strict, Tokenizer
from m3.positions import additive
from m3.types import MaskPlan, Tokens


class Coder(Protocol):
    """What every coder of this file provides.

    Attributes:
        reference: codes along each position axis at the size the model is built for.
        is_two_way: False: there is no decoder, it only makes codes.
    """

    reference: tuple[int, ...]
    is_two_way: bool

    def encode(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Turn embedded tokens (B, N, D) into (B, M, D)."""
        ...

    def decode(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Turn what codes stand for (B, M, D) into a state for each of the N tokens (B, N, D)."""
        ...

    def is_valid(self, tokens: Tokens) -> Tensor | None:
        """Return (B, M) bool, False for codes of tokens that don't exist; None: all do."""
        ...


class Vit(nn.Module):
    """A ViT on both sides, one code per token (ViT-VQGAN, Yu et al. 2021; 4M for semantic and feature maps).

    The encoder is the `backbone` section without class tokens, the decoder blocks of the same width.
    """

    class Spec(Strict):
        """Settings of `type: vit`.

        Attributes:
            depth: blocks of the decoder; null: there is none, so that it only makes codes (published tokenizers whose
                decoder is a diffusion model).
            tail: what stands behind the blocks on both sides: `norm`, in the encoder as `backbone.final_norm` says;
                `mlp`: a residual MLP with tanh (ViT-VQGAN, section 3.1; 4M); `none`.
        """

        depth: NonNegativeInt | None = 12
        tail: Literal["norm", "mlp", "none"] = "norm"

    def __init__(self, spec: Spec, backbone: BackboneSpec, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.reference = tokenizer.reference
        width, eps = backbone.width, backbone.norm_eps
        self.positions = additive(tokenizer, width, backbone.axis_order)
        has_norm = backbone.final_norm and spec.tail == "norm"
        self.encoder = Backbone(backbone.model_copy(update={"class_tokens": 0, "final_norm": has_norm}))
        self.tail = _tanh_mlp(backbone) if spec.tail == "mlp" else nn.Identity()
        self.is_two_way = spec.depth is not None
        if spec.depth is None:
            return
        self.decoder_positions = additive(tokenizer, width, backbone.axis_order)
        self.blocks = nn.ModuleList([Block(width, backbone.heads, backbone.mlp_ratio, eps) for _ in range(spec.depth)])
        tails = {"norm": lambda: nn.LayerNorm(width, eps=eps), "mlp": lambda: _tanh_mlp(backbone), "none": nn.Identity}
        self.norm = tails[spec.tail]()

    def encode(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Turn embedded tokens (B, N, D) into (B, N, D)."""
        plan = MaskPlan({}, {}, is_valid=tokens.is_valid)
        return self.tail(self.encoder(x + self.positions(tokens.positions), plan).states)

    def decode(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Turn what codes stand for (B, N, D) into (B, N, D)."""
        x = x + self.decoder_positions(tokens.positions)
        mask = None if tokens.is_valid is None else tokens.is_valid[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def is_valid(self, tokens: Tokens) -> Tensor | None:
        """Return (B, N) bool: a code exists where its token does."""
        return tokens.is_valid


class Conv(nn.Module):
    """Residual convolutions on both sides (VQGAN's, Esser et al. 2021, without its attention and discriminator).

    They work on the grid of tokens, whose projection is their first layer; each stage halves rows and columns, so
    there is one code per 2 ** stages x 2 ** stages tokens. For tokens on the grid that the model is built for.
    """

    class Spec(Strict):
        """Settings of `type: conv`.

        Attributes:
            stages: halvings of the grid.
            blocks: residual blocks before the first stage and after each.
        """

        stages: NonNegativeInt = 1
        blocks: PositiveInt = 2

    is_two_way = True

    def __init__(self, spec: Spec, backbone: BackboneSpec, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.grid = tokenizer.reference
        self.cell = 2**spec.stages
        if len(self.grid) != 2 or any(count % self.cell for count in self.grid):
            raise M3Error(
                f"coder `conv` halves a grid of rows and columns {spec.stages} times, which one of "
                f"{' x '.join(map(str, self.grid)) or 'no'} tokens can't be; use other stages or coder `vit`."
            )
        self.reference = tuple(count // self.cell for count in self.grid)
        width = backbone.width
        down, up = _residuals(width, spec.blocks), _residuals(width, spec.blocks)
        for _ in range(spec.stages):
            down += [nn.Conv2d(width, width, 3, stride=2, padding=1), *_residuals(width, spec.blocks)]
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), *_residuals(width, spec.blocks)]
        self.down = nn.Sequential(*down, nn.GroupNorm(1, width))
        self.up = nn.Sequential(*up, nn.GroupNorm(1, width))

    def encode(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Turn embedded tokens (B, N, D) into (B, M, D)."""
        return self.down(_as_map(x, self.grid)).flatten(2).transpose(1, 2)

    def decode(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Turn what codes stand for (B, M, D) into (B, N, D)."""
        return self.up(_as_map(x, self.reference)).flatten(2).transpose(1, 2)

    def is_valid(self, tokens: Tokens) -> Tensor | None:
        """Return (B, M) bool: a code exists where a token of its cell does."""
        if tokens.is_valid is None:
            return None
        cells = F.max_pool2d(_as_map(tokens.is_valid.unsqueeze(-1).float(), self.grid), self.cell)
        return cells.flatten(1) > 0


class Mlp(nn.Module):
    """Residual MLPs on both sides, every token by itself (4M's coder of global features, its `BottleneckMLP`).

    For vectors, of which a sample has one; with `heads` of the quantiser each is told by several codes.
    """

    class Spec(Strict):
        """Settings of `type: mlp`.

        Attributes:
            depth: blocks of the encoder, and of the decoder (4M: 6 of width 1024).
        """

        depth: PositiveInt = 6

    is_two_way = True

    def __init__(self, spec: Spec, backbone: BackboneSpec, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.reference = tokenizer.reference
        self.encoder, self.decoder = _mlps(backbone, spec.depth), _mlps(backbone, spec.depth)

    def encode(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Turn embedded tokens (B, N, D) into (B, N, D)."""
        return self.encoder(x)

    def decode(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Turn what codes stand for (B, N, D) into (B, N, D)."""
        return self.decoder(x)

    def is_valid(self, tokens: Tokens) -> Tensor | None:
        """Return (B, N) bool: a code exists where its token does."""
        return tokens.is_valid


class ResidualMlp(nn.Module):
    """x + mlp(norm(x)), with a GELU inside if nothing else is given."""

    def __init__(self, width: int, mlp_ratio: float, eps: float, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, int(width * mlp_ratio), activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return x + self.mlp(self.norm(x))


def _tanh_mlp(spec: BackboneSpec) -> ResidualMlp:
    return ResidualMlp(spec.width, spec.mlp_ratio, spec.norm_eps, nn.Tanh())


def _mlps(spec: BackboneSpec, count: int) -> nn.Sequential:
    blocks = [ResidualMlp(spec.width, spec.mlp_ratio, spec.norm_eps) for _ in range(count)]
    return nn.Sequential(*blocks, nn.LayerNorm(spec.width, eps=spec.norm_eps))


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(1, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, R, C) to (B, D, R, C)."""
        return x + self.layers(x)


def _residuals(width: int, count: int) -> list[nn.Module]:
    return [Residual(width) for _ in range(count)]


def _as_map(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Lay tokens (B, N, D) out on their grid: (B, D, R, C)."""
    if x.shape[1] != grid[0] * grid[1]:
        raise M3Error(
            f"coder `conv` reads the {grid[0]} x {grid[1]} tokens it was built for, got {x.shape[1]}; "
            f"resize the signal."
        )
    return x.transpose(1, 2).unflatten(2, grid)
