"""Published image encoders read into our model say the same, and go back unchanged: timm's ViT, MAE, ViTMAE."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m3 import M3Model, convert
from m3.errors import M3Error
from m3.types import Batch
from tests.parity.published import quietly, randomised

timm = pytest.importorskip("timm", reason="parity needs timm")
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 3, "num_heads": 3, "num_classes": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": VIT,
    "registers, norms of queries, layer scale, norm before, a classifier": VIT
    | {"img_size": 48, "reg_tokens": 4, "qk_norm": True, "init_values": 0.1, "pre_norm": True, "num_classes": 10},
    "prefix tokens without positions": VIT
    | {"embed_dim": 384, "num_heads": 6, "reg_tokens": 4, "no_embed_class": True},
    "no class token": VIT | {"class_token": False, "global_pool": "avg", "fc_norm": False},
}


def pictures(size: int, count: int = 2) -> Tensor:
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def encoded(model: M3Model, pixels: Tensor) -> Tensor:
    """States of all tokens in float64; the pixels enter as float32, as the reader's do."""
    return model.double().encode(Batch({"image": pixels}, keys=torch.arange(len(pixels)))).sequence


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_vit_of_timm_says_the_same_and_goes_back(variant: str, eps: float, tmp_path: Path) -> None:
    settings = VARIANTS[variant] | {"norm_layer": partial(nn.LayerNorm, eps=eps)}
    theirs = randomised(timm.models.vision_transformer.VisionTransformer(**settings))
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    found = convert.convert(tmp_path / "vit.safetensors", [f"backbone.norm_eps={eps}"])
    assert found.format == "vit"
    assert not found.left
    pixels = pictures(VARIANTS[variant]["img_size"])
    normalised = found.model.modalities["image"].normalise(pixels)
    with torch.no_grad():
        single = theirs.forward_features(normalised)
        expected = theirs.double().forward_features(normalised.double())
    batch = Batch({"image": pixels}, keys=torch.arange(2))
    torch.testing.assert_close(found.model.encode(batch).sequence, single, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded(found.model, pixels), expected, rtol=0, atol=1e-9)
    convert.save(found.model.float(), tmp_path / "back.pth", "vit")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    wanted = theirs.float().state_dict()
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[name], x) for name, x in wanted.items())


def test_another_size_can_be_asked_for(tmp_path: Path) -> None:
    theirs = randomised(timm.models.vision_transformer.VisionTransformer(**VIT))
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    found = convert.convert(tmp_path / "vit.safetensors", ["modalities.image.size=48"])
    assert "image: learned positions go from 4 x 4 to 6 x 6 (interpolated)" in found.notes
    larger = timm.models.vision_transformer.VisionTransformer(**VIT | {"img_size": 48})
    theirs_resized = timm.models.vision_transformer.checkpoint_filter_fn(theirs.state_dict(), larger)
    larger.load_state_dict(theirs_resized)
    pixels = pictures(48)
    with torch.no_grad():
        expected = larger.eval().forward_features(found.model.modalities["image"].normalise(pixels))
    batch = Batch({"image": pixels}, keys=torch.arange(2))
    torch.testing.assert_close(found.model.encode(batch).sequence, expected, rtol=1e-5, atol=1e-5)


# -- MAE --------------------------------------------------------------------------------------------------------


