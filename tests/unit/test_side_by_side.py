"""`m3 compare` of models: the same tasks on the same samples, and what can't be compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from m3 import M3Config, M3Model
from m3.cli import main
from m3.processor import M3Processor

IMAGE = {"type": "image", "size": 8, "tokenizer": {"type": "patch", "size": 4}}
DECODER = {"type": "self_decoder", "width": 16, "depth": 1, "heads": 2}
TASKS = "{patches: {target: image, baseline: constant}, class: {type: knn, label: digit}}"
LOOKS = "Where the class token looks (last block)"


def save(folder: Path, width: int, target: dict, tasks: str = TASKS) -> str:
    """Save a model with fresh weights, and the recipe of a run that measured it by these tasks."""
    torch.manual_seed(width)
    objective = {"type": "reconstruct", "decoder": DECODER, "targets": {"image": target}}
    backbone = {"width": width, "depth": 1, "heads": 2}
    config = M3Config(modalities={"image": IMAGE}, backbone=backbone, objectives={"reconstruct": objective})
    M3Model(config).save_pretrained(folder / "model")
    M3Processor(config.modalities).save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(
        json.dumps({"name": folder.name, "modalities": {"image": IMAGE}, "backbone": backbone})[:-1]
        + f', "objectives": {{"reconstruct": {json.dumps(objective)}}}, "train": {{"steps": 1}},'
        + '"data": {"source": "digits", "held_out": 60, "workers": 0, "flip": 0.5},'
        + f'"evaluate": {{"samples": 40, "fit_samples": 80, "preview_rows": 1, "tasks": {tasks}}}}}\n'
    )
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return Path(save(tmp_path_factory.mktemp("one") / "run", 24, {}))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return Path(save(tmp_path_factory.mktemp("other") / "wide", 32, {}))


def rows_of(folder: Path) -> dict[str, dict]:
    return {row["task"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}


def test_models_are_measured_on_the_same_samples(run, other, tmp_path, capsys):
    assert main(["compare", str(run), str(other), "--out", str(tmp_path)]) == 0, "runs without metrics are models"
    said = capsys.readouterr().out
    for name, place in (("run", run), ("wide", other)):
        assert main(["eval", str(place), "data.flip=0", "--out", str(tmp_path / name)]) == 0
    assert "The same held-out samples" in said
    found = rows_of(tmp_path)
    assert found.keys() == {"patches", "class"}
    for task, row in found.items():
        assert list(row["models"]) == ["run", "wide"]
        for name in ("run", "wide"):
            alone = rows_of(tmp_path / name)[task]
            assert row["models"][name]["model"] == pytest.approx(alone["model"]), "as each by itself"
            assert row["models"][name]["interval"] == pytest.approx(alone["interval"])
        difference = row["models"]["wide"]["model"] - row["models"]["run"]["model"]
        assert row["differences"]["wide"]["difference"] == pytest.approx(difference)
        low, high = row["differences"]["wide"]["interval"]
        assert low < difference < high
    page = (tmp_path / "report.html").read_text()
    for title in ("Predictions for the same samples", "run: class: nearest neighbours", f"wide: {LOOKS}", "Recipe"):
        assert f"<h2>{title}</h2>" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_runs_are_measured_when_something_to_measure_is_given(tmp_path, capsys):
    runs = [save(tmp_path / name, 16, {}) for name in ("one", "two")]
    for step, run in enumerate(runs, 1):
        line = {"step": step, "held_out/r": 0.5, "baseline/r": 0.1}
        Path(run, "metrics.jsonl").write_text(json.dumps(line) + "\n")
    given = ["--task", "knn:digit", "--out", str(tmp_path / "out"), "evaluate.samples=20"]
    assert main(["compare", *runs, *given]) == 0
    row = rows_of(tmp_path / "out")["knn of digit"]
    assert row["models"]["one"]["notes"]["samples"] == 20
    assert row["differences"]["two"] == {"difference": 0.0, "interval": [0.0, 0.0]}, "they have the same weights"
    capsys.readouterr()
    assert main(["compare", *runs]) == 2, "their metrics are compared, which have no step in common"
    assert "no evaluated step in common" in capsys.readouterr().err
    assert main(["compare", *runs, "--by-step", "--task", "spread"]) == 2
    assert "leave out --task and --data" in capsys.readouterr().err


def test_what_is_no_common_ground_is_named(run, tmp_path, capsys):
    blind = save(tmp_path / "blind", 16, {"target": {"type": "values", "normalise": True}})
    out = ["--out", str(tmp_path / "out")]
    assert main(["compare", str(run), blind, *out]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "patches is left out, since blind can't be measured by it" in said
    assert main(["compare", str(run), blind, *out, "--task", "retrieval"]) == 2
    assert (
        "m3 compare: run: evaluate.tasks.retrieval: the model has no contrastive objective" in capsys.readouterr().err
    )
    assert main(["compare", f"{run}/model", *out]) == 2
    assert "give at least two models, each once" in capsys.readouterr().err
    assert main(["compare", f"{run}/model", f"{run}/model", *out]) == 2
    assert "give at least two models, each once" in capsys.readouterr().err
