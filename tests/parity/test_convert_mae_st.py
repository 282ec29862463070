"""MAE-ST's layout, against the model written again with its names and shapes.

Letters: B clips, T, H, W tubes along the axes, D width.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from m3 import convert
from m3.errors import M3Error
from tests.parity.published import (
    assert_equal,
    difference,
    drawn_plan,
    encode_all,
    encoded_view,
    pixels,
    randomised,
    signals_of,
    tensors_in,
    tokens_of,
)
from tests.parity.published_blocks import Block, attend


class Attention(nn.Module):
    """Queries, keys and values each by themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(self.q(x), self.k(x), self.v(x), self.heads))


def blocks(width: int, heads: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList([Block(width, heads, 4 * width, attention=Attention(width, heads)) for _ in range(depth)])


class PatchEmbed(nn.Module):
    def __init__(self, width: int, tube: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, tube, stride=tube)


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, *shape))


class MaeSt(nn.Module):
    def __init__(self, tube: tuple[int, int, int], grid: tuple[int, int, int], predicted: int) -> None:
        super().__init__()
        width, inner, (t, h, w) = 192, 32, grid
        self.patch_embed = PatchEmbed(width, tube)
        self.cls_token, self.decoder_cls_token = zeros(1, width), zeros(1, inner)
        self.pos_embed_spatial, self.decoder_pos_embed_spatial = zeros(h * w, width), zeros(h * w, inner)
        self.pos_embed_temporal, self.decoder_pos_embed_temporal = zeros(t, width), zeros(t, inner)
        self.pos_embed_class, self.decoder_pos_embed_class = zeros(1, width), zeros(1, inner)
        self.blocks, self.norm = blocks(width, 3, 2), nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed, self.mask_token = nn.Linear(width, inner), zeros(1, inner)
        self.decoder_blocks, self.decoder_norm = blocks(inner, 16, 2), nn.LayerNorm(inner, eps=1e-6)
        self.decoder_pred = nn.Linear(inner, predicted * tube[1] * tube[2] * 3)

    def encode(self, clips: Tensor, visible: Tensor) -> Tensor:
        """States of the class token and of the tubes seen (B, 1 + S, D)."""
        x = self.patch_embed.proj(clips).flatten(2).transpose(1, 2)
        x = x + places(self.pos_embed_temporal, self.pos_embed_spatial)
        x = torch.stack([row[seen] for row, seen in zip(x, visible, strict=True)])
        x = torch.cat([(self.cls_token + self.pos_embed_class).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, clips: Tensor, visible: Tensor) -> Tensor:
        """Predict all tubes -> (B, T H W, (frame, row, column, channel))."""
        x = self.decoder_embed(self.encode(clips, visible)[:, 1:])
        place = places(self.decoder_pos_embed_temporal, self.decoder_pos_embed_spatial)
        full = self.mask_token.expand(len(x), place.shape[1], -1).clone()
        for sample, (states, seen) in enumerate(zip(x, visible, strict=True)):
            full[sample, seen] = states
        start = self.decoder_cls_token + self.decoder_pos_embed_class
        x = torch.cat([start.expand(len(x), -1, -1), full + place], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def places(time: Tensor, space: Tensor) -> Tensor:
    """(1, T, D) and (1, H W, D) -> (1, T H W, D)."""
    return (time.unsqueeze(2) + space.unsqueeze(1)).flatten(1, 2)


CASES = [((2, 4, 4), (3, 2, 2), 1), ((2, 3, 3), (2, 3, 3), 2)]


def saved(folder: Path, tube, grid, predicted) -> tuple[Path, MaeSt]:
    theirs = randomised(MaeSt(tube, grid, predicted), seed=13)
    torch.save({"model_state": theirs.state_dict(), "epoch": 99}, folder / "theirs.pyth")
    return folder / "theirs.pyth", theirs


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.parametrize(("tube", "grid", "predicted"), CASES)
def test_predictions_are_theirs_and_the_file_comes_back_equal(tmp_path: Path, tube, grid, predicted, dtype, near):
    path, theirs = saved(tmp_path, tube, grid, predicted)
    found = convert.convert(path, ["objectives.reconstruct.masking.visible=5"])
    assert (found.format, found.left) == ("mae_st", {})
    convert.save(found.model, tmp_path / "ours.pth", "mae_st")
    assert_equal(tensors_in(tmp_path / "ours.pth"), theirs.state_dict())
    model, theirs = found.model.to(dtype), theirs.to(dtype)
    raw = {"video": pixels(2, tuple(n * m for n, m in zip(tube, grid, strict=True)))}
    plan, signals = drawn_plan(model, raw), signals_of(model, raw, dtype)
    asked = plan.target["video"]
    own = model.objectives["reconstruct"].predict(
        "video", encoded_view(model, signals, plan), tokens_of(model, signals), asked
    )
    own = own.unflatten(-1, (3, predicted, *tube[1:])).permute(0, 1, 3, 4, 5, 2).flatten(2)
    with torch.no_grad():
        everything = theirs(signals["video"], plan.visible["video"])
    expected = torch.stack([row[index] for row, index in zip(everything, asked, strict=True)])
    assert difference(own, expected) < near


def test_the_encoder_alone_gives_their_states(tmp_path: Path):
    path, theirs = saved(tmp_path, *CASES[0])
    encoder = {n: x for n, x in theirs.state_dict().items() if not n.startswith(("decoder", "mask"))}
    torch.save({"model": encoder}, path)
    model = convert.load(path)
    raw = {"video": pixels(2, (6, 8, 8))}
    signals = signals_of(model, raw, torch.float32)
    with torch.no_grad():
        expected = theirs.encode(signals["video"], torch.arange(12).expand(2, -1))
    assert difference(encode_all(model, signals), expected) < 1e-6
    torch.save({"model": encoder | {"head.weight": torch.ones(5, 192)}}, path)
    assert sorted(convert.convert(path).left) == ["head.weight", "norm.bias", "norm.weight"]


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path: Path):
    path, theirs = saved(tmp_path, *CASES[0])
    tensors = theirs.state_dict()
    torch.save(tensors | {"pos_embed": torch.ones(1)}, path)
    with pytest.raises(M3Error, match="no place for `pos_embed`"):
        convert.load(path)
    del tensors["decoder_pos_embed_class"]
    torch.save(tensors, path)
    with pytest.raises(M3Error, match="`decoder_pos_embed_class` is missing"):
        convert.load(path)


def test_a_decoder_that_sees_the_encoders_class_token_can_not_be_written(tmp_path: Path):
    path, _ = saved(tmp_path, *CASES[0])
    model = convert.load(path, ["objectives.reconstruct.decoder.own_class=false"])
    with pytest.raises(M3Error, match="own_class: true"):
        convert.save(model, tmp_path / "back.pth", "mae_st")
