"""Checkpoints that appear whole or not at all; schedule, optimizer groups and averaged weights by hand."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from m3 import checkpoint
from m3.ema import Average
from m3.errors import M3Error
from m3.recipe import TrainSpec
from m3.schedule import Plan, learning_rate, make_optimizer, plan_run


def save(run: Path, step: int, text: str = "whole") -> Path:
    target = checkpoint.folder_of(run, step)
    checkpoint.write(target, lambda folder: _fill(folder, text), {"step": step}, True, lambda work: work())
    return target


def _fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "weights").write_text(text)


def _break(folder: Path) -> None:
    _fill(folder, "half")
    raise OSError("no space left")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# -- checkpoints ----------------------------------------------------------------------------------------


def test_a_written_checkpoint_holds_what_was_put_in(tmp_path: Path) -> None:
    target = save(tmp_path, 12)
    assert target == tmp_path / "checkpoints" / "step-00000012"
    assert (target / "inner" / "weights").read_text() == "whole"
    assert checkpoint.read_state(target) == {"step": 12, "files": {"inner/weights": "5 bytes, crc32 c459294f"}}
    assert names(tmp_path) == ["step-00000012"]


def test_a_write_that_fails_leaves_no_checkpoint_and_the_last_one_whole(tmp_path: Path) -> None:
    before = save(tmp_path, 5, "five")
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write(checkpoint.folder_of(tmp_path, 9), _break, {"step": 9}, True, lambda work: work())
    assert not checkpoint.folder_of(tmp_path, 9).exists()
    assert checkpoint.newest(tmp_path) == before
    assert (before / "inner" / "weights").read_text() == "five"
    save(tmp_path, 9, "second try")
    assert (checkpoint.folder_of(tmp_path, 9) / "inner" / "weights").read_text() == "second try"
    assert names(tmp_path) == ["step-00000005", "step-00000009"]


def test_a_failed_rewrite_keeps_the_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    target = save(tmp_path, 5, "first")
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write(target, _break, {"step": 5}, True, lambda work: work())
    assert (target / "inner" / "weights").read_text() == "first"
    save(tmp_path, 5, "again")
    assert (target / "inner" / "weights").read_text() == "again"


def test_only_the_main_process_makes_and_renames_and_all_wait(tmp_path: Path) -> None:
    waits: list[list[str]] = []
    (tmp_path / "checkpoints" / ".step-00000003.partial").mkdir(parents=True)
    target = checkpoint.folder_of(tmp_path, 3)

    def together(work) -> None:
        work()
        waits.append(names(tmp_path))

    checkpoint.write(target, lambda f: _fill(f, "other"), {"step": 3}, False, together)
    assert waits == [[".step-00000003.partial"]] * 3
    assert not target.exists()


def test_newest_passes_over_partial_ones(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    older, newer = save(tmp_path, 9), save(tmp_path, 100)
    (tmp_path / "checkpoints" / ".step-00000200.partial").mkdir()
    (tmp_path / "checkpoints" / "step-00000300").mkdir()  # no state.json: not made by us, or damaged
    assert checkpoint.newest(tmp_path) == newer
    (newer / "state.json").unlink()
    assert checkpoint.newest(tmp_path) == older


def test_prune_keeps_the_newest_and_sweeps_up_partial_ones(tmp_path: Path) -> None:
    for step in (7, 100, 20, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / ".step-00000200.partial" / "inner").mkdir(parents=True)
    checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000100"]
    checkpoint.prune(tmp_path, keep=5)
    assert names(tmp_path) == ["step-00000020", "step-00000100"]


def test_prune_spares_multiples_and_the_best(tmp_path: Path) -> None:
    for step in (10, 20, 25, 30, 40, 50):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, keep=1, every=20, best=25)
    assert names(tmp_path) == ["step-00000020", "step-00000025", "step-00000040", "step-00000050"]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: _flip(folder / "inner" / "weights"), r"inner/weights is damaged \(written: 5 bytes, crc32"),
        (lambda folder: (folder / "inner" / "weights").write_text("who"), "inner/weights is damaged .*found: 3 bytes"),
        (lambda folder: (folder / "inner" / "weights").unlink(), "inner/weights can't be read .No such file"),
        (lambda folder: (folder / "state.json").write_text("{"), "state.json can't be read"),
        (lambda folder: (folder / "state.json").write_text("{}"), "state.json can't be read .KeyError"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_moved_and_the_one_before_it_used(tmp_path: Path, harm, reason: str) -> None:
    older, newer = save(tmp_path, 5), save(tmp_path, 9)
    assert checkpoint.damage(newer) is None
    harm(newer)
    said: list[str] = []
    assert checkpoint.newest_undamaged(tmp_path, said.append) == older
    assert re.search(f"step-00000009: {reason}", said[0])
    assert said[0].endswith("it was moved to damaged-step-00000009, and the checkpoint before it is tried")
    assert names(tmp_path) == ["damaged-step-00000009", "step-00000005"]
    harm(older)
    with pytest.raises(M3Error, match=f"no checkpoint of {tmp_path} is undamaged; of the newest, .*{reason}.*Repair"):
        checkpoint.newest_undamaged(tmp_path, said.append)


@pytest.mark.parametrize(
    ("saved", "wanted", "sentence"),
    [
        ({"a": {"b": [1, 2], "c": 3}}, {"a": {"b": [1, 5], "c": 4}}, r"`a.b` is \[1, 2\] there and \[1, 5\] here"),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": "x"}}, "`a.c` is None there and 'x' here"),
        ({"a": {"b": 1}, "d": 2}, {"a": {"b": 1}}, "`d` is 2 there and None here"),
        ({"a": {"b": 1}}, {"a": 7}, r"`a` is \{'b': 1\} there and 7 here"),
    ],
)
def test_another_model_is_refused_with_the_first_difference(saved: dict, wanted: dict, sentence: str) -> None:
    place = Path("runs/x/checkpoints/step-00000004")
    with pytest.raises(M3Error, match=f"{place} was made by another recipe: {sentence}; resume with .*x/recipe.yaml"):
        checkpoint.check_same_model(saved, wanted, place)


def test_the_same_model_is_accepted_whatever_the_order_of_settings() -> None:
    checkpoint.check_same_model({"a": {"b": 1, "c": [2]}}, {"a": {"c": [2], "b": 1}}, Path("x/y/z"))


def test_another_order_of_modalities_is_another_model() -> None:
    """The order decides the order of the tokens and of the random shares, so it is part of the model."""
    image, depth = {"type": "image"}, {"type": "depth"}
    saved, wanted = {"image": image, "depth": depth}, {"depth": depth, "image": image}
    with pytest.raises(M3Error, match="modalities"):
        checkpoint.check_same_model({"modalities": saved}, {"modalities": wanted}, Path("x/y/z"))


# -- schedule -------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_from_zero_and_ends_a_half_cosine_at_the_minimum() -> None:
    plan = Plan(steps=25, warmup=5, micro_batch=1, accumulation=1, lr=1.0, min_lr=0.2)
    assert [learning_rate(step, plan) for step in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert learning_rate(10, plan) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(15, plan) == pytest.approx(0.6)
    assert learning_rate(25, plan) == pytest.approx(0.2)
    assert learning_rate(0, plan._replace(warmup=0)) == 1.0


def test_the_learning_rate_is_scaled_by_the_batch() -> None:
    spec = TrainSpec(steps=10, batch_size=4096, lr=1.5e-4, min_lr=1e-6, lr_per=256)
    plan = plan_run(spec, samples=10_000, world=8)
    assert plan.lr == pytest.approx(1.5e-4 * 4096 / 256)
    assert plan.min_lr == pytest.approx(1e-6 * 16)
    unscaled = plan_run(spec.model_copy(update={"lr_per": None}), samples=10_000, world=8)
    assert (unscaled.lr, unscaled.min_lr) == (1.5e-4, 1e-6)


def test_epochs_become_steps_that_pass_over_the_samples_so_often() -> None:
    spec = TrainSpec(epochs=2.5, warmup=0.5, batch_size=16, micro_batch=4)
    assert plan_run(spec, samples=100, world=2)[:4] == (16, 3, 4, 2)  # 250 and 50 samples in batches of 16
    assert plan_run(TrainSpec(epochs=10, batch_size=64), samples=20, world=1).steps == 3, "200 samples, not 640"
    assert plan_run(TrainSpec(epochs=0.5, batch_size=64), samples=20, world=1).steps == 1
    steps = TrainSpec(steps=15, warmup=3, batch_size=16)
    assert plan_run(steps, samples=100, world=2)[:4] == (15, 3, 8, 1)


@pytest.mark.parametrize(("micro", "world", "multiple"), [(3, 1, 3), (4, 3, 12), (None, 20, 20), (None, 3, 15)])
def test_an_uneven_batch_is_refused_with_the_number_it_must_divide(micro, world: int, multiple: int) -> None:
    spec = TrainSpec(steps=1, batch_size=16, micro_batch=micro)
    sentence = f"^train.batch_size 16 can't be cut evenly into {world} processes of micro-batches of .*"
    with pytest.raises(M3Error, match=rf"{sentence}make it a multiple of {multiple}\.$"):
        plan_run(spec, samples=100, world=world)


# -- optimizer and averages -----------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 3), nn.LayerNorm(3)
        self.token, self.fixed = nn.Parameter(torch.arange(3.0)[None]), nn.Parameter(torch.arange(4.0)[None])
        self.fixed.requires_grad = False


@pytest.mark.parametrize(
    ("rule", "groups"),
    [
        ("matrices", {0.3: {"linear.weight", "token"}, 0.0: {"linear.bias", "norm.weight", "norm.bias"}}),
        ("all", {0.3: {"linear.weight", "token", "linear.bias", "norm.weight", "norm.bias"}}),
    ],
)
def test_weight_decay_by_rule(rule: str, groups: dict[float, set[str]]) -> None:
    model = Small()
    optimizer = make_optimizer(model, TrainSpec(steps=1, decay=rule, weight_decay=0.3, betas=(0.8, 0.99), eps=1e-6))
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {g["weight_decay"]: {name_of[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert found == groups
    assert all((g["betas"], g["eps"], g["lr"]) == ((0.8, 0.99), 1e-6, 0.0) for g in optimizer.param_groups)


def test_the_average_by_hand_lent_and_given_back_also_after_an_error() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    average = Average(model, decay=0.75)
    model.weight.data = torch.tensor([[8.0, 5.0], [2.0, -1.0]])
    average.update(model)
    expected = torch.tensor([[2.0, 2.0], [2.0, 2.0]])
    torch.testing.assert_close(average.weights[0], expected)
    average.update(model)
    expected = torch.tensor([[3.5, 2.75], [2.0, 1.25]])
    torch.testing.assert_close(average.weights[0], expected)
    weights = model.weight.data.clone()
    with average.lent_to(model):
        assert torch.equal(model.weight.data, expected)
        assert torch.equal(average.weights[0], expected), "a teacher keeps what it has"
    assert torch.equal(model.weight.data, weights)
    with pytest.raises(M3Error, match="no figures"), average.lent_to(model):
        raise M3Error("no figures")
    assert torch.equal(model.weight.data, weights)
    assert torch.equal(average.weights[0], expected)


def test_the_average_of_low_precision_weights_is_kept_in_full() -> None:
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    model.weight.data = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    average = Average(model, decay=0.999)
    model.weight.data = torch.tensor([[3.0, -4.0]], dtype=torch.bfloat16)
    average.update(model)
    torch.testing.assert_close(average.weights[0], torch.tensor([[1.002, 1.994]]))
    with average.lent_to(model):
        assert model.weight.tolist() == [[1.0, 1.9921875]], "rounded to bfloat16"
    assert model.weight.tolist() == [[3.0, -4.0]]


def test_an_average_is_restored_from_its_state() -> None:
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    average, other = Average(model, 0.5), Average(nn.Linear(3, 2), 0.5)
    other.load_state_dict(average.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(average.weights, other.weights, strict=True))
