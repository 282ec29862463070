"""Layer-wise learning rates: the groups of our optimizer are those of timm's `param_groups_layer_decay`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from m3 import convert
from m3.config import M3Config
from m3.model import M3Model
from m3.recipe import TrainSpec
from m3.schedule import Plan, layer_scales, make_optimizer, set_rates

timm = pytest.importorskip("timm", reason="parity needs timm")
timm_optim = pytest.importorskip("timm.optim", reason="parity needs timm")
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3, "num_classes": 7}
SPEC = TrainSpec(steps=10, lr=0.5, layer_decay=0.65, decay="weights", weight_decay=0.05)
Groups = dict[tuple[float, float], set[str]]


def grouped(groups: Any, model: nn.Module, key: str) -> Groups:
    names = {id(p): name for name, p in model.named_parameters()}
    found: Groups = {}
    for group in groups:
        place = round(group[key], 9), group["weight_decay"]
        found.setdefault(place, set()).update(names[id(p)] for p in group["params"])
    return found


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_groups_equal_timms(pool: str, tmp_path: Path) -> None:
    """timm's names become ours by the table of the converter; the position of the class token is a part of theirs."""
    theirs = timm.models.vision_transformer.VisionTransformer(**VIT, global_pool=pool)
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    found = convert.convert(tmp_path / "vit.safetensors")
    table = {name: row.ours for row in found.rows for name in row.theirs}
    expected = timm_optim.param_groups_layer_decay(
        theirs, 0.05, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=0.65
    )
    wanted = {
        place: {own for name in names for own in table[name]}
        for place, names in grouped(expected, theirs, "lr_scale").items()
    }
    assert grouped(make_optimizer(found.model, SPEC).param_groups, found.model, "layer_scale") == wanted
    assert len(wanted) == 12


def test_rates_follow_the_groups_and_without_decay_there_are_two() -> None:
    modalities = {
        "image": {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 8}},
        "label": {"type": "label", "classes": 3, "tokenizer": {"type": "label"}},
    }
    objectives = {"classify": {"type": "classify"}}
    backbone = {"width": 16, "depth": 2, "heads": 2}
    model = M3Model(M3Config(modalities=modalities, backbone=backbone, objectives=objectives))
    optimizer = make_optimizer(model, SPEC)
    set_rates(optimizer, 0, SPEC, Plan(10, 0, 1, 1, 0.5, 0.0))
    rates = sorted({round(group["lr"], 9) for group in optimizer.param_groups})
    assert rates == pytest.approx([0.5 * 0.65**3, 0.5 * 0.65**2, 0.5 * 0.65, 0.5])
    plain = make_optimizer(model, TrainSpec(steps=10, lr=0.5))
    set_rates(plain, 0, TrainSpec(steps=10, lr=0.5), Plan(10, 0, 1, 1, 0.5, 0.0))
    assert [group["lr"] for group in plain.param_groups] == [0.5, 0.5]
    assert {p.ndim > 1 for p in plain.param_groups[0]["params"]} == {True}
    assert torch.tensor([p.ndim for p in plain.param_groups[1]["params"]]).max() == 1


def test_every_tower_counts_its_own_blocks() -> None:
    modalities = {
        "image": {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 8}},
        "depth": {"type": "depth", "size": 16, "tokenizer": {"type": "patch", "size": 8}},
    }
    tower = {"modalities": ["depth"], "width": 16, "depth": 3, "heads": 2}
    objectives = {"contrast": {"type": "contrast", "width": 8, "sides": {"image": {}, "depth": {}}}}
    backbone = {"width": 16, "depth": 1, "heads": 2}
    config = M3Config(modalities=modalities, backbone=backbone, towers={"far": tower}, objectives=objectives)
    scales = layer_scales(M3Model(config), 0.5)
    assert scales["tokenizers.image.projection.weight"] == scales["backbone.prefix"] == 0.25
    assert scales["tokenizers.depth.projection.bias"] == scales["towers.far.prefix"] == 0.5**4
    assert [scales[f"towers.far.blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert scales["backbone.norm.weight"] == scales["towers.far.norm.bias"] == 0.5
    assert scales["objectives.contrast.projections.image.weight"] == 1.0
