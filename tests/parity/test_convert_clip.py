"""transformers' CLIP becomes ours with the same outputs, and goes back with the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from m3 import convert
from m3.errors import M3Error
from tests.parity.published import assert_equal, assert_refuses, normalised, pictures, quietly, saved

SENTENCES = ["a red cube", "Two large blue spheres behind a cone.", "x " * 40]
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT |= {"max_position_embeddings": 12}
OTHER = ({**VISION, "layer_norm_eps": 1e-3, "image_size": 24}, {**TEXT, "hidden_act": "gelu"})


@pytest.mark.parametrize(("vision", "text", "space"), [(VISION, TEXT, 24), (*OTHER, 10)], ids=["quick", "gelu"])
def test_outputs_are_the_same_and_transformers_opens_what_is_written(
    tmp_path: Path, vision: dict, text: dict, space: int
) -> None:
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=space)
    clip = saved(CLIPModel, config, tmp_path / "in")
    found = convert.convert(tmp_path / "in")
    assert (found.format, found.left, found.notes) == ("clip", {}, [])
    convert.save(found.model, tmp_path / "out", "clip")
    assert_equal(load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "in/model.safetensors"))
    with quietly():
        again = AutoModel.from_pretrained(tmp_path / "out")
    assert_equal(again.state_dict(), clip.state_dict())
    assert again.config.text_config.eos_token_id == 49407
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model, peer = found.model.to(dtype=dtype), again.to(dtype=dtype)  # type: ignore[call-arg]
        batch = pictures(model, text=SENTENCES)
        ids = batch.signals["text"].long()
        ids[ids < 0] = 49407  # filled up with the end token, as their tokenizer does
        with torch.no_grad():
            expected = peer(input_ids=ids, pixel_values=normalised(model, batch).to(dtype))
        ours = model.embed(batch)
        torch.testing.assert_close(ours["image"], expected.image_embeds, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours["text"], expected.text_embeds, rtol=0, atol=tolerance)
        contrast: Any = model.objectives["contrast"]
        logits = contrast.scale * ours["text"] @ ours["image"].T
        torch.testing.assert_close(logits, expected.logits_per_text, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_its_images_alone(tmp_path: Path, kind: type) -> None:
    clip = saved(kind, CLIPVisionConfig(**VISION), tmp_path / "in")
    found = convert.convert(tmp_path / "in")
    has_projection = kind is CLIPVisionModelWithProjection
    reason = "a projection to a space with text, whose tower is not here"
    assert found.left == ({"visual_projection.weight": reason} if has_projection else {})
    convert.save(found.model, tmp_path / "out", "clip")
    with quietly():
        again = AutoModel.from_pretrained(tmp_path / "out")
    assert type(again) is CLIPVisionModel
    assert_equal(again.state_dict(), (clip.vision_model if has_projection else clip).state_dict())
    model = found.model.double()
    batch = pictures(model)
    with torch.no_grad():
        expected = again.double()(normalised(model, batch).double()).pooler_output
    torch.testing.assert_close(model.encode(batch).prefix[:, 0], expected, rtol=0, atol=1e-9)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    saved(CLIPModel, CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8), tmp_path)
    assert_refuses(tmp_path, "model.safetensors", "text_model.final_layer_norm.bias")
    with pytest.raises(M3Error, match=r"its `config\.json` is needed too"):
        convert.convert(tmp_path / "model.safetensors")
    other = CLIPConfig(vision_config={**VISION, "hidden_act": "relu"}, text_config=TEXT, projection_dim=8)
    saved(CLIPModel, other, tmp_path)
    with pytest.raises(M3Error, match=r"its hidden_act is `relu`, but only gelu, quick_gelu"):
        convert.convert(tmp_path)
