"""The wheel, built from the tracked files alone, works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELVES = ("tokenizers", "modalities", "recipes")
USE = """
import sys
from pathlib import Path
import m3, m3.tokenizers.patch, m3.modalities.image
from m3.parts import available
from m3.recipe import find_recipe, load_recipe
site = Path(sys.argv[1])
for found in (m3.__file__, m3.tokenizers.patch.__file__, m3.modalities.image.__file__, find_recipe("quickstart")):
    assert Path(found).is_relative_to(site), found
print(load_recipe("quickstart").name, *available("modalities"), *available("tokenizers"))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not os.path.lexists(ROOT / name):
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to(os.readlink(ROOT / name))
        else:
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_everything_is_in_it_and_nothing_is_a_link(site: Path) -> None:
    paths = [path for path in site.rglob("*") if not path.is_dir()]
    assert not [path for path in paths if path.is_symlink()]
    packed = {path.relative_to(site).as_posix() for path in paths}
    for shelf in SHELVES:
        wanted = {f"m3/{shelf}/{path.name}" for path in (ROOT / shelf).iterdir() if path.suffix in (".py", ".yaml")}
        assert wanted <= packed
        for name in wanted:
            assert (site / name).read_bytes() == (ROOT / name).read_bytes()
    assert {"m3/types.py", "m3/data/sources/folder.py", "m3/py.typed"} <= packed
    outside = {name.split("/")[0] for name in packed if not name.startswith("m3/")}
    assert all(name.endswith(".dist-info") for name in outside), "only m3 and its description belong in it"


def test_it_is_used_from_elsewhere(site: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USE, str(site)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = [path.stem for shelf in ("modalities", "tokenizers") for path in sorted((ROOT / shelf).glob("*.py"))]
    assert len(parts) >= 5
    assert done.stdout.split() == ["quickstart", *parts]
