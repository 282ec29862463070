"""What commands say of run folders: their lines, the list of runs, curves, two runs and two revisions step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3 import provenance, step_compare
from m3.cli import main
from m3.errors import M3Error
from m3.metrics import duration, read_lines
from m3.plot import _smooth, plot
from m3.step_compare import compare_revisions, compare_steps

RECIPE = """
modalities:
  image: {type: image, size: 32, tokenizer: {type: patch, size: 8}}
backbone: {width: 32, depth: 1, heads: 2}
objectives:
  reconstruct: {type: reconstruct, decoder: {type: self_decoder, width: 32, depth: 1, heads: 2}, targets: {image: {}}}
data: {source: world, samples: 64, held_out: 8, workers: 0}
train: {steps: 4, batch_size: 8, lr: 1.0e-3, log_every: 1}
"""


def write_run(folder: Path, losses: list[float], held_out: float | None = None) -> Path:
    """A run that logged every step in a second."""
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "reconstruct/image": loss, "lr": 0.1, "gradient_norm": 1.0, "seconds": 1.0, "skipped": 0}
        for step, loss in enumerate(losses, 1)
    ]
    if held_out is not None:
        lines.append({"step": len(losses), "held_out/patches": held_out, "baseline/patches": 0.25})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(RECIPE + f"name: {folder.name}\n")
    return folder


# -- lines ------------------------------------------------------------------------------------------------


def test_lines_tell_losses_from_evaluations_and_add_up_the_time(tmp_path: Path):
    lines = read_lines(write_run(tmp_path / "run", [2.0, 1.5], held_out=0.5))
    assert [line.step for line in lines] == [1, 2, 2]
    assert [line.seconds for line in lines] == [1.0, 2.0, 2.0]
    assert lines[1].losses == {"reconstruct/image": 1.5}
    assert lines[1].values["lr"] == 0.1
    assert lines[2].held_out == {"patches": 0.5}
    assert lines[2].baselines == {"patches": 0.25}
    assert not lines[2].values


def test_an_unfinished_last_line_is_left_out_and_a_broken_one_is_named(tmp_path: Path):
    run = write_run(tmp_path / "run", [2.0, 1.5])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reco')
    assert [line.step for line in read_lines(run)] == [1, 2]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(M3Error, match=r"metrics.jsonl: line 3 is no JSON"):
        read_lines(run)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 min 00 s"), (59.6, "1 min 00 s"), (3599.0, "59 min 59 s"), (7260.0, "2 h 01 min")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


# -- runs -------------------------------------------------------------------------------------------------


def test_runs_are_listed_with_their_state_and_last_figures(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    write_run(tmp_path / "ended", [2.0, 1.5, 1.0, 0.75], held_out=0.5)
    (tmp_path / "ended" / "model").mkdir()
    (tmp_path / "ended" / "model" / "config.json").write_text("{}")
    provenance.note_start(write_run(tmp_path / "going", [2.0]), 0, 1)
    killed = write_run(tmp_path / "killed", [2.0])
    provenance.note_start(killed, 0, 1)
    starts = provenance.read_starts(killed)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    starts[-1]["process"] = ended.pid
    (killed / "run.json").write_text(json.dumps(starts))
    (tmp_path / "no_run").mkdir()
    assert main(["runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    rows = {name: text[text.index(name) :].split("├")[0] for name in ("ended", "going", "killed")}
    assert "finished" in rows["ended"]
    assert "reconstruct/image 0.75" in rows["ended"]
    assert "patches 0.5" in rows["ended"]
    assert "0 min 04 s" in rows["ended"]
    assert "running" in rows["going"]
    assert "stopped" in rows["killed"]
    assert "no_run" not in text


def test_a_folder_without_runs_is_named(tmp_path: Path, capsys):
    assert main(["runs", str(tmp_path)]) == 2
    assert "holds no runs" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_run_says_how_it_was_started(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["m3", "train", "a recipe.yaml"])
    provenance.note_start(tmp_path, 0, 2)
    provenance.note_start(tmp_path, 30, 2)
    first, second = provenance.read_starts(tmp_path)
    assert (first["step"], second["step"]) == (0, 30)
    assert first["command"] == "m3 train 'a recipe.yaml'"
    assert first["packages"]["torch"]
    assert first["process"] == os.getpid()
    assert provenance.is_running(tmp_path) is True
    provenance.note_start(tmp_path, 0, 1)  # killed before there was a checkpoint, and started again
    assert [start["step"] for start in provenance.read_starts(tmp_path)] == [0, 30, 0]


def test_the_revision_says_when_files_were_changed(tmp_path: Path, monkeypatch):
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "m3" / "provenance.py"))
    assert provenance.revision() is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    assert provenance.revision() == git("rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("a = 2\n")
    assert provenance.revision() == git("rev-parse", "HEAD") + "+"


# -- curves -----------------------------------------------------------------------------------------------


def test_curves_are_drawn_of_losses_and_held_out_figures(tmp_path: Path, capsys):
    runs = [write_run(tmp_path / name, [2.0, 1.5], held_out=0.5) for name in ("a", "b")]
    assert plot(runs, tmp_path / "both.png", []) == ["reconstruct/image", "patches"]
    assert plot(runs, tmp_path / "rate.png", ["lr"], by="time") == ["lr"]
    assert main(["plot", *map(str, runs), "--out", str(tmp_path / "c" / "curves.png")]) == 0
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("both.png", "rate.png", "c/curves.png"))
    with pytest.raises(M3Error, match=r"no run has `patch`. Did you mean `patches`"):
        plot(runs, tmp_path / "none.png", ["patch"])


def test_the_running_mean_has_no_bias_towards_its_start():
    assert _smooth([(1, 3.0), (2, 3.0), (3, 3.0)]) == [(1, 3.0), (2, 3.0), (3, 3.0)]
    short = [(0.0, 0.0), (1.0, 1.0)]
    assert _smooth(short) == short
    smooth = _smooth([(float(x), float(x % 2)) for x in range(40)])  # forgets in two values
    assert smooth[1] == (1.0, pytest.approx(1 / 1.5))


# -- step by step -----------------------------------------------------------------------------------------


def test_two_runs_step_by_step(tmp_path: Path, capsys):
    one = write_run(tmp_path / "one", [2.0, 1.5, 1.0])
    same = write_run(tmp_path / "same", [2.0, 1.5, 1.0])
    other = write_run(tmp_path / "other", [2.0, 1.5, 0.75, 0.5])
    found = compare_steps(one, same)["reconstruct/image"]
    assert (found.steps, found.first, found.largest) == (3, None, 0.0)
    found = compare_steps(one, other, tolerance=0.25)["reconstruct/image"]
    assert (found.steps, found.first, found.largest, found.relative) == (3, 3, 0.25, 0.25)
    assert main(["compare", "--by-step", str(one), str(other), "--tolerance", "0.2"]) == 2
    assert "`reconstruct/image` differs by 0.25 of its value, more than --tolerance 0.2" in capsys.readouterr().err
    with pytest.raises(M3Error, match="have no step and loss in common"):
        compare_steps(one, write_run(tmp_path / "empty", []))


@pytest.mark.slow
def test_two_revisions_step_by_step(tmp_path: Path, monkeypatch, capsys):
    """A checkout whose second revision seeds its weights otherwise."""
    source, root = Path(step_compare.__file__).resolve().parent.parent, tmp_path / "checkout"

    def git(*arguments: str) -> None:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(root), *arguments]
        subprocess.run(command, capture_output=True, check=True)

    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for name in ("m3", "modalities", "tokenizers", "recipes"):
        subprocess.run(["cp", "-a", str(source / name), str(root)], check=True)
    git("add", ".")
    git("commit", "-qm", "one")
    git("tag", "one")
    train = root / "m3" / "train.py"
    train.write_text(train.read_text().replace("set_seed(recipe.seed)", "set_seed(recipe.seed + 1)"))
    git("commit", "-qam", "other")
    monkeypatch.setattr(step_compare, "__file__", str(root / "m3" / "step_compare.py"))
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE)
    compare_revisions(["one", "one"], str(recipe), [], 2, 0.0)
    assert "reconstruct/image: equal bit for bit" in capsys.readouterr().out
    with pytest.raises(M3Error, match=r"`.*` differs by .* of its value"):
        compare_revisions(["one", "HEAD"], str(recipe), [], 2, 0.0)
    with pytest.raises(M3Error, match="git has no revision `nothing`"):
        compare_revisions(["one", "nothing"], str(recipe), [], 2, 0.0)
