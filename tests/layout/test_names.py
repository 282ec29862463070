"""Names that must not be shadowed, links that must stay links, and nothing in the files that belongs to one machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELVES = ("tokenizers", "modalities", "recipes")
# Put together here, so that this file does not hold what it looks for.
FOREIGN = ["/" + "home/", "/" + "root/", "/" + "Users/", "index" + "-url", "find" + "-links", "trusted" + "-host"]
GUARD = """
import tokenizers
import m3.tokenizers.patch
assert "site-packages" in tokenizers.__file__, tokenizers.__file__
assert m3.tokenizers.patch.Patch.__name__ == "Patch"
print("resolved", tokenizers.Tokenizer.__name__)
"""


def run(*command: str, **environment: str) -> str:
    """Run Python from the top of the checkout and return what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_library_is_found_inside_pytest() -> None:
    import tokenizers

    assert tokenizers.__file__ is not None
    assert not Path(tokenizers.__file__).is_relative_to(ROOT / "tokenizers")
    assert hasattr(tokenizers.Tokenizer, "from_pretrained")


def test_the_library_is_found_from_the_top_of_the_checkout() -> None:
    assert "resolved Tokenizer" in run("-c", GUARD)


def test_the_library_is_found_under_accelerate_launch(tmp_path: Path) -> None:
    (tmp_path / "guard_of_names.py").write_text(GUARD)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "guard_of_names"]
    assert "resolved Tokenizer" in run(*launch, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")


@pytest.mark.parametrize("shelf", SHELVES)
def test_shelves_are_plain_folders_linked_into_the_package(shelf: str) -> None:
    assert (ROOT / shelf).is_dir()
    assert not list((ROOT / shelf).rglob("__init__.py*")), "it would shadow a library of that name"
    link = ROOT / "m3" / shelf
    assert link.is_symlink()
    assert os.readlink(link) == f"../{shelf}"
    assert link.resolve() == (ROOT / shelf).resolve()


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def test_links_are_tracked_as_links() -> None:
    command = ["git", "ls-files", "--stage", *(f"m3/{shelf}" for shelf in SHELVES)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["120000"] * 3


def test_no_file_names_a_machine_or_a_package_index() -> None:
    found = []
    for path in tracked():
        if path.is_symlink() or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {word}" for word in FOREIGN if word in text]
    assert found == []


def test_what_runs_leave_behind_is_not_tracked() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in tracked()}
    assert {"pyproject.toml", "m3/types.py", "tokenizers/patch.py"} <= names
    endings = (".pyc", ".safetensors", ".egg-info", ".whl")
    assert not [n for n in names if n.endswith(endings) or n.startswith(("runs/", "build/", "dist/"))]
