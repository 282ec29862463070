"""Probes when modalities are missing: which figures belong to which subset."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from m3 import M3Config, M3Model
from m3.errors import M3Error
from m3.evaluate.task import Row, build_tasks
from m3.evaluate.tasks.probe import best_strength, classify
from m3.types import Batch

SIZE = 8


def make(names: tuple[str, ...] = ("image", "other", "noise")) -> M3Model:
    torch.manual_seed(3)
    picture = {"type": "image", "size": SIZE, "tokenizer": {"type": "patch", "size": 4}}
    return M3Model(
        M3Config(
            modalities=dict.fromkeys(names, picture),
            backbone={"width": 24, "depth": 1, "heads": 2},
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "decoder": {"type": "cross_decoder", "width": 8, "depth": 1, "heads": 2},
                    "targets": {"image": {}},
                    "inputs": list(names),
                }
            },
        )
    ).eval()


def batch_of(count: int, seed: int) -> Batch:
    """`image` and `other` tell half of the class each: which of two it is not; `noise` tells nothing."""
    random = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (count,), generator=random)

    def pixels(bit: torch.Tensor) -> torch.Tensor:
        noise = torch.randint(0, 90, (count, 3, SIZE, SIZE), generator=random)
        return (noise + 120 * bit.view(-1, 1, 1, 1)).to(torch.uint8)

    signals = {"image": pixels(label % 2), "other": pixels(label // 2), "noise": pixels(label * 0)}
    return Batch(signals, torch.arange(count), labels={"class": label})


def measure(**settings) -> tuple[Any, list[Row], Batch, Batch]:
    (task,) = build_tasks({"robust": {"type": "subsets", "label": "class", **settings}}, make(), seed=0)
    train, held_out = batch_of(200, 1), batch_of(150, 2)
    task.fit(train)
    task.add(held_out)
    return task, task.rows(), train, held_out


def test_every_subset_has_the_accuracies_of_its_two_probes():
    task, rows, train, held_out = measure()
    assert [row.task for row in rows] == [
        "robust, image",
        "robust, other",
        "robust, noise",
        "robust, all but noise",
        "robust, all but other",
        "robust, all but image",
        "robust, all",
    ]
    assert len(task.matrix) == 7
    y, truth = train.labels["class"].numpy(), held_out.labels["class"].numpy()

    def features(batch: Batch, names: tuple[str, ...]) -> np.ndarray:
        return task.model.encode(Batch({n: batch.signals[n] for n in names}, batch.keys)).pooled.numpy()

    def accuracy(fitted: tuple[str, ...], asked: tuple[str, ...]) -> float:
        x = features(train, fitted)
        guesses = classify(x, y, features(held_out, asked), "logistic", best_strength(x, y, "logistic"))
        return float((guesses == truth).mean())

    everything = ("image", "other", "noise")
    for subset in (("image",), ("image", "other"), everything):
        expected = accuracy(everything, subset), accuracy(subset, subset)
        assert task.matrix[subset] == pytest.approx(expected)
    assert task.matrix["image", "other"][1] > 0.9
    assert 0.3 < task.matrix["image",][1] < 0.65
    assert task.matrix["noise",][1] < 0.4
    assert rows[-1].model == task.matrix[everything][0]
    assert (
        rows[-1].notes["every subset: probe of all inputs, own probe"]["image + other"] == task.matrix["image", "other"]
    )


def test_the_picture_has_a_line_for_every_subset(tmp_path):
    task, *_ = measure(inputs=["image", "other"])
    ((title, figure),) = task.figures().items()
    assert title == "robust: every subset of the inputs"
    assert len(figure.axes[1].patches) == 3
    figure.savefig(tmp_path / "subsets.png")


def test_samples_that_lack_an_input_or_the_label_are_left_out():
    _, rows, train, held_out = measure()
    (task,) = build_tasks({"robust": {"type": "subsets", "label": "class"}}, make(), seed=0)
    extra = batch_of(20, 3)
    absent = Batch(extra.signals, extra.keys, {"noise": torch.zeros(20, dtype=torch.bool)}, extra.labels)
    unlabelled = Batch(extra.signals, extra.keys, labels={"class": torch.full((20,), -1)})
    for batch in (train, absent, unlabelled, Batch({"image": extra.signals["image"]}, extra.keys, labels=extra.labels)):
        task.fit(batch)
    for batch in (absent, held_out):
        task.add(batch)
    assert [row.model for row in task.rows()] == [row.model for row in rows]


def test_what_has_no_subsets_is_refused():
    with pytest.raises(M3Error, match=r"robust.inputs: subsets are of 2 to 8 inputs, the model has image; name some"):
        measure(inputs=["image"])
    (task,) = build_tasks({"robust": {"type": "subsets", "label": "clas"}}, make(), seed=0)
    task.fit(batch_of(9, 1))
    with pytest.raises(M3Error, match=r"no sample \(train\) has the label `clas` and all of image, other, noise"):
        task.rows()
