"""BEiT, Data2VecVision and SimMIM's ViT become ours with the same outputs, and go back with the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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
from m3.check import _stand_in
from m3.errors import M3Error
from m3.foreign.checkpoint import read_foreign
from m3.network import Prepared
from tests.parity.published import assert_equal, assert_refuses, normalised, pictures, quietly, randomised
from tests.parity.published_blocks import Mlp

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


@pytest.mark.parametrize("name", CASES)
def test_states_are_the_same_and_transformers_opens_what_is_written(tmp_path: Path, name: str) -> None:
    kind, config = CASES[name]
    peer = randomised(kind(config))
    with quietly():
        peer.save_pretrained(tmp_path / "in")
    found = convert.convert(tmp_path / "in")
    assert found.format == ("hf_beit" if name.startswith("beit") else "hf_data2vec_vision")
    assert {key.split(".")[-2] for key in found.left} <= {"classifier", "layernorm", "embeddings"}
    convert.save(found.model, tmp_path / "out", found.format)
    given = dict(convert._format(found.format).tidy(read_foreign(tmp_path / "in")).tensors)
    written = load_file(tmp_path / "out/model.safetensors")
    assert_equal(written, {key: x for key, x in given.items() if key not in found.left})
    with quietly():
        again = AutoModel.from_pretrained(tmp_path / "out")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model, opened = found.model.to(dtype=dtype), again.to(dtype=dtype)  # type: ignore[call-arg]
        own: Any = peer.to(dtype=dtype)
        own = getattr(own, own.base_model_prefix, own)
        batch = pictures(model)
        pixels = normalised(model, batch).to(dtype)
        states = model.encode(batch).sequence
        with torch.no_grad():
            torch.testing.assert_close(states, own(pixels).last_hidden_state, rtol=0, atol=tolerance)
            torch.testing.assert_close(states, opened(pixels).last_hidden_state, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["beit", "beit, shared", "data2vec, shared"])
def test_names_as_version_5_has_them_in_memory_are_read(tmp_path: Path, name: str) -> None:
    kind, config = CASES[name]
    peer = randomised(kind(config))
    config.save_pretrained(tmp_path)
    save_file(peer.state_dict(), tmp_path / "model.safetensors")
    model = convert.load(tmp_path)
    batch = pictures(model)
    with torch.no_grad():
        expected = peer(normalised(model, batch)).last_hidden_state
    torch.testing.assert_close(model.encode(batch).sequence, expected, rtol=0, atol=1e-5)


def pretrained(folder: Path) -> Any:
    sizes: dict[str, Any] = SMALL | SHARED | {"layer_norm_eps": 1e-5, "vocab_size": 16, "use_mask_token": True}
    peer = randomised(BeitForMaskedImageModeling(BeitConfig(**sizes)))
    with quietly():
        peer.save_pretrained(folder)
    return peer


def tokenizer_for(folder: Path) -> str:
    """Return an override that names a tokenizer of 16 codes for pictures as these."""
    half = (0.5, 0.5, 0.5)
    image = {"type": "image", "size": 32, "mean": half, "std": half, "tokenizer": {"type": "patch", "size": 8}}
    path = _stand_in({"image": image}, "image", folder / "tokenizer")
    return f"objectives.reconstruct.targets.codes.target.tokenizer={path}"


def hidden_and_codes(model: M3Model, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Return (B, N) bool, True for hidden patches, and the codes of these, one after the other."""
    (plan,) = prepared.plans.values()
    asked, objective = plan.target["image"], cast(Any, model.objectives["reconstruct"])
    is_hidden = torch.zeros(len(asked), 16, dtype=torch.bool).scatter(1, asked, True)
    codes = objective.providers["codes"](prepared.tokens["image"], asked)
    return is_hidden, codes.flatten()


def test_beits_pretraining_has_the_same_loss_where_the_tokenizer_is_given(tmp_path: Path) -> None:
    peer = pretrained(tmp_path / "in")
    found = convert.convert(tmp_path / "in", [tokenizer_for(tmp_path)])
    assert found.left.keys() == {"beit.layernorm.weight", "beit.layernorm.bias"}, "their second names"
    prepared = found.model.prepare(pictures(found.model))
    is_hidden, codes = hidden_and_codes(found.model, prepared)
    pixels = normalised(found.model, pictures(found.model))
    convert.save(found.model, tmp_path / "out", "hf_beit")
    assert_equal(load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "in/model.safetensors"))
    with quietly():
        again = BeitForMaskedImageModeling.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = peer(pixels, bool_masked_pos=is_hidden, labels=codes).loss
        torch.testing.assert_close(found.model(prepared).loss, expected, rtol=1e-5, atol=1e-5)
        assert again(pixels, bool_masked_pos=is_hidden, labels=codes).loss == expected


def test_beits_pretraining_without_a_tokenizer_is_its_encoder_with_the_norm_behind_it(tmp_path: Path) -> None:
    peer = pretrained(tmp_path)
    found = convert.convert(tmp_path)
    assert "tokenizer" in found.left["lm_head.weight"]
    batch = pictures(found.model)
    with torch.no_grad():
        expected = peer.layernorm(peer.beit(normalised(found.model, batch)).last_hidden_state)
    torch.testing.assert_close(found.model.encode(batch).sequence, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("beit, shared", "beit.layernorm.bias"), ("data2vec", "data2vec_vision.encoder.layer.1.lambda_2")],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, missing: str) -> None:
    kind, config = CASES[name]
    with quietly():
        kind(config).save_pretrained(tmp_path)
    bare = load_file(tmp_path / "model.safetensors")  # with prefixes as a head has them, strange names keep theirs
    prefix = missing.partition(".")[0]
    save_file({f"{prefix}.{name}": x for name, x in bare.items()}, tmp_path / "model.safetensors")
    assert_refuses(tmp_path, "model.safetensors", missing)


