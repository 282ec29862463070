"""The same batch gives the same loss and gradients however it is cut into micro-batches and processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("gradients.py")
ROOT = SCRIPT.parents[2]


def launch(recipe: str, out: Path, processes: int, micro: int) -> dict[str, torch.Tensor]:
    # `accelerate launch --cpu --num_processes 2` starts one process only; torchrun starts as many as it is told.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(SCRIPT), recipe, str(out), str(micro), str(processes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


def test_processes_that_hold_different_modalities_agree(tmp_path: Path) -> None:
    """Four processes with two samples each: one has images only, one depth only, one maps only, one text only."""
    expected = launch("disjoint", tmp_path / "whole.safetensors", processes=1, micro=8)
    found = launch("disjoint", tmp_path / "cut.safetensors", processes=4, micro=2)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["counts"], expected["counts"], rtol=0, atol=0)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=1e-6)
    reached = [name for name, gradient in expected.items() if gradient.abs().max() > 0]
    for modality in ("image", "depth", "semantic", "text"):
        assert any(f"tokenizers.{modality}." in name for name in reached), modality
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module", params=["multimae_tiny", "contrast", "uniter", "translate"])
def whole(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    """One batch of 8 in one process: what an objective of single samples and losses that join a step give."""
    folder = tmp_path_factory.mktemp("whole")
    return request.param, launch(request.param, folder / "1x8.safetensors", processes=1, micro=8)


@pytest.mark.parametrize(("processes", "micro"), [(1, 4), (1, 1), (2, 4), (2, 2)])
def test_cutting_the_batch_changes_nothing(tmp_path: Path, whole, processes: int, micro: int) -> None:
    recipe, expected = whole
    if recipe == "uniter":  # pairs of neighbours are mismatched, so no micro-batch may part them
        micro = max(2, micro)
    found = launch(recipe, tmp_path / "cut.safetensors", processes, micro)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["counts"], expected["counts"], rtol=0, atol=0)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=1e-6)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
