"""open_clip's CLIP becomes ours with the same outputs, and goes back with the same tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from m3 import M3Config, M3Model, convert
from m3.errors import M3Error
from tests.parity.published import assert_equal, assert_refuses, normalised, pictures, randomised

open_clip = pytest.importorskip("open_clip", reason="needs open_clip")

SENTENCES = ["a red cube", "Two large blue spheres behind a cone.", "x " * 40]
VISION = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 12, "width": 16, "heads": 2, "layers": 3}
SMALL = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
OTHER = {
    "embed_dim": 10,
    "init_logit_bias": -10.0,
    "vision_cfg": {**VISION, "image_size": [32, 16], "no_ln_pre": True, "mlp_ratio": 2.0, "norm_kwargs": {"eps": 1e-3}},
    "text_cfg": {**TEXT, "heads": 4, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-4}},
}
OTHER["vision_cfg"]["act_kwargs"] = {"approximate": "tanh"}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}


def theirs(model_cfg: dict) -> nn.Module:
    return randomised(open_clip.model.CLIP(**model_cfg, output_dict=True))


def saved(model: nn.Module, folder: Path, model_cfg: dict | None) -> Path:
    """Write a model as open_clip's repositories hold it."""
    folder.mkdir(exist_ok=True)
    save_file({name: x.clone() for name, x in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    if model_cfg is not None:
        config = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def assert_same_outputs(model: M3Model, clip: nn.Module, dtype: torch.dtype, tolerance: float) -> None:
    model, clip = model.to(dtype=dtype), clip.to(dtype=dtype)  # type: ignore[call-arg]
    batch = pictures(model, text=SENTENCES)
    ids = open_clip.tokenizer.SimpleTokenizer(context_length=12)(SENTENCES)
    with torch.no_grad():
        expected = clip(normalised(model, batch).to(dtype), ids)
    found = model.embed(batch)
    torch.testing.assert_close(found["image"], expected["image_features"], rtol=0, atol=tolerance)
    torch.testing.assert_close(found["text"], expected["text_features"], rtol=0, atol=tolerance)
    contrast: Any = model.objectives["contrast"]
    logits = contrast.scale * found["image"] @ found["text"].T
    theirs = expected["logit_scale"] * expected["image_features"] @ expected["text_features"].T
    torch.testing.assert_close(logits, theirs, rtol=0, atol=tolerance)
    if "logit_bias" in expected:
        assert contrast.logit_bias == expected["logit_bias"]


@pytest.mark.parametrize("model_cfg", [SMALL, OTHER], ids=["quick", "sigmoid"])
def test_outputs_are_the_same_and_open_clip_opens_what_is_written(tmp_path: Path, model_cfg: dict) -> None:
    clip = theirs(model_cfg)
    found = convert.convert(saved(clip, tmp_path / "in", model_cfg))
    assert (found.format, found.left, found.notes) == ("open_clip", {}, [])
    assert found.model.config.modalities["image"]["mean"] == (0.5, 0.4, 0.3)
    out = tmp_path / "out"
    convert.save(found.model, out, "open_clip")
    assert_equal(load_file(out / "open_clip_model.safetensors"), clip.state_dict())
    again, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{out}", return_transform=True)
    assert_equal(again.state_dict(), clip.state_dict())
    assert preprocess.transforms[-1].mean == [0.5, 0.4, 0.3]
    again.output_dict = True
    assert_same_outputs(found.model, again.eval(), torch.float32, 1e-5)
    assert_same_outputs(found.model, clip, torch.float64, 1e-9)


def test_openais_state_dict_says_quick_gelu_and_comes_in_two_precisions(tmp_path: Path) -> None:
    model_cfg = {"embed_dim": 24, "quick_gelu": True}
    model_cfg |= {
        "vision_cfg": {**VISION, "width": 192, "head_width": 64},
        "text_cfg": {**TEXT, "width": 64, "heads": 1},
    }
    clip = theirs(model_cfg)
    clip.get_submodule("visual.conv1").half()
    extra = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(12),
        "vocab_size": torch.tensor(49408),
    }
    torch.save({**clip.state_dict(), **extra}, tmp_path / "vit.pt")
    found = convert.convert(tmp_path / "vit.pt")
    assert found.left == dict.fromkeys(extra, "a number that the shapes tell")
    assert "quick_gelu, the heads 3 and 1" in found.notes[0]
    assert_same_outputs(found.model, clip.float(), torch.float32, 1e-5)
    given = convert.convert(tmp_path / "vit.pt", ["towers.photo.mlp=gelu"]).model.config.towers
    assert given["photo"]["mlp"] == given["words"]["mlp"] == "gelu"


def test_a_model_of_our_recipe_can_be_written(tmp_path: Path) -> None:
    """It has a bias in the patches' projection and no position of the class token, which theirs says otherwise."""
    grid = {"positions": {"type": "learned"}}
    image = {"type": "image", "size": 32, "tokenizer": {"type": "patch", "size": 8}, **grid}
    image |= {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
    text = {"type": "text", "vocabulary": "open_clip:", "length": 12, "tokenizer": {"type": "embedding"}, **grid}
    text |= {"start": "<start_of_text>", "end": "<end_of_text>"}
    style = {"mlp": "quick_gelu", "norm_eps": 1e-5}
    photo = {"modalities": ["image"], "width": 32, "depth": 2, "heads": 4, "input_norm": True, **style}
    words = {"modalities": ["text"], "width": 16, "depth": 3, "heads": 2, "class_tokens": 0, "causal": True, **style}
    sides = {"image": {"pool": "class"}, "text": {"pool": "last"}}
    model = randomised(
        M3Model(
            M3Config(
                modalities={"image": image, "text": text},
                towers={"photo": photo, "words": words},
                objectives={
                    "contrast": {
                        "type": "contrast",
                        "loss": "softmax",
                        "temperature": 0.07,
                        "width": 24,
                        "sides": sides,
                    }
                },
            )
        )
    )
    assert isinstance(model, M3Model)
    convert.save(model, tmp_path, "open_clip")
    clip = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    clip.output_dict = True
    assert_same_outputs(model, clip, torch.float64, 1e-6)  # the sums of positions and bias are rounded to float32


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = saved(theirs(SMALL), tmp_path, SMALL)
    assert_refuses(folder, "open_clip_model.safetensors", "visual.ln_post.bias")
    saved(theirs(SMALL), tmp_path, {**SMALL, "vision_cfg": {**VISION, "pool_type": "avg"}})
    with pytest.raises(M3Error, match=r"vision_cfg\.pool_type is `avg`"):
        convert.convert(folder)
    clip = open_clip.model.CLIP(24, VISION, {**TEXT, "vocab_size": 50})
    with pytest.raises(M3Error, match=r"which words the 50 ids are; give modalities\.text\.vocabulary"):
        convert.convert(saved(clip, tmp_path, SMALL))
