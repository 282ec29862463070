"""What a frozen network or tokenizer makes of the clean picture as a target: its values, and that it stays outside."""

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.model import M3Model
from m3.teachers import open_teacher
from m3.tokenizer_model import M3Tokenizer
from m3.types import Batch

NAME, SIZE, PATCH = "vit_tiny_patch16_224", 32, 8
IMAGE = {"type": "image", "size": SIZE, "tokenizer": {"type": "patch", "size": PATCH}}
SMALL = {"width": 16, "depth": 1, "heads": 2}
HIDE = {"type": "fixed", "visible": 6, "hidden": "replace"}
BATCH = Batch(
    {"image": (torch.arange(3 * 3 * SIZE * SIZE) * 7 % 251).to(torch.uint8).reshape(3, 3, SIZE, SIZE)}, torch.arange(3)
)


def build(target: dict, loss: str) -> M3Model:
    spec = {"of": "image", "target": target, "loss": loss}
    objective = {"type": "reconstruct", "masking": HIDE, "decoder": {"type": "head"}, "targets": {"it": spec}}
    return M3Model(M3Config(modalities={"image": IMAGE}, backbone=SMALL, objectives={"guess": objective}))


def heads_by_hand(network: torch.nn.Module, x: Tensor) -> Tensor:
    """Attention of the class token in the last block, head by head."""
    block = network.blocks[-1]
    q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    rows = []
    for head in range(block.attn.num_heads):
        part = slice(head * 64, (head + 1) * 64)
        rows.append((q[:, 0, part].unsqueeze(1) @ k[:, :, part].transpose(1, 2)).squeeze(1).div(8).softmax(-1))
    return torch.stack(rows).mean(0)[:, 1:]


