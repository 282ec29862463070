"""Training that starts from published weights: what is taken is said, and is what training begins with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from m3.check import shrink
from m3.checkpoint import newest
from m3.errors import M3Error
from m3.recipe import Recipe, load_recipe, recipe_from
from m3.train import train
from tests.parity.published import randomised


def small(name: str, folder: Path, init: Path, steps: int, **more: Any) -> Recipe:
    """A recipe as `m3 check` shrinks it, as wide as the smallest published transformer, from weights."""
    settings = shrink(load_recipe(name), folder, steps).model_dump(mode="json", exclude_none=True)
    for tower in (settings["backbone"], *settings["towers"].values()):
        tower |= {"width": 192, "heads": 3}
    settings["modalities"]["image"]["size"] = 32
    settings["train"] |= {"lr": 1e-12}  # a step changes nothing that is larger than this
    settings |= {"init": str(init)}
    for section, values in more.items():
        settings[section] |= values
    return recipe_from(settings, name)


def timms_vit(file: Path) -> dict[str, torch.Tensor]:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason="needs timm")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 5}
    theirs = randomised(vision_transformer.VisionTransformer(**sizes)).state_dict()
    save_file(theirs, file)
    return theirs


def clip(file: Path) -> dict[str, torch.Tensor]:
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip")
    vision = {"layers": 2, "width": 192, "head_width": 64, "patch_size": 16, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 2}
    theirs: nn.Module = randomised(open_clip.model.CLIP(32, vision, text, quick_gelu=True))
    tensors = {name: x.clone() for name, x in theirs.state_dict().items()}
    save_file(tensors, file)
    return tensors


def trained_from(file: Path, name: str, capsys: pytest.CaptureFixture) -> tuple[str, dict[str, torch.Tensor], str]:
    """What a step of the recipe said, the tensors it saved and their card."""
    recipe = small(name, file.parent / "run", file, 1)
    train(recipe)
    said = " ".join(capsys.readouterr().out.split())
    model = recipe.folder / "model"
    return said, load_file(model / "model.safetensors"), (model / "README.md").read_text()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """All but equal: one step of 1e-12."""
    return torch.allclose(found, expected.reshape(found.shape), rtol=0, atol=1e-7)


def resumed_is_the_same(recipe: Recipe, capsys: pytest.CaptureFixture) -> None:
    """The rest of a run that is resumed does not look at the published weights again: they may be gone."""
    run = recipe.folder
    Path(str(recipe.init)).unlink()
    final = load_file(run / "model" / "model.safetensors")
    shutil.rmtree(newest(run))
    capsys.readouterr()
    train(recipe, resume=True)
    assert "init:" not in capsys.readouterr().out
    again = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(again[name], x) for name, x in final.items())


def test_mae_starts_from_a_vit_of_timm(tmp_path: Path, capsys) -> None:
    theirs = timms_vit(tmp_path / "vit.safetensors")
    said, own, card = trained_from(tmp_path / "vit.safetensors", "mae_vit_b_from_timm", capsys)
    assert f"tensors come from {tmp_path}/vit.safetensors (ViT in timm's names (timm, MAE's encoder));" in said
    assert "fresh: objectives.reconstruct; unused: objectives.classify" in said
    for block in (0, 1):
        for ours, name in (("attention.qkv", "attn.qkv"), ("attention.projection", "attn.proj"), ("norm2", "norm2")):
            for part in ("weight", "bias"):
                key = f"backbone.blocks.{block}.{ours}.{part}"
                assert close(own[key], theirs[f"blocks.{block}.{name}.{part}"]), key
    assert close(own["tokenizers.image.projection.bias"], theirs["patch_embed.proj.bias"])
    assert close(own["backbone.norm.weight"], theirs["norm.weight"])
    assert close(
        own["backbone.prefix"] + own["backbone.prefix_positions"], theirs["cls_token"] + theirs["pos_embed"][:, :1]
    )
    assert close(own["positions.image.table"], theirs["pos_embed"][0, 1:].t())
    assert "starting from `vit.safetensors`" in card


def test_flip_starts_from_a_clip_of_open_clip(tmp_path: Path, capsys) -> None:
    theirs = clip(tmp_path / "clip.safetensors")
    said, own, _ = trained_from(tmp_path / "clip.safetensors", "flip_vit_b_from_clip", capsys)
    assert f"tensors come from {tmp_path}/clip.safetensors (CLIP in open_clip's names" in said
    assert "fresh:" not in said
    assert "unused:" not in said
    assert "towers.photo.mlp is quick_gelu and seems to be gelu there; towers.words.mlp is quick_gelu and" in said
    for ours, name in (("photo", "visual.transformer"), ("words", "transformer")):
        for block in (0, 1):
            qkv = own[f"towers.{ours}.blocks.{block}.attention.qkv.weight"]
            assert close(qkv, theirs[f"{name}.resblocks.{block}.attn.in_proj_weight"])
    assert close(own["objectives.contrast.projections.image.weight"], theirs["visual.proj"].t())
    assert close(own["objectives.contrast.projections.text.weight"], theirs["text_projection"].t())
    assert close(own["tokenizers.text.table.weight"][:-1], theirs["token_embedding.weight"])


@pytest.mark.parametrize(
    ("name", "write"), [("mae_vit_b_from_timm", timms_vit), ("flip_vit_b_from_clip", clip)], ids=["mae", "flip"]
)
def test_it_goes_on_after_an_interruption_and_never_starts_again(tmp_path: Path, capsys, name: str, write: Any) -> None:
    write(tmp_path / "weights.safetensors")
    recipe = small(name, tmp_path / "run", tmp_path / "weights.safetensors", 3, train={"lr": 1e-3})
    train(recipe)
    assert "init:" in capsys.readouterr().out
    resumed_is_the_same(recipe, capsys)


def test_another_size_is_adapted_and_said(tmp_path: Path, capsys) -> None:
    timms_vit(tmp_path / "vit.safetensors")
    recipe = small("mae_vit_b_from_timm", tmp_path / "run", tmp_path / "vit.safetensors", 1)
    settings = recipe.model_dump(mode="json", exclude_none=True)
    settings["modalities"]["image"]["size"] = 48
    train(recipe_from(settings, recipe.name))
    said = " ".join(capsys.readouterr().out.split())
    assert "image: learned positions go from 2 x 2 to 3 x 3 (interpolated)" in said


def test_what_no_tensor_tells_is_to_be_said_in_a_conversion_first(tmp_path: Path) -> None:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason="needs timm")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 40, "depth": 2, "num_heads": 5, "num_classes": 0}
    save_file(vision_transformer.VisionTransformer(**sizes).state_dict(), tmp_path / "vit.safetensors")
    recipe = small("mae_vit_b_from_timm", tmp_path / "run", tmp_path / "vit.safetensors", 1)
    with pytest.raises(
        M3Error, match=r"^init: .* give backbone\.heads=N to `m3 convert .* FOLDER`, and start from FOLDER"
    ):
        train(recipe)
