"""Mistakes on the command line end in one sentence; `check` looks at the recipe's own data; nothing needs Linux."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from m3 import checkpoint, progress
from m3 import train as trainer
from m3.check import shrink
from m3.cli import main
from m3.errors import M3Error, within
from m3.plugins import Strict
from m3.recipe import load_recipe
from m3.train import build_model, train

ROOT = Path(__file__).parents[2]


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg")
    return folder


# -- check ----------------------------------------------------------------------------------------------


def test_check_reads_the_recipes_own_data(tmp_path: Path, capsys) -> None:
    assert main(["check", "mae_tiny", "data.source=folder", "data.root=/nowhere"]) == 2
    assert "data.root: the folder /nowhere does not exist" in capsys.readouterr().err
    root = photographs(tmp_path / "photos", 3)
    assert main(["check", "mae_tiny", "data.source=folder", f"data.root={root}"]) == 0
    sentence = f"mae_tiny is fine: built tiny, 3 steps on {root}, saved, loaded, predicted.\n"
    assert capsys.readouterr().out == sentence, "no table of a 3-step model, no folder that is gone already"


def test_check_of_a_recipe_that_leaves_its_folder_open_uses_the_world(tmp_path: Path) -> None:
    recipe = load_recipe("mae_vit_b")
    assert (recipe.data.source, recipe.data.root) == ("folder", None)
    assert shrink(recipe, tmp_path).data.source == "world"


def test_check_finds_a_model_that_does_not_load_as_it_was(monkeypatch, capsys) -> None:
    from m3.model import M3Model

    def other(folder: Path) -> M3Model:
        model = load(folder)
        model.backbone.norm.bias.data[3] += 1e-3
        return model

    load = M3Model.from_pretrained
    monkeypatch.setattr(M3Model, "from_pretrained", other)
    assert main(["check", "mae_tiny"]) == 2
    assert "mae_tiny: the saved model does not load as it was" in capsys.readouterr().err


# -- reconstruct ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--visible", "25%"], "m3 reconstruct: --visible must be a share such as 0.25, got `25%`.\n"),
        (["--visible", "25"], "m3 reconstruct: --visible must be a share in (0, 1], got 25.0.\n"),
        (["--out", "x.foo"], "m3 reconstruct: --out writes a PNG file, got x.foo; end its name in .png.\n"),
    ],
)
def test_options_of_reconstruct_are_checked_before_the_model_is_loaded(option: list, sentence: str, capsys) -> None:
    assert main(["reconstruct", "no_model_is_needed", "photo.jpg", *option]) == 2
    assert capsys.readouterr().err == sentence


def test_reconstruct_takes_the_folder_of_a_run_and_draws_no_bars(tmp_path: Path, capsys) -> None:
    train(shrink(load_recipe("mae_tiny"), tmp_path / "run"), is_shown=False)
    photo = photographs(tmp_path / "photos", 1) / "000.jpg"
    assert main(["reconstruct", str(tmp_path / "run"), str(photo), "--out", str(tmp_path / "drawn.png")]) == 0
    assert (tmp_path / "drawn.png").stat().st_size > 1000
    assert capsys.readouterr().err == "", "no bar of transformers' while training ends or the model is read"


# -- trackers, launching --------------------------------------------------------------------------------


def test_an_unknown_tracker_and_one_that_is_not_installed_are_refused(monkeypatch) -> None:
    with pytest.raises(M3Error, match=r"train.trackers: `wandbb` is no tracker. Did you mean `wandb`\?"):
        train(load_recipe("mae_tiny", ["train.trackers=[wandbb]"]))
    monkeypatch.setattr(trainer, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(M3Error, match=r"train.trackers: `wandb` is not installed; install it \(pip install wandb\)"):
        train(load_recipe("mae_tiny", ["train.trackers=[wandb]"]))
    trainer.check_trackers(("tensorboard", "all"))


def test_a_mistake_under_accelerate_launch_is_the_last_thing_printed() -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "m3.train", "mae_tiny", "train.stepz=3"], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    sentence = "m3 train: mae_tiny.yaml: train.stepz: unknown key. Did you mean `steps`?"
    assert done.stderr.strip().splitlines()[-1] == sentence
    assert "accelerate launch --quiet" in (ROOT / "README.md").read_text()
    assert "accelerate launch --quiet" in (ROOT / "Makefile").read_text()


# -- other systems --------------------------------------------------------------------------------------


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch) -> None:
    assert trainer.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert trainer.cores() == 6


def test_checkpoints_are_written_where_folders_cannot_be_opened(tmp_path: Path, monkeypatch) -> None:
    """As Windows: `os.open` refuses folders, `os.fsync` refuses what was opened for reading only."""
    opened, flags_of = os.open, {}

    def refuse(path, flags, *more):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        handle = opened(path, flags, *more)
        flags_of[handle] = flags
        return handle

    def flush(handle) -> None:
        if flags_of[handle] & os.O_RDWR != os.O_RDWR:
            raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(checkpoint, "CAN_OPEN_FOLDERS", False)
    target = checkpoint.folder_of(tmp_path, 4)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        patched.setattr(os, "fsync", flush)
        checkpoint.write(target, lambda f: (f / "x").write_text("whole"), {"step": 4}, True, lambda work: work())
    assert (target / "x").read_text() == "whole"
    assert checkpoint.newest(tmp_path) == target


# -- key paths and plugins ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("masking.visibel=0.5", r"^objectives.reconstruct.masking.visibel: unknown key. Did you mean `visible`\?"),
        ("decoder.heads=5", "^objectives.reconstruct.targets.image.decoder: width 128 is not divisible by heads 5;"),
        ("targets.depth.loss=l1", "^objectives.reconstruct: targets.depth names `depth`, which is no modality"),
    ],
)
def test_mistakes_in_objectives_name_the_whole_key_path(override: str, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        build_model(load_recipe("mae_tiny", [f"objectives.reconstruct.{override}"]))


def test_key_paths_are_joined_by_points_and_sentences_by_a_colon() -> None:
    with pytest.raises(M3Error, match=r"^a\.b\.c: wrong$"), within("a"), within("b"):
        raise M3Error("c: wrong")
    with pytest.raises(M3Error, match=r"^a: all of it: wrong$"), within("a"):
        raise M3Error("all of it: wrong")


class Halved:
    """A target plugin that knows of no normalisation."""

    class Spec(Strict):
        pass

    def __init__(self, spec, tokenizer):
        self.width = tokenizer.output_width

    def __call__(self, tokens, index):
        return tokens.values.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.values.shape[-1])) / 2


def test_a_target_plugin_needs_no_normalise(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "halved_plugin", sys.modules[__name__])
    recipe = load_recipe("mae_tiny", ["objectives.reconstruct.targets.image.target={type: 'halved_plugin:Halved'}"])
    predictor = build_model(recipe).objectives["reconstruct"]
    assert predictor.is_relative == {"image": False}


def test_two_photographs_that_differ_in_their_ending_only_are_two_samples(tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos", 2)
    Image.fromarray(np.arange(12_000, dtype=np.uint8).reshape(40, 100, 3)).save(root / "001.png")
    recipe = load_recipe("mae_tiny", ["data.source=folder", f"data.root={root}", "data.held_out=0"])
    source = trainer.open_source(recipe, build_model(recipe), "train")
    assert [source.name(i) for i in range(len(source))] == ["000", "001", "001.png"]
    assert source.read(2).signals["image"].size == (100, 40)


def test_speed_and_waiting_do_not_count_the_start(monkeypatch) -> None:
    seconds = iter([100.0, 160.0, 162.0, 162.0])  # made, restarted after the first step, line, restarted by it
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    clock = progress.Clock(start=0, batch_size=8)
    clock.waited = 59.0  # workers start
    clock.restart(1)
    clock.waited += 0.5
    line = clock.line(6, {"loss": 1.5}, lr=0.1, norm=2.0, skipped={"a": 2, "b": 1})
    assert (line["samples_per_second"], line["data_wait"], line["skipped"]) == (5 * 8 / 2, 0.25, 3)


def test_the_first_step_of_a_run_has_no_speed(tmp_path: Path) -> None:
    recipe = shrink(load_recipe("mae_tiny"), tmp_path / "run")
    train(recipe, is_shown=False)
    first, second = (json.loads(x) for x in (recipe.folder / "metrics.jsonl").read_text().splitlines()[:2])
    assert "samples_per_second" not in first
    assert second["samples_per_second"] > 0
