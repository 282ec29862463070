"""A modality from outside: `m3-volume`, installed by pip, trains on real NIfTI files without a change in M3."""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from m3.check import check
from m3.errors import M3Error
from m3.model import M3Model
from m3.network import build_modalities
from m3.parts import available
from m3.processor import M3Processor
from m3.recipe import Recipe, load_recipe, recipe_from
from m3.testing import check_modality
from m3.train import train

nibabel = pytest.importorskip("nibabel", reason="pip install nibabel; it is in the dev extra")

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests/plugins/volume"
SHIPPED = Path(nibabel.__file__).parent / "tests/data"
SCANS = ("anatomical.nii", "reoriented_anat_moved.nii", "functional.nii", "example_nifti2.nii.gz", "example4d.nii.gz")
SMALL = {"width": 32, "depth": 1, "heads": 2}
TINY = [
    "train.steps=3",
    "train.batch_size=4",
    "train.warmup=1",
    "train.trackers=[]",
    "train.threads=1",
    "data.workers=0",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder into which pip installs the plugin, first on the path."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source", ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    pip += ["--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "site")
        yield folder / "site"
    sys.modules.pop("m3_volume", None)


@pytest.fixture
def scans(site: Path, tmp_path: Path) -> Path:
    """Aligned folders t1 (real volumes), t2 (the same inverted) and photo (a slice of each), in train and val."""
    for number, name in enumerate(SCANS * 2):
        split = "val" if number % 5 == 4 else "train"
        for kind in ("t1", "t2", "photo"):
            (tmp_path / "data" / split / kind).mkdir(parents=True, exist_ok=True)
        folder = tmp_path / "data" / split
        scan = nibabel.load(SHIPPED / name)
        values = scan.get_fdata(dtype=np.float32)
        (folder / f"t1/s{number}.nii{'.gz' if name.endswith('gz') else ''}").write_bytes((SHIPPED / name).read_bytes())
        nibabel.save(nibabel.Nifti1Image(values.max() - values, np.eye(4)), folder / f"t2/s{number}.nii.gz")
        middle = values[..., 0] if values.ndim == 4 else values
        middle = middle[:, :, middle.shape[2] // 2]
        Image.fromarray((255 * middle / middle.max()).clip(0, 255).astype(np.uint8)).save(
            folder / f"photo/s{number}.png"
        )
    return tmp_path / "data"


def recipe(scans: Path, *more: str) -> Recipe:
    """The plugin's own recipe, smaller."""
    sizes = [f"modalities.{name}.size=[16,16,8]" for name in ("t1", "t2")]
    network = [f"backbone.{key}={value}" for key, value in SMALL.items()]
    decoder = [f"objectives.reconstruct.decoder.{key}={value}" for key, value in SMALL.items()]
    overrides = [f"data.root={scans}", f"out={scans.parent / 'run'}", *TINY, *sizes, *network, *decoder, *more]
    return load_recipe(PLUGIN / "volume.yaml", overrides)


def losses(run: Path) -> list[dict[str, float]]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "lr" in line]


def test_the_plugin_is_short_and_known_by_its_entry_points(site: Path) -> None:
    assert len((PLUGIN / "src/m3_volume.py").read_text().splitlines()) <= 120
    assert "volume" in available("modalities")
    assert "cubes" in available("tokenizers")


@pytest.mark.filterwarnings("error")
def test_it_passes_the_kit(site: Path) -> None:
    settings = {"type": "volume", "size": (16, 8, 12)}
    scans = [nibabel.load(SHIPPED / name).get_fdata(dtype=np.float32) for name in SCANS]
    for samples in (build_modalities({"own": settings})["own"].example_samples(), scans):
        check_modality(settings, samples, {"type": "cubes", "size": 4})


def test_it_reads_files_as_nibabel_does(site: Path, tmp_path: Path) -> None:
    part = build_modalities({"own": {"type": "volume"}})["own"]
    for name in SCANS:
        expected = nibabel.load(SHIPPED / name).get_fdata()
        np.testing.assert_allclose(part.load(SHIPPED / name), expected, rtol=1e-6)
        with open(SHIPPED / name, "rb") as file:  # as out of an archive
            np.testing.assert_allclose(part.load(file), expected, rtol=1e-6)
    plain = gzip.decompress((SHIPPED / "standard.nii.gz").read_bytes())
    (tmp_path / "plain.nii").write_bytes(plain)
    assert part.load(tmp_path / "plain.nii").shape == (4, 5, 7)
    moments = part.load(SHIPPED / "functional.nii")
    assert np.array_equal(part.cut(moments, 1.0), moments[..., 19])
    with pytest.raises(M3Error, match=r"a volume needs 3 axes and finite numbers, got \(17, 21, 3\); resample or fill"):
        part.to_raw(part.load(SHIPPED / "resampled_anat_moved.nii"))


def test_cubes_are_ordered_and_placed_along_three_axes(site: Path) -> None:
    from m3.testing.tokenizer import build_tokenizer

    signal = build_modalities({"own": {"type": "volume", "size": (4, 2, 6)}})["own"].signal
    part = build_tokenizer({"type": "cubes", "size": 2}, signal)
    tokens = part.tokenize(torch.arange(48.0).reshape(1, 1, 4, 2, 6))
    assert tokens.positions.tolist() == [[[0, 0, 0], [0, 0, 1], [0, 0, 2], [1, 0, 0], [1, 0, 1], [1, 0, 2]]]
    assert tokens.values[0, 1].tolist() == [2, 3, 8, 9, 14, 15, 20, 21]


def test_two_contrasts_train_with_any_subset_of_them(scans: Path) -> None:
    run = recipe(scans, "data.drop=0.5")
    rows = train(run)
    lines = losses(run.folder)
    assert len(lines) == 1
    assert {"t1", "t2"} <= {key.split("/")[-1] for key in lines[0]}
    assert [row.task for row in rows] == ["t1", "t2 from t1"]
    assert all(np.isfinite([row.model, row.baseline]).all() for row in rows)
    assert (run.folder / "preview.png").stat().st_size > 1000
    model = M3Model.from_pretrained(run.folder / "model")
    processor = M3Processor.from_pretrained(run.folder / "model")
    one = scans / "train/t1/s0.nii"
    some = processor(t1=[one, None, one], t2=[None, scans / "train/t2/s0.nii.gz", scans / "train/t2/s0.nii.gz"])
    predicted = model.reconstruct(some, visible=0.5).predicted
    assert {name: tuple(x.shape) for name, x in predicted.items()} == {"t1": (3, 1, 16, 16, 8), "t2": (3, 1, 16, 16, 8)}
    assert all(x.isfinite().all() for x in predicted.values())
    assert model.encode(processor(t1=one)).pooled.isfinite().all()


def test_it_trains_together_with_pictures_and_learns(scans: Path) -> None:
    settings = recipe(scans, "train.steps=20", "train.log_every=1", "train.save_every=20", "train.lr=3e-3")
    settings = settings.model_dump(mode="json")
    settings["modalities"]["photo"] = {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 8}}
    settings["objectives"]["reconstruct"]["targets"]["photo"] = {}
    settings["data"]["crop"] = [0.5, 1.0]
    run = recipe_from(settings, "together")
    train(run)
    lines = losses(run.folder)
    total = [sum(line[f"reconstruct/{name}"] for name in ("t1", "t2", "photo")) for line in lines]
    assert sum(total[-5:]) < 0.9 * sum(total[:5]), total


def test_check_runs_a_plugins_recipe_on_its_own_data(scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(recipe(scans))
    assert "volume is fine" in capsys.readouterr().out


def test_without_the_plugin_a_saved_model_names_it(scans: Path, tmp_path: Path) -> None:
    model = M3Model.from_pretrained(saved(scans))
    code = "import sys, m3; from m3 import M3Model; M3Model.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", code, str(model.name_or_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "m3.errors.M3Error: modalities.t1.type: `volume` in `modalities` is not known: neither built in, nor an "
        "installed plugin; install the package that provides it"
    ), done.stderr[-2000:]


def saved(scans: Path) -> Path:
    from m3.train import build_model

    folder = scans.parent / "model"
    build_model(recipe(scans)).save_pretrained(folder)
    return folder


def test_its_recipe_is_a_lab_note_and_says_what_it_needs() -> None:
    text = (PLUGIN / "volume.yaml").read_text()
    assert text.startswith("# ")
    assert {entry["type"] for entry in yaml.safe_load(text)["modalities"].values()} == {"volume"}
