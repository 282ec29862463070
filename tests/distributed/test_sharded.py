"""FSDP2 with two processes trains, measures, saves and goes on as one process does; the model comes out whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from m3.cli import main
from m3.recipe import PACKAGED, load_recipe
from m3.train import train

SCRIPT = Path(__file__).with_name("sharded.py")
SMALL = ["backbone.width=48", "backbone.depth=2", "backbone.heads=4", "data.workers=0", "data.held_out=8"]
SMALL += ["train.steps=4", "train.batch_size=8", "train.warmup=1", "train.log_every=1", "train.trackers=[]"]
# Of eight samples a label more or less that is told right is a matter of rounding.
SMALL += ["evaluate.tasks.shape=", "evaluate.tasks.colour="]
SMALL += ["train.precision=fp32", "train.save_every=2", "evaluate.every=2", "evaluate.samples=8", "data.samples=64"]
SMALL += ["train.ema=0.9", "train.threads=1", "train.clip=1.0", "train.checkpoint_activations=true"]


def launch(config: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the trainer under torchrun with the environment that `accelerate launch` makes of a config file."""
    settings = yaml.safe_load((PACKAGED / "accelerate" / f"{config}.yaml").read_text())["fsdp_config"]
    environment = {key.upper(): str(value).lower() for key, value in settings.items()}
    for key in ("FSDP_AUTO_WRAP_POLICY", "FSDP_STATE_DICT_TYPE"):
        environment[key] = environment[key].upper()
    environment |= {"ACCELERATE_USE_FSDP": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    return subprocess.run(
        [*command, *words], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def lines(run: Path) -> list[dict]:
    times = ("samples_per_second", "data_wait", "seconds", "utilisation")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in times} for line in found]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "zero2"])
def test_sharded_training_is_that_of_one_process(tmp_path: Path, config: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(load_recipe("mae_tiny", [*SMALL, f"out={one}"]), is_shown=False)
    done = launch(config, "mae_tiny", *SMALL, f"out={two}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FSDP" in done.stdout, "the parameters are cut up"
    compare(one, two)
    if config == "zero2":
        return

    assert main(["export", str(two), str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == (
        two / "model" / "model.safetensors"
    ).read_bytes(), "the parts put together by a command are what the run itself gathers"
    before = lines(two)
    for run in (one, two):
        shutil.copytree(run, tmp_path / f"{run.name} again")
        shutil.rmtree(tmp_path / f"{run.name} again" / "checkpoints" / "step-00000004")
    own, other = tmp_path / "two again", tmp_path / "one again"
    shutil.copytree(own, tmp_path / "alone")
    done = launch(config, "mae_tiny", *SMALL, f"out={own}", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming at step 2" in done.stdout
    assert lines(own) == before
    for name in ("model", "model_ema"):
        assert (own / name / "model.safetensors").read_bytes() == (two / name / "model.safetensors").read_bytes()

    train(load_recipe("mae_tiny", [*SMALL, f"out={tmp_path / 'alone'}"]), resume=True, is_shown=False)
    done = launch(config, "mae_tiny", *SMALL, f"out={other}", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    compare(two, tmp_path / "alone")  # of parts, on one process
    compare(one, other)  # of whole tensors, on two that cut them up


def test_a_teacher_that_is_cut_up_teaches_and_is_saved_as_a_whole_one(tmp_path: Path) -> None:
    """Two latent objectives, whose teacher moves fast: a student that taught itself would end elsewhere."""
    recipe = Path(__file__).with_name("latent.yaml")
    more = ["train.lr=1e-2", "train.trackers=[]", "train.steps=4", "train.threads=1", "train.save_every=2"]
    more += ["train.log_every=1", "evaluate.every=2", "evaluate.samples=8", "data.held_out=8", "data.workers=0"]
    more += [
        "train.precision=fp32",
        "train.warmup=0",
        "train.eps=1e-4",
    ]  # eps: a key's bias has no gradient but rounding
    one, two = tmp_path / "one", tmp_path / "two"
    train(load_recipe(recipe, [*more, f"out={one}"]), is_shown=False)
    done = launch("fsdp2", str(recipe), *more, f"out={two}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert any("held_out/hidden features" in line for line in lines(two)), "measured with the teacher"
    compare(one, two)
    for name, option in (("model", []), ("model_ema", ["--ema"])):
        assert main(["export", str(two), str(tmp_path / name), *option]) == 0
        written, gathered = (folder / name / "model.safetensors" for folder in (tmp_path, two))
        assert written.read_bytes() == gathered.read_bytes()
    before = lines(two)
    shutil.rmtree(two / "checkpoints" / "step-00000004")
    done = launch("fsdp2", str(recipe), *more, f"out={two}", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines(two) == before
    for name in ("model", "model_ema"):
        assert all(
            (folder / name / "model.safetensors").read_bytes() == (two / name / "model.safetensors").read_bytes()
            for folder in (tmp_path, two)
        )


def compare(one: Path, two: Path) -> None:
    """Check that two runs have measured the same at every step and ended with the same weights, averaged ones too."""
    for a, b in zip(lines(one), lines(two), strict=True):
        assert b == {key: pytest.approx(value, rel=1e-5) for key, value in a.items()}
    for name in ("model", "model_ema"):
        whole, found = (load_file(run / name / "model.safetensors") for run in (one, two))
        assert found.keys() == whole.keys()
        for key, weight in whole.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=key: f"{n}: {m}")
