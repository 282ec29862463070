"""unilm's BEiT and SimMIM's ViT, written from the papers and the published names, and what their tests share.

Letters: B batch, N patches, D width, H heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from m3 import M3Model
from m3.check import _stand_in
from m3.network import Prepared
from tests.parity.published import normalised, pictures, randomised
from tests.parity.published_blocks import Mlp


def tokenizer_for(folder: Path) -> str:
    """Return an override that names a tokenizer of 16 codes for pictures as these."""
    half = (0.5, 0.5, 0.5)
    image = {"type": "image", "size": 32, "mean": half, "std": half, "tokenizer": {"type": "patch", "size": 8}}
    path = _stand_in({"image": image}, "image", folder / "tokenizer")
    return f"objectives.reconstruct.targets.codes.target.tokenizer={path}"


def hidden_and_codes(model: M3Model, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Return (B, N) bool, True for hidden patches, and the codes of these, one after the other."""
    (plan,) = prepared.plans.values()
    asked, objective = plan.target["image"], cast(Any, model.objectives["reconstruct"])
    is_hidden = torch.zeros(len(asked), 16, dtype=torch.bool).scatter(1, asked, True)
    codes = objective.providers["codes"](prepared.tokens["image"], asked)
    return is_hidden, codes.flatten()


def assert_close_in_both(model: M3Model, theirs: nn.Module, forward: Any) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model, _ = model.to(dtype=dtype), theirs.to(dtype=dtype)  # type: ignore[call-arg]
        batch = pictures(model)
        with torch.no_grad():
            expected = forward(normalised(model, batch).to(dtype))
        torch.testing.assert_close(model.encode(batch).sequence, expected, rtol=0, atol=tolerance)


class Bias(nn.Module):
    """A table and the number of the entry for each pair; the last three are for the class token."""

    relative_position_index: Tensor

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, heads))
        index = torch.zeros(side**2 + 1, side**2 + 1, dtype=torch.long)
        for query in range(side**2):
            for key in range(side**2):
                down, right = query // side - key // side, query % side - key % side
                index[query + 1, key + 1] = (down + side - 1) * (2 * side - 1) + right + side - 1
        index[0, :], index[:, 0] = (2 * side - 1) ** 2, (2 * side - 1) ** 2 + 1
        index[0, 0] = (2 * side - 1) ** 2 + 2
        self.register_buffer("relative_position_index", index)

    def forward(self) -> Tensor:
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class Attention(Bias):
    """Queries and values with biases; the table is its own where it has one."""

    def __init__(self, width: int, heads: int, side: int | None) -> None:
        super().__init__(side or 1, heads)
        self.heads, self.has_table = heads, side is not None
        if not self.has_table:
            del self.relative_position_bias_table, self.relative_position_index
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x).chunk(3, -1)
        bias, states = super().forward() if bias is None else bias, []
        for head, (one, two, three) in enumerate(
            zip(*(part.chunk(self.heads, -1) for part in (q + self.q_bias, k, v + self.v_bias)), strict=True)
        ):
            states.append((one @ two.transpose(1, 2) * one.shape[-1] ** -0.5 + bias[head]).softmax(-1) @ three)
        return self.proj(torch.cat(states, -1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, side: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads, side), Mlp(width, 4 * width)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x), bias)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """The encoder in pre-training (`is_shared`) or after fine-tuning, without its head."""

    def __init__(self, size: int, is_shared: bool, width: int = 128, heads: int = 4, patch: int = 8) -> None:
        super().__init__()
        side = size // patch
        self.cls_token, self.patch_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        if is_shared:
            self.mask_token, self.rel_pos_bias = nn.Parameter(torch.zeros(1, 1, width)), Bias(side, heads)
            self.norm = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList([Block(width, heads, None if is_shared else side) for _ in range(2)])

    def forward(self, pixels: Tensor, is_hidden: Tensor | None = None) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)  # type: ignore[operator]
        if is_hidden is not None:
            x = torch.where(is_hidden[..., None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, self.rel_pos_bias() if hasattr(self, "rel_pos_bias") else None)
        return self.norm(x) if hasattr(self, "norm") else x


def in_unilm(size: int, version: int | None) -> Any:
    """BEiT's pre-training of a version with its heads; None: fine-tuned."""
    theirs: Any = Transformer(size, version is not None)
    if version is None:
        theirs.fc_norm, theirs.head = nn.LayerNorm(128), nn.Linear(128, 3)
    else:
        theirs.lm_head = nn.Linear(128, 16)
    if version == 2:
        theirs.cls_pt_layers = nn.ModuleList([Block(128, 4, None) for _ in range(2)])
    return randomised(theirs)


class SimMIM(nn.Module):
    """Xie et al. 2021: hidden patches as mask tokens, a 1 x 1 convolution and a shuffle of its channels to pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = Transformer(size, is_shared=True)
        self.decoder = nn.Sequential(nn.Conv2d(128, 8 * 8 * 3, 1), nn.PixelShuffle(8))

    def forward(self, pixels: Tensor, is_hidden: Tensor) -> Tensor:
        """Return the mean absolute error of all hidden pixels."""
        side = pixels.shape[-1] // 8
        states = self.encoder(pixels, is_hidden)[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        where = is_hidden.unflatten(1, (side, side)).repeat_interleave(8, 1).repeat_interleave(8, 2)
        return (self.decoder(states) - pixels).abs().mean(1)[where].mean()
