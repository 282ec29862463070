"""SigLIP of transformers and of open_clip becomes ours with the same outputs, and goes back with the same tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, SiglipConfig, SiglipModel

from m3 import M3Model, convert
from m3.errors import M3Error
from tests.parity.published import assert_equal, assert_refuses, normalised, pictures, quietly, randomised, saved

WORDS = "modalities.text.vocabulary=words:</s> " + " ".join(f"w{i}" for i in range(58))
"""60 ids; the first one is for unknown words, the second is the end."""
SENTENCES = ["w1 w2 w3", "w4", "w5 " * 20]
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 119, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT |= {"max_position_embeddings": 9, "vocab_size": 60, "projection_size": 32}
OTHER = ({**VISION, "layer_norm_eps": 1e-3, "image_size": 24}, {**TEXT, "hidden_act": "gelu", "layer_norm_eps": 1e-5})


def ids_of(model: M3Model) -> torch.Tensor:
    """What the sentences are in the vocabulary, filled up to the length."""
    ids = pictures(model, text=SENTENCES).signals["text"].long()
    assert ids.min() >= 0, "nothing is left empty"
    assert ids[1].tolist() == [6, *[1] * (ids.shape[1] - 1)]
    return ids


@pytest.mark.parametrize(("vision", "text"), [(VISION, TEXT), OTHER], ids=["tanh", "exact text"])
def test_transformers_outputs_are_the_same_and_it_opens_what_is_written(
    tmp_path: Path, vision: dict, text: dict
) -> None:
    peer = saved(SiglipModel, SiglipConfig(vision_config=vision, text_config=text), tmp_path / "in")
    found = convert.convert(tmp_path / "in", [WORDS])
    assert (found.format, found.left) == ("siglip", {})
    convert.save(found.model, tmp_path / "out", "siglip")
    assert_equal(load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "in/model.safetensors"))
    with quietly():
        again = AutoModel.from_pretrained(tmp_path / "out")
    assert_equal(again.state_dict(), peer.state_dict())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model, opened = found.model.to(dtype=dtype), again.to(dtype=dtype)  # type: ignore[call-arg]
        batch = pictures(model, text=SENTENCES)
        with torch.no_grad():
            expected = opened(input_ids=ids_of(model), pixel_values=normalised(model, batch).to(dtype))
        ours = model.embed(batch)
        torch.testing.assert_close(ours["image"], expected.image_embeds, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours["text"], expected.text_embeds, rtol=0, atol=tolerance)
        contrast: Any = model.objectives["contrast"]
        logits = contrast.scale * ours["text"] @ ours["image"].T + contrast.logit_bias
        torch.testing.assert_close(logits, expected.logits_per_text, rtol=0, atol=tolerance)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    saved(SiglipModel, SiglipConfig(vision_config=VISION, text_config=TEXT), tmp_path)
    with pytest.raises(M3Error, match=r"which words the 60 ids are; give modalities\.text\.vocabulary"):
        convert.convert(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    assert convert.load(tmp_path).config.modalities["text"]["vocabulary"].startswith("tokenizers:")
    assert_refuses(tmp_path, "model.safetensors", "vision_model.head.layernorm.bias")


def tokenizer_json() -> str:
    """A vocabulary of 60 whole words, as a folder of transformers holds it."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(58)}}, "<unk>")).to_str()


def open_clip_model(text: dict, size: int) -> Any:
    """open_clip's model, with a small trunk in the place of timm's smallest."""
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip")
    vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason="needs timm")
    name = "vit_base_patch16_siglip_224"
    vision = {"timm_model_name": name, "image_size": size, "timm_pool": "map", "timm_proj": "none"}
    with torch.device("meta"):  # it is large, and of it only the shell is kept
        model = open_clip.model.CustomTextCLIP(32, vision, text, init_logit_scale=2.3, init_logit_bias=-10.0)
    model.visual.trunk = vision_transformer.VisionTransformer(
        img_size=size,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        class_token=False,
        global_pool="map",
        num_classes=0,
    )
    model.text = open_clip.model._build_text_tower(32, text)
    model.logit_scale, model.logit_bias = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    return randomised(model)


OPEN_TEXT: dict[str, Any] = {"context_length": 9, "vocab_size": 60, "width": 24, "heads": 2, "layers": 3}
OPEN_TEXT |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}


@pytest.mark.parametrize(
    ("size", "other"), [(32, {}), (24, {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}})]
)
def test_open_clips_outputs_are_the_same_and_it_opens_what_is_written(tmp_path: Path, size: int, other: dict) -> None:
    text = OPEN_TEXT | other
    peer = open_clip_model(text, size)
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": {}, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(peer.state_dict(), tmp_path / "open_clip_model.safetensors")
    found = convert.convert(tmp_path, [WORDS, "towers.photo.heads=4"])
    assert (found.format, found.left) == ("open_clip_siglip", {})
    convert.save(found.model, tmp_path / "back.safetensors", "open_clip_siglip")
    written = load_file(tmp_path / "back.safetensors")
    assert_equal(written, peer.state_dict())
    peer.load_state_dict(written, strict=True)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model, own = found.model.to(dtype=dtype), peer.to(dtype=dtype)  # type: ignore[call-arg]
        batch = pictures(model, text=SENTENCES)
        with torch.no_grad():
            image = own.encode_image(normalised(model, batch).to(dtype), normalize=True)
            words = own.encode_text(ids_of(model), normalize=True)
        ours = model.embed(batch)
        torch.testing.assert_close(ours["image"], image, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours["text"], words, rtol=0, atol=tolerance)
        contrast: Any = model.objectives["contrast"]
        logits = contrast.scale * ours["text"] @ ours["image"].T + contrast.logit_bias
        theirs = own.logit_scale.exp() * words @ image.T + own.logit_bias
        torch.testing.assert_close(logits, theirs, rtol=0, atol=tolerance)


def test_the_settings_that_are_written_build_the_model_in_open_clip(tmp_path: Path) -> None:
    """At the smallest size that timm has, on the meta device: the names."""
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip")
    from m3 import M3Config
    from m3.recipe import load_recipe

    recipe = load_recipe("recipes/siglip_vit_b16.yaml", ["modalities.text.end=<end_of_text>"]).model_dump(mode="json")
    with torch.device("meta"):
        model = M3Model(M3Config(**{key: recipe[key] for key in ("modalities", "towers", "objectives")}))
    form = convert._format("open_clip_siglip")
    config: Any = model.config
    names = {name for row in form.rows(config) for name in row.theirs}
    model_cfg = form.settings(config)["model_cfg"]
    model_cfg.pop("custom_text")
    with torch.device("meta"):
        peer = open_clip.model.CustomTextCLIP(**model_cfg, init_logit_scale=2.3)
    assert names == peer.state_dict().keys()
    assert model_cfg["text_cfg"]["vocab_size"] == peer.text.token_embedding.weight.shape[0] == 49408
