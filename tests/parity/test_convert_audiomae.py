"""AudioMAE's encoder, against timm's ViT with its names, one channel and its positions.

Letters: B spectrograms, T, F patches along time and frequency, D width.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3 import convert
from m3.errors import M3Error
from tests.parity.published import assert_equal, difference, encode_all, randomised, tensors_in

timm = pytest.importorskip("timm")


def table(steps: int, bands: int, width: int) -> Tensor:
    """By hand: the first half of the channels tells the band, the second the time; nothing for the class token."""
    count = width // 4
    rows = [[0.0] * width]
    for t in range(steps):
        for f in range(bands):
            angles = [[at / 10000 ** (i / count) for i in range(count)] for at in (f, t)]
            rows.append([wave(a) for axis in angles for wave in (math.sin, math.cos) for a in axis])
    return torch.tensor(rows).unsqueeze(0)


def build(steps: int, patch: tuple[int, int]):
    """timm's ViT; its positions are not learned there."""
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=(steps * patch[0], 8 * patch[1]),
        patch_size=patch,
        in_chans=1,
        embed_dim=192,
        depth=2,
        num_heads=3,
        num_classes=0,
        global_pool="",
    )
    vit = randomised(vit, seed=41)
    vit.pos_embed.data = table(steps, 8, 192)
    return vit


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.parametrize(("steps", "patch"), [(3, (4, 4)), (2, (2, 3))])
def test_states_are_theirs_and_the_file_comes_back_equal(tmp_path: Path, steps, patch, dtype, near):
    """Two times eight is a square as well, four times four; the positions tell that it is none."""
    theirs = build(steps, patch)
    swin = {
        "decoder_blocks.0.attn.qkv.weight": torch.ones(3),
        "decoder_embed.weight": torch.ones(2),
        "mask_token": torch.ones(1),
    }
    torch.save({"model": theirs.state_dict() | swin}, tmp_path / "theirs.pth")
    found = convert.convert(tmp_path / "theirs.pth")
    assert found.format == "audiomae"
    assert sorted(found.left) == sorted(swin)
    convert.save(found.model, tmp_path / "ours.pth", "audiomae")
    assert_equal(tensors_in(tmp_path / "ours.pth"), theirs.state_dict())
    model, theirs = found.model.to(dtype), theirs.to(dtype)
    sound = torch.randn(2, 1, steps * patch[0], 8 * patch[1], generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        expected = theirs(sound)
    assert difference(encode_all(model, {"audio": sound}), expected) < near


def test_a_tuned_model_has_no_norm_behind_its_tokens(tmp_path: Path):
    tensors = build(4, (4, 4)).state_dict()
    tensors = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: x for name, x in tensors.items()
    }
    torch.save({"model": tensors | {"head.bias": torch.ones(2)}}, tmp_path / "theirs.pth")
    found = convert.convert(tmp_path / "theirs.pth")
    assert sorted(found.left) == ["fc_norm.bias", "fc_norm.weight", "head.bias"]
    assert isinstance(found.model.backbone.norm, torch.nn.Identity)


@pytest.mark.parametrize("side", [4, 8])
def test_a_picture_of_one_channel_is_still_a_vit(tmp_path: Path, side):
    """Eight by eight patches have the same table in both, and are taken for a picture."""
    tensors = build(side * side // 8, (4, 4)).state_dict()
    tensors["pos_embed"] = table(side, side, 192)
    torch.save(tensors, tmp_path / "theirs.pth")
    assert convert.convert(tmp_path / "theirs.pth").format == "vit"


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path: Path):
    tensors = build(3, (4, 4)).state_dict()
    torch.save(tensors | {"dist_token": torch.ones(1)}, tmp_path / "theirs.pth")
    with pytest.raises(M3Error, match="no place for `dist_token`"):
        convert.load(tmp_path / "theirs.pth")
    del tensors["blocks.1.norm2.bias"]
    torch.save(tensors, tmp_path / "theirs.pth")
    with pytest.raises(M3Error, match=r"`blocks\.1\.norm2\.bias` is missing"):
        convert.load(tmp_path / "theirs.pth")
