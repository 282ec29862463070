"""Collapse monitors by hand, and in a run: they stand in the metrics, and a collapse is said once."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from m3.errors import M3Error
from m3.monitors import ROWS, Watch, deviation, effective_rank
from m3.recipe import TrainSpec, recipe_from
from m3.schedule import momentum, weight_decay
from m3.train import train


def test_deviation_by_hand() -> None:
    x = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 10.0]])  # variances 4 and 0
    assert deviation(x).item() == pytest.approx(1.0, abs=1e-5)


def test_effective_rank_counts_directions_of_equal_strength() -> None:
    q, _ = torch.linalg.qr(torch.arange(64.0).reshape(8, 8).cos())
    assert effective_rank(q[:5]).item() == pytest.approx(5.0, abs=1e-3)
    assert effective_rank(q[:1].expand(30, -1)).item() == pytest.approx(1.0, abs=1e-3)
    two = torch.diag(torch.tensor([3.0, 1.0]))  # shares 3/4 and 1/4
    assert effective_rank(two).item() == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-4
    )


def test_features_that_become_the_same_are_reported_once_and_not_in_the_warm_up() -> None:
    said = io.StringIO()
    watch = Watch(Console(file=said), warmup=10)
    alive = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 3
    dead = torch.full((50, 4), 3.0) + 0.001 * alive
    for step, x in ((5, dead), (11, alive), (12, dead), (13, dead)):
        found = watch({"latent/pooled": x}, step)
        assert set(found) == {"latent/pooled deviation", "latent/pooled rank"}
    text = " ".join(said.getvalue().split())
    assert text.count("`latent/pooled` collapses") == 1
    assert text.startswith("step 12: `latent/pooled` collapses: its features differ by 0.00")
    assert watch({}, 20) == {}


def test_a_large_matrix_is_thinned_evenly() -> None:
    x = torch.arange(5.0 * ROWS).unsqueeze(1)
    found = Watch(Console(quiet=True), 0)({"x": x}, 1)
    assert found["x deviation"] == pytest.approx(x.std().item(), rel=0.01)


def test_momentum_and_weight_decay_by_hand() -> None:
    spec = TrainSpec(steps=100, ema={"start": 0.9, "end": 1.0}, weight_decay=0.04, weight_decay_end=0.4)
    assert [momentum(step, spec.ema, 100) for step in (0, 50, 100)] == pytest.approx([0.9, 0.95, 1.0])
    assert [weight_decay(step, spec, 100) for step in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    early = TrainSpec(steps=100, ema={"start": 0.9, "end": 0.99, "steps": 10, "curve": "cosine"}).ema
    quarter = 0.99 - 0.09 * (1 + math.sqrt(0.5)) / 2
    found = [momentum(step, early, 100) for step in (0, 2.5, 5, 10, 60)]
    assert found == pytest.approx([0.9, quarter, 0.945, 0.99, 0.99])
    constant = TrainSpec(steps=5, ema=0.999)
    assert momentum(3, constant.ema, 5) == 0.999
    assert weight_decay(3, constant, 5) == 0.05
    with pytest.raises(ValueError, match="less than 1"):
        TrainSpec(steps=5, ema=1.5)


def recipe(tmp_path: Path, **changes):
    settings = {
        "modalities": {"image": {"type": "image", "size": 32, "tokenizer": {"type": "patch", "size": 8}}},
        "backbone": {"width": 16, "depth": 2, "heads": 2},
        "objectives": {
            "latent": {
                "type": "latent",
                "masking": {"type": "fixed", "visible": 6},
                "decoder": {"type": "self_decoder", "width": 16, "depth": 1, "heads": 2},
            }
        },
        "data": {"source": "world", "samples": 32, "held_out": 0, "workers": 0},
        "train": {"steps": 4, "batch_size": 8, "micro_batch": 4, "lr": 1e-3, "log_every": 1, "save_every": 2}
        | {"trackers": [], "precision": "fp32", "threads": 1, "ema": {"start": 0.5, "end": 0.9}},
        "out": str(tmp_path / "run"),
    }
    settings["train"] |= changes
    return recipe_from(settings, "test")


def test_a_run_logs_the_monitors_and_saves_its_teacher_beside_the_model(tmp_path: Path) -> None:
    train(recipe(tmp_path), is_shown=False)
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("latent/pooled", "latent/image predicted", "latent/image target"):
            assert line[f"{name} deviation"] > 0
            assert 1 <= line[f"{name} rank"] <= 16
    assert (run / "checkpoints" / "step-00000004" / "ema.safetensors").is_file()
    assert (run / "model_ema" / "model.safetensors").is_file()


def test_a_resumed_run_has_the_teacher_it_had(tmp_path: Path) -> None:
    """The third and fourth step need the average of the first two; without it the losses differ."""
    train(recipe(tmp_path / "whole"), is_shown=False)
    whole = (tmp_path / "whole" / "run" / "metrics.jsonl").read_text().splitlines()
    train(recipe(tmp_path / "cut", steps=4), is_shown=False)
    run = tmp_path / "cut" / "run"
    (run / "checkpoints" / "step-00000004").rename(tmp_path / "away")
    train(recipe(tmp_path / "cut", steps=4), resume=True, is_shown=False)
    again = (run / "metrics.jsonl").read_text().splitlines()
    names = ("latent/image", "gradient_norm", "latent/image target deviation", "latent/pooled rank")
    for one, other in zip(whole, again, strict=True):
        assert [json.loads(one)[name] for name in names] == [json.loads(other)[name] for name in names]


def test_an_objective_with_a_teacher_needs_an_average(tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=r"learns from a moving average .* the run keeps none; set train.ema"):
        train(recipe(tmp_path, ema=None), is_shown=False)
