"""`m3 table`: what it says of a run, and of a folder that is none."""

from __future__ import annotations

import json

import pytest

from m3.check import shrink
from m3.cli import main
from m3.plugins import View
from m3.recipe import load_recipe
from m3.table import hides
from m3.train import train


@pytest.mark.parametrize(
    ("masking", "words"),
    [
        ({"type": "fixed", "visible": 0.25}, "75% of image, text"),
        ({"type": "dirichlet", "visible": 98}, "all but 98 tokens of image, text"),
        ({"type": "fixed", "visible": {"text": 0.85, "image": 1.0}, "hidden": "mix"}, "15% of text, replaced"),
        ({"type": "fixed", "visible": 0.1, "scorer": {"type": "tube"}}, "90% of image, text, by tube"),
        ({"type": "fixed", "visible": 1.0}, "nothing"),
        ({"type": "budget", "visible": [0, 64]}, "all but 0 to 64 tokens of image, text"),
    ],
)
def test_a_view_says_what_it_hides(masking, words):
    assert hides(View(("image", "text"), json.dumps(masking))) == words


def test_a_finished_run_is_a_line(tmp_path, capsys):
    recipe = shrink(load_recipe("quickstart"), tmp_path / "run")
    train(recipe, is_shown=False)
    assert main(["table", str(tmp_path / "run")]) == 0
    head, rule, line = capsys.readouterr().out.strip().splitlines()
    assert head.startswith("| recipe | hides | predicts |")
    assert set(rule) == set("|- ")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "`quickstart`"
    assert cells[1].endswith("of image, depth, semantic")
    assert cells[2] == "image, depth, semantic"
    assert cells[4] == "3"
    assert len(cells[6].split("; ")) == len(recipe.evaluate.tasks)


def test_another_folder_is_refused(tmp_path, capsys):
    assert main(["table", str(tmp_path)]) == 2
    assert "is no folder of a finished run" in capsys.readouterr().err


def test_what_is_read_off_features_is_a_line_with_its_baselines(tmp_path, capsys):
    recipe = shrink(load_recipe("mae_tiny"), tmp_path / "run")
    train(recipe, is_shown=False)
    tasks = ["--task", "probe:shape:random,raw", "--task", "knn:color:random,majority"]
    assert main(["eval", str(tmp_path / "run"), *tasks, "evaluate.samples=16", "evaluate.fit_samples=40"]) == 0
    capsys.readouterr()
    assert main(["table", "--features", str(tmp_path / "run")]) == 0
    head, _, probe, knn, _, caption = capsys.readouterr().out.strip().splitlines()
    assert head == "| model | data | label | read by | features | fresh weights | raw values | most frequent |"
    report = json.loads((tmp_path / "run" / "eval" / "report.json").read_text())["rows"]
    rows = {(row["task"], row["baseline_name"]): row for row in report}
    own = rows["probe of shape", "raw"]
    low, high = (f"{100 * bound:.1f}" for bound in own["interval"])
    cells = [cell.strip() for cell in probe.strip("|").split("|")]
    assert cells[:4] == ["`run`", "world", "shape", "probe"]
    assert cells[4] == f"**{100 * own['model']:.1f}** ({low} to {high})"
    assert cells[7] == "", "this baseline was not asked for"
    for cell, baseline in ((cells[5], "random"), (cells[6], "raw")):
        value, sign = cell.split()
        low, high = rows["probe of shape", baseline]["difference"]
        assert value == f"{100 * rows['probe of shape', baseline]['baseline']:.1f}"
        assert sign == ("+" if low > 0 else "-" if high < 0 else "=")
    assert knn.split("|")[3:5] == [" color ", " knn "]
    assert caption.startswith("Shares of held-out samples")


def test_a_model_whose_features_were_not_measured_is_refused(tmp_path, capsys):
    assert main(["table", "--features", str(tmp_path)]) == 2
    assert f"{tmp_path} has not been measured; do it first (m3 eval {tmp_path} --task probe:LABEL)" in (
        capsys.readouterr().err
    )
    text = {"facts": {"model": "m", "data": "world"}, "rows": []}
    (tmp_path / "report.json").write_text(json.dumps(text))
    assert main(["table", "--features", str(tmp_path)]) == 2
    assert "no label was read off features" in capsys.readouterr().err
