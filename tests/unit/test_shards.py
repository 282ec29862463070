"""Tar shards: packing, reading at any place, checking, and what is said about broken ones."""

import argparse
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import warnings
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image as PILImage
from rich.console import Console

from m3.data import shards
from m3.data.check import check, print_report
from m3.data.commands import add_arguments
from m3.data.files import Member, encode
from m3.data.loader import Order, Samples
from m3.data.pack import Packed, pack
from m3.data.shards import Index, index_of, join_name, read_member, split_name
from m3.data.source import Source, coverage, open_source
from m3.errors import M3Error
from m3.modalities.image import Image
from m3.plugins import Modality
from m3.recipe import DataSpec


class Depth(Image):
    """Stands for a second map that shares .png with images."""

    extensions = (".png", ".npy")

    def load(self, path: Any) -> np.ndarray:
        return np.load(path) if path.name.endswith(".npy") else np.array(PILImage.open(path))


class Text(Image):
    """Stands for a modality of its own file type."""

    extensions = (".txt",)

    def load(self, path: Any) -> str:
        return path.read_text() if isinstance(path, Path) else path.read().decode()


def modalities(*names: str) -> dict[str, Modality]:
    known = {"image": Image, "depth": Depth, "text": Text}
    return {name: known[name](Image.Spec(size=4)) for name in names}


ALL = ("image", "depth", "text")


def open_data(root: Path | str, *names: str, source: str = "shards", split: Any = "train", **more: Any) -> Source:
    spec = DataSpec(source=source, root=str(root), **{"held_out": 0, **more})
    return open_source(spec, modalities(*names), 0, split)


def png(value: int) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(np.arange(value, value + 48, dtype=np.uint8).reshape(4, 4, 3)).save(file, "PNG")
    return file.getvalue()


