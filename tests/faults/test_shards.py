"""Tars that break in the middle of a run, and stores that fail or hang: skipped, counted, told; the run goes on."""

import json
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from m3.check import shrink
from m3.data import shards
from m3.data.loader import Samples, far_away, first_batches
from m3.data.remote import Patience, Remote
from m3.data.source import open_source
from m3.errors import M3Error
from m3.network import build_modalities
from m3.recipe import DataSpec, Recipe, load_recipe, recipe_from
from m3.train import train
from tests.unit.shard_files import png, write_tar

QUICK = {"retries": 3, "wait": 0.001, "pause": 60.0}


def tars(folder: Path, count: int, per_tar: int = 20) -> list[Path]:
    """Write tars of pictures."""
    paths = []
    for number in range(count):
        members = {f"{number}_{i:02d}.png": png(i) for i in range(per_tar)}
        paths.append(folder / f"{number:03d}.tar")
        write_tar(paths[-1], members)
    return paths


def recipe(root: str, out: Path, **data: object) -> Recipe:
    settings = shrink(load_recipe("mae_tiny"), out, 20).model_dump(mode="json", exclude_none=True)
    settings["data"] = {"source": "shards", "root": root, "held_out": 0, "workers": 0, "options": QUICK} | data
    settings["train"] |= {"log_every": 1, "trackers": []}
    settings["evaluate"] |= {"tasks": {}}
    return recipe_from(settings, "faults")


def train_and_break(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, damage, at: int = 4) -> list[dict]:
    """Train, do damage when batch `at` was read, and return the lines of metrics."""
    collate, read = Samples.collate, [0]

    def collating(self, samples):
        read[0] += 1
        if read[0] == at:
            damage()
        return collate(self, samples)

    monkeypatch.setattr(Samples, "collate", collating)
    monkeypatch.setattr("m3.held_out.preview", lambda *_: None)  # drawing takes longer than all steps
    train(recipe)
    return [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]


def remove(tar: Path) -> None:
    tar.unlink()
    shards._descriptor.cache_clear()  # as long as it is open, a file that was removed can be read


def truncate(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[:1024])


def corrupt(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    for at in range(512, len(data)):
        data[at] ^= 0x5A
    tar.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [remove, truncate, corrupt])
def test_a_tar_that_breaks_in_the_middle_of_a_run_is_skipped(tmp_path: Path, monkeypatch, capsys, damage) -> None:
    paths = tars(tmp_path / "data", 5)
    run = recipe(str(tmp_path / "data"), tmp_path / "run", max_unreadable=0.5)
    lines = train_and_break(run, monkeypatch, lambda: damage(paths[2]))
    last = lines[-1]
    assert last["step"] == 20, "the run goes on to its end"
    assert 5 < last["skipped"] <= 20, "only samples of the broken tar"
    assert last["skipped_of"] == {str(paths[2]): last["skipped"]}
    assert f"{last['skipped']} of {paths[2]}" in capsys.readouterr().out
    assert lines[0]["skipped"] == 0
    assert "skipped_of" not in lines[0]


def test_past_the_limit_the_run_ends_with_a_sentence(tmp_path: Path, monkeypatch) -> None:
    paths = tars(tmp_path / "data", 3)
    run = recipe(str(tmp_path / "data"), tmp_path / "run", max_unreadable=0.0)
    with pytest.raises(M3Error, match=r"can't be read, more than data.max_unreadable = 0.0"):
        train_and_break(run, monkeypatch, lambda: [remove(path) for path in paths[:2]])


def test_what_stands_in_for_a_sample_lies_far_away_and_all_are_tried() -> None:
    assert sorted(far_away(3, turn, 24) for turn in range(24)) == list(range(24))
    near = [abs(far_away(500, turn, 1000) - 500) for turn in range(1, 6)]
    assert min(near) > 80, "not in the same shard of a few dozen"


