"""Packing samples as tar shards, checking what was packed, and the two commands."""

import argparse
import io
import multiprocessing
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from m3.data.check import check, print_report
from m3.data.commands import add_arguments
from m3.data.loader import Samples
from m3.data.pack import Packed, pack
from m3.data.source import open_source
from m3.errors import M3Error
from m3.modalities.image import Image
from m3.network import build_modalities
from m3.recipe import DataSpec, load_recipe
from tests.unit.shard_files import ALL, Text, contents, modalities, open_data, png, scenes, write_tar

# ---------------------------------------------------------------------------------------------- packing


def bytes_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.tar"))}


def test_ranks_write_disjoint_shards_that_together_are_the_whole(tmp_path: Path) -> None:
    folder = open_data(scenes(tmp_path / "files", 10), *ALL, source="folder", missing="allow")
    pack(folder, modalities(*ALL), tmp_path / "alone", 3)
    done = [pack(folder, modalities(*ALL), tmp_path / "shared", 3, "one", rank, 3) for rank in range(3)]
    assert done == [Packed(2, 0), Packed(1, 0), Packed(1, 0)]
    assert bytes_of(tmp_path / "shared") == bytes_of(tmp_path / "alone")
    assert not list(tmp_path.rglob("*.part"))


def pack_files(root: Path, out: Path, layout: Any) -> None:
    pack(open_data(root, *ALL, source="folder", missing="allow"), modalities(*ALL), out, 2, layout)


