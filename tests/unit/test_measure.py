"""`m3 eval`, its report, and the report of a run; digits and folders of classes as data with labels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from m3.cli import main
from m3.evaluate.task import Row
from m3.recipe import DataSpec, load_recipe
from m3.report import Report
from m3.train import train
from tests.unit.source_files import open_data, picture

RECIPE = """
modalities:
  image: {type: image, size: 8, tokenizer: {type: patch, size: 4}}
backbone: {width: 24, depth: 1, heads: 2}
objectives:
  reconstruct: {type: reconstruct, decoder: {type: self_decoder, width: 16, depth: 1, heads: 2}, targets: {image: {}}}
data: {source: digits, held_out: 60, workers: 0}
train: {steps: 3, batch_size: 8, lr: 1.0e-3, log_every: 1, trackers: []}
evaluate:
  samples: 60
  fit_samples: 100
  tasks:
    patches: {target: image, baseline: constant}
    class: {type: knn, label: digit}
"""


LOOKS = "Where the class token looks (last block)"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("measure")
    (folder / "small.yaml").write_text(RECIPE)
    train(load_recipe(folder / "small.yaml", [f"out={folder / 'run'}"]), is_shown=False)
    return folder / "run"


def rows_of(folder: Path) -> dict[str, dict]:
    return {row["task"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}


def test_a_run_ends_with_a_report_that_needs_no_other_file(run):
    page = (run / "report.html").read_text()
    assert rows_of(run).keys() == {"patches", "class"}
    for title in ("Predictions", "Curves", "class: nearest neighbours", LOOKS, "Recipe"):
        assert f"<h2>{title}</h2>" in page
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert '<meta name="viewport"' in page


def test_a_model_is_measured_by_the_tasks_of_its_recipe(run, capsys):
    assert main(["eval", str(run)]) == 0
    again, before = rows_of(run / "eval"), rows_of(run)
    assert again["class"]["model"] == before["class"]["model"]
    assert again["patches"]["model"] == pytest.approx(before["patches"]["model"])
    page = (run / "eval" / "report.html").read_text()
    assert [title in page for title in ("<h2>Predictions</h2>", f"<h2>{LOOKS}</h2>")] == [True, True]
    assert "Report: " in capsys.readouterr().out


def test_tasks_and_settings_can_be_given(run, tmp_path, capsys):
    given = ["--task", "probe:digit", "--task", "spread", "--out", str(tmp_path), "evaluate.fit_samples=300"]
    assert main(["eval", str(run / "model"), *given]) == 0
    rows = rows_of(tmp_path)
    assert rows.keys() == {"probe of digit", "spread, rank", "spread, deviation"}
    assert rows["probe of digit"]["notes"]["training samples"] == 300
    assert rows["probe of digit"]["model"] > 0.5
    assert "300 training samples" in (tmp_path / "report.html").read_text()


def test_other_data_can_be_given(run, tmp_path):
    for name in ("dark", "light"):
        for i in range(15):
            picture(tmp_path / "data" / name / f"{i}.png", i + 200 * (name == "light"))
    given = ["--data", str(tmp_path / "data"), "--task", "probe:label", "--out", str(tmp_path / "report")]
    assert main(["eval", str(run), *given]) == 0
    row = rows_of(tmp_path / "report")["probe of label"]
    assert row["notes"]["samples"] == 3
    assert row["model"] == 1.0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["backbone.width=8"], "`backbone.width=8` would change the model; only data, evaluate, seed can be set"),
        (["--task", "knn:digi"], "no sample (train) has the label `digi` together with image. Did you mean `digit`?"),
        (["--task", "retrieval"], "the model has no contrastive objective"),
        (["--task", "guess"], "`guess` in `tasks` is not known"),
        (["data.held_out=0"], "no sample of 1797 is held out"),
        (["evaluate.tasks="], "nothing to measure; give e.g. --task spread"),
        (["--data", "worl"], "`worl` in `sources` is not known"),
        (["--task", "probe"], "evaluate.tasks.probe.label: this key is required"),
    ],
)
def test_what_can_not_be_measured_is_named(run, given, sentence, capsys):
    assert main(["eval", str(run), *given]) == 2
    assert sentence in capsys.readouterr().err


# -- reports ----------------------------------------------------------------------------------------------


def test_a_report_escapes_what_it_is_given_and_marks_what_may_be_chance(tmp_path):
    rows = [
        Row("a <b>", "accuracy", 0.5, 0.4, "random", True, (0.4, 0.6), (-0.1, 0.2), {"k": 3}),
        Row("error", "L1", 0.5, 0.4, "constant", False),
    ]
    figure = Figure()
    figure.subplots().plot([1, 2])
    report = Report("A & B", {"data": "<x>", "empty": ""}, rows, {"one": figure, "none": tmp_path / "no.png"}, "a: <1>")
    page = report.write(tmp_path / "new").read_text()
    assert "A &amp; B" in page
    assert "a &lt;b&gt;" in page
    assert "<x>" not in page
    assert "<b>empty</b>" not in page
    assert "[0.4, 0.6]" in page
    assert page.count("may be chance") == 1
    assert '<span class="won">+0.1</span>' in page
    assert '<span class="lost">+0.1</span>' in page
    assert page.count("<img") == 1
    assert rows_of(tmp_path / "new")["a <b>"]["notes"] == {"k": 3}


# -- data with labels -------------------------------------------------------------------------------------


def test_files_beside_folders_have_no_class(tmp_path):
    for place in ("a/1.png", "b/2.png", "3.png"):
        picture(tmp_path / place, 1)
    source = open_data(DataSpec(source="folder", root=str(tmp_path), held_out=0), "image")
    assert [source.read(i).labels for i in range(3)] == [{}, {}, {}]
