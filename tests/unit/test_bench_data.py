"""`m3 bench data` reads through the trainer's own path and compares a folder of pictures with torchvision."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from m3.cli import main


def test_a_folder_is_compared_with_torchvision(tmp_path: Path, capsys) -> None:
    for i in range(40):
        Image.fromarray(np.full((40, 48, 3), i, np.uint8)).save(tmp_path / f"{i:02d}.png")
    overrides = ["data.source=folder", f"data.root={tmp_path}", "data.held_out=0", "data.workers=0"]
    assert main(["bench", "data", "mae_tiny", *overrides, "--samples", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["source"] == "folder"
    assert found["samples"] == 32
    assert set(found["samples_per_second"]) == {"one process", "1 worker(s)", "torchvision ImageFolder, one process"}
    assert all(rate > 0 for rate in found["samples_per_second"].values())
    parts = sum(found["seconds_per_sample"].values())
    assert abs(parts * found["samples_per_second"]["one process"] - 1) < 1e-6


def test_a_missing_recipe_is_asked_for(capsys) -> None:
    assert main(["bench", "data"]) == 2
    assert "bench data: name the recipe whose data are to be read" in capsys.readouterr().err