@pytest.mark.parametrize("layout", ["one", "modality"])
def test_processes_that_pack_the_same_shards_do_not_disturb_each_other(layout: Any, tmp_path: Path) -> None:
    root = scenes(tmp_path / "files", 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
        context = multiprocessing.get_context("fork")
        both = [context.Process(target=pack_files, args=(root, tmp_path / "out", layout)) for _ in range(2)]
        for process in both:
            process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    pack_files(root, tmp_path / "alone", layout)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert not list(tmp_path.rglob("*.part"))
    folder = open_data(root, *ALL, source="folder", missing="allow")
    assert contents(open_data(tmp_path / "out", *ALL, missing="allow")) == contents(folder)


def test_a_pack_that_was_cut_goes_on_and_leaves_no_half_shard(tmp_path: Path) -> None:
    root, out = scenes(tmp_path / "files", 8), tmp_path / "out"
    hidden = root / "image/b/005.v1.png"
    folder = open_data(root, *ALL, source="folder", missing="allow")
    hidden.rename(tmp_path / "aside.png")
    for layout in ("one", "modality"):
        with pytest.raises(M3Error, match=r"there is no file .*b/005.v1.png for `image`"):
            pack(folder, modalities(*ALL), out / layout, 3, layout)
    assert sorted(bytes_of(out / "one")) == ["000000.tar", "000001.tar"]
    assert not list(out.rglob("*.part"))
    (tmp_path / "aside.png").rename(hidden)
    before = (out / "one/000000.tar").stat().st_mtime_ns
    assert pack(folder, modalities(*ALL), out / "one", 3) == Packed(1, 2)
    assert (out / "one/000000.tar").stat().st_mtime_ns == before
    (out / "modality/text/000001.tar").unlink()
    assert pack(folder, modalities(*ALL), out / "modality", 3, "modality") == Packed(2, 1)
    assert len(open_data(out / "modality", *ALL, missing="allow")) == 8


def test_shards_of_another_pack_are_refused(tmp_path: Path) -> None:
    folder = open_data(scenes(tmp_path / "files", 8), *ALL, source="folder", missing="allow")
    pack(folder, modalities(*ALL), tmp_path / "out", 3)
    with pytest.raises(M3Error, match=r"out/000002.tar is not part of this pack; remove it or pack into another"):
        pack(folder, modalities(*ALL), tmp_path / "out", 4)
    with pytest.raises(M3Error, match=r"out/000000.tar is not part of this pack"):
        pack(folder, modalities(*ALL), tmp_path / "out", 3, "modality")
    with pytest.raises(M3Error, match=r"000000.tar holds 3 samples that are not the 2 of this shard"):
        pack(folder, modalities(*ALL), tmp_path / "out", 2)
    (tmp_path / "out/000000.tar").write_bytes((tmp_path / "out/000001.tar").read_bytes())
    with pytest.raises(M3Error, match=r"000000.tar holds 3 samples that are not the 3 of this shard"):
        pack(folder, modalities(*ALL), tmp_path / "out", 3)


def test_every_signal_of_the_world_is_the_same_from_a_pack(tmp_path: Path) -> None:
    recipe = load_recipe("everything_tiny", ["data.drop=0", "data.samples=3"])
    parts = build_modalities(recipe.modalities)
    world = open_source(recipe.data, parts, recipe.seed, "train")
    assert pack(world, parts, tmp_path / "out") == Packed(1, 0)
    shards = open_source(DataSpec(source="shards", root=str(tmp_path / "out"), held_out=0), parts, 0, "train")
    drawn = Samples(world, parts, recipe.data, recipe.seed), Samples(shards, parts, recipe.data, recipe.seed)
    for number in range(3):
        made, read = (samples[(number, number)] for samples in drawn)
        assert set(made.signals) == set(recipe.modalities) == set(read.signals)
        assert made.id == read.id
        assert made.labels == read.labels
        for name, signal in made.signals.items():
            assert torch.equal(torch.as_tensor(signal), torch.as_tensor(read.signals[name])), name
        assert made.times.keys() == read.times.keys()
        assert all(torch.equal(times, read.times[name]) for name, times in made.times.items())


def test_what_could_not_be_read_again_is_not_packed(tmp_path: Path) -> None:
    world = open_source(DataSpec(samples=2), modalities("image", "depth"), 0, "train")
    with pytest.raises(M3Error, match=r"world/train/000000: `depth` would be stored as .npy, but it reads .txt; add"):
        pack(world, {**modalities("image"), "depth": Text(Image.Spec(size=4))}, tmp_path / "out")
    twice = {"sources": {"a": {"samples": 2}}}
    mixture = open_source(DataSpec(source="mixture", options=twice, samples=3), modalities("image"), 0, "train")
    with pytest.raises(M3Error, match=r"a/world/train/00000[01]: this sample comes twice; pack the parts of a mixture"):
        pack(mixture, modalities("image"), tmp_path / "out")
    assert not bytes_of(tmp_path / "out")


# --------------------------------------------------------------------------------------------- checking


def test_a_check_counts_what_is_there_and_names_what_is_broken(tmp_path: Path) -> None:
    good = {"1.jpg": png(0), "1.depth.png": png(1), "1.labels.json": b"{}", "2.jpg": png(2)}
    write_tar(tmp_path / "0.tar", good)
    report = check(str(tmp_path))
    assert (report.shards, report.samples, report.is_sound) == (1, 2, True)
    assert report.coverage == {".jpg": 2, "depth": 1, "labels": 1}
    write_tar(
        tmp_path / "1.tar", {"3.jpg": png(0)[:50], "3.txt": b"\xff", "4.npy": b"", "5.bin": b"x", "5.jpg": png(1)}
    )
    tar = write_tar(tmp_path / "2.tar", {"6.jpg": png(0)})
    tar.write_bytes(tar.read_bytes()[:600])
    report = check(str(tmp_path))
    assert (report.shards, report.samples, report.is_sound) == (3, 5, False)
    assert [sentence.split(":")[0].rpartition("/")[2] for sentence in report.unreadable] == ["1.tar"] * 3 + ["2.tar"]
    for member in ("`3.jpg` can't be read: ", "`3.txt` can't be read: ", "`4.npy` can't be read: the file is empty"):
        assert any(member in sentence for sentence in report.unreadable)
    assert "breaks off after `6.jpg`" in report.unreadable[3]


def test_a_check_names_keys_that_do_not_fit(tmp_path: Path) -> None:
    for name, keys in (("image", "abc"), ("depth", "ac")):
        write_tar(tmp_path / name / "0.tar", {f"{key}.png": png(0) for key in keys})
    write_tar(tmp_path / "image/1.tar", {"d.png": png(0)})
    report = check(str(tmp_path))
    assert (report.samples, report.coverage) == (4, {"depth": 2, "image": 4})
    assert report.misaligned == (
        f"{tmp_path}/0: `depth` has no `b` (1 such)",
        f"{tmp_path}/1: `depth` has no `d` (1 such)",
    )
    with tarfile.open(tmp_path / "image/1.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("d.jpg"))
    assert f"{tmp_path}/1: `d` is there more than once in `image` (1 such)" in check(str(tmp_path)).misaligned


def test_the_report_is_printed_as_a_table(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"1.jpg": png(0), "2.jpg": b"", "2.txt": b"a"})
    console = Console(file=io.StringIO(), width=200, record=True)
    print_report(check(str(tmp_path)), console)
    text = console.export_text()
    assert "1 shards, 2 samples" in text
    assert [line.split()[1:6:2] for line in text.splitlines() if ".txt" in line] == [[".txt", "1", "50.0%"]]
    assert "0.tar: `2.jpg` can't be read: the file is empty" in text


# --------------------------------------------------------------------------------------------- commands

RECIPE = """
modalities: {image: {type: image, size: 16, tokenizer: {type: patch, size: 8}}}
objectives: {pixels: {type: reconstruct}}
train: {steps: 1}
"""


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers())
    options = parser.parse_args(words)
    return options.run(options) or 0


def test_the_commands_pack_both_splits_and_check_them(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    recipe, out = str(tmp_path / "mine.yaml"), str(tmp_path / "out")
    size = ["data.samples=5", "data.held_out=2"]
    assert run("data", "pack", recipe, out, *size, "--per-shard", "2") == 0
    text = capsys.readouterr().out
    assert "out/train: 5 samples (image 100.0%); 3 shards written, 0 were there." in text
    assert "out/val: 2 samples (image 100.0%); 1 shards written, 0 were there." in text
    held_out = open_data(out, "image", split="held_out", held_out=5)
    assert [held_out.name(i) for i in range(2)] == ["world/held_out/000000", "world/held_out/000001"]
    assert run("data", "check", out) == 0
    assert "5 samples" in capsys.readouterr().out
    (tmp_path / "out/val/000000.tar").write_bytes(b"")
    assert run("data", "check", out) == 1
    assert "breaks off at its start" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("data", "pack", recipe, f"{out}2", "data.samples=5", "data.held_out=0", "--per-shard", "2") == 0
    assert sorted(bytes_of(tmp_path / "out2")) == ["000001.tar"]
    with pytest.raises(M3Error, match="--per-shard: a shard holds at least one sample, got 0"):
        run("data", "pack", recipe, out, "--per-shard", "0")
