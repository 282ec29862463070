"""transformers' BEiT and Data2VecVision become ours with the same outputs, and go back with the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitModel,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    Data2VecVisionModel,
)

from m3 import M3Config, M3Model, convert
from m3.errors import M3Error
from m3.foreign.checkpoint import read_foreign
from tests.parity.published import (
    assert_equal,
    assert_refuses,
    assert_same_states,
    normalised,
    pictures,
    quietly,
    randomised,
    saved,
)
from tests.parity.published_beit import hidden_and_codes, tokenizer_for

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"image_size": 32, "patch_size": 8, "use_relative_position_bias": True}
LARGER: dict[str, Any] = {
    **SMALL,
    "image_size": 48,
    "layer_norm_eps": 1e-3,
    "num_attention_heads": 2,
    "use_mean_pooling": False,
}
SHARED: dict[str, Any] = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
CASES = {
    "beit": (BeitModel, BeitConfig(**SMALL)),
    "beit, shared": (BeitModel, BeitConfig(**LARGER | SHARED, use_mask_token=True)),
    "beit, places too": (BeitModel, BeitConfig(**LARGER, use_absolute_position_embeddings=True)),
    "beit, no scale": (BeitModel, BeitConfig(**SMALL | {"layer_scale_init_value": 0.0, "num_channels": 1})),
    "beit that classifies": (BeitForImageClassification, BeitConfig(**SMALL)),
    "data2vec": (Data2VecVisionModel, Data2VecVisionConfig(**SMALL)),
    "data2vec, shared": (Data2VecVisionModel, Data2VecVisionConfig(**LARGER | SHARED, use_mask_token=True)),
    "data2vec that classifies": (Data2VecVisionForImageClassification, Data2VecVisionConfig(**SMALL)),
}

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"]
)


@pytest.mark.parametrize("name", CASES)
def test_states_are_the_same_and_transformers_opens_what_is_written(tmp_path: Path, name: str) -> None:
    peer = saved(*CASES[name], tmp_path / "in")
    found = convert.convert(tmp_path / "in")
    assert found.format == ("hf_beit" if name.startswith("beit") else "hf_data2vec_vision")
    assert {key.split(".")[-2] for key in found.left} <= {"classifier", "layernorm", "embeddings"}
    convert.save(found.model, tmp_path / "out", found.format)
    given = dict(convert._format(found.format).tidy(read_foreign(tmp_path / "in")).tensors)
    written = load_file(tmp_path / "out/model.safetensors")
    assert_equal(written, {key: x for key, x in given.items() if key not in found.left})
    with quietly():
        again = AutoModel.from_pretrained(tmp_path / "out")
    assert_same_states(found.model, peer, again)


@pytest.mark.parametrize("name", ["beit", "beit, shared", "data2vec, shared"])
def test_names_as_version_5_has_them_in_memory_are_read(tmp_path: Path, name: str) -> None:
    kind, config = CASES[name]
    peer = randomised(kind(config))
    config.save_pretrained(tmp_path)
    save_file(peer.state_dict(), tmp_path / "model.safetensors")
    assert_same_states(convert.load(tmp_path), peer)


def pretrained(folder: Path) -> Any:
    sizes: dict[str, Any] = SMALL | SHARED | {"layer_norm_eps": 1e-5, "vocab_size": 16, "use_mask_token": True}
    return saved(BeitForMaskedImageModeling, BeitConfig(**sizes), folder)


@PRECISIONS
def test_beits_pretraining_has_the_same_loss_where_the_tokenizer_is_given(tmp_path: Path, dtype, near: float) -> None:
    peer = pretrained(tmp_path / "in")
    found = convert.convert(tmp_path / "in", [tokenizer_for(tmp_path)])
    assert found.left.keys() == {"beit.layernorm.weight", "beit.layernorm.bias"}, "their second names"
    convert.save(found.model, tmp_path / "out", "hf_beit")
    assert_equal(load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "in/model.safetensors"))
    with quietly():
        again = BeitForMaskedImageModeling.from_pretrained(tmp_path / "out")
    model, peer, again = found.model.to(dtype=dtype), peer.to(dtype), again.to(dtype)  # type: ignore[call-arg]
    prepared = model.prepare(pictures(model))
    is_hidden, codes = hidden_and_codes(model, prepared)
    pixels = normalised(model, pictures(model)).to(dtype)
    with torch.no_grad():
        expected = peer(pixels, bool_masked_pos=is_hidden, labels=codes).loss
        torch.testing.assert_close(
            model(prepared).loss, expected, rtol=max(near, 1e-7), atol=0, check_dtype=False
        )  # float32
        assert again(pixels, bool_masked_pos=is_hidden, labels=codes).loss == expected


@PRECISIONS
def test_beits_pretraining_without_a_tokenizer_is_its_encoder_and_its_norm(tmp_path: Path, dtype, near: float) -> None:
    peer = pretrained(tmp_path)
    found = convert.convert(tmp_path)
    assert "tokenizer" in found.left["lm_head.weight"]
    model, peer = found.model.to(dtype=dtype), peer.to(dtype)  # type: ignore[call-arg]
    batch = pictures(model)
    with torch.no_grad():
        expected = peer.layernorm(peer.beit(normalised(model, batch).to(dtype)).last_hidden_state)
    torch.testing.assert_close(model.encode(batch).sequence, expected, rtol=0, atol=near)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("beit, shared", "beit.layernorm.bias"), ("data2vec", "data2vec_vision.encoder.layer.1.lambda_2")],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, missing: str) -> None:
    saved(*CASES[name], tmp_path)
    bare = load_file(tmp_path / "model.safetensors")  # with prefixes as a head has them, strange names keep theirs
    prefix = missing.partition(".")[0]
    save_file({f"{prefix}.{name}": x for name, x in bare.items()}, tmp_path / "model.safetensors")
    assert_refuses(tmp_path, "model.safetensors", missing)


def test_two_norms_in_a_row_and_no_positions_at_all_are_refused(tmp_path: Path) -> None:
    saved(BeitForMaskedImageModeling, BeitConfig(**LARGER | SHARED), tmp_path / "two")
    saved(BeitModel, BeitConfig(**{**SMALL, "use_relative_position_bias": False}), tmp_path / "none")
    with pytest.raises(M3Error, match=r"two norms behind its blocks"):
        convert.convert(tmp_path / "two")
    with pytest.raises(M3Error, match=r"either one relative bias for all blocks, or one for each, or absolute"):
        convert.convert(tmp_path / "none")


# -- models of our own -----------------------------------------------------------------------------------------------


def own_model(**backbone: Any) -> M3Model:
    image = {"type": "image", "size": 32, "tokenizer": {"type": "patch", "size": 8}, "positions": {"type": "relative"}}
    settings = {"width": 32, "depth": 2, "heads": 2, "relative_bias": "shared", "layer_scale": 0.1} | backbone
    return M3Model(M3Config(modalities={"image": image}, backbone=settings, objectives={})).eval()


def test_a_model_of_our_own_is_written_with_whole_factors_of_its_branches(tmp_path: Path) -> None:
    """Ours keeps them as differences from 0.1."""
    model = randomised(own_model())
    convert.save(model, tmp_path / "out", "hf_beit")
    with quietly():
        opened = AutoModel.from_pretrained(tmp_path / "out")
    batch = pictures(model)
    with torch.no_grad():
        found = opened(normalised(model, batch)).last_hidden_state
    torch.testing.assert_close(found, model.encode(batch).sequence, rtol=0, atol=1e-5)


@pytest.mark.parametrize("other", [{"mlp": "quick_gelu"}, {"class_tokens": 2}, {"qk_norm": True}])
@pytest.mark.parametrize("name", ["beit", "hf_beit", "hf_data2vec_vision", "simmim"])
def test_what_theirs_can_not_say_is_not_written(tmp_path: Path, name: str, other: dict[str, Any]) -> None:
    with pytest.raises(M3Error, match=rf"^{name} .*backbone\.{next(iter(other))} is "):
        convert.save(own_model(**other), tmp_path / "out", name)


@pytest.mark.parametrize("name", ["vit", "hf_vit", "vit_mae", "dinov2"])
def test_formats_without_a_relative_bias_refuse_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(M3Error, match=r"backbone\.relative_bias is shared, and .* knows None only"):
        convert.save(own_model(), tmp_path / "out", name)
