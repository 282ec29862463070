"""The config files for `accelerate launch` are understood by it, say how they are used, and are no recipes."""

import re
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from m3.recipe import PACKAGED

FILES = {path.stem: path for path in (PACKAGED / "accelerate").glob("*.yaml")}
ROOT = Path(__file__).parents[2]


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert sorted(FILES) == ["cpu_two_processes", "eight_gpus", "fsdp2", "one_gpu", "two_nodes", "zero2"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(FILES[name]))
    processes = {"one_gpu": 1, "cpu_two_processes": 2, "two_nodes": 16}.get(name, 8)
    assert config.num_processes == processes
    assert config.mixed_precision == "no", "the precision is the recipe's"
    assert config.use_cpu == (name == "cpu_two_processes")
    kinds = {"one_gpu": "NO", "cpu_two_processes": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "FSDP"}
    assert str(config.distributed_type.value) == kinds.get(name, "MULTI_GPU")


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_command_in_its_header_is_one_that_the_launcher_takes(name: str) -> None:
    header = "".join(line[1:].rstrip(" \n\\") for line in FILES[name].read_text().splitlines() if line.startswith("#"))
    command = re.search(r"accelerate launch (--config_file recipes/accelerate/\S+ .*?-m) m3.train RECIPE", header)
    assert command, "the header says how it is used"
    words = [str(ROOT / word) if "/" in word else word for word in command.group(1).split()]
    arguments = launch_command_parser().parse_args([*words, "m3.train", "mae_tiny"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert Path(arguments.config_file) == ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    assert arguments.num_machines == (2 if name == "two_nodes" else 1)


def test_sharded_kinds_differ_in_what_stays_after_the_forward_pass() -> None:
    fully, half = (load_config_from_file(str(FILES[name])).fsdp_config for name in ("fsdp2", "zero2"))
    assert fully["fsdp_version"] == half["fsdp_version"] == 2
    assert {key for key in fully if fully[key] != half[key]} == {"fsdp_reshard_after_forward"}
    assert fully["fsdp_reshard_after_forward"] is True


def test_they_are_no_recipes_and_are_packaged() -> None:
    assert not {path.stem for path in PACKAGED.glob("*.yaml")} & set(FILES)
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["m3.recipes"]
    assert {path for pattern in packaged for path in PACKAGED.glob(pattern)} >= set(FILES.values())