def scenes(root: Path, count: int) -> Path:
    """Folders with ids in subfolders and with dots; of four samples one lacks its depth."""
    for i in range(count):
        key = f"{'ab'[i % 2]}/{i:03d}.v1"
        for name, data in {"image.png": png(i), "depth.png": png(2 * i), "text.txt": f"scene {i}\n".encode()}.items():
            folder, ending = name.split(".")
            file = root / folder / f"{key}.{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            if folder != "depth" or i % 4 != 3:
                file.write_bytes(data)
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def contents(source: Source) -> list[tuple[str, dict[str, Any], dict[str, int]]]:
    samples = [source.read(i) for i in range(len(source))]
    return [(s.id, {n: np.asarray(x).tolist() for n, x in s.signals.items()}, s.labels) for s in samples]


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("000123.jpg", ("000123", "jpg")),
        ("000123.depth.png", ("000123", "depth.png")),
        ("./a.b/c/0.nii.gz", ("a.b/c/0", "nii.gz")),
        (".hidden", ("", "hidden")),
        ("no_ending", ("no_ending", "")),
    ],
)
def test_a_name_is_cut_at_the_first_dot_of_its_last_part(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_ids_with_dots_and_percent_signs_come_back() -> None:
    for key in ("photo.v1", "a.b/c", "100%/x.y", "%2E", "a%25.b"):
        assert split_name(join_name(key, "image.png")) == (key, "image.png")
    assert join_name("a.b/photo.v1", "jpg") == "a.b/photo%2Ev1.jpg"
    for key in ("./a", "a/", ""):
        with pytest.raises(M3Error, match=f"the id `{key}` can't be the name of a file"):
            join_name(key, "jpg")


def test_signals_in_memory_are_stored_without_loss() -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    metres = np.array([[np.inf, 0.1], [np.nan, 3]], np.float32)
    wide = grey.astype(np.int32) * 9999
    for array, ending in ((grey, ".png"), (np.stack([grey] * 3, -1), ".png"), (metres, ".npy"), (wide, ".npy")):
        stored = encode(array)
        file = Member(stored.data, f"x{stored.ending}")
        assert stored.ending == ending
        np.testing.assert_array_equal(np.array(PILImage.open(file)) if ending == ".png" else np.load(file), array)
    assert encode("grün") == (".txt", "grün".encode())
    with pytest.raises(M3Error, match="a signal of type dict has no file form"):
        encode({"a": 1})


# ------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("layout", ["one", "modality"])
def test_packed_folders_give_the_same_samples_in_the_same_order(layout: Any, tmp_path: Path) -> None:
    folder = open_data(scenes(tmp_path / "files", 11), *ALL, source="folder", missing="allow")
    assert pack(folder, modalities(*ALL), tmp_path / "out", 4, layout) == Packed(3, 0)
    packed = open_data(tmp_path / "out", *ALL, missing="allow")
    assert contents(packed) == contents(folder)
    assert [packed.name(i) for i in range(11)] == [folder.name(i) for i in range(11)]
    assert [packed.stored(i) for i in range(11)] == [folder.stored(i) for i in range(11)]
    assert coverage(packed) == coverage(folder) == {"image": 1.0, "depth": 9 / 11, "text": 1.0}
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.tar"))
    prefixes = [""] if layout == "one" else ["depth/", "image/", "text/"]
    assert names == [f"{prefix}{i:06d}.tar" for prefix in prefixes for i in range(3)]
    assert pickle.loads(pickle.dumps(packed)).stored(5) == folder.stored(5)


def test_a_sample_that_lacks_a_modality_is_named_unless_allowed(tmp_path: Path) -> None:
    folder = open_data(scenes(tmp_path / "files", 8), *ALL, source="folder", missing="allow")
    for layout in ("one", "modality"):
        pack(folder, modalities(*ALL), tmp_path / layout, 4, layout)
    sentence = r"one/000001.tar: `b/003.v1` has no `depth` \(.png, .npy; 2 such in this shard\).*data.missing=allow"
    with pytest.raises(M3Error, match=sentence):
        open_data(tmp_path / "one", *ALL)
    with pytest.raises(M3Error, match=r"depth/000001.tar: `b/003.v1` has no `depth`"):
        open_data(tmp_path / "modality", *ALL)
    assert len(open_data(tmp_path / "one", "image", "text")) == 8


def test_labels_travel_and_the_worlds_signals_come_back(tmp_path: Path) -> None:
    spec = DataSpec(samples=5, held_out=0)
    world = open_source(spec, modalities(*ALL), 3, "train")
    for layout in ("one", "modality"):
        pack(world, modalities(*ALL), tmp_path / layout, 2, layout)
        packed = open_data(tmp_path / layout, *ALL)
        for i in range(5):
            given, back = world.read(i), packed.read(i)
            assert (back.id, back.labels, back.signals["text"]) == (given.id, given.labels, given.signals["text"])
            for name in ("image", "depth"):
                np.testing.assert_array_equal(np.asarray(back.signals[name]), given.signals[name])


def test_an_epoch_over_shards_visits_every_sample_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {f"{i:03d}.png": png(i) for i in range(7)})
    write_tar(tmp_path / "1.tar", {f"{i:03d}.png": png(i) for i in range(7, 12)})
    source = open_data(tmp_path, "image")
    samples = Samples(source, source.modalities, source.spec, 0)
    pairs = [pair for batch in Order(12, 5, 4, stop=3) for pair in batch]
    seen = [samples[pair] for pair in pairs]
    assert sorted(s.id for s in seen) == [f"{i:03d}" for i in range(12)]
    assert all(int(s.signals["image"][0, 0, 0]) == int(s.id) for s in seen)


def test_splits_are_folders_or_chosen_by_the_hash_that_folders_use(tmp_path: Path) -> None:
    ids = [f"{i:03d}" for i in range(30)]
    write_tar(tmp_path / "shards/0.tar", {f"{key}.png": png(0) for key in ids})
    for key in ids:
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / f"files/{key}.png").write_bytes(png(0))
    for split in ("train", "held_out"):
        packed = open_data(tmp_path / "shards", "image", split=split, held_out=9, samples=20)
        folder = open_data(tmp_path / "files", "image", source="folder", split=split, held_out=9, samples=20)
        assert [packed.name(i) for i in range(len(packed))] == [folder.name(i) for i in range(len(folder))]
        assert len(packed) == (20 if split == "train" else 3)
    write_tar(tmp_path / "both/train/0.tar", {f"{key}.png": png(0) for key in ids[:20]})
    write_tar(tmp_path / "both/val/0.tar", {f"{key}.png": png(0) for key in ids[20:]})
    assert [len(open_data(tmp_path / "both", "image", split=s, held_out=9)) for s in ("train", "held_out")] == [20, 9]


