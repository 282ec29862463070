"""Folders and manifests, mixtures, Hugging Face data sets: what they read, and what they say when they can't."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from m3.data.loader import Order, Samples, train_loader
from m3.data.source import coverage, describe_coverage
from m3.data.sources.mixture import Mixture, interleave, shares, spread
from m3.errors import M3Error
from m3.recipe import DataSpec
from tests.unit.source_files import colour, manifest, modalities, open_data, picture

# ------------------------------------------------------------------------------------------ manifests


def test_a_csv_gives_paths_inline_text_ids_labels_and_gaps(tmp_path: Path) -> None:
    text = 'id,image,text,label,label:colour,other\na,images/1.png,"red, round",3,7,x\nb,,two words,,2,y\n'
    source = open_data(manifest(tmp_path, text), "image", "text")
    first, second = source.read(0), source.read(1)
    assert (first.id, first.signals["text"], first.labels) == ("a", "red, round", {"label": 3, "colour": 7})
    assert colour(source, 0) == 10
    assert (second.id, second.signals, second.labels) == ("b", {"text": "two words"}, {"colour": 2})
    assert coverage(source) == {"image": 0.5, "text": 1.0}
    assert source.stored(1).files["text"] == (".txt", b"two words")
    assert source.stored(0).files["image"].data == (tmp_path / "images/1.png").read_bytes()


def test_a_jsonl_reads_the_same_and_numbers_rows_without_id(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"image": "images/2.png", "text": "a"}, {"image": None, "text": "b", "label": 4}]
    text = "".join(json.dumps(row) + "\n\n" for row in rows)
    source = open_data(manifest(tmp_path, text, "pairs.jsonl"), "image", "text")
    assert [source.name(i) for i in range(2)] == ["00000000", "00000001"]
    assert colour(source, 0) == 20
    assert (source.read(1).signals, source.read(1).labels) == ({"text": "b"}, {"label": 4})


def test_a_manifest_names_its_splits(tmp_path: Path) -> None:
    text = "id,image,split\na,images/0.png,train\nb,images/1.png,val\nc,images/2.png,train\nd,images/3.png,held_out\n"
    spec = manifest(tmp_path, text)
    names = {
        split: [s.name(i) for i in range(len(s))]
        for split in ("train", "held_out")
        for s in [open_data(spec.model_copy(update={"held_out": 9}), "image", split=split)]
    }
    assert names == {"train": ["a", "c"], "held_out": ["b", "d"]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("image\nimages/0.jpg,x\n", r"pairs.csv, line 2: the row has more or fewer values .* \(1\); put values"),
        ("image,text\nimages/0.png\n", r"line 2: the row has more or fewer values than the header has names \(2\)"),
        ("image,text\nimages/0.gif,a\n", r"line 2: `images/0.gif` is no file that `image` can read \(.jpg, "),
        ("image,text\nimages/0.png,a\n,\n", r"line 3: the sample has none of image, text; give it one or remove"),
        ("image,text,label\nimages/0.png,a,cat\n", r"line 2: `label` must be the number of a class, got 'cat'"),
        ("id,image,text\nk,images/0.png,a\nk,images/1.png,b\n", r"line 3: the id `k` is taken by line 2"),
        ("image,text,split\nimages/0.png,a,tran\n", r"line 2: `tran` is no split. Did you mean `train`\?"),
        ("image,text,split\nimages/0.png,a,val\nimages/1.png,a,\n", r"line 3: either every row names its `split`"),
        ("imag,text\nimages/0.png,a\n", r"no row has a value for the modality `image`. Did you mean `imag`\?"),
        ("image,text\n", r"pairs.csv: the manifest has no rows; add one per sample"),
        ('image,text\nimages/0.png,"a\n', r"line 2: not readable as CSV: unexpected end of data"),
        ("image,text\nimages/0.png,a\n\xff\xfe,b", r"pairs.csv: the manifest is not UTF-8 text"),
    ],
)
def test_a_wrong_manifest_is_named_with_its_line(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(M3Error, match=sentence):
        open_data(DataSpec(source="folder", root=str(tmp_path / "pairs.csv")), "image", "text")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"text": "a"}\n{"text": }\n', r"pairs.jsonl, line 2: not readable as JSON: Expecting value"),
        ('{"text": "a"}\n[1]\n', r"pairs.jsonl, line 2: a row is an object {...}, got list"),
        ('{"text": 5}\n', r"pairs.jsonl, line 1: the value of `text` must be a string, got 5"),
    ],
)
def test_a_wrong_line_of_jsonl_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=sentence):
        open_data(manifest(tmp_path, text, "pairs.jsonl"), "text")


def test_a_file_that_a_manifest_names_wrongly_is_named_when_it_is_read(tmp_path: Path) -> None:
    source = open_data(manifest(tmp_path, "image\nimages/0.png\nimages/9.png\n"), "image")
    for access in (source.read, source.stored):
        with pytest.raises(M3Error, match=r"pairs.csv, line 3: there is no file .*images/9.png for `image`"):
            access(1)


def test_another_file_is_no_manifest(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    with pytest.raises(M3Error, match=r"a.png is neither a folder nor a manifest \(.csv, .jsonl\)"):
        open_data(DataSpec(source="folder", root=str(tmp_path / "a.png")), "image")


# ----------------------------------------------------------------------------------- samples with gaps


def test_samples_may_lack_modalities_only_where_the_recipe_allows_it(tmp_path: Path) -> None:
    for key in ("a", "b", "c"):
        picture(tmp_path / f"image/{key}.png", 1)
    for key in ("b", "d"):
        picture(tmp_path / f"depth/{key}.png", 2)
    with pytest.raises(M3Error, match=r"`d` is in `depth` but not in `image` \(1 such in all\).*data.missing=allow"):
        open_data(DataSpec(source="folder", root=str(tmp_path)), "image", "depth")
    source = open_data(DataSpec(source="folder", root=str(tmp_path), missing="allow"), "image", "depth")
    assert {source.name(i): sorted(source.read(i).signals) for i in range(4)} == {
        "a": ["image"],
        "b": ["depth", "image"],
        "c": ["image"],
        "d": ["depth"],
    }
    assert coverage(source) == {"image": 0.75, "depth": 0.5}
    assert {name: len(file.data) > 0 for name, file in source.stored(1).files.items()} == {"image": True, "depth": True}


def test_a_run_is_told_which_share_of_the_samples_has_a_modality(tmp_path: Path) -> None:
    for key in ("a", "b", "c"):
        picture(tmp_path / f"image/{key}.png", 1)
    picture(tmp_path / "depth/b.png", 2)
    source = open_data(DataSpec(source="folder", root=str(tmp_path), missing="allow"), "image", "depth")
    assert describe_coverage(source) == "3 training samples: image 100.0%, depth 33.3%"
    assert describe_coverage(open_data(DataSpec(samples=5), "image")) == "5 training samples"


def test_an_address_is_left_as_it_is_and_a_path_made_absolute(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert DataSpec(source="shards", root="s3://bucket/a/../b").root == "s3://bucket/a/../b"
    assert DataSpec(source="folder", root="data/x.csv").root == str(tmp_path / "data/x.csv")


def test_the_world_covers_all_it_makes() -> None:
    source = open_data(DataSpec(samples=5), "image", "depth", "text")
    assert coverage(source) == {"image": 1.0, "depth": 1.0, "text": 1.0}
    stored = source.stored(2)
    assert {name: file.ending for name, file in stored.files.items()} == {
        "image": ".png",
        "depth": ".npy",
        "text": ".txt",
    }


# ------------------------------------------------------------------------------------------- mixtures


def test_shares_add_up_and_are_exact_to_one() -> None:
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([0.3, 0.7], 10) == [3, 7]
    assert shares([0.5, 0.2, 0.3], 7) == [4, 1, 2]
    assert shares([1e-9, 1], 5) == [0, 5]


@pytest.mark.parametrize("draws", [[3, 7], [7, 3], [1, 1, 1], [5, 0, 2, 9], [1, 99], [4]])
def test_draws_are_interleaved_evenly_and_each_comes_once(draws: list[int]) -> None:
    total = sum(draws)
    drawn = [interleave(i, draws) for i in range(total)]
    assert sorted(drawn) == [(part, k) for part, n in enumerate(draws) for k in range(n)]
    for stop in range(total + 1):
        counts = Counter(part for part, _ in drawn[:stop])
        assert all(abs(counts[part] - stop * n / total) <= len(draws) / 2 for part, n in enumerate(draws))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 89, 100, 720])
def test_a_round_through_a_part_is_a_permutation_that_begins_spread_out(size: int) -> None:
    order = [spread(turn, size) for turn in range(size)]
    assert sorted(order) == list(range(size))
    assert [spread(turn + size, size) for turn in range(size)] == order
    for seen in range(2, size + 1):
        points = sorted(order[:seen])
        gaps = [after - before for before, after in zip(points, [*points[1:], points[0] + size], strict=True)]
        assert max(gaps) <= 4 * size / seen + 1


def parts_of(tmp_path: Path, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    for base, (name, size) in enumerate(sizes.items()):
        for i in range(size):
            picture(tmp_path / f"{name}/{i:03d}.png", 100 * base + i)
    return {name: {"source": "folder", "root": str(tmp_path / name), "held_out": 0} for name in sizes}


def test_a_mixture_draws_by_weight_over_an_epoch(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, {"few": 5, "many": 45})
    parts["few"]["weight"], parts["many"]["weight"] = 3.0, 1.0
    spec = DataSpec(source="mixture", options={"sources": parts}, samples=40)
    source = open_data(spec, "image")
    ids = [source.name(i) for i in range(len(source))]
    assert len(ids) == 40
    counts = Counter(ids)
    assert sum(n for key, n in counts.items() if key.startswith("few/")) == 30
    assert {counts[f"few/{i:03d}"] for i in range(5)} == {6}
    of_many = sorted(key for key in counts if key.startswith("many/"))
    assert len(of_many) == 10
    assert of_many[-1] >= "many/040"  # spread over the part, not its beginning
    for i in (0, 17, 39):
        sample = source.read(i)
        name, number = sample.id.split("/")
        assert (sample.id, colour(source, i)) == (ids[i], 100 * (name == "many") + int(number))
        assert source.stored(i).id == ids[i]
    equal = open_data(spec.model_copy(update={"samples": None}), "image")
    assert len(equal) == 50


def visited(source: Mixture, part: str, epochs: int) -> list[str]:
    """Ids of one part over some epochs, in the order of the draws."""
    drawn = [source.name(source.at(epoch, i)) for epoch in range(epochs) for i in range(len(source))]
    return [key for key in drawn if key.startswith(part)]


def test_over_epochs_every_sample_of_a_large_part_comes_once_before_any_comes_again(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, {"few": 5, "many": 45})
    parts["few"]["weight"], parts["many"]["weight"] = 3.0, 1.0
    spec = DataSpec(source="mixture", options={"sources": parts}, samples=28)  # 7 of `many`: 45 are no multiple of it
    source = open_data(spec, "image")
    assert isinstance(source, Mixture)
    in_turn = visited(source, "many", 13)
    assert len(in_turn) == 13 * 7
    everything = [f"many/{i:03d}" for i in range(45)]
    assert sorted(in_turn[:45]) == sorted(in_turn[45:90]) == everything
    few = visited(source, "few", 5)
    assert len(few) == 105
    assert set(Counter(few).values()) == {21}
    assert open_data(spec, "image").read(source.at(9, 3)).id == source.name(9 * 28 + 3)  # nothing is remembered


def test_a_mixture_in_a_mixture_goes_on_through_all_its_samples(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, {"a": 3, "b": 8})
    inner = {"source": "mixture", "options": {"sources": parts}, "samples": 4, "held_out": 0}
    source = open_data(DataSpec(source="mixture", options={"sources": {"both": inner}}, samples=2), "image")
    ids = [source.name(source.at(epoch, i)) for epoch in range(16) for i in range(2)]
    assert set(Counter(key for key in ids if "/b/" in key).values()) == {2}
    assert {key for key in ids if "/b/" in key} == {f"both/b/{i:03d}" for i in range(8)}


def test_the_loader_tells_a_mixture_the_epoch_however_it_is_cut_and_continued(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, {"few": 2, "many": 9})
    parts["few"]["weight"] = 2.0
    spec = DataSpec(source="mixture", options={"sources": parts}, samples=6, repeats=2)
    samples = Samples(open_data(spec, "image"), modalities("image"), spec, 0)

    def drawn(micro: int, accumulation: int, world: int, start: int = 0) -> dict[int, str]:
        orders = [Order(6, 0, micro, accumulation, rank, world, start, 15, repeats=2) for rank in range(world)]
        batches = [batch for order in orders for batch in train_loader(samples, order, 0)]
        return {key: name for batch in batches for key, name in zip(batch.keys.tolist(), batch.ids, strict=True)}

    whole = drawn(4, 1, 1)
    assert sorted(whole) == list(range(60))
    assert drawn(2, 1, 2) == drawn(1, 4, 1) == whole
    assert drawn(2, 1, 2, start=7) == {position: name for position, name in whole.items() if position >= 28}
    of_many = [whole[position] for position in range(60) if "many" in whole[position]]
    assert set(Counter(of_many[:16]).values()) == {2}
    assert len(set(of_many[:16])) == 8  # four epochs of 2 draws, each used twice
    assert set(of_many) == {f"many/{i:03d}" for i in range(9)}


def test_parts_have_the_modalities_they_name(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, {"photos": 4})
    parts["photos"] |= {"modalities": ["image"], "weight": 1}
    parts["scenes"] = {"source": "world", "samples": 4, "weight": 3}
    source = open_data(DataSpec(source="mixture", options={"sources": parts}), "image", "depth")
    assert len(source) == 8
    assert Counter(tuple(sorted(source.read(i).signals)) for i in range(8)) == {("depth", "image"): 6, ("image",): 2}
    assert coverage(source) == {"image": 1.0, "depth": 0.75}


def test_a_mixture_holds_out_what_its_parts_hold_out(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, {"a": 20, "b": 20})
    del parts["a"]["held_out"]
    spec = DataSpec(source="mixture", options={"sources": parts}, held_out=9)
    held_out = open_data(spec, "image", split="held_out")
    train = open_data(spec, "image")
    assert (len(held_out), len(train)) == (2, 38)
    assert not {held_out.name(i) for i in range(2)} & {train.name(i) for i in range(38)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, r"data.options.sources: this key is required"),
        ({"sources": {"a": {"sourc": "world"}}}, r"data.options.sources.a.sourc: unknown key. Did you mean `source`\?"),
        ({"sources": {"a": {"weight": 0}}}, r"data.options.sources.a.weight: input should be greater than 0, got 0"),
        ({"sources": {"a": {"crop": [0.2, 1]}}}, r"sources.a.crop: this belongs to the whole mixture; set data.crop"),
        ({"sources": {"a": {"modalities": ["imag"]}}}, r"a.modalities: the recipe has no `imag`. Did you mean `image`"),
        ({"sources": {"a": {"source": "folder"}}}, r"data.options.sources.a: data.root: this key is required"),
    ],
)
def test_a_wrong_mixture_is_named_with_its_part(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        open_data(DataSpec(source="mixture", options=options), "image")
