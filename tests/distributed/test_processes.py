"""The same batch gives the same loss and gradients however it is cut into micro-batches and processes.

What two cuts differ by is measured by its norm, relative to that of the whole: of each loss, and of the gradient of
each parameter, so that a small gradient has to agree as well as a large one. In float32 both stay below 1e-6 (a sum
taken in another order rounds otherwise, up to 7e-7 of a parameter's gradient); in float64, below 1e-12 (2e-15 was
seen), so that nothing but rounding differs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3.recipe import load_recipe

SCRIPT = Path(__file__).with_name("gradients.py")
ROOT = SCRIPT.parents[2]


EACH = ("multimae_text_tiny", "contrast", "uniter", "translate", "latent", "others")
"""Recipes that together have all objectives: of single samples, and losses that join the samples of a step."""


LIMITS = {torch.float32: 1e-6, torch.float64: 1e-12}
"""What two cuts of a batch may differ by, relative to the norm of the whole."""


def launch(
    folder: Path, processes: int, micro: int, *recipes: str, dtype: str = "float32"
) -> dict[str, dict[str, torch.Tensor]]:
    # `accelerate launch --cpu --num_processes 2` starts one process only; torchrun starts as many as it is told.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), str(micro), str(processes), dtype, *recipes],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = {name: load_file(folder / f"{name}.safetensors") for name in recipes}
    # Copies: what is loaded may be a view of the file, which a later launch into the same folder writes anew.
    return {name: {key: tensor.clone() for key, tensor in tensors.items()} for name, tensors in files.items()}


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], recipe: str) -> None:
    assert found.keys() == expected.keys(), recipe
    torch.testing.assert_close(found["counts"], expected["counts"], rtol=0, atol=0, msg=f"counts of {recipe}")
    limit = LIMITS[expected["loss"].dtype]
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=limit, atol=0, msg=lambda m: f"{recipe}: {m}")
    for name, tensor in expected.items():
        apart, whole = (found[name].double() - tensor.double()).norm(), tensor.double().norm()
        assert apart <= limit * whole, f"{recipe} {name}: {apart:.2e} apart, of {whole:.2e}"


def test_every_objective_is_among_them() -> None:
    names = [SCRIPT.with_name(f"{name}.yaml") for name in EACH]
    recipes = [load_recipe(path if path.is_file() else path.stem) for path in names]
    used = {objective["type"] for recipe in recipes for objective in recipe.objectives.values()}
    assert used == {path.stem for path in (ROOT / "m3" / "objectives").glob("[!_]*.py")}


def test_processes_that_hold_different_modalities_agree(tmp_path: Path) -> None:
    """Four processes with two samples each: one has images only, one depth only, one maps only, one text only."""
    expected = launch(tmp_path, 1, 8, "disjoint")["disjoint"]
    check_same(launch(tmp_path, 4, 2, "disjoint")["disjoint"], expected, "disjoint")
    reached = [name for name, gradient in expected.items() if gradient.abs().max() > 0]
    for modality in ("image", "depth", "semantic", "text"):
        assert any(f"tokenizers.{modality}." in name for name in reached), modality


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """One batch of 8 in one process."""
    found = launch(tmp_path_factory.mktemp("whole"), 1, 8, *EACH)
    for recipe, tensors in found.items():
        for name, tensor in tensors.items():
            assert tensor.abs().max() > 0, f"{name} of {recipe} has no gradient"
    return found


@pytest.fixture(scope="module")
def whole_in_float64(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    return launch(tmp_path_factory.mktemp("whole"), 1, 8, *EACH, dtype="float64")


def test_a_smoothed_loss_in_float64(tmp_path: Path) -> None:
    """In float32 the gradient of its temperature, a small difference of large sums, rounds by up to 3e-6."""
    expected = launch(tmp_path, 1, 8, "smoothed", dtype="float64")["smoothed"]
    check_same(launch(tmp_path, 2, 2, "smoothed", dtype="float64")["smoothed"], expected, "smoothed")


SLOW = [pytest.param(*cut, marks=pytest.mark.slow) for cut in ((1, 4), (2, 4), (4, 2), (4, 1))]


@pytest.mark.parametrize(("processes", "micro"), [(1, 1), (2, 2), *SLOW])
def test_cutting_the_batch_changes_nothing(tmp_path: Path, whole, processes: int, micro: int) -> None:
    for recipe, found in launch(tmp_path, processes, micro, *EACH).items():
        check_same(found, whole[recipe], recipe)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "micro"), [(1, 1), (2, 2), (4, 2)])
def test_in_float64_only_its_rounding_is_left(tmp_path: Path, whole_in_float64, processes: int, micro: int) -> None:
    for recipe, found in launch(tmp_path, processes, micro, *EACH, dtype="float64").items():
        assert found["loss"].dtype == torch.float64
        check_same(found, whole_in_float64[recipe], recipe)