# ----------------------------------------------------------------------------------- tars of others


def test_a_bare_ending_belongs_to_the_only_modality_that_reads_it(tmp_path: Path) -> None:
    members = {"7.jpg": png(1), "7.depth.png": png(2), "7.txt": b"seven", "7.json": b"{}", "7.flow.npy": b"", "x": b""}
    write_tar(tmp_path / "0.tar", members)
    source = open_data(tmp_path, *ALL)
    assert contents(source) == [
        ("7", {"image": png_list(1), "depth": png_list(2), "text": "seven"}, {}),
    ]
    write_tar(tmp_path / "0.tar", {"7.png": png(1), "7.txt": b"seven"})
    sentence = r"0.tar: `7.png` may belong to image or depth, which all read .png; name such members KEY.image.png"
    with pytest.raises(M3Error, match=sentence):
        open_data(tmp_path, *ALL)


def png_list(value: int) -> list[Any]:
    return np.arange(value, value + 48).reshape(4, 4, 3).tolist()


def test_two_members_for_one_modality_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"7.jpg": png(1), "7.image.png": png(2)})
    with pytest.raises(M3Error, match=r"0.tar: `7` has two members for `image`, one is `7.image.png`; remove one"):
        open_data(tmp_path, "image")


def test_roots_without_what_is_needed_are_named(tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=r"data.root: this key is required for source `shards`"):
        open_source(DataSpec(source="shards"), modalities("image"), 0, "train")
    with pytest.raises(M3Error, match=r"data.root: the folder .*/absent does not exist"):
        open_data(tmp_path / "absent", "image")
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(M3Error, match=r"holds no .tar, neither directly nor in folders named after modalities"):
        open_data(tmp_path, "image")
    write_tar(tmp_path / "0.tar", {"7.gif": b"x"})
    with pytest.raises(M3Error, match=r"no shard holds a member that `image` can read \(.jpg, .*\); check data.root"):
        open_data(tmp_path, "image")
    with pytest.raises(M3Error, match=r"modalities.labels: shards hold the labels of samples under this name"):
        open_source(DataSpec(source="shards", root=str(tmp_path)), {"labels": modalities("image")["image"]}, 0, "train")
    with pytest.raises(M3Error, match=r"nowhere://x: this kind of address can't be read: Protocol not known: nowhere"):
        open_data("nowhere://x", "image")


def test_a_broken_member_is_named_with_its_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"7.png": png(1)[:40], "8.png": png(1)})
    source = open_data(tmp_path, "image")
    with pytest.raises(M3Error, match=r"0.tar: 7.png can't be read as `image`: "):
        source.read(0)
    assert source.read(1).id == "8"


# ------------------------------------------------------------------------------------- index and tars


def test_the_index_is_kept_beside_the_tar_and_made_anew_when_that_changes(tmp_path: Path, monkeypatch: Any) -> None:
    tar = write_tar(tmp_path / "0.tar", {"a.txt": b"first", "b.txt": b"second!"})
    index = index_of(str(tar))
    assert (index.names, index.sizes) == (["a.txt", "b.txt"], [5, 7])
    assert read_member(str(tar), index.stamp, index.offsets[1], 7) == b"second!"
    beside = tmp_path / "0.tar.index.json"
    assert Index(**json.loads(beside.read_text())) == index
    with monkeypatch.context() as no_scan:
        no_scan.delattr(shards, "_scan")
        assert index_of(str(tar)) == index
    for damage in ("{", "[]", '{"names": []}'):
        beside.write_text(damage)
        assert index_of(str(tar)) == index
    write_tar(tar, {"c.txt": b"third"})
    os.utime(tar, ns=(1, 1))
    assert index_of(str(tar)).names == ["c.txt"]
    with pytest.raises(M3Error, match=r"0.tar: the tar was written again while it was in use; start anew"):
        read_member(str(tar), "2", index.offsets[0], 5)


