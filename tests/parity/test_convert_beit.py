"""BEiT of timm and of its authors, and SimMIM's ViT, become ours with the same outputs and go back unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from m3 import convert
from tests.parity.published import assert_equal, assert_refuses, normalised, pictures, randomised
from tests.parity.published_beit import (
    SimMIM,
    Transformer,
    assert_close_in_both,
    hidden_and_codes,
    in_unilm,
    tokenizer_for,
)

# -- timm ---------------------------------------------------------------------------------------------------------

TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
TIMM |= {"use_abs_pos_emb": False, "init_values": 0.1}
VARIANTS = {
    "tuned": TIMM | {"use_rel_pos_bias": True},
    "shared": TIMM | {"img_size": 48, "use_shared_rel_pos_bias": True, "global_pool": "token", "num_heads": 2},
    "places too": TIMM | {"use_rel_pos_bias": True, "use_abs_pos_emb": True, "init_values": None, "num_classes": 0},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_timms_beit_says_the_same_and_goes_back(variant: str, eps: float, tmp_path: Path) -> None:
    beit = pytest.importorskip("timm", reason="parity needs timm").models.beit
    theirs = randomised(beit.Beit(**VARIANTS[variant], norm_layer=lambda width, **k: nn.LayerNorm(width, eps=eps, **k)))
    save_file(theirs.state_dict(), tmp_path / "beit.safetensors")
    found = convert.convert(tmp_path / "beit.safetensors", [f"backbone.norm_eps={eps}"])
    assert found.format == "beit"
    assert all(name.startswith(("head.", "fc_norm.")) for name in found.left)
    assert_close_in_both(found.model, theirs, theirs.forward_features)
    convert.save(found.model.float(), tmp_path / "back.pth", "beit")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    wanted = {name: x for name, x in theirs.float().state_dict().items() if name not in found.left}
    assert_equal(back, wanted)
    theirs.load_state_dict({name: x for name, x in theirs.state_dict().items() if name in found.left} | back)


def test_timm_opens_a_published_size(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="parity needs timm")
    theirs = timm.create_model("beit_base_patch16_224", pretrained=False, depth=2)
    save_file(theirs.state_dict(), tmp_path / "beit.safetensors")
    found = convert.convert(tmp_path / "beit.safetensors")
    backbone: Any = found.model.config.backbone
    assert (backbone["heads"], backbone["depth"], backbone["relative_bias"]) == (12, 2, "per_block")
    assert found.model.config.modalities["image"]["size"] == (224, 224)
    convert.save(found.model, tmp_path / "back.safetensors", "beit")
    assert_equal(
        load_file(tmp_path / "back.safetensors"),
        {name: x for name, x in theirs.state_dict().items() if name not in found.left},
    )


# -- unilm and SimMIM, written from the papers and the published names ----------------------------------------------


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("version", [1, 2, None])
def test_unilms_beit_says_the_same_and_goes_back(tmp_path: Path, size: int, version: int | None) -> None:
    theirs = in_unilm(size, version)
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "beit.pth")
    found = convert.convert(tmp_path / "beit.pth")
    assert found.format == "beit"
    groups = {name.split(".")[0] for name in found.left if "relative_position_index" not in name}
    assert groups == {1: {"lm_head", "mask_token"}, 2: {"lm_head", "mask_token", "cls_pt_layers"}}.get(
        version or 0, {"fc_norm", "head"}
    )
    assert sum("relative_position_index" in name for name in found.left) == (2 if version is None else 1)
    assert found.model.config.modalities["image"]["mean"] == ((0.485, 0.456, 0.406) if version == 2 else (0.5,) * 3)
    assert_close_in_both(found.model, theirs, theirs)
    convert.save(found.model.float(), tmp_path / "back.pth", "beit")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert_equal(back, {name: x for name, x in theirs.float().state_dict().items() if name not in found.left})


def test_unilms_beit_predicts_the_codes_of_a_tokenizer_that_is_given(tmp_path: Path) -> None:
    theirs = in_unilm(32, 1)
    torch.save({"model": theirs.state_dict()}, tmp_path / "beit.pth")
    found = convert.convert(tmp_path / "beit.pth", [tokenizer_for(tmp_path)])
    assert found.left.keys() == {"rel_pos_bias.relative_position_index"}
    prepared = found.model.prepare(pictures(found.model))
    is_hidden, codes = hidden_and_codes(found.model, prepared)
    with torch.no_grad():
        states = theirs(normalised(found.model, pictures(found.model)), is_hidden)[:, 1:][is_hidden]
        expected = nn.functional.cross_entropy(theirs.lm_head(states), codes)
    torch.testing.assert_close(found.model(prepared).loss, expected, rtol=1e-5, atol=1e-5)
    convert.save(found.model, tmp_path / "back.pth", "beit")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert_equal(back, {name: x for name, x in theirs.state_dict().items() if name not in found.left})


@pytest.mark.parametrize("size", [32, 48])
def test_simmim_has_the_same_loss_and_goes_back(tmp_path: Path, size: int) -> None:
    theirs = randomised(SimMIM(size))
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "simmim.pth")
    found = convert.convert(tmp_path / "simmim.pth")
    assert found.format == "simmim"
    assert found.left.keys() == {"encoder.rel_pos_bias.relative_position_index"}
    assert_close_in_both(found.model, theirs, theirs.encoder)
    batch = pictures(found.model)
    prepared = found.model.prepare(batch)
    (plan,) = prepared.plans.values()
    count = (size // 8) ** 2
    is_hidden = torch.zeros(3, count, dtype=torch.bool).scatter(1, plan.target["image"], True)
    assert is_hidden.sum(1).tolist() == [{16: 10, 36: 22}[count]] * 3
    with torch.no_grad():
        expected = theirs(normalised(found.model, batch).double(), is_hidden)
    torch.testing.assert_close(found.model(prepared).loss, expected.float(), rtol=1e-6, atol=0)  # losses are float32
    convert.save(found.model.float(), tmp_path / "back.pth", "simmim")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert_equal(back, {name: x for name, x in theirs.float().state_dict().items() if name not in found.left})


@pytest.mark.parametrize("kind", ["beit", "simmim"])
def test_a_file_that_is_not_whole_or_holds_more_is_refused(tmp_path: Path, kind: str) -> None:
    theirs = in_unilm(32, 1) if kind == "beit" else randomised(SimMIM(32))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    assert_refuses(tmp_path, "model.safetensors", ("" if kind == "beit" else "encoder.") + "blocks.1.attn.v_bias")


# -- another size, and models of our own ----------------------------------------------------------------------------


def test_another_size_stretches_the_tables(tmp_path: Path) -> None:
    theirs = in_unilm(32, None)
    torch.save({"model": theirs.state_dict()}, tmp_path / "beit.pth")
    found = convert.convert(tmp_path / "beit.pth", ["modalities.image.size=48"])
    assert "backbone: relative biases go from 7 x 7 to 11 x 11 (interpolated)" in found.notes
    state = theirs.state_dict()
    for number in range(2):
        name = f"blocks.{number}.attn.relative_position_bias_table"
        inner = state[name][:-3].t().reshape(1, 4, 7, 7)
        inner = nn.functional.interpolate(inner, (11, 11), mode="bicubic", antialias=True).flatten(2)[0].t()
        state[name] = torch.cat([inner, state[name][-3:]])
        del state[f"blocks.{number}.attn.relative_position_index"]
    larger = Transformer(48, is_shared=False).eval()
    larger.load_state_dict({name: x for name, x in state.items() if not name.startswith(("head", "fc_norm"))}, False)
    batch = pictures(found.model)
    with torch.no_grad():
        expected = larger(normalised(found.model, batch))
    torch.testing.assert_close(found.model.encode(batch).sequence, expected, rtol=1e-5, atol=1e-5)
