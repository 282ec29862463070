"""Damaged files of every modality are read or refused in words; no crash, no hang, no memory for empty claims."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m3.parts import available, find

SCRIPT = Path(__file__).with_name("fuzz.py")
NAMES = (
    "image", "depth", "semantic_map", "normals", "boxes", "text", "points", "audio", "video", "metadata", "vector",
    "regions", "answers",
)  # fmt: skip
NEEDS = {"audio": ("soundfile", "torchaudio", "av"), "video": ("av",)}
LEAST = {"text": 10}
"""Damaged files that must be refused: most changes of a sentence give another sentence."""


def lacking(name: str) -> list[str]:
    return [library for library in NEEDS.get(name, ()) if importlib.util.find_spec(library) is None]


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """Modality -> what one process, which reads all damaged files, found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), *[name for name in NAMES if not lacking(name)]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, f"died at {done.stderr[-1500:]}"
    return {name: found for line in done.stdout.splitlines() for name, found in json.loads(line).items()}


def test_every_modality_is_fuzzed() -> None:
    own = {name for name in available("modalities") if not find("modalities", name).reads}  # the others read its files
    # Codes are .npy files or what their tokenizer's modality reads; labels are numbers of the data, not files.
    assert own - {"codes", "label"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_do_no_harm(name: str, results: dict[str, dict[str, Any]]) -> None:
    if lacking(name):
        pytest.skip(f"`{name}` needs {', '.join(lacking(name))}")
    found = results[name]
    assert found["wrong"] == []
    assert found["refused"] >= LEAST.get(name, 25), found
    assert found["slowest"] < 5, found
    assert found["grown"] < 400, f"{found['grown']} MiB for files of a few thousand bytes"