def test_where_nothing_can_be_written_the_index_is_kept_in_memory(tmp_path: Path, monkeypatch: Any) -> None:
    tar = write_tar(tmp_path / "0.tar", {"a.png": png(5)})

    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(shards, "write_aside", refuse)
    source = open_data(tmp_path, "image")
    assert contents(source) == [("a", {"image": png_list(5)}, {})]
    assert sorted(path.name for path in tmp_path.iterdir()) == [tar.name]


@pytest.mark.parametrize(
    ("kept", "sentence"),
    [
        (512 + 100, r"0.tar: not a complete tar file, it breaks off after `a.txt` \(unexpected end of data\); copy"),
        (1024, r"it breaks off after `a.txt`; copy or pack it again"),
        (1024 + 512 + 300, r"it breaks off after `b.txt` \(unexpected end of data\)"),
        (1024 + 200, r"it breaks off after `a.txt`; copy"),
        (2048, r"it breaks off after `b.txt`; copy"),
        (100, r"it breaks off at its start \(truncated header\)"),
        (0, r"it breaks off at its start \(empty file\)"),
    ],
)
def test_a_tar_that_is_cut_off_is_named_wherever_the_cut_is(kept: int, sentence: str, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", {"a.txt": b"x" * 400, "b.txt": b"y" * 500})
    tar.write_bytes(tar.read_bytes()[:kept])
    with pytest.raises(M3Error, match=sentence):
        open_data(tmp_path, "text")


def test_what_is_no_tar_and_links_in_tars_are_named(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(M3Error, match=r"0.tar: not a complete tar file, it breaks off at its start \(.*header\)"):
        open_data(tmp_path, "text")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        tar.addfile(link)
    with pytest.raises(M3Error, match=r"0.tar: `b.txt` is a link or sparse; pack plain files"):
        open_data(tmp_path, "text")


def test_a_tar_that_gets_shorter_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", {"a.txt": b"x" * 400})
    stamp = index_of(str(tar)).stamp
    with pytest.raises(M3Error, match=r"0.tar: the tar ends within a member at byte 10240; copy or pack it again"):
        read_member(str(tar), stamp, 10000, 400)


def test_long_names_are_indexed(tmp_path: Path) -> None:
    key = "/".join(["folder" * 10] * 6)
    write_tar(tmp_path / "0.tar", {f"{key}.txt": b"deep", "b.txt": b"flat"})
    assert [(i, x["text"]) for i, x, _ in contents(open_data(tmp_path, "text"))] == [(key, "deep"), ("b", "flat")]


def test_an_address_is_read_like_a_folder(tmp_path: Path) -> None:
    folder = open_data(scenes(tmp_path / "files", 6), *ALL, source="folder", missing="allow")
    store = fsspec.filesystem("memory")
    for layout in ("one", "modality"):
        pack(folder, modalities(*ALL), tmp_path / layout, 4, layout)
        for tar in (tmp_path / layout).rglob("*.tar"):
            store.pipe_file(f"/{tmp_path.name}/{layout}/{tar.relative_to(tmp_path / layout)}", tar.read_bytes())
        root = f"memory://{tmp_path.name}/{layout}"
        packed = open_data(root, *ALL, missing="allow")
        assert contents(packed) == contents(folder)
        assert store.glob(f"/{tmp_path.name}/{layout}/**/*.index.json")
        assert contents(open_data(f"{root}/", *ALL, missing="allow")) == contents(folder)
        assert (check(root).samples, check(root).unreadable) == (6, ())
    store.rm(f"/{tmp_path.name}", recursive=True)


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


def test_what_could_not_be_read_again_is_not_packed(tmp_path: Path) -> None:
    world = open_source(DataSpec(samples=2), modalities("image", "depth"), 0, "train")
    with pytest.raises(M3Error, match=r"world/train/000000: `depth` would be stored as .npy, but it reads .txt; add"):
        pack(world, {**modalities("image"), "depth": Text(Image.Spec(size=4))}, tmp_path / "out")
    twice = {"sources": {"a": {"samples": 2}}}
    mixture = open_source(DataSpec(source="mixture", options=twice, samples=3), modalities("image"), 0, "train")
    with pytest.raises(M3Error, match=r"a/world/train/000000: this sample comes twice; pack the parts of a mixture"):
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
