"""Streams: every sample once an epoch, shared out among processes, continued at the exact sample."""

import gc
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file

from m3.data.loader import Order, Samples, first_batches, train_loader
from m3.data.source import Row, Sample, Source, Stream, coverage, describe_coverage, open_source
from m3.data.stream import Place, StreamOrder, load_place, save_place
from m3.errors import M3Error
from m3.modalities.image import Image
from m3.recipe import DataSpec, TrainSpec, recipe_from
from m3.schedule import plan_run
from m3.train import train
from m3.types import Batch


class Letters(Stream):
    """Shards a, b, c, ... of given lengths, with rows a0, a1, ...; remembers what was read."""

    def __init__(self, sizes: list[int], buffer: int = 3) -> None:
        self.sizes, self.shards, self.buffer = sizes, len(sizes), buffer
        self.read: list[str] = []

    def rows(self, shard: int, first: int) -> Iterator[tuple[int, Row]]:
        for number in range(first, self.sizes[shard]):
            name = f"{'abcdef'[shard]}{number}"
            self.read.append(name)
            yield number, Row(name, {"image": np.full((4, 4, 3), 10 * shard + number, np.uint8)})

    def source(self, rows: list[Row]) -> Source:
        return Held(rows)


class Held(Source):
    """Rows in memory; one whose name is in `broken` can't be read."""

    broken: tuple[str, ...] = ()

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(DataSpec(), PARTS, 0, "train")
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Sample:
        row = self.rows[index]
        if row.id in self.broken:
            raise M3Error(f"the row {row.id} is broken")
        return Sample({"image": row.values["image"]}, row.id)

    def name(self, index: int) -> str:
        return self.rows[index].id


PARTS: Any = {"image": Image(Image.Spec(size=4))}


def order_of(sizes: list[int], *numbers: int, place: Place | None = None, repeats: int = 1) -> StreamOrder:
    """`numbers` as in `Order`, from micro_batch on."""
    return StreamOrder(Letters(sizes), Order(0, 7, *numbers, repeats=repeats), place or Place())


def ids(order: StreamOrder, samples: int | None = None) -> list[str]:
    drawn = (batch.rows[i].id for batch in order for _, i in batch.pairs)
    return list(islice(drawn, samples))


def everything(sizes: list[int]) -> list[str]:
    return [f"{'abcdef'[shard]}{number}" for shard, size in enumerate(sizes) for number in range(size)]


# ---------------------------------------------------------------------------------------------- order


def test_an_epoch_visits_every_sample_once_and_the_next_in_another_order() -> None:
    sizes = [4, 5, 0, 7]
    drawn = ids(order_of(sizes, 4, 1, 0, 1, 0, 12))
    assert len(drawn) == 48
    epochs = [drawn[:16], drawn[16:32], drawn[32:]]
    assert [sorted(epoch) for epoch in epochs] == [everything(sizes)] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({tuple(dict.fromkeys(name[0] for name in epoch)) for epoch in epochs}) > 1  # shards are shuffled too


def test_only_one_block_is_held_and_shuffled_at_a_time() -> None:
    order = order_of([100], 1, 1, 0, 1, 0, 99)
    assert isinstance(order.stream, Letters)
    batches = iter(order)
    for count in range(1, 20):
        next(batches)
        assert len(order.stream.read) == -(-count // 3) * 3  # blocks of 3 rows
    drawn = ids(order_of([9], 1, 1, 0, 1, 0, 9))
    assert [set(drawn[i : i + 3]) for i in (0, 3, 6)] == [{f"a{i + k}" for k in range(3)} for i in (0, 3, 6)]
    assert drawn != sorted(drawn)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [[6, 6, 6, 6], [12, 12, 12], [24], [5, 4, 8, 7]])
