"""What can't be measured, by `m3 eval`: wrong label files, one class, a class or a split without samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from m3 import M3Config, M3Model
from m3.cli import main
from m3.evaluate.task import check_classes
from m3.processor import M3Processor
from tests.unit.source_files import picture

IMAGE = {"type": "image", "size": 4, "tokenizer": {"type": "patch", "size": 2}}
DECODER = {"type": "self_decoder", "width": 16, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    objective = {"type": "reconstruct", "decoder": DECODER, "targets": {"image": {}}}
    backbone = {"width": 16, "depth": 1, "heads": 2}
    config = M3Config(modalities={"image": IMAGE}, backbone=backbone, objectives={"reconstruct": objective})
    M3Model(config).save_pretrained(folder)
    M3Processor(config.modalities).save_pretrained(folder)
    return str(folder)


def manifest(folder: Path, rows: list[str], header: str = "image,split,label:kind") -> str:
    """A file of rows `SPLIT,KIND`, each with a picture of its own brightness."""
    for number in range(len(rows)):
        picture(folder / f"{number}.png", 20 * number)
    lines = [f"{number}.png,{row}" for number, row in enumerate(rows)]
    (folder / "labels.csv").write_text("\n".join([header, *lines]) + "\n")
    return str(folder / "labels.csv")


def said(model: str, data: str, folder: Path, capsys, task: str = "probe:kind", *given: str) -> tuple[int, str]:
    code = main(["eval", model, "--data", data, "--task", task, "--out", str(folder / "out"), *given])
    found = capsys.readouterr()
    return code, " ".join((found.out + found.err).split())


GOOD = ["train,0", "train,1", "train,0", "train,1", "train,0", "train,1", "val,0", "val,1"]


def test_good_labels_are_measured_without_a_remark(model, tmp_path, capsys):
    code, text = said(model, manifest(tmp_path, GOOD), tmp_path, capsys)
    assert code == 0, text
    assert "hold out more" not in text


@pytest.mark.parametrize(
    ("rows", "header", "sentences"),
    [
        (["train,0", "train,one"] * 4, "image,split,label:kind", ["labels.csv, line 3", "`label:kind`"]),
        (["train,0", "tran,1"] * 4, "image,split,label:kind", ["labels.csv, line 3: `tran` is no split"]),
        (["train,0,1"] * 4, "image,split,label:kind", ["labels.csv, line 2: the row has more or fewer values"]),
        (GOOD, "image,split,label:kin", ["no sample (train) has the label `kind`", "Did you mean `kin`?"]),
        (["train,0", "train,1"] * 4, "image,split,label:kind", ["no sample of 8 is held out", "column `split`"]),
        (["val,0", "val,1"] * 4, "image,split,label:kind", ["no sample", "`train`"]),
        (
            ["train,2", "val,2"] * 4,
            "image,split,label:kind",
            ["all samples have class 2 of `kind`", "check the labels"],
        ),
        (["train,2", "val,1"] * 4, "image,split,label:kind", ["all training samples have class 2 of `kind`"]),
        (["train,-1", "val,-1"] * 4, "image,split,label:kind", ["no sample (train) has the label `kind`"]),
    ],
)
def test_wrong_label_files_are_named_with_the_remedy(model, tmp_path, capsys, rows, header, sentences):
    code, text = said(model, manifest(tmp_path, rows, header), tmp_path, capsys)
    assert code == 2, text
    assert [sentence for sentence in sentences if sentence not in text] == [], text


def test_a_label_file_that_is_not_there_is_named(model, tmp_path, capsys):
    code, text = said(model, str(tmp_path / "none.csv"), tmp_path, capsys)
    assert code == 2
    assert "none.csv" in text


def test_classes_that_are_in_one_split_only_are_told(model, tmp_path, capsys):
    rows = [*GOOD, "train,4", "train,7", "val,5"]
    code, text = said(model, manifest(tmp_path, rows), tmp_path, capsys)
    assert code == 0, text
    assert "`kind`: no held-out sample has class 4, 7; hold out more (data.held_out, evaluate.samples);" in text
    assert "no training sample has class 5, so it can't be guessed" in text
    (row,) = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert row["notes"]["remark"].startswith("`kind`: no held-out sample has class 4, 7;")
    assert "no training sample has class 5" in (tmp_path / "out" / "report.html").read_text()


def test_many_missing_classes_are_counted():
    assert check_classes("here", "kind", set(range(9)), {0, 1}).startswith(
        "`kind`: no held-out sample has class 2, 3, 4, 5, 6 and 2 more; hold out more"
    )


@pytest.mark.parametrize(
    ("task", "given", "sentence"),
    [
        ("probe:kind", ["evaluate.tasks.probe of kind.inputs=[depth]"], "the model encodes no `depth`"),
        ("predict", ["evaluate.tasks.predict.target=depth"], "the model predicts no `depth`"),
        ("depth_in_metres", [], "the model predicts no `depth`"),
        ("retrieval", [], "the model has no contrastive objective"),
        ("match_accuracy", [], "no objective of type `match`"),
        ("accuracy", [], "no objective of type `classify`"),
        ("likelihood", ["evaluate.tasks.likelihood.target=text"], "no objective of type `translate` predicts `text`"),
        ("predict_features", [], "no objective of type `latent`"),
        ("subsets:kind", [], "subsets are of 2 to 8 inputs"),
    ],
)
def test_a_model_without_what_is_asked_for_is_named(model, tmp_path, capsys, task, given, sentence):
    code, text = said(model, manifest(tmp_path, GOOD), tmp_path, capsys, task, *given)
    assert code == 2, text
    assert sentence in text


def test_data_without_the_models_modality_are_refused(model, tmp_path, capsys):
    (tmp_path / "words.csv").write_text("text,split,label:kind\na,train,0\nb,train,1\nc,val,0\n")
    code, text = said(model, str(tmp_path / "words.csv"), tmp_path, capsys)
    assert code == 2, text
    assert "image" in text
