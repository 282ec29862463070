"""Tensors in parts on disk, in one process; `tests/distributed/test_sharded.py` has several."""

from pathlib import Path

import pytest
import torch

from m3 import saving, sharded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.step": torch.tensor(7.0), "c": torch.arange(4)}


def test_what_was_written_is_read_by_name_and_nothing_is_a_pickle(tmp_path: Path) -> None:
    sharded.write(tmp_path / "shards", TENSORS)
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".safetensors"}
    assert sharded.shapes(tmp_path / "shards") == {"a": (2, 3), "b.step": (), "c": (4,)}
    room = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items() if name != "a"}
    sharded.read(tmp_path / "shards", room)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in room.items())


def test_what_can_not_be_written_or_read_is_an_ordinary_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"\(in process 0\)"):
        sharded.write(tmp_path / "file" / "shards", TENSORS)
    sharded.write(tmp_path / "shards", {"a": TENSORS["a"]})
    with pytest.raises(OSError, match="Missing key"):
        sharded.read(tmp_path / "shards", {"other": torch.zeros(2)})


def test_what_fails_in_another_process_fails_here_and_all_do_their_work(monkeypatch) -> None:
    done, given = [], []

    def in_all(value: str | None) -> list[str | None]:
        given.append(value)
        return [value, "no space left"]

    monkeypatch.setattr(saving, "in_all", in_all)
    with pytest.raises(OSError, match="no space left"):
        saving.together(lambda: done.append(True))
    assert (done, given) == ([True], [None])

    def fail() -> None:
        raise RuntimeError("can't write here")

    monkeypatch.setattr(saving, "in_all", lambda value: [None, value])
    with pytest.raises(OSError, match="can't write here"):
        saving.together(fail)
