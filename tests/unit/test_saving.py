"""What a run saves, when, and what happens when it can't."""

import json
import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from m3 import checkpoint, saving
from m3.check import shrink
from m3.errors import M3Error
from m3.recipe import Recipe, load_recipe, recipe_from
from m3.saving import HostCopy, own_weights, random_states, set_random_states
from m3.train import train


def tiny(out: Path, steps: int = 4, evaluate: dict | None = None, **changes) -> Recipe:
    settings: dict = shrink(load_recipe("mae_tiny"), out, steps).model_dump(mode="json", exclude_none=True)
    settings["train"] |= {"threads": 1, "save_every": 1, "keep": 9, **changes}
    settings["evaluate"] |= evaluate or {}
    return recipe_from(settings, "mae_tiny")


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def files_of(run: Path, step: int) -> dict[str, str]:
    return checkpoint.read_state(checkpoint.folder_of(run, step))["files"]


def words(text: str) -> str:
    return " ".join(text.split())


# -- contents -------------------------------------------------------------------------------------------


def test_in_the_background_the_same_bytes_are_written(tmp_path: Path) -> None:
    train(tiny(tmp_path / "a", ema=0.9), is_shown=False)
    train(tiny(tmp_path / "b", ema=0.9, save_in_background=True), is_shown=False)
    assert steps_of(tmp_path / "a") == steps_of(tmp_path / "b") == [1, 2, 3, 4]
    names = {"model.safetensors", "ema.safetensors", "optimizer.pt", "process-00000.pt"}
    for step in (1, 2, 3, 4):
        assert files_of(tmp_path / "a", step) == files_of(tmp_path / "b", step)
        assert set(files_of(tmp_path / "a", step)) == names
        assert checkpoint.damage(checkpoint.folder_of(tmp_path / "b", step)) is None
    assert files_of(tmp_path / "b", 1)["model.safetensors"] != files_of(tmp_path / "b", 2)["model.safetensors"]


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(tmp_path: Path, monkeypatch) -> None:
    """The first write ends only when step 2 has been taken; the second save must not begin before that."""
    events: list[str] = []
    may_end = threading.Event()
    write, set_rates = checkpoint.write, saving.checkpoint

    def slow(target: Path, *rest) -> None:
        events.append(f"begin {target.name[-1]}")
        if target.name.endswith("2"):
            assert may_end.wait(60)
        write(target, *rest)
        events.append(f"end {target.name[-1]}")

    from m3 import train as trainer

    rates = trainer.set_rates

    def stepping(optimizer, step, *rest) -> None:
        events.append(f"step {step + 1}")
        if step + 1 == 4:
            may_end.set()
            time.sleep(0.2)
        rates(optimizer, step, *rest)

    monkeypatch.setattr(set_rates, "write", slow)
    monkeypatch.setattr(trainer, "set_rates", stepping)
    train(tiny(tmp_path, save_in_background=True, save_every=2), is_shown=False)
    assert [e for e in events if not e.startswith("begin")] == [
        "step 1", "step 2", "step 3", "step 4", "end 2", "end 4",
    ]  # fmt: skip
    assert events.index("begin 4") > events.index("end 2")


def test_a_copy_on_the_host_is_reused_and_keeps_what_was(tmp_path: Path) -> None:
    copy = HostCopy()
    tree = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": [torch.arange(3), {"c": 5}], "d": (torch.tensor(7.0),)}
    first = copy(tree)
    places = [x.data_ptr() for x in copy.held]
    assert first["a"].is_contiguous()
    assert (first["a"].tolist(), first["b"][0].tolist(), first["b"][1]) == (
        [[0, 3], [1, 4], [2, 5]],
        [0, 1, 2],
        {"c": 5},
    )
    tree["a"] += 10
    assert first["a"][0].tolist() == [0, 3]
    again = copy(tree)
    assert again["a"][0].tolist() == [10, 13]
    assert [x.data_ptr() for x in copy.held] == places


def test_a_tensor_with_two_names_is_saved_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert list(own_weights(model)) == ["a.weight", "a.bias", "b.bias"]


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    torch.save(random_states(), tmp_path / "states")
    drawn = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    set_random_states(torch.load(tmp_path / "states", weights_only=True))
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == drawn


# -- which are kept -------------------------------------------------------------------------------------


def test_every_nth_is_written_and_kept_beside_the_newest(tmp_path: Path) -> None:
    train(tiny(tmp_path, steps=7, save_every=2, keep=1, keep_every=3), is_shown=False)
    assert steps_of(tmp_path) == [3, 6, 7]


