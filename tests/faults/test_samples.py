"""Samples that can't be read, settings that don't fit them, and too few of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3.cli import main
from m3.data.loader import Order, Samples, train_loader
from m3.data.source import Sample, Source
from m3.errors import M3Error
from m3.network import build_modalities
from m3.recipe import DataSpec, Recipe, load_recipe
from m3.train import train

SMALL = ["backbone.width=32", "backbone.depth=1", "backbone.heads=2", "train.steps=2", "train.batch_size=4"]
SMALL += ["train.warmup=0", "train.trackers=[]", "train.threads=1", "data.workers=0", "evaluate.preview_rows=2"]


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg")
    return folder


def recipe_of(root: Path, *more: str) -> Recipe:
    return load_recipe("mae_tiny", ["data.source=folder", f"data.root={root}", f"out={root}-run", *SMALL, *more])


def words(text: str) -> str:
    return " ".join(text.split())


class Pictures(Source):
    """Four pictures, none of which can be read."""

    def __len__(self) -> int:
        return 4

    def read(self, index: int) -> Sample:
        raise OSError(f"no picture number {index}")


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_end_in_one_sentence_with_and_without_workers(workers: int) -> None:
    modalities = build_modalities({"image": {"type": "image", "size": 32}})
    source = Pictures(DataSpec(), modalities, 0, "train")
    samples = Samples(source, modalities, DataSpec(), 0)
    with pytest.raises(M3Error) as caught:
        list(train_loader(samples, Order(4, 0, 2, stop=1), workers))
    first = str(caught.value).rpartition("number ")[2]
    assert (
        str(caught.value) == f"all 4 samples of the data can't be read; the first: {first}: no picture number {first}"
    )


def test_more_than_sixteen_are_given_up_after_sixteen() -> None:
    class Many(Pictures):
        def __len__(self) -> int:
            return 17

    modalities = build_modalities({"image": {"type": "image", "size": 32}})
    samples = Samples(Many(DataSpec(), modalities, 0, "train"), modalities, DataSpec(), 0)
    with pytest.raises(M3Error, match=r"^16 samples in a row can't be read; the first: 5: no picture number 5$"):
        samples[0, 5]


def test_the_command_prints_one_sentence_for_data_that_workers_cannot_read(tmp_path: Path, capsys) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(3):
        (root / f"{i}.jpg").write_bytes(b"no picture")
    overrides = ["data.source=folder", f"data.root={root}", f"out={tmp_path / 'run'}", *SMALL, "data.workers=1"]
    assert main(["train", "mae_tiny", *overrides]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("m3 train: all 3 samples of the data can't be read; the first: ")


def test_a_setting_that_no_sample_fits_is_told_from_broken_files(tmp_path: Path) -> None:
    recipe = load_recipe("mae_tiny", [*SMALL, "modalities.image.channels=4", f"out={tmp_path}"])
    sentence = (
        "^the recipe does not fit the data, 16 samples in a row fail alike: an image must be uint8 with 4 channels"
    )
    with pytest.raises(M3Error, match=sentence):
        train(recipe)


def test_grey_images_of_the_world_are_pillows_luma(tmp_path: Path) -> None:
    image = build_modalities({"image": {"type": "image", "size": 4, "channels": 1}})["image"]
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    grey = image.to_raw(pixels)
    assert grey.shape == (1, 4, 4)
    assert np.array_equal(grey[0], np.array(Image.fromarray(pixels).convert("L")))
    red, green, blue = (int(x) for x in pixels[2, 3])
    assert abs(int(grey[0, 2, 3]) - (0.299 * red + 0.587 * green + 0.114 * blue)) <= 1
    train(
        load_recipe(
            "mae_tiny", [*SMALL, "modalities.image.channels=1", "data.held_out=4", "data.samples=8", f"out={tmp_path}"]
        )
    )


def test_a_broken_held_out_picture_is_counted_and_reported(tmp_path: Path, capsys) -> None:
    root = photographs(tmp_path / "data" / "train", 6).parent
    photographs(root / "val", 4)
    (root / "val" / "002.jpg").write_bytes(b"no picture")
    train(recipe_of(root, "evaluate.every=1"))
    printed = words(capsys.readouterr().out)
    assert printed.count("skipped 002") == 1, "each is named once, however often it is measured"
    assert "1 unreadable held-out samples were skipped: 002" in printed


def test_too_many_broken_held_out_pictures_end_the_run(tmp_path: Path) -> None:
    root = photographs(tmp_path / "data" / "train", 4).parent
    photographs(root / "val", 30)
    for i in range(0, 30, 2):
        (root / "val" / f"{i:03d}.jpg").write_bytes(b"no picture")
    with pytest.raises(
        M3Error, match=r"1\d of \d+ held-out samples can't be read, more than data.max_unreadable = 0.01"
    ):
        train(recipe_of(root))


def test_fewer_than_ten_pictures_are_drawn_from_training_and_nothing_is_measured(tmp_path: Path, capsys) -> None:
    root = photographs(tmp_path / "photos", 7)
    assert train(recipe_of(root, "evaluate.every=1")) == []
    printed = words(capsys.readouterr().out)
    assert "no held-out samples (at most a tenth of the data is held out): nothing is measured" in printed
    assert f"Picture (of training samples): {root}-run/preview.png" in printed
    run = Path(f"{root}-run")
    assert (run / "preview.png").stat().st_size > 1000
    assert (run / "previews" / "step-00000001.png").stat().st_size > 1000
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [2]


def test_a_warm_up_longer_than_the_run_is_pointed_out(tmp_path: Path, capsys) -> None:
    overrides = [*SMALL, "train.warmup=8", "train.lr=0.008", "data.held_out=4", "data.samples=8"]
    train(load_recipe("mae_tiny", [*overrides, f"out={tmp_path}"]))
    sentence = "train.warmup covers the whole run (8 of 2 steps): the learning rate only reaches 0.001; lower"
    assert sentence in words(capsys.readouterr().out)