def test_layers_and_attention_are_those_of_the_networks_own_blocks() -> None:
    teacher = open_teacher(f"timm:{NAME}", None, (SIZE, SIZE))
    pixels = BATCH.signals["image"]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (teacher.mean, teacher.std))
    network = teacher.network
    with torch.no_grad():
        x = network._pos_embed(network.patch_embed((pixels.float() / 255 - mean) / std))
        states = []
        for block in network.blocks:
            x = block(x)
            states.append(x)
        attention = heads_by_hand(network, states[-2])
    found = teacher.layers(pixels, 3)
    assert found.shape == (3, 3, 1 + 4, 192)
    torch.testing.assert_close(found, torch.stack(states[-3:]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.attention(pixels), attention, rtol=1e-5, atol=1e-6)
    assert not network.blocks[-1].attn._forward_pre_hooks


def test_clips_layers_and_attention() -> None:
    teacher = open_teacher("open_clip:ViT-B-32", None, (64, 64))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    layers, attention = teacher.layers(pixels, 2), teacher.attention(pixels)
    block = teacher.network.transformer.resblocks[-1]
    with torch.no_grad():
        torch.testing.assert_close(block(layers[0]), layers[1], rtol=1e-4, atol=1e-4)
        x = block.ln_1(layers[0])
        _, weights = block.attn(x, x, x, need_weights=True)
    torch.testing.assert_close(attention, weights[:, 0, 1:], rtol=1e-4, atol=1e-6)


def test_features_of_a_teacher_are_targets_of_hidden_tokens_and_stay_outside(tmp_path: Path) -> None:
    model = build({"type": "teacher", "model": f"timm:{NAME}", "size": 64}, "smooth_l1")
    network = timm.create_model(NAME, num_classes=0, img_size=64)
    network.load_state_dict(open_teacher(f"timm:{NAME}", None, (64, 64)).network.state_dict())
    pixels = F.interpolate(BATCH.signals["image"].float(), (64, 64), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.no_grad():
        features = network.eval().forward_features((pixels / 255 - 0.5) / 0.5)[:, 1:]
    expected = (features - features.mean(-1, keepdim=True)) / (
        features.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    prepared = model.prepare(BATCH)
    (plan,) = prepared.plans.values()
    index = plan.target["image"]
    truth = model.objectives["guess"].providers["it"](prepared.tokens["image"], index)
    wanted = expected.gather(1, index.unsqueeze(-1).expand(-1, -1, 192))
    torch.testing.assert_close(truth, wanted, rtol=1e-3, atol=1e-3)

    output = model(prepared)
    states = model.encode_tokens(prepared.tokens, plan).states.gather(1, index.unsqueeze(-1).expand(-1, -1, 16))
    head = model.objectives["guess"].decoders["it"].output
    error = (states @ head.weight.T + head.bias - truth).abs()
    by_hand = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
    torch.testing.assert_close(output.loss, by_hand)
    assert output.parts.parts["guess/it"].count == model.counts(prepared)["guess/it"] == 3 * 10 * 192

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == dict(model.named_parameters()).keys()
    assert sum(v.numel() for v in saved.values()) == sum(p.numel() for p in model.parameters()) < 20_000


def test_a_prediction_of_features_is_no_picture() -> None:
    model = build({"type": "teacher", "model": f"timm:{NAME}", "size": 64}, "mse")
    with pytest.raises(M3Error, match="no objective that predicts signals"):
        model.reconstruct(BATCH)


@pytest.mark.parametrize(
    ("target", "loss", "text"),
    [
        (
            {"model": f"timm:{NAME}"},
            "mse",
            "makes 4 tokens of a picture of 32 x 32, the model 16; choose another `size`",
        ),
        ({"model": f"timm:{NAME}", "size": 64}, "cross_entropy", "`it` holds values, which loss `cross_entropy`"),
        ({"model": "timm:no_such_net", "size": 64}, "mse", "timm knows no model `no_such_net`"),
    ],
)
def test_wrong_teachers_are_refused(target: dict, loss: str, text: str) -> None:
    with pytest.raises(M3Error, match=text):
        build({"type": "teacher", **target}, loss)


def test_a_modality_that_is_no_picture_has_no_teacher() -> None:
    model = build({"type": "teacher", "model": f"timm:{NAME}", "size": 64}, "mse")
    provider = model.objectives["guess"].providers["it"]
    provider.tokenizer.modality = M3Model(
        M3Config(
            modalities={"depth": {"type": "depth", "size": SIZE, "tokenizer": {"type": "patch", "size": PATCH}}},
            backbone=SMALL,
            objectives={"guess": {"type": "reconstruct", "decoder": {"type": "head"}, "targets": {"depth": {}}}},
        )
    ).modalities["depth"]
    with pytest.raises(M3Error, match="`Depth` holds no pictures that a teacher could look at"):
        provider(model.tokenise(BATCH)["image"], torch.zeros(3, 1, dtype=torch.long))


# -- codes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer with 16 codes at 4 x 4 places."""
    objective = {
        "type": "autoencode",
        "of": "image",
        "coder": {"type": "vit", "depth": 1},
        "quantiser": {"type": "fsq", "levels": [4, 4]},
    }
    torch.manual_seed(0)
    model = M3Model(M3Config(modalities={"image": IMAGE}, backbone=SMALL, objectives={"codes": objective}))
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save_pretrained(folder)
    return folder


def test_codes_of_hidden_tokens_are_targets_and_can_be_drawn(tokenizer: Path, tmp_path: Path) -> None:
    model = build({"type": "codes", "tokenizer": str(tokenizer)}, "cross_entropy")
    prepared = model.prepare(BATCH)
    (plan,) = prepared.plans.values()
    index = plan.target["image"]
    codes = M3Tokenizer.from_pretrained(tokenizer).encode(BATCH)
    assert len(codes.unique()) > 3
    provider = model.objectives["guess"].providers["it"]
    assert torch.equal(provider(prepared.tokens["image"], index).squeeze(-1), codes.gather(1, index))

    scores = model.objectives["guess"].decoders["it"](
        model.encode_tokens(prepared.tokens, plan), prepared.tokens, index
    )
    losses = [
        math.log(sum(math.exp(v) for v in row)) - row[int(code)]
        for rows, wanted in zip(scores.tolist(), codes.gather(1, index).tolist(), strict=True)
        for row, code in zip(rows, wanted, strict=True)
    ]
    assert model(prepared).loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    result = model.reconstruct(BATCH)
    assert result.predicted["it"].shape == (3, 3, SIZE, SIZE)
    best = result.output["it"].argmax(-1)
    torch.testing.assert_close(result.predicted["it"], M3Tokenizer.from_pretrained(tokenizer).decode(best))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == dict(model.named_parameters()).keys()


def test_a_tokenizer_of_another_grid_is_refused(tokenizer: Path) -> None:
    objective = {
        "type": "reconstruct",
        "masking": HIDE,
        "decoder": {"type": "head"},
        "targets": {"it": {"of": "image", "target": {"type": "codes", "tokenizer": str(tokenizer)}}},
    }
    image = {**IMAGE, "tokenizer": {"type": "patch", "size": 4}}
    with pytest.raises(M3Error, match=r"makes 16 codes of .* but the model 64 tokens of .*patches of one size"):
        M3Model(M3Config(modalities={"image": image}, backbone=SMALL, objectives={"guess": objective}))