def test_the_best_is_written_and_kept(tmp_path: Path, monkeypatch) -> None:
    from m3 import train as trainer
    from m3.evaluate.task import Row

    values = {1: 0.5, 2: 0.3, 3: 0.4, 4: 0.9, 5: 0.35, 6: 0.1}
    monkeypatch.setattr(
        trainer.HeldOut,
        "evaluate",
        lambda _, step, average, picture=None: [Row("loss", "MSE", values[step], 1.0, "none", False)],
    )
    monkeypatch.setattr(trainer.HeldOut, "conclude", lambda *_: None)
    run = tmp_path / "run"
    train(tiny(run, 6, {"every": 1}, save_every=9, keep=1, keep_best="loss"), is_shown=False)
    assert steps_of(run) == [2, 6], "step 6 is the last; what is measured at the end comes after it"
    assert checkpoint.read_state(checkpoint.folder_of(run, 6))["best"] == {"of": "loss", "value": 0.3, "step": 2}
    values |= {7: 0.31, 8: 0.29, 9: 0.3}
    train(tiny(run, 9, {"every": 1}, save_every=9, keep=1, keep_best="loss"), resume=True, is_shown=False)
    assert steps_of(run) == [8, 9]
    with pytest.raises(
        M3Error, match=r"train.keep_best: `los` was not measured on held-out samples. Did you mean `loss`"
    ):
        train(tiny(tmp_path / "b", 3, {"every": 1}, keep_best="los"), is_shown=False)


def test_the_best_needs_measures() -> None:
    with pytest.raises(M3Error, match=r"`train.keep_best` needs measures during the run; set `evaluate.every`"):
        load_recipe("mae_tiny", ["train.keep_best=x", "evaluate.every=null"])


# -- what can't be written ------------------------------------------------------------------------------


class FullDisk:
    """Stands in for torch.save: writes half and fails, for steps that are named."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.save = steps, torch.save

    def __call__(self, tree: object, path: Path) -> None:
        if path.name == "optimizer.pt" and any(f"{step:08d}" in path.parent.name for step in self.steps):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        self.save(tree, path)


@pytest.mark.parametrize("is_behind", [False, True])
def test_a_full_disk_is_a_warning_and_the_run_is_the_same(tmp_path: Path, monkeypatch, capsys, is_behind: bool) -> None:
    train(tiny(tmp_path / "a"), is_shown=False)
    monkeypatch.setattr(torch, "save", FullDisk(2, 3))
    train(tiny(tmp_path / "b", save_in_background=is_behind))
    printed = words(capsys.readouterr().out)
    where = tmp_path / "b" / "checkpoints"
    for step in (2, 3):
        assert (
            f"the checkpoint of step {step} can't be written to {where}: [Errno 28] No space left on device;" in printed
        )
    assert printed.count("the one before it, step-00000001, is whole. Training goes on without") == 2
    assert steps_of(tmp_path / "b") == [1, 4]
    assert not list(where.glob(".*"))
    assert files_of(tmp_path / "a", 4) == files_of(tmp_path / "b", 4)


@pytest.mark.parametrize(("step", "policy"), [(2, "stop"), (4, "warn")])
def test_a_full_disk_ends_the_run_if_the_recipe_says_so_or_at_its_end(
    tmp_path: Path, monkeypatch, step: int, policy: str
) -> None:
    monkeypatch.setattr(torch, "save", FullDisk(step))
    sentence = (
        rf"the checkpoint of step {step} can't be written .*the one before it, step-0000000{step - 1}, is whole.*"
    )
    with pytest.raises(M3Error, match=sentence + "then go on with --resume"):
        train(tiny(tmp_path, on_save_error=policy), is_shown=False)
    assert steps_of(tmp_path) == list(range(1, step))


@pytest.mark.skipif(os.geteuid() == 0, reason="only a read-only disk stops the superuser: see tests/faults")
def test_a_folder_that_may_not_be_written_is_a_warning(tmp_path: Path, capsys) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints").chmod(0o500)
    with pytest.raises(M3Error, match=r"the checkpoint of step 4 can't be written .*Permission denied.*there is none"):
        train(tiny(tmp_path))
    assert words(capsys.readouterr().out).count("Permission denied") == 3


# -- damage and resuming --------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_newest_costs_nothing_but_its_steps(tmp_path: Path, capsys) -> None:
    train(tiny(tmp_path), is_shown=False)
    final = load_file(tmp_path / "model" / "model.safetensors")
    weights = checkpoint.folder_of(tmp_path, 4) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 64
    weights.write_bytes(content)
    train(tiny(tmp_path), resume=True)
    printed = words(capsys.readouterr().out)
    assert "damaged checkpoint" in printed
    assert "step-00000004: model.safetensors is damaged" in printed
    assert "resuming at step 3 of 4" in printed
    again = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(again[name], x) for name, x in final.items())
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_lines_that_were_cut_off_in_writing_are_written_again(tmp_path: Path) -> None:
    train(tiny(tmp_path), is_shown=False)
    metrics = tmp_path / "metrics.jsonl"
    whole = [json.loads(line) for line in metrics.read_text().splitlines()]
    for step in (3, 4):
        (checkpoint.folder_of(tmp_path, step) / "state.json").unlink()
    text = metrics.read_text()
    metrics.write_text(text[: text.index('"step": 3') + 20])
    train(tiny(tmp_path), resume=True, is_shown=False)
    changing = ("samples_per_second", "data_wait", "seconds", "utilisation")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [{k: v for k, v in x.items() if k not in changing} for x in lines] == [
        {k: v for k, v in x.items() if k not in changing} for x in whole
    ]
    metrics.write_text("{]\n" + metrics.read_text())
    with pytest.raises(M3Error, match=r"metrics.jsonl: line 1 is no JSON .*; remove it"):
        train(tiny(tmp_path), resume=True, is_shown=False)
