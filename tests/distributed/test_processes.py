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


def launch(out: Path, processes: int, micro: int) -> dict[str, torch.Tensor]:
    # `accelerate launch --cpu --num_processes 2` starts one process only; torchrun starts as many as it is told.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(SCRIPT), str(out), str(micro), str(processes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return launch(tmp_path_factory.mktemp("whole") / "1x8.safetensors", processes=1, micro=8)


@pytest.mark.parametrize(("processes", "micro"), [(1, 4), (1, 1), (2, 4), (2, 2)])
def test_cutting_the_batch_changes_nothing(tmp_path: Path, whole, processes: int, micro: int) -> None:
    found = launch(tmp_path / "cut.safetensors", processes, micro)
    assert found.keys() == whole.keys()
    torch.testing.assert_close(found["counts"], whole["counts"], rtol=0, atol=0)
    torch.testing.assert_close(found["loss"], whole["loss"], rtol=1e-6, atol=1e-6)
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
