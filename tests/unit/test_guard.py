"""Steps that are not finite change nothing, are written down, and end the run when they go on."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from m3 import train as trainer
from m3.check import shrink
from m3.checkpoint import folder_of
from m3.data.loader import Samples, first_batches
from m3.errors import M3Error
from m3.guard import first_not_finite
from m3.monitors import Health
from m3.recipe import Recipe, load_recipe, recipe_from
from m3.train import build_model, open_source, train


def tiny(name: str, out: Path, steps: int = 6, **changes) -> Recipe:
    settings: dict = shrink(load_recipe(name), out, steps).model_dump(mode="json", exclude_none=True)
    settings["train"] |= {"threads": 1, "save_every": 1, "keep": 99, **changes}
    return recipe_from(settings, name)


def poison(monkeypatch, steps: set[int], what: str) -> None:
    """Make the loss or one gradient of some steps NaN."""
    gradients, count = trainer.gradients, [0]

    def broken(accelerator, model, *rest):
        names, sums, *others = gradients(accelerator, model, *rest)
        count[0] += 1
        if count[0] in steps and what == "gradient":
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan
        if count[0] in steps and what == "loss":
            sums = sums * math.inf
        return names, sums, *others

    monkeypatch.setattr(trainer, "gradients", broken)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["mae_tiny", "tokenizer_depth_vq"])
def test_a_skipped_step_leaves_weights_average_optimizer_and_codebook_alone(
    tmp_path: Path, monkeypatch, capsys, name: str, what: str
) -> None:
    poison(monkeypatch, {2, 4}, what)
    recipe = tiny(name, tmp_path, ema=0.9)
    train(recipe)
    for bad in (2, 4):
        for file in ("model.safetensors", "ema.safetensors"):
            before, after, next_one = (load_file(folder_of(tmp_path, bad + i) / file) for i in (-1, 0, 1))
            assert all(torch.equal(after[key], x) for key, x in before.items())
            assert not all(torch.equal(next_one[key], x) for key, x in before.items())
        before, after = (
            torch.load(folder_of(tmp_path, step) / "optimizer.pt", weights_only=True)["state"]
            for step in (bad - 1, bad)
        )
        assert all(torch.equal(after[i][key], x) for i, state in before.items() for key, x in state.items())
    counted = {float(x["step"]) for x in torch.load(folder_of(tmp_path, 6) / "optimizer.pt")["state"].values()}
    assert counted == {4.0}, "six steps, two of them skipped"
    skipped = lines(tmp_path / "skipped.jsonl")
    assert [line["step"] for line in skipped] == [2, 4]
    assert all(len(line["ids"]) == 4 for line in skipped)
    by_step = {line["step"]: line for line in lines(tmp_path / "metrics.jsonl") if "lr" in line}
    assert all(math.isfinite(x) for line in by_step.values() for x in line.values())
    assert [by_step[step].get("skipped_steps", 0) for step in range(1, 7)] == [0, 1, 1, 2, 2, 2]
    assert ("gradient_norm" in by_step[2]) == (what == "loss")
    assert " ".join(capsys.readouterr().out.split()).count("is skipped: its loss or gradient is not finite") == 2


def test_the_samples_are_those_of_the_step(tmp_path: Path, monkeypatch) -> None:
    seen: list[list[str]] = []
    to_device = trainer.Skipped.count

    def counting(self, batch, **about):
        seen.append(list(batch.ids))
        return to_device(self, batch, **about)

    monkeypatch.setattr(trainer.Skipped, "count", counting)
    poison(monkeypatch, {3}, "gradient")
    train(tiny("mae_tiny", tmp_path, 4), is_shown=False)
    assert lines(tmp_path / "skipped.jsonl") == [{"step": 3, "ids": seen[4] + seen[5]}]


def test_too_many_in_a_row_end_the_run_and_name_the_cause(tmp_path: Path, monkeypatch) -> None:
    poison(monkeypatch, {2, 3, 5, 6, 7}, "gradient")
    sentence = (
        r"step 7: the loss or its gradient was not finite in 3 steps in a row \(train.max_skipped: 2\); the forward "
        r"pass is finite, so only the gradient is not. Lower .*go on from the last good checkpoint, .*step-00000006"
    )
    with pytest.raises(M3Error, match=sentence):
        train(tiny("mae_tiny", tmp_path, 9, max_skipped=2), is_shown=False)
    assert [line["step"] for line in lines(tmp_path / "skipped.jsonl")] == [2, 3, 5, 6, 7]


def test_resuming_drops_the_skipped_steps_that_come_again(tmp_path: Path, monkeypatch) -> None:
    poison(monkeypatch, {1, 3, 4}, "gradient")
    with pytest.raises(M3Error, match="in 2 steps in a row"):
        train(tiny("mae_tiny", tmp_path, 5, max_skipped=1), is_shown=False)
    monkeypatch.undo()
    train(tiny("mae_tiny", tmp_path, 5, max_skipped=1), resume=True, is_shown=False)
    assert [line["step"] for line in lines(tmp_path / "skipped.jsonl")] == [1, 3]
    last = [line for line in lines(tmp_path / "metrics.jsonl") if "lr" in line][-1]
    assert last["skipped_steps"] == 2


def test_the_first_module_that_is_not_finite_is_named(tmp_path: Path) -> None:
    recipe = tiny("mae_tiny", tmp_path)
    model = build_model(recipe)
    samples = Samples(open_source(recipe, model, "train"), model.modalities, recipe.data, recipe.seed)
    prepared = [model.prepare(next(first_batches(samples, 4, 4)))]
    assert first_not_finite(model, prepared) is None
    blocks = [name for name, _ in model.named_modules() if name.endswith((".1.mlp", "blocks.1"))]
    name = blocks[0]
    module = model.get_submodule(name)
    hook = module.register_forward_hook(lambda _, __, output: output * math.nan)
    assert first_not_finite(model, prepared) == f"the output of the module `{name}` is the first that is not finite"
    hook.remove()
    assert not any(m._forward_hooks for m in model.modules())
    tokens = prepared[0].tokens["image"]
    tokens.values.fill_(math.nan)
    found = first_not_finite(model, prepared)
    assert found is not None
    assert found.endswith("is the first that is not finite, and neither is what it is given: look at the data")
    name, parameter = list(model.named_parameters())[3]
    parameter.data.view(-1)[0] = math.inf
    assert first_not_finite(model, prepared) == f"the weight `{name}` is not finite"


# -- plain warnings -------------------------------------------------------------------------------------


def watch(monkeypatch, records: list[tuple[float, float, float]]) -> str:
    """Feed (loss, MiB, share of waiting) line by line and return what was said."""
    console = Console(record=True, width=500, file=open("/dev/null", "w"))  # noqa: SIM115
    health = Health(console, warmup=0)
    for step, (loss, memory, wait) in enumerate(records, 1):
        monkeypatch.setattr("m3.monitors.resident_memory", lambda memory=memory: int(memory * 2**20))
        health({"step": step, "a": loss, "data_wait": wait}, {"a": loss})
    console.file.close()
    return console.export_text()


def test_a_loss_that_leaps_is_reported_once(monkeypatch) -> None:
    usual = [(1.0 + 0.02 * (i % 3), 100.0, 0.0) for i in range(30)]  # median 1.02, median distance 0.02
    assert watch(monkeypatch, [*usual, (1.2, 100, 0)]) == ""
    said = watch(monkeypatch, [*usual, (1.3, 100, 0), (1.3, 100, 0)])
    assert said.startswith("step 31: the loss `a` leaps to 1.3; the median of the last 30 lines is 1.02. If it stays")
    assert said.count("leaps") == 1
    assert watch(monkeypatch, [*usual[:20], (9, 100, 0)]) == "", "too early to tell"
    assert watch(monkeypatch, [*usual, (0.1, 100, 0)]) == "", "downwards is fine"


def test_growing_memory_is_reported_and_a_plateau_is_not(monkeypatch) -> None:
    grows = watch(monkeypatch, [(1.0, 100 + 2 * i, 0.0) for i in range(40)])
    assert grows.startswith("step 31: the memory of the training process grows: 100 MiB became 158 MiB in 30 steps;")
    assert grows.count("grows") == 1
    assert watch(monkeypatch, [(1.0, 100 + min(i, 9), 0.0) for i in range(80)]) == ""


def test_waiting_for_data_is_reported(monkeypatch) -> None:
    said = watch(monkeypatch, [(1.0, 100, 0.1 + 0.012 * i) for i in range(60)])
    assert said.startswith("step 34: 31% of the time is spent waiting for data; raise data.workers")
    assert watch(monkeypatch, [(1.0, 100, 0.9 if i % 3 == 0 else 0.1) for i in range(60)]) == ""