def test_two_norms_in_a_row_and_no_positions_at_all_are_refused(tmp_path: Path) -> None:
    with quietly():
        BeitForMaskedImageModeling(BeitConfig(**LARGER | SHARED)).save_pretrained(tmp_path / "two")
        BeitModel(BeitConfig(**{**SMALL, "use_relative_position_bias": False})).save_pretrained(tmp_path / "none")
    with pytest.raises(M3Error, match=r"two norms behind its blocks"):
        convert.convert(tmp_path / "two")
    with pytest.raises(M3Error, match=r"either one relative bias for all blocks, or one for each, or absolute"):
        convert.convert(tmp_path / "none")


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


def assert_close_in_both(model: M3Model, theirs: nn.Module, forward: Any) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model, _ = model.to(dtype=dtype), theirs.to(dtype=dtype)  # type: ignore[call-arg]
        batch = pictures(model)
        with torch.no_grad():
            expected = forward(normalised(model, batch).to(dtype))
        torch.testing.assert_close(model.encode(batch).sequence, expected, rtol=0, atol=tolerance)


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


class Bias(nn.Module):
    """A table and the number of the entry for each pair; the last three are for the class token."""

    relative_position_index: Tensor

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, heads))
        index = torch.zeros(side**2 + 1, side**2 + 1, dtype=torch.long)
        for query in range(side**2):
            for key in range(side**2):
                down, right = query // side - key // side, query % side - key % side
                index[query + 1, key + 1] = (down + side - 1) * (2 * side - 1) + right + side - 1
        index[0, :], index[:, 0] = (2 * side - 1) ** 2, (2 * side - 1) ** 2 + 1
        index[0, 0] = (2 * side - 1) ** 2 + 2
        self.register_buffer("relative_position_index", index)

    def forward(self) -> Tensor:
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class Attention(Bias):
    """Queries and values with biases; the table is its own where it has one."""

    def __init__(self, width: int, heads: int, side: int | None) -> None:
        super().__init__(side or 1, heads)
        self.heads, self.has_table = heads, side is not None
        if not self.has_table:
            del self.relative_position_bias_table, self.relative_position_index
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x).chunk(3, -1)
        bias, states = super().forward() if bias is None else bias, []
        for head, (one, two, three) in enumerate(
            zip(*(part.chunk(self.heads, -1) for part in (q + self.q_bias, k, v + self.v_bias)), strict=True)
        ):
            states.append((one @ two.transpose(1, 2) * one.shape[-1] ** -0.5 + bias[head]).softmax(-1) @ three)
        return self.proj(torch.cat(states, -1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, side: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads, side), Mlp(width, 4 * width)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x), bias)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """The encoder in pre-training (`is_shared`) or after fine-tuning, without its head."""

    def __init__(self, size: int, is_shared: bool, width: int = 128, heads: int = 4, patch: int = 8) -> None:
        super().__init__()
        side = size // patch
        self.cls_token, self.patch_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        if is_shared:
            self.mask_token, self.rel_pos_bias = nn.Parameter(torch.zeros(1, 1, width)), Bias(side, heads)
            self.norm = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList([Block(width, heads, None if is_shared else side) for _ in range(2)])

    def forward(self, pixels: Tensor, is_hidden: Tensor | None = None) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)  # type: ignore[operator]
        if is_hidden is not None:
            x = torch.where(is_hidden[..., None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, self.rel_pos_bias() if hasattr(self, "rel_pos_bias") else None)
        return self.norm(x) if hasattr(self, "norm") else x


def in_unilm(size: int, version: int | None) -> Any:
    """BEiT's pre-training of a version with its heads; None: fine-tuned."""
    theirs: Any = Transformer(size, version is not None)
    if version is None:
        theirs.fc_norm, theirs.head = nn.LayerNorm(128), nn.Linear(128, 3)
    else:
        theirs.lm_head = nn.Linear(128, 16)
    if version == 2:
        theirs.cls_pt_layers = nn.ModuleList([Block(128, 4, None) for _ in range(2)])
    return randomised(theirs)


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


class SimMIM(nn.Module):
    """Xie et al. 2021: hidden patches as mask tokens, a 1 x 1 convolution and a shuffle of its channels to pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = Transformer(size, is_shared=True)
        self.decoder = nn.Sequential(nn.Conv2d(128, 8 * 8 * 3, 1), nn.PixelShuffle(8))

    def forward(self, pixels: Tensor, is_hidden: Tensor) -> Tensor:
        """Return the mean absolute error of all hidden pixels."""
        side = pixels.shape[-1] // 8
        states = self.encoder(pixels, is_hidden)[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        where = is_hidden.unflatten(1, (side, side)).repeat_interleave(8, 1).repeat_interleave(8, 2)
        return (self.decoder(states) - pixels).abs().mean(1)[where].mean()


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
