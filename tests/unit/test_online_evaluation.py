"""Measuring during a run: it changes nothing of the run, reads the average where asked, and is written everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m3.errors import M3Error
from m3.evaluate.task import Row
from m3.held_out import HeldOut
from m3.measure import measure
from m3.recipe import Recipe, recipe_from
from m3.saving import random_states
from m3.train import train

WORDS = (
    "a an empty ground small large red green blue yellow purple cyan orange sphere cube cylinder cone left right of in"
)
WORDS += " front behind beside"
LABEL = {"label": "shape", "inputs": ["image"]}
TASKS: dict[str, dict[str, Any]] = {
    "patches": {"target": "image", "baseline": "neighbours"},
    "image from text": {"target": "image", "visible": {"text": 1.0}, "baseline": "average_map"},
    "probe": {"type": "probe", "baseline": ["random", "pca"], **LABEL},
    "svm": {"type": "probe", "classifier": "svm", **LABEL},
    "published": {"type": "probe", "classifier": "sgd", "optimizer": "adamw", "epochs": 2, **LABEL},
    "knn": {"type": "knn", **LABEL},
    "spread": {"type": "spread"},
    "subsets": {"type": "subsets", "label": "color"},
    "retrieval": {"type": "retrieval", "k": 3},
    "words": {"type": "zero_shot", "label": "shape", "classes": ["sphere", "cube", "cylinder", "cone"]},
}


FEW = {name: TASKS[name] for name in ("patches", "svm", "spread")}


def recipe(out: Path, evaluate: dict[str, Any], **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "modalities": {
            "image": {"type": "image", "size": 32, "tokenizer": {"type": "patch", "size": 8}},
            "text": {
                "type": "text",
                "length": 12,
                "vocabulary": WORDS.split(),
                "tokenizer": {"type": "embedding"},
            },
        },
        "backbone": {"width": 16, "depth": 2, "heads": 2, "drop_path": 0.2},
        "objectives": {
            "reconstruct": {
                "type": "reconstruct",
                "inputs": ["image", "text"],
                "masking": {"type": "fixed", "visible": {"image": 0.5, "text": 1.0}},
                "decoder": {"type": "cross_decoder", "width": 16, "depth": 1, "heads": 2},
                "targets": {"image": {"loss": "mse"}},
            },
            "contrast": {
                "type": "contrast",
                "width": 8,
                "sides": {"image": {"pool": "mean"}, "text": {"pool": "mean"}},
            },
        },
        "data": {"source": "world", "samples": 32, "held_out": 24, "workers": 0, "drop": 0.1, "crop": [0.5, 1.0]},
        "train": {"steps": 2, "batch_size": 8, "micro_batch": 4, "lr": 1e-2, "log_every": 1, "save_every": 1}
        | {"trackers": [], "precision": "fp32", "threads": 1, "ema": 0.6},
        "evaluate": {"samples": 24, "fit_samples": 32, "preview_rows": 2, "tasks": FEW} | evaluate,
        "out": str(out),
    }
    for section, values in changes.items():
        settings[section] |= values
    return recipe_from(settings, "test")


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(one: Any, other: Any) -> bool:
    """Nested containers with tensors in them are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """Three equal runs: measured after every step, only at the end, and after every step by their average."""
    folder = tmp_path_factory.mktemp("runs")
    train(recipe(folder / "often", {"every": 1}), is_shown=False)
    train(recipe(folder / "once", {}), is_shown=False)
    rows = train(recipe(folder / "average", {"every": 1, "weights": "ema"}), is_shown=False)
    return folder, rows


def test_measuring_changes_nothing_of_the_run(runs: tuple[Path, list[Row]]) -> None:
    """Losses, gradients, weights and their average are those of a run that is measured only at its end."""
    often, once, average = (runs[0] / name for name in ("often", "once", "average"))
    steps = {run: [line for line in lines_of(run) if "lr" in line] for run in (often, once, average)}
    for run in (often, average):
        for one, other in zip(steps[run], steps[once], strict=True):
            names = [name for name in other if name.startswith(("reconstruct/", "contrast/", "gradient_norm"))]
            assert len(names) >= 3
            assert [one[n] for n in names] == [other[n] for n in names]
        for name in ("model.safetensors", "ema.safetensors"):
            found, expected = (load_file(r / "checkpoints" / "step-00000002" / name) for r in (run, once))
            assert same(found, expected), name
    assert sum("held_out/svm" in line for line in lines_of(often)) == 2
    assert sum("held_out/svm" in line for line in lines_of(once)) == 1


def test_random_numbers_go_on_as_if_nothing_had_been_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of python, numpy and torch; the model learns on as before, with its own weights."""
    seen: list[str] = []

    def unchanged(held_out: HeldOut, *arguments: Any, **options: Any) -> list[Row]:
        weights = [parameter.detach().clone() for parameter in held_out.model.parameters()]
        before = random_states()
        rows = measured(held_out, *arguments, **options)
        assert same(random_states(), before)
        assert same([parameter.detach() for parameter in held_out.model.parameters()], weights)
        assert held_out.model.training
        seen.extend(row.task for row in rows)
        return rows

    measured = HeldOut.evaluate
    monkeypatch.setattr(HeldOut, "evaluate", unchanged)
    train(recipe(tmp_path / "run", {"weights": "ema", "tasks": TASKS}), is_shown=False)
    assert {name.split(",")[0] for name in seen} == TASKS.keys()


def test_the_average_is_measured_where_the_recipe_says_so(runs: tuple[Path, list[Row]], capsys: Any) -> None:
    """The figures are those of the model that is saved as `model_ema`, and not those of `model`."""
    folder, rows = runs
    figures = {row.task: row.model for row in rows}
    last = {key[9:]: value for key, value in lines_of(folder / "average")[-1].items() if key.startswith("held_out/")}
    assert last == figures
    plain = {key[9:]: value for key, value in lines_of(folder / "often")[-1].items() if key.startswith("held_out/")}
    assert plain["patches"] != figures["patches"]
    again = {row.task: row.model for row in measure(str(folder / "average"), [], [], None, None)}
    assert again == pytest.approx(figures, rel=1e-5)
    other = measure(str(folder / "average"), ["evaluate.weights=model"], [], None, folder / "other")
    assert {row.task: row.model for row in other} == pytest.approx(plain, rel=1e-5)
    assert "patches" in (folder / "average" / "model_ema" / "README.md").read_text()
    assert "patches" not in (folder / "average" / "model" / "README.md").read_text()
    assert (folder / "average" / "eval" / "report.html").is_file()
    capsys.readouterr()


def test_what_is_measured_is_in_metrics_and_tensorboard_and_table(tmp_path: Path, capsys: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train(recipe(tmp_path / "run", {"every": 1}, train={"trackers": ["tensorboard"]}))
    events = EventAccumulator(str(next((tmp_path / "run" / "logs").rglob("events*")).parent)).Reload()
    lines = [line for line in lines_of(tmp_path / "run") if "held_out/patches" in line]
    table = capsys.readouterr().out
    for row in rows:
        scalars = [(event.step, event.value) for event in events.Scalars(f"held_out/{row.task}")]
        assert scalars == [(line["step"], pytest.approx(line[f"held_out/{row.task}"])) for line in lines]
        assert [step for step, _ in scalars] == [1, 2]
        assert lines[-1][f"baseline/{row.task}"] == pytest.approx(row.baseline)
        assert row.task.split(",")[0] in table


def test_an_average_that_is_not_kept_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=r"`evaluate.weights: ema` measures an average, .* set `train.ema`"):
        recipe(tmp_path, {"weights": "ema"}, train={"ema": None})
