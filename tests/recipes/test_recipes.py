"""Every recipe is a test: found by globbing, shrunk, shown, differentiated; trained, saved, reloaded, resumed.

The last four in `make test` for the small recipes, in `make test-slow` for those of published sizes.
"""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3.build import meta_model, model_config
from m3.check import shrink
from m3.checkpoint import newest
from m3.cost import cost
from m3.data.loader import Samples, first_batches
from m3.evaluate.tasks.predict import predictors
from m3.held_out import HeldOut
from m3.model import M3Model
from m3.recipe import PACKAGED, dump_recipe, load_recipe
from m3.schedule import choices
from m3.summary import print_summary
from m3.train import build_model, open_source, train

RECIPES = sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def _one_of_each_size() -> list[str]:
    """Return the recipes that are still different once they are shrunk: sizes of one method are not."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in RECIPES:
            settings = shrink(load_recipe(name), Path(folder) / "run").model_dump(mode="json", exclude={"name"})
            found.setdefault(json.dumps(settings, sort_keys=True), name)
    return list(found.values())


DISTINCT = _one_of_each_size()
SMALL = [name for name in DISTINCT if name == "quickstart" or "_tiny" in name]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in DISTINCT if name not in SMALL]


def test_there_are_recipes() -> None:
    assert {"quickstart", "mae_tiny", "mae_vit_b", "multimae_vit_b"} <= set(DISTINCT)
    assert len(DISTINCT) > 0.8 * len(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_starts_with_a_note_and_survives_writing(name: str, tmp_path: Path) -> None:
    text = (PACKAGED / f"{name}.yaml").read_text()
    assert text.startswith("# "), "a recipe opens with its lab note"
    recipe = load_recipe(name)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_measured_during_the_run_and_says_whether_features_spread(name: str) -> None:
    recipe = load_recipe(name)
    kinds = {entry.get("type", "predict") for entry in recipe.evaluate.tasks.values()}
    assert kinds
    assert recipe.evaluate.every
    is_supervised = {entry["type"] for entry in recipe.objectives.values() if entry} == {"classify"}
    assert "spread" in kinds or is_supervised or name.startswith(("finetune_", "tokenizer_", "quickstart"))


@pytest.mark.parametrize("name", DISTINCT)
def test_recipe_can_be_shown_with_its_cost(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = shrink(load_recipe(name), tmp_path)
    print_summary(recipe)
    assert "FLOPs per sample: " in capsys.readouterr().out
    mixes = choices(recipe.train.mix, list(recipe.objectives)) if recipe.train.mix else {}
    for active in mixes:  # a run tells the share of its speed that it reaches
        assert cost(meta_model(recipe), active).train_flops > 0


@pytest.mark.parametrize("name", DISTINCT)
def test_every_parameter_receives_a_gradient(name: str, tmp_path: Path) -> None:
    recipe = shrink(load_recipe(name), tmp_path)
    model = build_model(recipe)
    samples = Samples(open_source(recipe, model, "train"), model.modalities, recipe.data, recipe.seed)
    model(next(first_batches(samples, 16, 16))).loss.backward()
    trained = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
    without = [n for n, grad in trained if grad is None or not grad.abs().sum() > 0]
    # An Embedding row or modality that no sample shows may stay at zero, a whole parameter may not.
    assert without == []


@pytest.mark.parametrize("name", [*SMALL, *OTHERS])
def test_recipe_trains_saves_reloads_and_resumes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = shrink(load_recipe(name), tmp_path / "run")
    train(recipe)
    run = recipe.folder
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "lr" in line]
    assert [line["step"] for line in losses] == [1, 2, 3]
    if predictors(build_model(recipe)):  # others have nothing to draw
        assert (run / "preview.png").stat().st_size > 1000
    final = load_file(run / "model" / "model.safetensors")
    assert M3Model.from_pretrained(run / "model").config.modalities == model_config(recipe).modalities

    shutil.rmtree(newest(run))
    plain = recipe.evaluate.model_copy(update={"tasks": {}, "every": None})  # measured and drawn once is enough
    monkeypatch.setattr(HeldOut, "draw", lambda *_: None)
    train(recipe.model_copy(update={"evaluate": plain}), resume=True)
    again = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in final.items())
    resumed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in resumed if "lr" in line] == [1, 2, 3]
    assert [line for line in resumed if "lr" in line][-1]["gradient_norm"] == losses[-1]["gradient_norm"]


def test_paper_sizes_have_the_papers_parameters() -> None:
    """MAE ViT-B 111.91 M with its two position tables of 197 rows; MultiMAE-B 97.92 M trained values."""
    tables = 197 * (768 + 512)
    mae = sum(p.numel() for p in meta_model(load_recipe("mae_vit_b")).parameters())
    assert round((mae + tables) / 1e6, 2) == 111.91
    multimae = sum(p.numel() for p in meta_model(load_recipe("multimae_vit_b")).parameters())
    assert round(multimae / 1e6, 2) == 97.92


def test_clip_has_the_parameters_of_open_clips() -> None:
    """149,620,737; ours has a bias of patches, no position of the class token, a row of words for padding."""
    clip = sum(p.numel() for p in meta_model(load_recipe("clip_vit_b16")).parameters())
    assert clip == 149_620_737 + 768 - 768 + 512


def test_flops_agree_with_a_count_by_hand() -> None:
    """Forward FLOPs of MAE ViT-B: two per multiply-add of every matrix product."""
    encoder, decoder = 50, 197

    def block(n: int, d: int) -> int:
        return n * 12 * d * d + 2 * n * n * d

    products = 49 * 768 * 768 + 12 * block(encoder, 768) + encoder * 768 * 512
    products += 7 * block(decoder, 512) + 147 * 512 * 768
    # In the last block only the 147 hidden tokens ask; all 197 answer.
    products += (147 * 10 + decoder * 2) * 512 * 512 + 2 * 147 * decoder * 512
    assert cost(meta_model(load_recipe("mae_vit_b"))).forward_flops == 2 * products
