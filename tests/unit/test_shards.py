"""Tar shards: names of members, reading at any place, the index, and what is said about broken ones."""

import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image as PILImage

from m3.data import shards
from m3.data.check import check
from m3.data.files import Member, encode
from m3.data.loader import Order, Samples
from m3.data.pack import Packed, pack
from m3.data.shards import Index, index_of, join_name, read_member, split_name
from m3.data.source import coverage, open_source
from m3.errors import M3Error
from m3.recipe import DataSpec
from tests.unit.shard_files import ALL, contents, modalities, open_data, png, scenes, write_tar

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
    with pytest.raises(M3Error, match="a signal of type set has no file form"):
        encode({1, 2})


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
    prefixes = [""] if layout == "one" else ["depth/", "image/", "labels/", "text/"]  # folders a and b are classes
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
