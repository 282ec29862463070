"""VideoMAE's own layout, against the model written again with its names and shapes.

Letters: B clips, N tubes, D width of the encoder, E of the decoder.
"""

import math
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
from tests.parity.published_blocks import Attention, Block


def table(count: int, width: int) -> Tensor:
    """Sines and cosines in turn of the number of the tube, by hand."""
    rows = [[n / 10000 ** (2 * (j // 2) / width) for j in range(width)] for n in range(count)]
    return torch.tensor([[math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(row)] for row in rows])


def block(width: int, heads: int, hidden: int) -> Block:
    return Block(width, heads, hidden, attention=Attention(width, heads, "query and value"))


class Embedding(nn.Module):
    def __init__(self, width: int, tube: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, tube, stride=tube)


class Encoder(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, tube: tuple[int, int, int], has_norm: bool = True) -> None:
        super().__init__()
        self.patch_embed = Embedding(width, tube)
        self.blocks = nn.ModuleList([block(width, heads, 4 * width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6) if has_norm else nn.Identity()

    def forward(self, clips: Tensor, visible: Tensor) -> Tensor:
        """Clips (B, C, T, H, W) and numbers of the tubes seen (B, S) -> (B, S, D)."""
        x = self.patch_embed.proj(clips).flatten(2).transpose(1, 2)
        x = x + table(x.shape[1], x.shape[2]).to(x.dtype)
        x = torch.stack([row[seen] for row, seen in zip(x, visible, strict=True)])
        for part in self.blocks:
            x = part(x)
        return self.norm(x)


class Decoder(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(width, heads, 4 * width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)


class VideoMae(nn.Module):
    """Width 192 has 3 heads as the small model's; the decoder's are given."""

    def __init__(self, tube: tuple[int, int, int], width: int = 192, inner: int = 20, heads: int = 5) -> None:
        super().__init__()
        self.encoder = Encoder(width, 2, 3, tube)
        self.decoder = Decoder(inner, 2, heads, math.prod(tube) * 3)
        self.encoder_to_decoder = nn.Linear(width, inner, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inner))

    def forward(self, clips: Tensor, visible: Tensor, asked: Tensor) -> Tensor:
        """Predict the tubes asked for -> (B, T, (frame, row, column, channel))."""
        x = self.encoder_to_decoder(self.encoder(clips, visible))
        count = clips[0, 0].numel() // math.prod(self.encoder.patch_embed.proj.kernel_size)
        places = table(count, x.shape[2]).to(x.dtype)
        x = torch.cat([x + places[visible], self.mask_token + places[asked]], dim=1)
        for part in self.decoder.blocks:
            x = part(x)
        return self.decoder.head(self.decoder.norm(x[:, -asked.shape[1] :]))


SMALL = ((2, 4, 4), 4, 12)
OTHER = ((3, 2, 4), 9, 8)


def build(tube: tuple[int, int, int], **settings) -> VideoMae:
    return randomised(VideoMae(tube, **settings), seed=9)


def given(frames: int, size: int) -> list[str]:
    return [
        f"modalities.video.frames={frames}",
        f"modalities.video.size={size}",
        "objectives.reconstruct.decoder.heads=5",
    ]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.parametrize(("tube", "frames", "size"), [SMALL, OTHER])
@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_predictions_are_theirs_and_the_file_comes_back_equal(tmp_path: Path, tube, frames, size, wrapper, dtype, near):
    theirs = build(tube)
    torch.save({wrapper: theirs.state_dict(), "epoch": 3}, tmp_path / "theirs.pth")
    found = convert.convert(tmp_path / "theirs.pth", given(frames, size))
    assert found.format == "videomae"
    assert not found.left
    convert.save(found.model, tmp_path / "ours.pth", "videomae")
    assert_equal(tensors_in(tmp_path / "ours.pth"), theirs.state_dict())
    model, theirs = found.model.to(dtype), theirs.to(dtype)
    raw = {"video": pixels(2, (frames, size, size))}
    plan, signals = drawn_plan(model, raw), signals_of(model, raw, dtype)
    visible, asked = plan.visible["video"], plan.target["video"]
    own = model.objectives["reconstruct"].predict(
        "video", encoded_view(model, signals, plan), tokens_of(model, signals), asked
    )
    own = own.unflatten(-1, (3, *tube)).permute(0, 1, 3, 4, 5, 2).flatten(2)
    with torch.no_grad():
        expected = theirs(signals["video"], visible, asked)
    assert difference(own, expected) < near


@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone."])
@pytest.mark.parametrize("has_norm", [True, False])
def test_an_encoder_alone_is_read_and_its_classifier_left_out(tmp_path: Path, prefix, has_norm):
    theirs = randomised(Encoder(192, 2, 3, (2, 4, 4), has_norm), seed=4)
    tensors = {f"{prefix}{name}": x for name, x in theirs.state_dict().items()}
    torch.save({"model": tensors | {"head.weight": torch.ones(2, 192)}}, tmp_path / "tuned.pth")
    found = convert.convert(tmp_path / "tuned.pth", given(4, 8)[:2])
    assert list(found.left) == ["head.weight"]
    assert any("modalities.video.frames=4" in note for note in found.notes)
    raw = {"video": pixels(2, (4, 8, 8))}
    signals = signals_of(found.model, raw, torch.float32)
    with torch.no_grad():
        expected = theirs(signals["video"], torch.arange(8).expand(2, -1))
    assert difference(encode_all(found.model, signals), expected) < 1e-6
    convert.save(found.model, tmp_path / "ours.pth", "videomae")
    assert_equal(tensors_in(tmp_path / "ours.pth"), theirs.state_dict())


def test_a_file_goes_on_to_transformers_only_where_its_norm_can_be_said(tmp_path: Path):
    """The decoder's last norm has 1e-6 here and 1e-5 in transformers: nearly the same, which must be asked for."""
    torch.save({"model": build((2, 4, 4)).state_dict()}, tmp_path / "theirs.pth")
    model = convert.load(tmp_path / "theirs.pth", given(4, 12))
    with pytest.raises(M3Error, match="eps of the norm before its head"):
        convert.save(model, tmp_path / "out", "video_mae")
    model = convert.load(tmp_path / "theirs.pth", [*given(4, 12), "objectives.reconstruct.decoder.norm_eps=1e-5"])
    convert.save(model, tmp_path / "out", "video_mae")
    assert_equal(convert.load(tmp_path / "out").state_dict(), model.state_dict())


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path: Path):
    tensors = build((2, 4, 4)).state_dict()
    torch.save({"model": tensors | {"pos_embed": torch.ones(1)}}, tmp_path / "theirs.pth")
    with pytest.raises(M3Error, match="no place for `pos_embed`"):
        convert.load(tmp_path / "theirs.pth", given(4, 12))
    del tensors["encoder.blocks.1.attn.v_bias"]
    torch.save({"model": tensors}, tmp_path / "theirs.pth")
    with pytest.raises(M3Error, match=r"`encoder\.blocks\.1\.attn\.v_bias` is missing"):
        convert.load(tmp_path / "theirs.pth", given(4, 12))


def test_another_model_of_ours_can_not_be_written(tmp_path: Path):
    torch.save({"model": build((2, 4, 4)).state_dict()}, tmp_path / "theirs.pth")
    for change, said in (
        ("backbone.mlp=quick_gelu", "backbone.mlp is quick_gelu"),
        ("modalities.video.positions.type=sincos", "flat_sincos"),
        ("objectives.reconstruct.targets.video.target.normalise=true", "normalise: channel"),
    ):
        eps = "objectives.reconstruct.targets.video.target.eps=1e-6"
        model = convert.load(tmp_path / "theirs.pth", [*given(4, 12), change, eps])
        with pytest.raises(M3Error, match=said):
            convert.save(model, tmp_path / "back.pth", "videomae")
