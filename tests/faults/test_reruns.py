"""Running again, resuming, and running into NaN lose nothing and mix nothing up."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3 import checkpoint
from m3 import train as trainer
from m3.check import shrink
from m3.cli import main
from m3.errors import M3Error
from m3.recipe import Recipe, load_recipe, recipe_from
from m3.train import train


def tiny(out: Path, steps: int = 3, **changes: dict) -> Recipe:
    settings: dict = shrink(load_recipe("mae_tiny"), out, steps).model_dump(mode="json", exclude_none=True)
    settings["train"]["threads"] = 1
    for section, values in changes.items():
        settings[section] = values if section == "seed" else settings[section] | values
    return recipe_from(settings, "mae_tiny")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# -- the same folder again ------------------------------------------------------------------------------


def test_a_second_run_moves_the_first_aside_and_loses_nothing(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    train(tiny(run, steps=5))
    first = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (run / "notes.txt").write_text("mine")
    capsys.readouterr()
    train(tiny(run, steps=2, seed=7))
    assert f"{run} held an earlier run, which now lies in {run}.1" in " ".join(capsys.readouterr().out.split())
    aside = tmp_path / "run.1"
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == first
    assert steps_of(run) == ["step-00000002"]
    assert [line["step"] for line in lines(run) if "lr" in line] == [1, 2]
    assert (run / "notes.txt").read_text() == "mine"
    train(tiny(run, steps=2, seed=7), resume=True)
    state = checkpoint.read_state(checkpoint.folder_of(run, 2))
    assert (state["step"], state["order"]["seed"]) == (2, 7)
    train(tiny(run))
    assert steps_of(tmp_path / "run.2") == ["step-00000002"]


def test_an_empty_folder_or_one_that_never_took_a_step_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text("name: x")
    assert checkpoint.set_aside(tmp_path) is None
    assert checkpoint.set_aside(tmp_path / "absent") is None


# -- resuming -------------------------------------------------------------------------------------------


def test_resuming_a_finished_run_writes_no_line_twice(tmp_path: Path) -> None:
    recipe = tiny(tmp_path / "run", evaluate={"every": 2})
    train(recipe)
    before = lines(recipe.folder)
    assert [(line["step"], "lr" in line) for line in before] == [
        (1, True), (2, True), (2, False), (3, True), (3, False),
    ]  # fmt: skip
    train(recipe, resume=True)
    assert lines(recipe.folder) == before


def test_a_longer_run_keeps_the_lines_of_the_shorter_and_says_that_the_cosine_changes(tmp_path: Path, capsys) -> None:
    train(tiny(tmp_path / "run", steps=3))
    capsys.readouterr()
    train(tiny(tmp_path / "run", steps=5), resume=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "resuming at step 3 of 5" in printed
    assert "follows another curve than in the first 3 steps (planned for 3): it jumps from 0 to " in printed
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 3, 4, 5, 5]


def test_held_out_lines_carry_their_step_and_baseline_also_for_epochs(tmp_path: Path) -> None:
    recipe = tiny(tmp_path / "run", train={"steps": None, "epochs": 0.5})
    rows = train(recipe)
    last = lines(recipe.folder)[-1]
    assert last.pop("step") == 2  # half of 16 samples in batches of 4
    assert last == {f"held_out/{row.task}": row.model for row in rows} | {
        f"baseline/{row.task}": row.baseline for row in rows
    }
    assert rows[0].task == "hidden patches"


def test_a_shorter_run_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", steps=3))
    with pytest.raises(M3Error, match=r"step-00000003 is past the 2 steps of this run; raise train.steps or start"):
        train(tiny(tmp_path / "run", steps=2), resume=True)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 5}, "`seed` is 0 there and 5 here"),
        ({"train": {"batch_size": 8}}, "`train.batch_size` is 4 there and 8 here"),
        ({"data": {"flip": 0.25}}, "`data.flip` is 0.5 there and 0.25 here"),
        ({"data": {"samples": 32}}, "`data.samples` is 16 there and 32 here"),
    ],
)
def test_resuming_with_another_order_of_the_data_is_refused(tmp_path: Path, changes: dict, difference: str) -> None:
    train(tiny(tmp_path / "run"))
    sentence = (
        rf"step-00000003 was trained on other data: {difference}, so .*; resume with its own recipe .*/recipe.yaml"
    )
    with pytest.raises(M3Error, match=sentence):
        train(tiny(tmp_path / "run", steps=5, **changes), resume=True)
    train(tiny(tmp_path / "run", steps=4, train={"micro_batch": 4, "lr": 1e-5}), resume=True)  # these may change


def test_resuming_without_a_checkpoint_says_so(tmp_path: Path, capsys) -> None:
    train(tiny(tmp_path / "run"), resume=True)
    assert "run holds no checkpoint yet, so the run starts at step 0" in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_whose_weights_have_other_names_is_refused_with_a_sentence(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    folder = checkpoint.folder_of(tmp_path, 3)
    weights = load_file(folder / "model.safetensors")
    weights["former"] = weights.pop("backbone.norm.weight")
    save_file(weights, folder / "model.safetensors")
    state = checkpoint.read_state(folder)
    state["files"]["model.safetensors"] = checkpoint.checksum(folder / "model.safetensors")
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    sentence = "written by another version of M3: the names or shapes of 2 weights are others, e.g. `backbone"
    with pytest.raises(M3Error, match=re.escape(sentence)):
        train(tiny(tmp_path, steps=5), resume=True)
    assert folder.is_dir()


# -- numbers that are not finite ------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_never_saved_over_good_ones(tmp_path: Path, monkeypatch) -> None:
    """The rate of step 4 is NaN: its loss is still fine, its weights are not."""
    recipe = tiny(tmp_path / "run", steps=8, train={"save_every": 1, "log_every": 8, "keep": 2})
    rates = trainer.set_rates

    def broken(optimizer, step, *rest):
        rates(optimizer, step, *rest)
        if step == 3:
            optimizer.param_groups[0]["lr"] = float("nan")

    monkeypatch.setattr(trainer, "set_rates", broken)
    sentence = (
        r"step 4: the weights are not finite.* go on from the last good checkpoint, .*step-00000003, with --resume"
    )
    with pytest.raises(M3Error, match=sentence):
        train(recipe)
    assert steps_of(recipe.folder) == ["step-00000002", "step-00000003"]
    saved = load_file(checkpoint.folder_of(recipe.folder, 3) / "model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in saved.values())
    monkeypatch.setattr(trainer, "set_rates", rates)
    train(recipe, resume=True)
    assert checkpoint.newest(recipe.folder) == checkpoint.folder_of(recipe.folder, 8)


def test_a_run_whose_losses_are_never_finite_says_to_start_again_and_saves_nothing(tmp_path: Path, monkeypatch) -> None:
    recipe = tiny(tmp_path / "run", steps=4, train={"save_every": 4})
    gradients = trainer.gradients

    def broken(*parts):
        names, sums, *rest = gradients(*parts)
        return names, sums * torch.inf, *rest

    monkeypatch.setattr(trainer, "gradients", broken)
    with pytest.raises(M3Error, match=r"step 4: the loss or its gradient was not finite in 4 steps.*then start again"):
        train(recipe)
    assert not (recipe.folder / "checkpoints").exists()


# -- tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("{target: dept}", r"target: the model predicts no `dept`. Did you mean `depth`\?"),
        (
            "{target: depth, visible: {imag: 1.0}}",
            r"visible: `imag` is no input of the objective. Did you mean `image`",
        ),
        ("{target: depth, visible: {image: 1.5}}", r"visible.image: .*, got 1.5"),
        ("{target: depth, visible: {depth: 1.0}}", "visible: all of `depth` is seen, so nothing is left to predict"),
        ("{target: semantic, baseline: neighbours}", "baseline: `neighbours` averages visible values, but `semantic`"),
        ("{target: depth, basline: constant}", "basline: unknown key. Did you mean `baseline`"),
        ("{baseline: constant}", "target: this key is required; add it."),
        ("{type: predcit, target: depth}", r"type: `predcit` in `tasks` is not known: .*`predict`"),
        ("{target: depth, baseline: patch_mean}", "baseline: `patch_mean` can't be compared with target `depth`"),
    ],
)
def test_mistakes_in_tasks_are_found_before_the_first_step(tmp_path: Path, task: str, sentence: str, capsys) -> None:
    run = tmp_path / "run"
    wrong = ["train", "multimae_tiny", f"evaluate.tasks.mine={task}", f"out={run}", "data.workers=0"]
    assert main(wrong) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(f"evaluate.tasks.mine.{sentence}", error), error
    assert not run.exists()