class Flaky(MemoryFileSystem):
    """A store that fails so many times before it answers, or is slow; counts how often it is asked."""

    protocol = "flaky"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    left = asked = 0
    seconds = 0.0

    def cat_file(self, path, start=None, end=None, **options):
        Flaky.asked += 1
        time.sleep(Flaky.seconds)
        if Flaky.left > 0:
            Flaky.left -= 1
            raise ConnectionError("503, slow down")
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def store(tmp_path: Path, monkeypatch) -> str:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "left", 0)
    monkeypatch.setattr(Flaky, "seconds", 0.0)
    root = f"flaky://{tmp_path.name}"
    for path in tars(tmp_path / "data", 3):
        Flaky().pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    return root


def samples(root: str, **options: object) -> Samples:
    modalities = build_modalities({"image": {"type": "image", "size": 8}})
    spec = DataSpec(source="shards", root=root, held_out=0, options=QUICK | options)
    return Samples(open_source(spec, modalities, 0, "train"), modalities, spec, 0)


def test_a_store_that_fails_a_few_times_loses_no_sample(store: str) -> None:
    data = samples(store)
    for failures in range(4):
        Flaky.left, Flaky.asked = failures, 0
        assert data.source.read(failures).id == f"0_{failures:02d}"
        assert Flaky.asked == failures + 1


def test_a_store_that_keeps_failing_costs_its_samples_and_is_left_alone_for_a_while(store: str) -> None:
    data = samples(store)
    Flaky.left, Flaky.asked = 4, 0
    (batch,) = first_batches(data, 2, 2)
    assert batch.skipped == (
        f"0_00: {store}/000.tar can't be read: 4 tries failed, the last with ConnectionError (503, slow down).",
        f"0_01: {store}/000.tar can't be read: 4 tries failed, the last with ConnectionError (503, slow down).",
    )
    assert batch.origins == (f"{store}/000.tar",) * 2
    assert all(not name.startswith("0_") for name in batch.ids)
    assert Flaky.asked == 4 + 2, "the second sample of that tar is skipped without asking"


def test_waits_grow_and_end(monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("m3.data.remote.time.sleep", waits.append)

    def fail() -> None:
        raise ConnectionError("no")

    with pytest.raises(M3Error, match="s3://a can't be read: 5 tries failed, the last with ConnectionError"):
        Remote(Patience(retries=4, wait=0.5)).read("s3://a", fail)
    assert waits == [0.5, 1.0, 2.0, 4.0]


def test_what_no_try_changes_is_not_tried_again() -> None:
    asked = []

    def missing() -> None:
        asked.append(1)
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        Remote(Patience(wait=0.001)).read("s3://a", missing)
    assert len(asked) == 1


def test_a_store_that_hangs_is_given_up_after_the_timeout(store: str) -> None:
    data = samples(store, timeout=0.05, retries=1)
    Flaky.seconds = 0.4
    start = time.monotonic()
    with pytest.raises(M3Error, match=r"no answer in 0.05 seconds"):
        data.source.read(0)
    assert time.monotonic() - start < 0.35
    Flaky.seconds = 0.0
    assert data.source.read(45).id == "2_05"
    time.sleep(0.5)  # the threads that were left behind end


def test_a_place_that_failed_is_asked_again_after_the_pause(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("m3.data.remote.time.monotonic", lambda: now[0])
    remote, answers = Remote(Patience(retries=0, pause=10)), iter([ConnectionError("no"), None])

    def ask() -> str:
        error = next(answers)
        if error:
            raise error
        return "there"

    for now[0] in (0.0, 9.0):
        with pytest.raises(M3Error, match="1 tries failed"):
            remote.read("s3://a", ask)
    now[0] = 11.0
    assert remote.read("s3://a", ask) == "there"


def test_how_patient_a_run_is_may_change_when_it_goes_on(tmp_path: Path) -> None:
    tars(tmp_path / "data", 3)
    first = recipe(str(tmp_path / "data"), tmp_path / "run")
    train(first, is_shown=False)
    second = recipe(str(tmp_path / "data"), tmp_path / "run", options={"retries": 9})
    assert train(second, resume=True, is_shown=False) == []
