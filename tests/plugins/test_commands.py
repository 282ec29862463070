"""`m3 plugin list | new | check`."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from m3.cli import main
from m3.errors import M3Error
from m3.network import build_modalities
from m3.plugin_commands import check_plugin, new_plugin
from m3.recipe import load_recipe
from m3.train import train

ROOT = Path(__file__).parents[2]


def described(folder: Path, site: Path) -> None:
    """Write what pip would write about an installed package, from its pyproject.toml."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in own.items()) for group, own in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A plugin `heart_beat` as `m3 plugin new` writes it, installed."""
    monkeypatch.chdir(tmp_path)
    assert main(["plugin", "new", "heart_beat"]) == 0
    described(tmp_path / "m3-heart_beat", tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "m3-heart_beat/src")
    yield tmp_path / "m3-heart_beat"
    sys.modules.pop("m3_heart_beat", None)


def table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], list[str]]:
    """(kind, name) -> the other columns of `m3 plugin list`."""
    monkeypatch.setenv("COLUMNS", "400")
    capsys.readouterr()
    assert main(["plugin", "list"]) == 0
    rows = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in capsys.readouterr().out.splitlines()]
    return {(row[0], row[1]): row[2:] for row in rows if len(row) == 4}


def test_list_shows_built_in_parts_of_every_kind(capsys, monkeypatch) -> None:
    rows = table(capsys, monkeypatch)
    for row in (("modalities", "image"), ("tokenizers", "patch"), ("scorers", "uniform"), ("positions", "rotary")):
        assert rows[row] == ["built in", "yes"]
    assert {kind for kind, _ in rows} >= {"objectives", "sources", "maskings", "decoders", "targets"}


def test_list_names_the_package_and_why_a_part_does_not_load(made: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    entries = tmp_path / "site/m3_heart_beat-0.1.0.dist-info/entry_points.txt"
    entries.write_text(entries.read_text() + "[m3.scorers]\nlost = gone_package:Lost\nuniform = m3_heart_beat:X\n")
    rows = table(capsys, monkeypatch)
    assert rows["modalities", "heart_beat"] == ["m3-heart_beat 0.1.0", "yes"]
    assert rows["tokenizers", "heart_beat_pieces"] == ["m3-heart_beat 0.1.0", "yes"]
    package, state = rows["scorers", "lost"]
    assert package == "m3-heart_beat 0.1.0"
    assert state.startswith("no: the plugin `lost` in `scorers` failed to load: ModuleNotFoundError")
    assert rows["scorers", "uniform"] == ["built in (hides that of m3-heart_beat 0.1.0)", "yes"]


def test_new_writes_a_package_whose_own_test_passes(made: Path) -> None:
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert files == {"pyproject.toml", "README.md", "src/m3_heart_beat.py", "tests/test_heart_beat.py"}
    assert len((made / "README.md").read_text().splitlines()) <= 10
    assert not [path for path in made.rglob("*") if path.suffix in (".py", ".md", ".toml") and "$" in path.read_text()]
    path = os.pathsep.join([str(made / "src"), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(made / "tests")]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=made, env=environment, capture_output=True, text=True, timeout=120)
    assert "1 passed" in done.stdout, done.stdout[-2000:] + done.stderr[-1000:]


def test_what_new_writes_is_clean(made: Path) -> None:
    ruff = pytest.importorskip("ruff", reason="it is in the dev extra")
    for action in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", ruff.__name__, *action, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run([*command, str(made / "src")], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_recipe_that_names_the_new_part_trains(made: Path, tmp_path: Path) -> None:
    samples = build_modalities({"own": {"type": "heart_beat"}})["own"].example_samples()
    for number, sample in enumerate(samples * 2):
        (tmp_path / "data/beats").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / f"data/beats/{number}.npy", sample)
    settings = {
        "out": str(tmp_path / "run"),
        "modalities": {"beats": {"type": "heart_beat", "tokenizer": {"type": "heart_beat_pieces"}}},
        "backbone": {"width": 32, "depth": 1, "heads": 2},
        "objectives": {
            "reconstruct": {
                "type": "reconstruct",
                "decoder": {"type": "self_decoder", "width": 32, "depth": 1, "heads": 2},
                "targets": {"beats": {}},
            }
        },
        "data": {"source": "folder", "root": str(tmp_path / "data"), "workers": 0},
        "train": {"steps": 3, "batch_size": 4, "log_every": 1, "trackers": [], "threads": 1},
    }
    (tmp_path / "beats.yaml").write_text(yaml.safe_dump(settings))
    train(load_recipe(tmp_path / "beats.yaml"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["reconstruct/beats"] for line in lines if "lr" in line]
    assert len(losses) == 3
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("name", ["Lidar", "2d", "my-part", "a b", "_x", ""])
def test_new_refuses_names_that_can_t_be_types(name: str, tmp_path: Path) -> None:
    with pytest.raises(M3Error, match="can't be the name of a part; use lower-case letters"):
        new_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_new_overwrites_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "m3-lidar").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["plugin", "new", "lidar", "--kind", "modality"]) == 2
    assert capsys.readouterr().err == f"m3 plugin: {tmp_path / 'm3-lidar'} exists; choose another name or remove it.\n"
    with pytest.raises(M3Error, match=r"^there is a modality `image` already \(built in\); choose another name.$"):
        new_plugin("image", tmp_path)


def test_check_runs_the_kit_on_a_plugin(made: Path, capsys) -> None:
    check_plugin("heart_beat")
    check_plugin("heart_beat", ["size=32", "tokenizer.type=heart_beat_pieces", "tokenizer.size=4"])
    check_plugin("m3_heart_beat:HeartBeat")
    check_plugin("heart_beat_pieces")
    printed = capsys.readouterr().out
    package = "m3-heart_beat 0.1.0"
    assert printed.count(f"heart_beat in modalities (with tokenizer `heart_beat_pieces`, {package}) keeps") == 2
    assert "m3_heart_beat:HeartBeat in modalities (with tokenizer `heart_beat_pieces`) keeps its contracts." in printed
    assert f"heart_beat_pieces in tokenizers (with modality `heart_beat`, {package}) keeps its contracts." in printed


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("image", ["size=32"]), ("depth", ["size=32"]), ("uniform", []), ("values", []), ("rotary", []), ("learned", [])],
)
def test_check_runs_on_built_in_parts_with_random_samples(name: str, overrides: list[str], capsys) -> None:
    check_plugin(name, overrides)
    assert "keeps its contracts" in capsys.readouterr().out


def test_check_says_which_contract_is_broken(made: Path, capsys) -> None:
    code = made / "src/m3_heart_beat.py"
    code.write_text(code.read_text().replace("/ (variance + 1e-6).sqrt()", "/ variance.sqrt()"))
    assert main(["plugin", "check", "heart_beat"]) == 2
    assert capsys.readouterr().err == (
        "m3 plugin: modality `heart_beat`: normalise makes NaN or infinite values of a blank sample, which stands in "
        "for absent ones; keep its divisions away from 0.\n"
    )


def test_check_says_what_it_can_t_check() -> None:
    with pytest.raises(M3Error, match=r"^there is no part `imag`; install the package .* Did you mean `image`\?$"):
        check_plugin("imag")
    with pytest.raises(M3Error, match=r"^`reconstruct` in `objectives` can't be checked by itself; name it in"):
        check_plugin("reconstruct")
