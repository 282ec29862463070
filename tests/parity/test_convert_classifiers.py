"""Published classifiers read into our model say the same, and go back unchanged: timm's, MAE's, transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from m3 import M3Model, convert
from m3.errors import M3Error
from m3.foreign.checkpoint import read_foreign
from tests.parity.published import pictures, quietly, randomised, saved

timm = pytest.importorskip("timm", reason="parity needs timm")
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 7}
CASES: dict[str, dict[str, Any]] = {
    "class token": VIT,
    "mean, norm after it (MAE's fine-tuned)": VIT | {"global_pool": "avg", "img_size": 48},
    "registers, mean over patches only": VIT | {"global_pool": "avg", "reg_tokens": 3},
    "no class token, norm before the mean": VIT | {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "class token, norm after it": VIT | {"fc_norm": True},
}
GIVEN = {"class token, norm after it": ["objectives.classify.pool=class"]}


def logits(model: M3Model, dtype: torch.dtype) -> Tensor:
    return model.to(dtype=dtype).classify(pictures(model))  # type: ignore[call-arg]


@pytest.mark.parametrize("name", CASES)
def test_logits_of_timm_are_the_same_and_the_weights_go_back(name: str, tmp_path: Path) -> None:
    theirs = randomised(timm.models.vision_transformer.VisionTransformer(**CASES[name]))
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    found = convert.convert(tmp_path / "vit.safetensors", GIVEN.get(name, []))
    assert (found.format, found.left) == ("vit", {})
    assert "objectives.classify.pool=" in found.notes[1]
    pixels = found.model.modalities["image"].normalise(pictures(found.model).signals["image"])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        with torch.no_grad():
            expected = theirs.to(dtype)(pixels.to(dtype))
        torch.testing.assert_close(logits(found.model, dtype), expected, rtol=tolerance, atol=tolerance)
    convert.save(found.model.float(), tmp_path / "back", "vit")
    back = load_file(tmp_path / "back/model.safetensors")
    wanted = theirs.float().state_dict()
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], x) for key, x in wanted.items())
    again = convert.load(tmp_path / "back")  # with the pooling beside it
    assert torch.equal(logits(again, torch.float32), logits(found.model, torch.float32))


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_logits_of_transformers_are_the_same_and_it_opens_what_is_written(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    more: dict[str, Any] = {"image_size": 24, "patch_size": 8, "num_labels": 5, "layer_norm_eps": 1e-3}
    config = ViTConfig(**sizes, **more, problem_type=kind)  # type: ignore[arg-type]  # a str
    theirs = saved(ViTForImageClassification, config, tmp_path / "in")
    found = convert.convert(tmp_path / "in")
    assert (found.format, found.left) == ("hf_vit", {})
    convert.save(found.model, tmp_path / "out", "hf_vit")
    given, written = (load_file(tmp_path / folder / "model.safetensors") for folder in ("in", "out"))
    tidied = dict(convert._format("hf_vit").tidy(read_foreign(tmp_path / "in")).tensors)
    assert written.keys() == tidied.keys()
    assert all(torch.equal(written[key], x) for key, x in tidied.items())
    assert len(given) == len(written)
    with quietly():
        again: Any = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert again.config.problem_type == (kind if kind.startswith("multi") else None)
    pixels = found.model.modalities["image"].normalise(pictures(found.model).signals["image"])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        own = logits(found.model, dtype)
        for peer in (theirs, again):
            with torch.no_grad():
                expected = peer.to(dtype)(pixels.to(dtype)).logits
            torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)


def test_a_head_that_is_not_whole_is_left_or_refused(tmp_path: Path) -> None:
    theirs = timm.models.vision_transformer.VisionTransformer(**VIT).state_dict()
    save_file({key: x for key, x in theirs.items() if key != "head.bias"}, tmp_path / "vit.safetensors")
    found = convert.convert(tmp_path / "vit.safetensors")
    assert found.left == {"head.weight": "a part of a classifier that is not whole"}
    assert not found.model.config.objectives
    save_file({**theirs, "head.scale": torch.ones(7)}, tmp_path / "vit.safetensors")
    with pytest.raises(M3Error, match=r"no place for `head\.scale`"):
        convert.convert(tmp_path / "vit.safetensors")


def test_a_model_that_predicts_more_is_not_written_as_a_vit(tmp_path: Path) -> None:
    save_file(timm.models.vision_transformer.VisionTransformer(**VIT).state_dict(), tmp_path / "vit.safetensors")
    model = convert.load(tmp_path / "vit.safetensors")
    model.config.objectives["classify"]["pool"] = "attention"
    with pytest.raises(M3Error, match="classifies images by the mean of their tokens or the class token"):
        convert.save(model, tmp_path / "back.pth", "vit")
    model.config.objectives["classify"]["pool"] = "mean"
    with pytest.raises(M3Error, match=r"by the class token behind `final_norm`"):
        convert.save(model, tmp_path / "back.pth", "hf_vit")


def test_an_image_net_head_is_named_through_from_pretrained(tmp_path: Path) -> None:
    save_file(timm.models.vision_transformer.VisionTransformer(**VIT).state_dict(), tmp_path / "vit.safetensors")
    found = convert.load(tmp_path / "vit.safetensors")
    found.save_pretrained(tmp_path / "ours")
    again = M3Model.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again, torch.float32), logits(found, torch.float32))
    shown = again.reconstruct(pictures(again)).predicted["label"]
    torch.testing.assert_close(shown[..., 0], logits(again, torch.float32).softmax(-1))
