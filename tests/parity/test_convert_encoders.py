"""transformers' encoders of images become ours with the same outputs, and go back with the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from m3 import convert
from m3.errors import M3Error
from m3.foreign.checkpoint import read_foreign
from tests.parity.published import (
    assert_equal,
    assert_refuses,
    assert_same_states,
    quietly,
    randomised,
    saved,
)

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"image_size": 32, "patch_size": 8}
OBLONG = {**SMALL, "image_size": (24, 40), "layer_norm_eps": 1e-3, "num_attention_heads": 2}
VIT = ViTConfig(**SMALL, intermediate_size=48)
CASES = {
    "vit": (ViTModel, VIT),
    "vit of 1 channel": (ViTModel, ViTConfig(**OBLONG, num_channels=1, hidden_act="gelu_pytorch_tanh")),
    "vit that classifies": (ViTForImageClassification, VIT),
    "dino": (Dinov2Model, Dinov2Config(**SMALL)),
    "dino, another eps": (Dinov2Model, Dinov2Config(**{**OBLONG, "image_size": 24}, mlp_ratio=2)),
    "dino that classifies": (Dinov2ForImageClassification, Dinov2Config(**SMALL)),
    "dino, gated": (Dinov2Model, Dinov2Config(**SMALL, use_swiglu_ffn=True, mlp_ratio=3)),
    "dino, registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)),
}


@pytest.mark.parametrize("name", CASES)
def test_states_are_the_same_and_transformers_opens_what_is_written(tmp_path: Path, name: str) -> None:
    peer = saved(*CASES[name], tmp_path / "in")
    found = convert.convert(tmp_path / "in")
    is_dino = name.startswith("dino")
    assert found.format == ("dinov2" if is_dino else "hf_vit")
    convert.save(found.model, tmp_path / "out", found.format)
    written = load_file(tmp_path / "out/model.safetensors")
    given = dict(convert._format(found.format).tidy(read_foreign(tmp_path / "in")).tensors)
    if is_dino:
        assert "mask token is left out" in found.notes[0]
        given["embeddings.mask_token"] = torch.zeros(1, 32)
    assert_equal(written, {key: x for key, x in given.items() if key not in found.left})
    assert {key.split(".")[-2] for key in found.left} <= {"classifier", "dense"}
    with quietly():
        again = AutoModel.from_pretrained(tmp_path / "out")
    assert_same_states(found.model, peer, again)


@pytest.mark.parametrize("name", ["vit", "dino"])
def test_names_as_version_5_has_them_in_memory_are_read(tmp_path: Path, name: str) -> None:
    kind, config = CASES[name]
    peer = randomised(kind(config))
    config.save_pretrained(tmp_path)
    save_file(peer.state_dict(), tmp_path / "model.safetensors")
    assert_same_states(convert.load(tmp_path), peer)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("vit", "vit.layernorm.bias"), ("dino, gated", "encoder.layer.1.mlp.weights_in.bias")],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, missing: str) -> None:
    saved(*CASES[name], tmp_path)
    assert_refuses(tmp_path, "model.safetensors", missing)
    with pytest.raises(M3Error, match=r"its `config\.json` is needed too"):
        convert.convert(tmp_path / "model.safetensors")


def test_a_gated_mlp_whose_width_is_rounded_up_is_refused(tmp_path: Path) -> None:
    """2 / 3 of 2 x 32 = 42 units, which they make 48 of."""
    saved(Dinov2Model, Dinov2Config(**SMALL, use_swiglu_ffn=True, mlp_ratio=2), tmp_path)
    with pytest.raises(M3Error, match=r"mlp\.fc2\.weight` of shape \(32, 48\), but the model needs \(32, 42\)"):
        convert.convert(tmp_path)
