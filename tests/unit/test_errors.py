"""What a user does wrong gets one sentence with the place and the remedy; the sentence is tested."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m3.check import shrink
from m3.cli import main
from m3.data.loader import Samples, first_batches
from m3.errors import M3Error
from m3.model import M3Model
from m3.recipe import load_recipe
from m3.train import build_model, open_source, train
from m3.types import Batch

TINY = ["train.steps=1", "train.batch_size=4", "data.workers=0", "train.trackers=[]", "train.threads=1"]


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg")
    return folder


def folder_recipe(root: Path, *more: str):
    return load_recipe("mae_tiny", ["data.source=folder", f"data.root={root}", f"out={root}-run", *TINY, *more])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=3", r"mae_tiny.yaml: train.stepz: unknown key. Did you mean `steps`\?"),
        ("trian.steps=3", r"mae_tiny.yaml: trian: unknown key. Did you mean `train`\?"),
        ("train.steps=many", "mae_tiny.yaml: train.steps: input should be a valid integer, .* got 'many'"),
        ("train.batch_size=0", "train.batch_size: input should be greater than 0, got 0"),
        ("data.crop=[1.0,0.2]", r"data: `crop` is smallest, then largest: write \[0.2, 1.0\]"),
        ("data.crop=[0.2,1.2]", "data.crop.1: input should be less than or equal to 1, got 1.2"),
        ("data.root=/photos", "data: source `world` makes its own scenes and reads no `root`; add data.source=folder"),
        ("train.betas=[0.9,1.5]", "train.betas.1: input should be less than 1, got 1.5"),
        ("backbone.class_tokens=-1", "backbone.class_tokens: input should be greater than or equal to 0, got -1"),
        ("backbone.mlp_ratio=0", "backbone.mlp_ratio: input should be greater than 0, got 0"),
        ("train.epochs=3", "train: give either `steps` or `epochs`, not both and not neither"),
        ("backbone.heads=5", "backbone: width 192 is not divisible by heads 5; change one of them"),
        ("backbone=big", "mae_tiny.yaml: backbone: .* got 'big'"),
        ("steps", "`steps` is no override; write key.path=value"),
    ],
)
def test_wrong_recipes_are_refused_before_any_work(override: str, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        load_recipe("mae_tiny", [override])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("modalities.image.sizee=64", r"modalities.image.sizee: unknown key. Did you mean `size`\?"),
        (
            "modalities.image.type=imag",
            r"modalities.image.type: `imag` in `modalities` is not known.*Did you mean `image`\?",
        ),
        (
            "modalities.image.type=nowhere_pkg.lidar:Lidar",
            "plugin `nowhere_pkg.lidar:Lidar` .* failed to load: ModuleNotFound",
        ),
        ("modalities.image.tokenizer.size=7", "size 64 x 64 is not a multiple of the patch 7 x 7"),
        (
            "objectives.reconstruct.targets.depth.loss=l1",
            "targets.depth names `depth`, which is no modality of the recipe",
        ),
        (
            "objectives.reconstruct.targets.image.loss=cross_entropy",
            "holds values, which loss `cross_entropy` can't compare",
        ),
        ("modalities.image.std=[0,0,0]", "modalities.image.std.0: input should be greater than 0, got 0"),
        ("objectives.reconstruct.masking.visible=1.5", "masking.visible: "),
        ("objectives.reconstruct.decoder.type=self_decoderr", r"Did you mean `self_decoder`\?"),
    ],
)
def test_wrong_parts_are_named(override: str, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        build_model(load_recipe("mae_tiny", [override]))


def test_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(M3Error, match=r"there is no recipe `mae_tinny`.* Did you mean `mae_tiny`\?"):
        load_recipe("mae_tinny")


def test_the_command_prints_one_sentence_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "mae_tiny", "train.stepz=1"]) == 2
    assert capsys.readouterr().err == "m3 show: mae_tiny.yaml: train.stepz: unknown key. Did you mean `steps`?\n"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=r"data.root: the folder .*/absent does not exist; check the path"):
        train(folder_recipe(tmp_path / "absent"))
    with pytest.raises(M3Error, match=r"data.root: this key is required for source `folder`"):
        train(load_recipe("mae_tiny", ["data.source=folder", *TINY]))


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=r"holds no file that `image` can read \(.jpg"):
        train(folder_recipe(tmp_path))


def test_an_unreadable_image_is_skipped_counted_and_reported(tmp_path: Path, capsys) -> None:
    root = photographs(tmp_path / "photos", 30)
    recipe = folder_recipe(root, "train.steps=8", "train.log_every=1", "data.held_out=2")
    broken = open_source(recipe, build_model(recipe), "train").ids[7]
    file = root / f"{broken}.jpg"
    file.write_bytes(file.read_bytes()[:3000])
    train(recipe)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count(f"skipped {broken}: image file is truncated") == 1
    assert f"1 unreadable samples were skipped: {broken}" in printed
    assert '"skipped": 1' in (recipe.folder / "metrics.jsonl").read_text()


def test_unreadable_images_past_the_limit_end_the_run(tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos", 40)
    for i in range(0, 40, 2):
        (root / f"{i:03d}.jpg").write_bytes(b"no picture")
    with pytest.raises(M3Error, match=r"1[12] of \d+ samples can't be read, more than data.max_unreadable = 0.01"):
        train(folder_recipe(root, "train.steps=20"))


def test_nothing_readable_at_all(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(20):
        (root / f"{i}.jpg").write_bytes(b"no picture")
    recipe = folder_recipe(root)
    model = build_model(recipe)
    with pytest.raises(M3Error, match="16 samples in a row can't be read; the first: "):
        next(first_batches(Samples(open_source(recipe, model, "train"), model.modalities, recipe.data, 0), 1, 1))


def aligned(root: Path) -> Path:
    photographs(root / "image", 12)
    (root / "depth").mkdir()
    (root / "semantic").mkdir()
    for i in range(12):
        Image.fromarray(np.full((70, 90), 1000 + i, np.uint16)).save(root / "depth" / f"{i:03d}.png")
        Image.fromarray(np.full((70, 90), i % 6, np.uint8)).save(root / "semantic" / f"{i:03d}.png")
    return root


def test_aligned_folders_train_and_a_mismatched_pair_is_named(tmp_path: Path, capsys: Any) -> None:
    root = aligned(tmp_path / "scenes")
    overrides = ["data.source=folder", f"data.root={root}", f"out={tmp_path / 'run'}", *TINY]
    recipe = load_recipe("multimae_tiny", [*overrides, "data.crop=[0.5, 1.0]", "data.flip=0.5", "data.held_out=1"])
    train(recipe)
    assert "left out: evaluate.tasks.shape.label: no sample (train) has the label `shape`" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    (root / "depth" / "004.png").rename(root / "depth" / "four.png")
    with pytest.raises(
        M3Error, match=r"`four` is in `depth` but not in `image`|`004` is in `image` but not in `depth`"
    ):
        train(recipe)


def test_a_folder_that_lacks_a_modality(tmp_path: Path) -> None:
    root = aligned(tmp_path / "scenes")
    shutil.rmtree(root / "depth")
    recipe = load_recipe("multimae_tiny", ["data.source=folder", f"data.root={root}", *TINY])
    with pytest.raises(M3Error, match=r"has no folder `depth` .*\(folders there: image, semantic\)"):
        train(recipe)


def test_a_label_outside_the_classes_is_named(tmp_path: Path) -> None:
    recipe = load_recipe("multimae_tiny")
    with pytest.raises(M3Error, match=r"holds class 9, but `classes` is 6; raise .* `ignore`"):
        build_model(recipe).modalities["semantic"].to_raw(np.full((4, 4), 9))


def test_absent_and_unknown_modalities() -> None:
    model = build_model(shrink(load_recipe("multimae_tiny"), Path("unused")))
    depth = {"depth": torch.rand(2, 64, 64)}
    with pytest.raises(M3Error, match="the batch has no `image`, which target `image` needs; add it to the data"):
        model(Batch(depth, torch.arange(2)))
    with pytest.raises(M3Error, match=r"the model has no modality `dept`. Did you mean `depth`\?"):
        model.encode(Batch({"dept": depth["depth"]}, torch.arange(2)))
    with pytest.raises(M3Error, match="`visible` names `image`, which the batch does not hold"):
        model.reconstruct(Batch(depth, torch.arange(2)), {"image": 0.5})


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train(shrink(load_recipe("mae_tiny"), tmp_path / "run"))
    other = shrink(load_recipe("mae_tiny", ["modalities.image.tokenizer.size=16"]), tmp_path / "run")
    with pytest.raises(M3Error, match=r"`modalities.image.tokenizer.size` is 8 there and 16 here; resume with its own"):
        train(other, resume=True)


def test_a_model_with_a_missing_plugin_says_which(tmp_path: Path) -> None:
    model = build_model(shrink(load_recipe("mae_tiny"), tmp_path))
    model.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"type": "image"', '"type": "lidar_pkg.lidar:Lidar"'))
    with pytest.raises(M3Error, match=r"plugin `lidar_pkg.lidar:Lidar` in `modalities` failed to load.*`lidar_pkg`"):
        M3Model.from_pretrained(tmp_path / "model")


def test_reconstruct_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["reconstruct", str(tmp_path / "nothing"), "x.png"]) == 2
    assert "there is no model in" in capsys.readouterr().err