def vit_mae(size: int, eps: float, normalise: bool, decoder: int = 32) -> Any:
    """A ViTMAE of transformers with random weights; its own init leaves the positions at 0."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from m3.foreign.vision import table_of

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    sizes |= {"decoder_hidden_size": decoder, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
    sizes |= {"decoder_intermediate_size": 2 * decoder, "image_size": size, "patch_size": 8, "layer_norm_eps": eps}
    theirs = randomised(ViTMAEForPreTraining(ViTMAEConfig(**sizes, norm_pix_loss=normalise)))
    with torch.no_grad():
        grid = (size // 8, size // 8)
        theirs.vit.embeddings.position_embeddings.copy_(table_of({}, grid, 48, 1))
        theirs.decoder.decoder_pos_embed.copy_(table_of({}, grid, decoder, 1))
    return theirs


@pytest.mark.parametrize(("size", "eps", "normalise"), [(32, 1e-6, True), (48, 1e-3, False)])
def test_vit_mae_of_transformers_has_the_same_loss_and_goes_back(size, eps, normalise, tmp_path: Path) -> None:
    from transformers import AutoModelForPreTraining

    theirs = vit_mae(size, eps, normalise)
    theirs.save_pretrained(tmp_path / "theirs")
    found = convert.convert(tmp_path / "theirs")
    assert (found.format, found.left) == ("vit_mae", {})
    pixels = pictures(size, 3)
    prepared = found.model.prepare(Batch({"image": pixels}, keys=torch.arange(3)))
    (plan,) = prepared.plans.values()
    noise = torch.arange((size // 8) ** 2, dtype=torch.float32).expand(3, -1) + 1000
    noise = noise.scatter(1, plan.visible["image"], plan.visible["image"].float())
    normalised = found.model.modalities["image"].normalise(pixels)
    convert.save(found.model, tmp_path / "ours", "vit_mae")
    back = AutoModelForPreTraining.from_pretrained(tmp_path / "ours").eval()
    wanted = theirs.state_dict()
    assert back.state_dict().keys() == wanted.keys()
    assert all(torch.equal(back.state_dict()[name], x) for name, x in wanted.items())
    asked, objective = plan.target["image"], found.model.objectives["reconstruct"]
    with torch.no_grad():
        expected = theirs(normalised, noise=noise).loss
        torch.testing.assert_close(found.model(prepared).loss, expected, rtol=1e-5, atol=1e-5)
        assert back(normalised, noise=noise).loss == expected
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
            model: Any = found.model.to(dtype=dtype)
            tokens = {"image": model.tokenizers["image"].tokenize(normalised.to(dtype))}
            own = objective.predict("image", model.encode_tokens(tokens, plan), tokens, asked)
            logits = theirs.to(dtype)(normalised.to(dtype), noise=noise).logits
            logits = logits.unflatten(-1, (64, 3)).transpose(-1, -2).flatten(-2)  # ours: channel first
            logits = logits.gather(1, asked[..., None].expand(-1, -1, logits.shape[-1]))
            torch.testing.assert_close(own, logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("size", "eps"), [(32, 1e-6), (48, 1e-3)])
def test_auto_model_opens_what_is_written_and_encodes_the_same(size: int, eps: float, tmp_path: Path) -> None:
    """Their encoder shuffles by the noise even where it hides nothing: rising noise keeps the order."""
    from transformers import AutoModel, ViTMAEModel

    vit_mae(size, eps, True).save_pretrained(tmp_path / "theirs")
    model = convert.load(tmp_path / "theirs")
    convert.save(model, tmp_path / "ours", "vit_mae")
    with quietly():
        opened = AutoModel.from_pretrained(tmp_path / "ours", mask_ratio=0.0).eval()
    assert isinstance(opened, ViTMAEModel)
    batch = Batch({"image": pictures(size, 3)}, keys=torch.arange(3))
    normalised = model.modalities["image"].normalise(batch.signals["image"])
    noise = torch.arange((size // 8) ** 2, dtype=torch.float32).expand(3, -1)
    with torch.no_grad():
        expected = opened(normalised, noise=noise).last_hidden_state
    torch.testing.assert_close(model.encode(batch).sequence, expected, rtol=0, atol=1e-5)
    with quietly():
        opened.save_pretrained(tmp_path / "alone")  # its names are those of a VideoMAE that is saved alone
    alone = convert.convert(tmp_path / "alone")
    assert (alone.format, alone.left) == ("vit_mae", {})
    assert torch.equal(alone.model.encode(batch).sequence, model.encode(batch).sequence)


def test_a_config_of_another_size_is_refused(tmp_path: Path) -> None:
    theirs = vit_mae(32, 1e-6, True)
    theirs.save_pretrained(tmp_path)
    theirs.config.image_size = 48
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(M3Error, match=r"`decoder\.decoder_pos_embed` is not the fixed sin-cos table of 6 x 6 patches"):
        convert.load(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    save_file({name: x for name, x in saved.items() if name.startswith("vit.")}, tmp_path / "model.safetensors")
    with pytest.raises(M3Error, match=r"`vit\.embeddings\.position_embeddings` of shape \(1, 17, 48\) can't become"):
        convert.load(tmp_path)


def test_the_three_layouts_of_vit_mae_are_one(tmp_path: Path) -> None:
    theirs = vit_mae(32, 1e-6, True)
    theirs.save_pretrained(tmp_path / "v5")
    saved = load_file(tmp_path / "v5" / "model.safetensors")
    assert any(name.startswith("decoder.decoder_encoder.layer.") for name in saved), "transformers saves otherwise now"
    first = convert.load(tmp_path / "v5").state_dict()
    for layout, tensors in {
        "v4": {name.replace("decoder_encoder.layer", "decoder_layers"): x for name, x in saved.items()},
        "in memory": theirs.state_dict(),
    }.items():
        folder = tmp_path / layout
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text((tmp_path / "v5" / "config.json").read_text())
        found = convert.load(folder).state_dict()
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], x) for name, x in first.items())


def test_maes_own_names_hold_the_same_model(tmp_path: Path) -> None:
    """By way of ours: ViTMAE -> MAE's own file, as its training writes it -> ours."""
    import argparse

    theirs = vit_mae(32, 1e-6, True, decoder=64)
    theirs.save_pretrained(tmp_path / "theirs")
    model = convert.load(tmp_path / "theirs")
    convert.save(model, tmp_path / "mae.pth", "mae")
    state = torch.load(tmp_path / "mae.pth", weights_only=True)
    assert state["model"]["decoder_blocks.1.attn.qkv.weight"].shape == (192, 64)
    assert torch.equal(state["model"]["decoder_pred.bias"], theirs.decoder.decoder_pred.bias)
    torch.save(state | {"epoch": 3, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "training.pth")
    heads = ["backbone.heads=4", "objectives.reconstruct.decoder.heads=4"]
    found = convert.convert(tmp_path / "training.pth", heads)
    assert found.format == "mae"
    assert "normalise=false" in found.notes[0]
    ours = model.state_dict()
    assert all(torch.equal(x, ours[name]) for name, x in found.model.state_dict().items())
    batch = Batch({"image": pictures(32)}, keys=torch.arange(2))
    assert found.model(batch).loss == model(batch).loss
    encoder = {name: x for name, x in state["model"].items() if "decoder" not in name and name != "mask_token"}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    alone = convert.convert(tmp_path / "encoder.pth", heads[:1])
    assert alone.format == "vit"
    assert torch.equal(alone.model.encode(batch).sequence, model.encode(batch).sequence)
    with pytest.raises(M3Error, match="there is no loss; call `encode`"):
        alone.model(batch)


def test_weights_without_a_known_number_of_heads_ask_for_it(tmp_path: Path) -> None:
    theirs = timm.models.vision_transformer.VisionTransformer(**VIT | {"embed_dim": 40, "num_heads": 5})
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(M3Error, match=r"width 40 is not a usual one; give backbone.heads=N"):
        convert.load(tmp_path / "vit.safetensors")
    assert convert.load(tmp_path / "vit.safetensors", ["backbone.heads=5"]).config.backbone["heads"] == 5


@pytest.mark.parametrize("other", [{"norm": "post"}, {"causal": True, "class_tokens": 0}, {"bias": False}])
def test_what_no_tensor_of_theirs_could_say_is_not_written(other: dict[str, Any], tmp_path: Path) -> None:
    from m3 import M3Config

    image = {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 8}}
    backbone = {"width": 16, "depth": 1, "heads": 2, "final_norm": False, **other}
    model = M3Model(M3Config(modalities={"image": image}, backbone=backbone, objectives={}))
    with pytest.raises(M3Error, match=r"^vit \(ViT in timm's names"):
        convert.save(model, tmp_path / "vit.safetensors", "vit")
    assert not (tmp_path / "vit.safetensors").exists()
