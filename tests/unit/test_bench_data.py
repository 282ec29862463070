"""`m3 bench data` reads through the trainer's own path and compares a folder of pictures with torchvision."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3.cli import main
from tests.unit.video_files import written

CLIPS = """
modalities: {v: {type: video, size: [16, 16], frames: 4, tokenizer: {type: tube, size: 8, frames: 2}}}
objectives: {pixels: {type: reconstruct, targets: {v: {}}}}
data: {source: folder, held_out: 0, workers: 0}
train: {steps: 1}
"""


def test_a_folder_is_compared_with_torchvision(tmp_path: Path, capsys) -> None:
    for i in range(40):
        Image.fromarray(np.full((40, 48, 3), i, np.uint8)).save(tmp_path / f"{i:02d}.png")
    overrides = ["data.source=folder", f"data.root={tmp_path}", "data.held_out=0", "data.workers=0"]
    assert main(["bench", "data", "mae_tiny", *overrides, "--samples", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["source"] == "folder"
    assert found["samples"] == 32
    own = {"one process", "1 worker"}
    assert set(found["samples_per_second"]) == own | {f"ImageFolder, {name}" for name in own}
    assert set(found["times_as_fast"]) == {f"ImageFolder, {name}" for name in own}
    assert all(rate > 0 for rate in found["samples_per_second"].values())
    parts = sum(found["seconds_per_sample"].values())
    assert abs(parts * found["samples_per_second"]["one process"] - 1) < 1e-6


def test_every_source_of_a_mixture_has_its_own_rate(tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(np.full((40, 48, 3), i, np.uint8)).save(tmp_path / name / f"{i}.jpg")
    parts = {name: {"source": "folder", "root": str(tmp_path / name)} for name in ("a", "b")}
    overrides = [
        "data.source=mixture",
        "data.options=",
        f"data.options={json.dumps({'sources': parts})}",
        "data.workers=0",
    ]
    assert main(["bench", "data", "mae_tiny", *overrides, "data.held_out=0", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    for row in ("one process", "1 worker", "source a, one process", "source b, one process"):
        assert re.search(rf"│ {row} +│ +[\d,.]+ │", shown), shown
    assert "Time of a sample, one process" in shown


def test_clips_are_decoded_beside_decord(tmp_path: Path, capsys) -> None:
    pytest.importorskip("decord", reason="the comparison is with decord")
    (tmp_path / "v").mkdir()
    for i in range(2):
        written(tmp_path / "v" / f"{i}.mp4")
    (tmp_path / "clips.yaml").write_text(CLIPS)
    overrides = [f"data.root={tmp_path}", "--samples", "2", "--rounds", "1", "--json"]
    assert main(["bench", "data", str(tmp_path / "clips.yaml"), *overrides]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rates = found["samples_per_second"]
    ratio = rates["clips of v, decoded"] / rates["clips of v, decord"]
    assert found["times_as_fast"]["clips of v, decord"] == pytest.approx(ratio)


def test_nothing_to_measure_is_refused(capsys) -> None:
    assert main(["bench", "data", "mae_tiny", "--samples", "0"]) == 2
    assert "--samples and --rounds must be at least 1" in capsys.readouterr().err


def test_a_missing_recipe_is_asked_for(capsys) -> None:
    assert main(["bench", "data"]) == 2
    assert "bench data: name the recipe whose data are to be read" in capsys.readouterr().err
