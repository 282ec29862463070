"""Few labels: which samples are chosen, what can't be chosen, and the table of `m3 labels`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from m3.cli import main
from m3.data.source import Labelled, open_source
from m3.errors import M3Error
from m3.evaluate.task import Row
from m3.label_efficiency import label_efficiency, table
from m3.network import build_modalities
from m3.recipe import DataSpec, load_recipe
from m3.train import train

DIGITS = {
    "image": {"type": "image", "size": 8, "tokenizer": {"type": "patch", "size": 4}},
    "label": {"type": "label", "of": "digit", "classes": 10, "tokenizer": {"type": "label"}},
}


def chosen(labelled: float | None, **more) -> tuple[set[str], Counter]:
    spec = DataSpec(source="digits", held_out=179, labelled=labelled, **more)
    source = open_source(spec, build_modalities(DIGITS), 0, "train")
    labels = source.known_labels("digit")
    assert labels is not None
    assert [source.read(i).labels["digit"] for i in range(0, len(source), 97)] == list(labels)[::97]
    return {source.name(i) for i in range(len(source))}, Counter(labels)


def test_fewer_labelled_samples_are_a_part_of_more_and_even_over_the_classes() -> None:
    everything, _ = chosen(None)
    one, counts = chosen(0.01)
    assert (len(everything), len(one)) == (1618, 16)
    assert sorted(counts.values()) == [1] * 4 + [2] * 6
    ten, counts = chosen(0.1)
    assert len(ten) == 162
    assert sorted(counts.values()) == [16] * 8 + [17] * 2
    assert one < ten < everything
    assert chosen(1.0)[0] == everything
    assert len(chosen(0.001)[0]) == 10, "of each class at least one"


def test_a_whole_number_counts_samples() -> None:
    names, counts = chosen(30)
    assert len(names) == 30
    assert set(counts.values()) == {3}
    assert len(chosen(1)[0]) == 1
    assert len(chosen(5000)[0]) == 1618


def test_held_out_samples_stay_all() -> None:
    spec = DataSpec(source="digits", held_out=179, labelled=0.01)
    assert len(open_source(spec, build_modalities(DIGITS), 0, "held_out")) == 179


def test_without_a_label_the_hash_alone_chooses_and_files_are_those_of_the_source(tmp_path: Path) -> None:
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    modalities = build_modalities({"image": DIGITS["image"]})
    spec = DataSpec(source="folder", root=str(tmp_path), held_out=0, labelled=0.25)
    source = open_source(spec, modalities, 0, "train")
    assert isinstance(source, Labelled)
    assert len(source) == 5
    assert source.stored(3).id == source.name(3) == source.read(3).id
    other = open_source(spec.model_copy(update={"labelled": 10}), modalities, 1, "train")
    assert {source.name(i) for i in range(5)} < {other.name(i) for i in range(10)}


def test_data_that_can_not_be_chosen_from_are_refused() -> None:
    modalities = build_modalities({**DIGITS, "label": {**DIGITS["label"], "of": "shape", "classes": 4}})
    with pytest.raises(M3Error, match="knows the label `shape` only by reading every sample"):
        open_source(DataSpec(source="world", samples=50, labelled=0.1), modalities, 0, "train")


def row(task: str, value: float) -> Row:
    return Row(task, "accuracy", value, 0.1, "majority", higher_is_better=True, interval=(0.0, 1.0))


def test_the_table_has_the_mean_of_the_seeds() -> None:
    curves = {
        ("digit", True): {0.01: [row("digit", 0.5), row("digit", 0.75)], 1.0: [row("digit", 1.0)]},
        ("digit", False): {0.01: [row("digit", 0.25), row("digit", 0.125)], 1.0: [row("digit", 0.9)]},
    }
    few, all_of_them = table(curves, "digit")
    assert (few.task, few.model, few.baseline) == ("digit, 0.01 of the labels", 0.625, 0.1875)
    assert (few.baseline_name, few.interval) == ("from scratch", None)
    assert few.notes == {"from the model": [0.5, 0.75], "from scratch": [0.25, 0.125], "majority": 0.1}
    assert (all_of_them.model, all_of_them.baseline) == (1.0, 0.9)


def test_a_wrong_share_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(M3Error, match=r"a share of the labels lies in \(0, 1\], got 2"):
        label_efficiency("model", "finetune_tiny", [], [0.1, 2], 1, None)
    assert main(["labels", "model", "finetune_tiny", "--shares", "few"]) == 2
    assert "--shares must be a share such as 0.25, got `few`" in capsys.readouterr().err


def test_a_recipe_is_trained_with_few_labels_from_both_starts(tmp_path: Path) -> None:
    small = [
        "modalities.image.size=8",
        "modalities.image.tokenizer.size=4",
        "backbone.width=16",
        "backbone.depth=1",
        "backbone.heads=2",
        "train.steps=2",
        "train.warmup=1",
        "train.batch_size=8",
        "train.threads=1",
        "data.workers=0",
        "evaluate.samples=20",
        "evaluate.fit_samples=20",
    ]
    train(load_recipe("finetune_tiny", [*small, f"out={tmp_path / 'start'}"]), is_shown=False)
    model = tmp_path / "start" / "model"
    own = [*small, "init:train.layer_decay=0.5"]
    rows = label_efficiency(str(model), "finetune_tiny", own, [0.1, 0.01], 1, tmp_path / "out")
    names = ["digit, 0.01 of the labels", "digit, 0.1 of the labels"]
    assert [one.task for one in rows] == [*names, *(name.replace("digit", "digit (top 5)") for name in names)]
    settings = (tmp_path / "out" / "0.01_init_0" / "recipe.yaml").read_text()
    assert "layer_decay: 0.5" in settings
    assert "labelled: 0.01" in settings
    assert "layer_decay: 0.5" not in (tmp_path / "out" / "0.01_scratch_0" / "recipe.yaml").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 2, "top-1 and top-5"
