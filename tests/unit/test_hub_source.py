"""Hugging Face data sets: what they read, and what they say when they can't."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from m3.data.source import Source, coverage
from m3.errors import M3Error
from m3.recipe import DataSpec
from tests.unit.source_files import colour, open_data, picture


def hub(options: dict[str, Any], *names: str, **more: Any) -> Source:
    return open_data(DataSpec(source="hub", options=options, **{"held_out": 0, **more}), *names)


def test_without_the_library_its_name_is_given(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(M3Error, match=r"`hub` needs the package `datasets`; run `pip install 'm3-multimodal\[hub\]'`"):
        hub({"path": "some/set"}, "image")


def test_unknown_options_are_refused() -> None:
    with pytest.raises(M3Error, match=r"data.options.pat: unknown key. Did you mean `path`\?"):
        hub({"path": "a", "pat": "b"}, "image")


def test_what_the_library_says_is_passed_on(monkeypatch: Any) -> None:
    fake = ModuleType("datasets")

    def load_dataset(path: str, name: str | None, split: str) -> None:
        raise ConnectionError(f"no answer for\n{path}/{name}/{split}")

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(M3Error, match=r"data.options.path: `set` can't be opened: no answer for set/small/test"):
        hub({"path": "set", "name": "small", "split": "test"}, "image")


@pytest.fixture
def table(tmp_path: Path) -> Any:
    """Twelve rows: pictures added from memory, texts with a gap, classes, lists of numbers."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    pictures = [PILImage.fromarray(np.full((4, 4, 3), 10 * i, np.uint8)) for i in range(12)]
    columns = {
        "photo": pictures,
        "words": [None if i == 5 else f"text {i}" for i in range(12)],
        "kind": [i % 2 for i in range(12)],
        "depth": [[[i, 1], [2, 3]] for i in range(12)],
    }
    rows = datasets.Dataset.from_dict(columns)
    return rows.cast_column("kind", datasets.ClassLabel(names=["even", "odd"]))


COLUMNS = {"image": "photo", "text": "words"}


def test_a_saved_data_set_is_read_by_number(table: Any, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "saved")
    options = {"path": str(tmp_path / "saved"), "columns": COLUMNS}
    with pytest.raises(M3Error, match=r"1 rows have no `words` for the modality `text`, the first is row 5; fill"):
        hub(options, "image", "text")
    source = hub(options, "image", "text", "depth", missing="allow")
    assert len(source) == 12
    sample = source.read(7)
    assert (sample.id, sample.signals["text"], sample.labels) == ("00000007", "text 7", {"kind": 1})
    assert colour(source, 7) == 70
    assert sample.signals["depth"].tolist() == [[7, 1], [2, 3]]
    assert "text" not in source.read(5).signals
    assert coverage(source) == {"image": 1.0, "text": 11 / 12, "depth": 1.0}
    stored = source.stored(7)
    assert stored.files["image"].data.startswith(b"\x89PNG")
    assert stored.files["text"] == (".txt", b"text 7")


def test_parquet_and_folders_of_pictures_are_read(table: Any, tmp_path: Path) -> None:
    table.to_parquet(tmp_path / "rows.parquet")
    source = hub({"path": str(tmp_path / "rows.parquet"), "columns": COLUMNS}, "image")
    assert [colour(source, i) for i in (0, 11)] == [0, 110]
    for kind, value in (("cat", 40), ("dog", 90)):
        picture(tmp_path / f"pets/{kind}/{value}.png", value)
    source = hub({"path": str(tmp_path / "pets")}, "image")
    assert [(colour(source, i), source.read(i).labels) for i in range(2)] == [(40, {"label": 0}), (90, {"label": 1})]
    assert source.stored(1).files["image"].data == (tmp_path / "pets/dog/90.png").read_bytes()


def test_a_wrong_split_or_column_is_named(table: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    options = {"path": str(tmp_path / "both")}
    with pytest.raises(M3Error, match=r"data.options.split: .*both has no `tes`. Did you mean `test`\?"):
        hub({**options, "split": "tes"}, "image")
    with pytest.raises(M3Error, match=r"both has no column `phot` for the modality `image`. Did you mean `photo`\?"):
        hub({**options, "columns": {"image": "phot"}}, "image")
