"""Schedule, optimizer groups, averages, checkpoints: values by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from m3 import checkpoint
from m3.ema import Average
from m3.errors import M3Error
from m3.memory import keep_freed_memory
from m3.recipe import TrainSpec, load_recipe
from m3.schedule import Plan, learning_rate, make_optimizer, plan_run


def test_learning_rate_by_hand() -> None:
    plan = Plan(steps=14, warmup=4, micro_batch=1, accumulation=1, lr=2.0, min_lr=0.5)
    assert [learning_rate(step, plan) for step in range(5)] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert learning_rate(9, plan) == pytest.approx(1.25)  # half of the cosine
    assert learning_rate(14, plan) == pytest.approx(0.5)
    assert learning_rate(13, plan) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * 0.9)))


def test_milestones_take_the_place_of_the_cosine() -> None:
    plan = plan_run(TrainSpec(epochs=8, batch_size=10, lr=2.0, warmup=1, milestones=(5, 7)), samples=100, world=1)
    assert (plan.steps, plan.warmup, plan.milestones) == (80, 10, (50, 70))
    rates = [learning_rate(step, plan) for step in (5, 10, 49, 50, 69, 70, 79)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 0.2, 0.2, 0.02, 0.02])


def test_the_papers_learning_rate_and_length() -> None:
    """MAE: 1.5e-4 x 4096 / 256 = 2.4e-3; 1600 epochs of 1,281,167 images; 64 processes of 64."""
    plan = plan_run(load_recipe("mae_vit_b").train, samples=1_281_167, world=64)
    assert plan.lr == pytest.approx(2.4e-3)
    assert plan.steps == 500_456  # 1600 x 1,281,167 / 4096 = 500,455.9
    assert plan.warmup == 12_511  # 40 x 1,281,167 / 4096 = 12,511.4
    assert (plan.micro_batch, plan.accumulation) == (64, 1)
    multimae = plan_run(load_recipe("multimae_vit_b").train, samples=1_281_167, world=8)
    assert multimae.lr == pytest.approx(8e-4)


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    spec = TrainSpec(steps=1, batch_size=10, micro_batch=4)
    with pytest.raises(M3Error, match="batch_size 10 can't be cut evenly into 1 processes of micro-batches of 4"):
        plan_run(spec, samples=100, world=1)
    with pytest.raises(M3Error, match="make it a multiple of 16"):
        plan_run(TrainSpec(steps=1, batch_size=10), samples=100, world=16)


@pytest.mark.parametrize(("rule", "decayed"), [("matrices", {(3, 2)}), ("all", {(3, 2), (3,)})])
def test_weight_decay_groups(rule: str, decayed: set[tuple[int, ...]]) -> None:
    optimizer = make_optimizer(nn.Linear(2, 3), TrainSpec(steps=1, decay=rule, weight_decay=0.05))
    found = {tuple(p.shape) for g in optimizer.param_groups if g["weight_decay"] == 0.05 for p in g["params"]}
    assert found == decayed


def test_the_average_by_hand_and_restored() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0]])
    average = Average(model, decay=0.9)
    model.weight.data = torch.tensor([[3.0, -2.0]])
    average.update(model)
    torch.testing.assert_close(average.weights[0], torch.tensor([[1.2, 1.6]]))
    other = Average(model, decay=0.9)
    other.load_state_dict({key: value.clone() for key, value in average.state_dict().items()})
    torch.testing.assert_close(other.weights[0], average.weights[0])


def write(run: Path, step: int, text: str) -> None:
    target = checkpoint.folder_of(run, step)
    checkpoint.write(target, lambda f: (f / "x").write_text(text), {"step": step}, True, lambda work: work())


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    write(tmp_path, 10, "ten")

    def broken(folder: Path) -> None:
        (folder / "x").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(checkpoint.folder_of(tmp_path, 20), broken, {"step": 20}, True, lambda work: work())
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.read_state(newest)["step"] == 10
    assert (newest / "x").read_text() == "ten"
    write(tmp_path, 20, "twenty")
    write(tmp_path, 30, "thirty")
    checkpoint.prune(tmp_path, keep=2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000020", "step-00000030"]


def test_keeping_freed_memory_is_possible_here() -> None:
    assert keep_freed_memory() in (True, False)
