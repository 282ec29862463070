"""`accelerate launch -m m3.train` from the command line, on one and on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["backbone.width=48", "backbone.depth=2", "backbone.heads=4", "data.workers=0", "data.held_out=8"]
SMALL += ["train.steps=3", "train.batch_size=8", "train.warmup=1", "train.log_every=1", "train.trackers=[]"]
SMALL += ["train.precision=fp32", "train.ema=0.9", "evaluate.every=2", "evaluate.samples=8", "data.samples=64"]


def launch(out: Path, processes: int, recipe: str = "multimae_tiny", *more: str) -> list[dict]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    if processes > 1:  # without GPUs accelerate's launcher starts one process only
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "m3.train", recipe, f"out={out}", *SMALL, *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"({processes} process(es) x" in " ".join(done.stdout.split())
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_one_and_two_processes_train_and_measure_alike(tmp_path: Path) -> None:
    """Losses, and what is measured on held-out samples with the average of the weights."""
    more = ["evaluate.weights=ema", "evaluate.fit_samples=32", "evaluate.tasks.features={type: spread}"]
    more += ["evaluate.tasks.neighbours={type: knn, label: shape, k: [3]}"]
    more += ["evaluate.tasks.colour={type: probe, label: color, baseline: [random, pca]}"]
    one, two = launch(tmp_path / "one", 1, "multimae_tiny", *more), launch(tmp_path / "two", 2, "multimae_tiny", *more)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 2, 3, 3]
    for line in (2, 4):
        assert {"held_out/features, rank", "held_out/neighbours", "baseline/colour"} < one[line].keys()
    for a, b in zip(one, two, strict=True):
        for name in (key for key in a if key.startswith(("reconstruct/", "held_out/", "baseline/"))):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    for run in ("one", "two"):
        for name in ("model/model.safetensors", "model_ema/model.safetensors", "recipe.yaml", "preview.png"):
            assert (tmp_path / run / name).is_file(), name
        assert (tmp_path / run / "previews" / "step-00000002.png").is_file()


def test_one_and_two_processes_draw_and_train_the_same_objectives(tmp_path: Path) -> None:
    """A step of one objective leaves the heads of the others without gradient, on both processes alike."""
    more = [
        "objectives.match.swap.group=2",
        "objectives.words.decoder.hidden=48",
        "objectives.patches.decoder.hidden=48",
    ]
    more += ["train.steps=6", "train.ema=", "evaluate.every=", "evaluate.tasks="]
    one, two = (
        launch(tmp_path / str(n), n, "uniter_tiny", *more, f"train.micro_batch={m}") for n, m in ((1, 2), (2, 4))
    )
    names = [[key for key in line if "/" in key] for line in one]
    assert len({tuple(keys) for keys in names}) > 1, "different objectives are drawn"
    for a, b, keys in zip(one, two, names, strict=True):
        assert [key for key in b if "/" in key] == keys
        assert [b[key] for key in keys] == [pytest.approx(a[key], rel=1e-4, abs=1e-6) for key in keys]
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
