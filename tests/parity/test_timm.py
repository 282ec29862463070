"""The encoder with everything visible is timm's ViT, given the same weights and a fixed sin-cos table."""

import math

import pytest
import torch

from m3.config import M3Config
from m3.model import M3Model
from m3.types import Batch

timm = pytest.importorskip("timm", reason="parity needs timm")


def mae_table(width: int, rows: int, columns: int) -> torch.Tensor:
    """MAE's positions by hand: half of the channels per axis, x first, each half [sines | cosines]."""
    count = width // 4
    table = torch.zeros(rows * columns, width, dtype=torch.float64)
    for y in range(rows):
        for x in range(columns):
            for i in range(count):
                for axis, at in enumerate((x, y)):
                    angle = at / 10000 ** (i / count)
                    table[y * columns + x, axis * 2 * count + i] = math.sin(angle)
                    table[y * columns + x, axis * 2 * count + count + i] = math.cos(angle)
    return table.float()


def build_pair(size: tuple[int, int], patch: tuple[int, int], width: int, depth: int, heads: int, final_norm: bool):
    """Return timm's ViT with random weights of all parameters, and M3's with a copy of them."""
    torch.manual_seed(width)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        global_pool="",
        final_norm=final_norm,
    ).eval()
    assert theirs.blocks[0].norm1.eps == 1e-6
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5 + is_scale)
        table = mae_table(width, size[0] // patch[0], size[1] // patch[1])
        theirs.pos_embed.copy_(torch.cat([torch.zeros(1, width), table]).unsqueeze(0))
    ours = M3Model(
        M3Config(
            modalities={"image": {"type": "image", "size": size, "tokenizer": {"type": "patch", "size": patch}}},
            backbone={"width": width, "depth": depth, "heads": heads, "final_norm": final_norm},
            objectives={"reconstruct": {"type": "reconstruct", "targets": {"image": {}}}},
        )
    ).eval()
    renamed = {}
    for name, tensor in theirs.state_dict().items():
        if name == "pos_embed":
            continue
        name = name.replace("attn.qkv", "attention.qkv").replace("attn.proj", "attention.projection")
        if name == "patch_embed.proj.weight":
            tensor = tensor.reshape(width, -1)
        if name.startswith("patch_embed.proj"):
            name = name.replace("patch_embed.proj", "tokenizers.image.projection")
        elif name == "cls_token":
            name, tensor = "backbone.prefix", tensor[0]
        else:
            name = f"backbone.{name}"
        renamed[name] = tensor
    missing, unexpected = ours.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all(name.startswith("objectives.") for name in missing)
    return theirs, ours


@pytest.mark.parametrize(
    ("size", "patch", "width", "depth", "heads", "final_norm"),
    [
        ((32, 32), (8, 8), 48, 3, 4, True),
        ((32, 56), (8, 8), 64, 2, 2, True),
        ((24, 40), (4, 8), 32, 2, 8, False),
    ],
    ids=["square", "non-square", "non-square patch, no final norm"],
)
def test_encoder_equals_timm(size, patch, width, depth, heads, final_norm):
    theirs, ours = build_pair(size, patch, width, depth, heads, final_norm)
    generator = torch.Generator().manual_seed(3)
    batch = Batch(
        {"image": torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator)}, keys=torch.arange(2)
    )
    with torch.no_grad():
        expected, blocks = theirs.forward_intermediates(
            ours.modalities["image"].normalise(batch.signals["image"]), output_fmt="NLC", return_prefix_tokens=True
        )
        expected_all = theirs.forward_features(ours.modalities["image"].normalise(batch.signals["image"]))
    encoded = ours.encode(batch, layers=tuple(range(depth)))
    torch.testing.assert_close(encoded.sequence, expected_all, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded.sequence, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded.prefix, expected_all[:, :1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded.pooled, expected_all[:, 1:].mean(1), rtol=1e-5, atol=1e-5)
    for number, (patches, prefix) in enumerate(blocks):
        both = torch.cat([prefix, patches], dim=1)
        torch.testing.assert_close(encoded.layers[number], both, rtol=1e-5, atol=1e-5)


def test_the_comparison_sees_a_swapped_axis():
    theirs, ours = build_pair((32, 48), (8, 8), 32, 1, 2, True)
    x = torch.arange(2 * 3 * 32 * 48).reshape(2, 3, 32, 48).remainder(251).to(torch.uint8)
    ours.positions["image"].axis_order = "yx"
    with torch.no_grad():
        expected = theirs.forward_features(ours.modalities["image"].normalise(x))
    found = ours.encode(Batch({"image": x}, keys=torch.arange(2))).sequence
    assert (found - expected).abs().max() > 0.1