def test_processes_share_every_epoch_without_overlap(sizes: list[int], world: int) -> None:
    """Each goes on to its next epoch by itself, so their epochs are told from the places."""
    seen: dict[int, list[str]] = {}
    for rank in range(world):
        order = order_of(sizes, 1, 1, rank, world, 0, 100)
        for step, batch in enumerate(order):
            seen.setdefault(order.places[step + 1].epoch, []).extend(row.id for row in batch.rows)
    for epoch in (0, 1):
        assert sorted(seen[epoch]) == sorted(everything(sizes))


def test_a_process_reads_only_its_own_shards_where_they_can_be_dealt() -> None:
    read = []
    for rank in range(2):
        order = order_of([4, 4, 4, 4], 4, 1, rank, 2, 0, 2)
        ids(order)
        assert isinstance(order.stream, Letters)
        read.append({name[0] for name in order.stream.read})
    assert [len(own) for own in read] == [2, 2]
    assert read[0] | read[1] == set("abcd")


@pytest.mark.parametrize(("world", "repeats"), [(1, 1), (2, 1), (3, 1), (1, 3), (2, 5)])
@pytest.mark.parametrize("sizes", [[5, 4, 8, 7], [10]])
def test_a_run_goes_on_at_the_exact_sample_from_every_step(
    sizes: list[int], world: int, repeats: int, tmp_path: Path
) -> None:
    for rank in range(world):
        numbers = (2, 2, rank, world)
        order = order_of(sizes, *numbers, 0, 20, repeats=repeats)
        whole = []
        for number, batch in enumerate(order, 1):
            whole.append(batch)
            if number % 2 == 0:
                folder = tmp_path / str(number // 2)
                folder.mkdir(exist_ok=True)
                save_place(folder, rank, order.state(number // 2))
        for start in range(1, 20):
            place = load_place(tmp_path / str(start), rank, world)
            rest = order_of(sizes, *numbers, start, 20, place=place, repeats=repeats)
            assert [(b.pairs[0][0], [r.id for r in b.rows]) for b in rest] == [
                (b.pairs[0][0], [r.id for r in b.rows]) for b in whole[2 * start :]
            ]


def test_going_on_reads_at_most_one_block_and_the_rows_before_it() -> None:
    order = order_of([30, 30], 1, 1, 0, 1, 40, 50, place=Place(0, 1, 9, 1))
    assert isinstance(order.stream, Letters)
    next(iter(order))
    assert [int(name[1:]) for name in order.stream.read] == [9, 10, 11]


def test_repeated_samples_follow_each_other_and_are_sent_once_a_batch() -> None:
    batches = list(order_of([4], 4, 1, 0, 1, 0, 3, repeats=3))
    names = [batch.rows[i].id for batch in batches for _, i in batch.pairs]
    assert [len(set(names[i : i + 3])) for i in range(0, 12, 3)] == [1] * 4
    assert sorted(set(names)) == everything([4])
    assert [len(batch.rows) for batch in batches] == [2, 2, 2]
    assert [position for batch in batches for position, _ in batch.pairs] == list(range(12))


@pytest.mark.parametrize(("micro", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_micro_batches_change_neither_samples_nor_positions(micro: int, accumulation: int) -> None:
    found = {}
    for rank in range(2):
        for batch in order_of([5, 4, 8, 7], micro, accumulation, rank, 2, 0, 5):
            found |= {position: batch.rows[i].id for position, i in batch.pairs}
    expected = {}
    for rank in range(2):
        for step, batch in enumerate(order_of([5, 4, 8, 7], 4, 1, rank, 2, 0, 5)):
            expected |= {8 * step + 4 * rank + i: row.id for i, row in enumerate(batch.rows)}
    assert found == expected


def test_another_number_of_processes_and_an_empty_part_are_refused(tmp_path: Path) -> None:
    order = order_of([8], 1, 1, 0, 2, 0, 3)
    ids(order)
    save_place(tmp_path, 0, order.state(2))
    with pytest.raises(M3Error, match=r"2 process\(es\) shared the stream there and 1 would here.*resume with 2 or"):
        load_place(tmp_path, 0, 1)
    with pytest.raises(M3Error, match=r"process 1 of 2 finds no samples in its part of the stream; add data or use"):
        ids(order_of([1], 1, 1, 1, 2, 0, 3))


# --------------------------------------------------------------------------------------------- loader


def samples_of(order: StreamOrder) -> Samples:
    source = Held([Row("a0", {"image": np.zeros((4, 4, 3), np.uint8)})])
    source.stream = order.stream
    return Samples(source, PARTS, DataSpec(crop=(0.3, 1.0), flip=0.5, repeats=order.order.repeats), 0)


def batches_of(order: StreamOrder, workers: int) -> list[Batch]:
    return list(train_loader(samples_of(order), order, workers))


def test_workers_change_nothing_and_decode_what_the_order_drew() -> None:
    expected = ids(order_of([5, 4, 8, 7], 2, 2, 0, 1, 0, 5))
    alone = batches_of(order_of([5, 4, 8, 7], 2, 2, 0, 1, 0, 5), 0)
    assert [name for batch in alone for name in batch.ids] == expected
    assert torch.cat([batch.keys for batch in alone]).tolist() == list(range(20))
    values = torch.cat([batch.signals["image"][:, 0, 0, 0] for batch in alone]).tolist()
    assert values == [10 * "abcdef".index(name[0]) + int(name[1:]) for name in expected]
    for batch, other in zip(alone, batches_of(order_of([5, 4, 8, 7], 2, 2, 0, 1, 0, 5), 2), strict=True):
        assert batch.ids == other.ids
        assert torch.equal(batch.signals["image"], other.signals["image"])


def test_the_state_is_that_of_what_was_trained_on_not_of_what_was_loaded_ahead(tmp_path: Path) -> None:
    whole = ids(order_of([5, 4, 8, 7], 2, 1, 0, 1, 0, 12))
    order = order_of([5, 4, 8, 7], 2, 1, 0, 1, 0, 12)
    batches = train_loader(samples_of(order), order, 2)
    trained = [name for batch in islice(batches, 3) for name in batch.ids]
    save_place(tmp_path, 0, order.state(3))
    rest = order_of([5, 4, 8, 7], 2, 1, 0, 1, 3, 12, place=load_place(tmp_path, 0, 1))
    assert trained + [name for batch in batches_of(rest, 1) for name in batch.ids] == whole


def test_a_row_that_cannot_be_read_is_replaced_by_another_of_its_micro_batch(monkeypatch: Any) -> None:
    names = ids(order_of([8], 4, 1, 0, 1, 0, 1))
    monkeypatch.setattr(Held, "broken", (names[1],))
    (batch,) = batches_of(order_of([8], 4, 1, 0, 1, 0, 1), 0)
    assert batch.ids == (names[0], names[0], names[2], names[3])
    assert batch.skipped == (f"{names[1]}: the row {names[1]} is broken",)


def test_epochs_of_a_stream_are_refused() -> None:
    with pytest.raises(M3Error, match=r"train.epochs: nobody knows how many samples a stream has; give train.steps"):
        plan_run(TrainSpec(epochs=2), None, 1)
    assert plan_run(TrainSpec(steps=9, warmup=2), None, 1)[:2] == (9, 2)


# ------------------------------------------------------------------------------ Hugging Face data sets


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder of three parquet files with 10, 10 and 9 rows: pictures of grey 0, 1, 2, ..., classes, texts."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    columns = {
        "photo": [PILImage.fromarray(np.full((4, 4, 3), i, np.uint8)) for i in range(29)],
        "words": [None if i == 20 else f"text {i}" for i in range(29)],
        "kind": [i % 2 for i in range(29)],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("kind", datasets.ClassLabel(names=["even", "odd"]))
    (tmp_path / "rows").mkdir()
    for i in range(3):
        table.shard(3, i).to_parquet(tmp_path / f"rows/train-{i}.parquet")
    return tmp_path / "rows"


def hub(path: Path, split: Any = "train", more: Any = None, **data: Any) -> Source:
    options = {"path": str(path), "streaming": True, "columns": {"image": "photo"}, "buffer": 4, **(more or {})}
    return open_source(DataSpec(source="hub", options=options, **data), PARTS, 0, split)


def greys(source: Source, *numbers: int) -> list[int]:
    """Train on a stream (numbers as in `Order`, from micro_batch on) and return the pictures' greys."""
    assert source.stream
    order = StreamOrder(source.stream, Order(0, 3, *numbers), Place())
    batches = train_loader(Samples(source, PARTS, source.spec, 0), order, 0)
    return [int(x) for batch in batches for x in batch.signals["image"][:, 0, 0, 0]]


def test_files_are_streamed_and_the_first_rows_held_out(rows: Path) -> None:
    held_out, source = hub(rows, "held_out", held_out=12), hub(rows, held_out=12)
    assert [int(held_out.read(i).signals["image"].getpixel((0, 0))[0]) for i in range(len(held_out))] == list(range(12))
    assert (held_out.stream, held_out.name(11)) == (None, "00001-00000001")
    assert source.stream
    assert source.stream.shards == 2  # the first is held out altogether
    drawn = greys(source, 17, 1, 0, 1, 0, 3)
    assert [sorted(drawn[i : i + 17]) for i in (0, 17, 34)] == [list(range(12, 29))] * 3
    assert drawn[:17] != sorted(drawn[:17])
    shared = greys(source, 8, 1, 0, 2, 0, 1) + greys(source, 8, 1, 1, 2, 0, 1)  # of shards of 8 and 9 rows
    assert len(set(shared)) == 16
    assert set(shared) < set(range(12, 29))
    assert source.read(0).labels == {"kind": 0}
    assert [name for batch in first_batches(Samples(source, PARTS, source.spec, 0), 99, 8) for name in batch.ids][
        :2
    ] == ["00001-00000002", "00001-00000003"]


def test_another_split_may_be_held_out_of_streams_and_of_tables(rows: Path) -> None:
    (rows / "train-2.parquet").rename(rows / "test-0.parquet")
    for is_streaming in (True, False):
        more = {"held_out_split": "test", "streaming": is_streaming}
        held_out = hub(rows, "held_out", more, held_out=5)
        assert [held_out.read(i).signals["image"].getpixel((0, 0))[0] for i in range(5)] == [20, 21, 22, 23, 24]
        assert len(hub(rows, "train", more, held_out=5)) == 20


def test_a_stream_with_samples_becomes_a_table_in_memory(rows: Path) -> None:
    source = hub(rows, samples=7, held_out=3)
    assert source.stream is None
    assert [source.read(i).signals["image"].getpixel((0, 0))[0] for i in range(len(source))] == list(range(3, 10))
    assert source.stored(0).files["image"].data.startswith(b"\x89PNG")


def test_gaps_in_a_stream_are_named_or_allowed(rows: Path) -> None:
    parts = {**PARTS, "words": PARTS["image"]}
    options = {"path": str(rows), "streaming": True, "columns": {"image": "photo"}}
    spec = DataSpec(source="hub", options=options, held_out=20)
    with pytest.raises(M3Error, match=r"rows: row 00002-00000000 has no `words` for the modality `words`; fill it or"):
        open_source(spec, parts, 0, "train")
    source = open_source(spec.model_copy(update={"missing": "allow"}), parts, 0, "train")
    assert coverage(source) == {"image": 1.0, "words": 8 / 9}
    assert describe_coverage(source) == "the first 9 samples of the stream: image 100.0%, words 88.9%"
    assert "words" not in source.read(0).signals


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # `datasets` leaves the file open
def test_a_csv_whose_columns_are_known_only_by_reading_is_streamed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "a.csv").write_text("words,photo\n" + "".join(f"text {i},x\n" for i in range(6)))
    options = {"path": str(tmp_path / "a.csv"), "streaming": True, "columns": {"text": "words"}}
    spec = DataSpec(source="hub", options=options, held_out=2)
    source = open_source(spec, {"text": PARTS["image"]}, 0, "train")
    assert [source.read(i).signals["text"] for i in range(4)] == [f"text {i}" for i in range(2, 6)]
    with pytest.raises(M3Error, match=r"a.csv has no column `image` for the modality `image`. Valid: `photo`, `words`"):
        open_source(spec, PARTS, 0, "train")
    del source
    gc.collect()  # so that the file's warning comes here, not in another test


def test_folders_of_pictures_are_streamed_by_their_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for kind, value in (("cat", 40), ("dog", 90)):
        (tmp_path / f"pets/{kind}").mkdir(parents=True)
        PILImage.fromarray(np.full((4, 4, 3), value, np.uint8)).save(tmp_path / f"pets/{kind}/{value}.png")
    source = hub(tmp_path / "pets", more={"columns": {}}, held_out=0)
    assert sorted(greys(source, 2, 1, 0, 1, 0, 1)) == [40, 90]
    assert [source.read(i).labels for i in range(2)] == [{"label": 0}, {"label": 1}]


def test_what_needs_numbers_refuses_a_stream(rows: Path, tmp_path: Path) -> None:
    from m3.data.pack import pack

    with pytest.raises(M3Error, match=r"m3 data pack needs samples that can be counted, not a stream; set data.opt"):
        pack(hub(rows, held_out=0), PARTS, tmp_path / "out", 10)
    options = {"path": str(rows), "streaming": True, "columns": {"image": "photo"}}
    part = {"source": "hub", "options": options, "held_out": 0}
    with pytest.raises(M3Error, match=r"data.options.sources.a: a mixture needs samples that can be counted"):
        open_source(DataSpec(source="mixture", options={"sources": {"a": part}}), PARTS, 0, "train")
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"photo": [1, 2]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(M3Error, match=r"data.options.streaming: .*saved is a table on this disk, read by number; set"):
        hub(tmp_path / "saved")


def test_a_training_run_on_a_stream_goes_on_exactly_with_other_workers(rows: Path, tmp_path: Path) -> None:
    options = {"path": str(rows), "streaming": True, "columns": {"image": "photo"}, "buffer": 4}
    data = {"source": "hub", "options": options, "held_out": 5, "crop": [0.5, 1.0], "drop": 0.0}

    def run(name: str, workers: int, resume: bool = False) -> dict[str, torch.Tensor]:
        settings = {
            "out": str(tmp_path / name),
            "modalities": {"image": {"type": "image", "size": 4, "tokenizer": {"type": "patch", "size": 2}}},
            "backbone": {"width": 16, "depth": 1, "heads": 2},
            "objectives": {"reconstruct": OBJECTIVE},
            "data": {**data, "workers": workers},
            "train": {"steps": 9, "batch_size": 4, "lr": 0.01, "save_every": 3, "keep": 9, "trackers": []},
            "evaluate": {"tasks": {"image": {"target": "image"}}, "samples": 4, "preview_rows": 2},
        }
        train(recipe_from(settings, name), resume=resume, is_shown=False)
        return load_file(tmp_path / name / "model/model.safetensors")

    whole = run("run", 0)
    for step in (6, 9):  # as if it had been killed after step 3
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:08d}")
    again = run("run", 2, resume=True)
    assert len((tmp_path / "run/checkpoints/step-00000003/stream-00000.json").read_text()) > 10
    assert all(torch.equal(again[name], x) for name, x in whole.items())


OBJECTIVE = {
    "type": "reconstruct",
    "masking": {"type": "fixed", "visible": 0.25},
    "decoder": {"type": "self_decoder", "width": 16, "depth": 1, "heads": 2},
    "targets": {"image": {"target": {"type": "values"}}},
}
