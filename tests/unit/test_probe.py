"""The linear probe: against scikit-learn used directly, on features that tell and on noise, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor

from m3 import M3Config, M3Model
from m3.errors import M3Error
from m3.evaluate.features import raw_values
from m3.evaluate.task import Row, build_tasks
from m3.evaluate.tasks.probe import best_strength, classify
from m3.show import metrics_table
from m3.types import Batch

SIZE = 8


def make(class_tokens: int = 1) -> M3Model:
    torch.manual_seed(3)
    return M3Model(
        M3Config(
            modalities={
                "image": {"type": "image", "size": SIZE, "tokenizer": {"type": "patch", "size": 4}},
                "semantic": {
                    "type": "semantic_map",
                    "size": SIZE,
                    "classes": 3,
                    "tokenizer": {"type": "class_patch", "size": 4, "class_width": 4},
                },
            },
            backbone={"width": 24, "depth": 2, "heads": 2, "class_tokens": class_tokens},
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "inputs": ["image", "semantic"],
                    "decoder": {"type": "cross_decoder", "width": 8, "depth": 1, "heads": 2},
                    "targets": {"image": {}},
                }
            },
        )
    ).eval()


def batch_of(count: int, seed: int, labels: dict[str, Tensor] | None = None) -> Batch:
    """Pictures of noise; `bright` says in which third of the range they lie, `noise` says nothing."""
    random = torch.Generator().manual_seed(seed)
    bright = torch.randint(0, 3, (count,), generator=random)
    pixels = torch.randint(0, 120, (count, 3, SIZE, SIZE), generator=random) + 45 * bright.view(-1, 1, 1, 1)
    noise = torch.randint(0, 3, (count,), generator=random)
    signals = {
        "image": pixels.to(torch.uint8),
        "semantic": torch.randint(0, 3, (count, SIZE, SIZE), generator=random, dtype=torch.uint8),
    }
    return Batch(signals, torch.arange(count), labels=labels or {"bright": bright, "noise": noise})


def measure(model: M3Model, train: list[Batch], held_out: list[Batch], **settings) -> Row:
    (task,) = build_tasks({"read": {"type": "probe", "label": "bright", **settings}}, model, seed=5)
    assert task.wants_training_samples
    for batch in train:
        task.fit(batch)
    for batch in held_out:
        task.add(batch)
    (row,) = task.rows()
    return row


def halves(batch: Batch) -> list[Batch]:
    """The batch in two of different sizes."""
    cut = len(batch) // 3
    parts = []
    for own in (slice(0, cut), slice(cut, None)):
        signals = {name: x[own] for name, x in batch.signals.items()}
        labels = {name: x[own] for name, x in batch.labels.items()}
        there = {name: x[own] for name, x in batch.is_present.items()}
        parts.append(Batch(signals, batch.keys[own], there, labels))
    return parts


def by_hand(train: np.ndarray, labels: np.ndarray, others: np.ndarray, truth: np.ndarray, kind: str) -> float:
    """Try every C on the last fifth, then use the best on all."""

    def classify(x: np.ndarray, y: np.ndarray, z: np.ndarray, strength: float) -> np.ndarray:
        scale = StandardScaler().fit(x)
        linear = LogisticRegression(C=strength, max_iter=1000) if kind == "logistic" else LinearSVC(C=strength)
        return linear.fit(scale.transform(x), y).predict(scale.transform(z))

    cut, best, most = len(labels) - -(-len(labels) // 5), 0.0, -1.0
    for strength in (0.001, 0.01, 0.1, 1.0, 10.0):
        right = (classify(train[:cut], labels[:cut], train[cut:], strength) == labels[cut:]).mean()
        if right > most:
            best, most = strength, right
    return (classify(train, labels, others, best) == truth).mean()


@pytest.mark.parametrize("kind", ["logistic", "svm"])
def test_accuracy_is_that_of_scikit_learn_used_directly(kind):
    random = np.random.default_rng(2)
    labels = {"train": random.integers(0, 4, 203), "held_out": random.integers(0, 4, 150)}
    centres = random.normal(size=(4, 10)) * np.arange(1, 11)
    x = {name: centres[y] + random.normal(size=(len(y), 10)) * 2 * np.arange(1, 11) for name, y in labels.items()}
    expected = by_hand(x["train"], labels["train"], x["held_out"], labels["held_out"], kind)
    assert 0.4 < expected < 0.95
    strength = best_strength(x["train"], labels["train"], kind)
    guesses = classify(x["train"], labels["train"], x["held_out"], kind, strength)
    assert (guesses == labels["held_out"]).mean() == pytest.approx(expected)


def test_a_row_compares_pooled_features_with_principal_components_of_the_values():
    model, train, held_out = make(), batch_of(150, 1), batch_of(90, 2)
    row = measure(model, halves(train), halves(held_out), inputs=["image"])
    x, y = train.labels["bright"].numpy(), held_out.labels["bright"].numpy()
    only = [Batch({"image": b.signals["image"]}, b.keys) for b in (train, held_out)]
    own = [model.encode(b).states.mean(1).numpy() for b in only]
    flat = [model.tokenise(b)["image"].values.flatten(1).numpy() for b in only]
    assert flat[0].shape[1] > own[0].shape[1] == 24
    project = PCA(24, svd_solver="randomized", random_state=5).fit(flat[0])
    assert row.model == pytest.approx(by_hand(own[0], x, own[1], y, "logistic"))
    assert row.baseline == pytest.approx(
        by_hand(*np.array([project.transform(flat[0])]), x, project.transform(flat[1]), y, "logistic")
    )
    assert (row.task, row.measure, row.baseline_name) == ("read", "accuracy of bright", "pca")
    assert row.higher_is_better


@pytest.mark.parametrize("classifier", ["logistic", "svm"])
def test_features_that_tell_the_label_win_and_noise_does_not(classifier):
    model, train, held_out = make(), batch_of(200, 1), batch_of(200, 2)
    told = measure(model, [train], [held_out], baseline="majority", classifier=classifier)
    assert told.model > 0.8
    assert told.is_won
    noise = measure(model, [train], [held_out], label="noise", baseline="majority", classifier=classifier)
    assert abs(noise.model - 1 / 3) < 0.1
    labels = train.labels["noise"].tolist()
    most = max(range(3), key=labels.count)
    assert noise.baseline == pytest.approx((held_out.labels["noise"] == most).float().mean().item())


@pytest.mark.parametrize(("settings", "states"), [({"layer": 0}, "mean"), ({"pool": "class", "layer": 1}, "class")])
def test_states_of_a_block_or_of_the_class_token_are_read(settings, states):
    model, train, held_out = make(), batch_of(120, 1), batch_of(80, 2)
    found = measure(model, [train], [held_out], baseline="majority", **settings)
    own = []
    for batch in (train, held_out):
        layer = model.encode(batch, (settings["layer"],)).layers[settings["layer"]]
        own.append((layer[:, 0] if states == "class" else layer[:, 1:].mean(1)).numpy())
    x, y = train.labels["bright"].numpy(), held_out.labels["bright"].numpy()
    assert found.model == pytest.approx(by_hand(own[0], x, own[1], y, "logistic"))


def test_samples_without_the_label_or_without_all_inputs_are_left_out():
    model, train, held_out = make(), batch_of(90, 1), batch_of(60, 2)
    clean = measure(model, [train], [held_out], inputs=["image"])
    useless = batch_of(30, 3)
    unlabelled = replace(useless, labels={"bright": torch.full((30,), -1)})
    absent = replace(useless, is_present={"image": torch.zeros(30, dtype=torch.bool)})
    without = [unlabelled, absent, replace(useless, labels={})]
    assert measure(model, [*without, train, *without], [*without, held_out, *without], inputs=["image"]) == clean


def test_an_evaluation_begins_anew():
    model, train, held_out = make(), batch_of(90, 1), batch_of(60, 2)
    (task,) = build_tasks({"read": {"type": "probe", "label": "bright"}}, model, seed=0)
    rows = []
    for _ in range(2):
        task.fit(train)
        task.add(held_out)
        rows.append(task.rows())
        task.fit(batch_of(40, 9))
        task.add(batch_of(40, 9))
        task.rows()
    assert rows[0] == rows[1]


def test_fresh_weights_are_others_and_always_the_same():
    model, train, held_out = make(), batch_of(150, 1), batch_of(120, 2)
    state = torch.random.get_rng_state()
    rows = []
    for _ in range(2):
        (task,) = build_tasks({"read": {"type": "probe", "label": "bright", "baseline": "random"}}, model, seed=5)
        task.fit(train)
        task.add(held_out)
        rows += task.rows()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert rows[0] == rows[1]
    fresh = dict(task.encodings.fresh.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.std() > 0:
            assert not torch.equal(fresh[name], parameter), name
    x, y = train.labels["bright"].numpy(), held_out.labels["bright"].numpy()
    own = [task.encodings.fresh.encode(b).pooled.numpy() for b in (train, held_out)]
    assert rows[0].baseline == pytest.approx(by_hand(own[0], x, own[1], y, "logistic"))


def test_one_class_alone_teaches_nothing():
    model, train, held_out = make(), batch_of(20, 1), batch_of(50, 2)
    train = replace(train, labels={"bright": torch.full((20,), 2)})
    with pytest.raises(M3Error, match="all training samples have class 2 of `bright`, so nothing can be learned"):
        measure(model, [train], [held_out])


def test_raw_values_are_token_values_with_0_for_unknown_ones_and_shares_of_classes():
    model, batch = make(), batch_of(4, 1)
    ids = torch.zeros(4, SIZE, SIZE, dtype=torch.uint8)
    ids[0, 0, :4], ids[0, 1, :2] = 1, 2
    there = torch.tensor([True, True, False, True])
    batch = Batch({"image": batch.signals["image"], "semantic": ids}, batch.keys, {"image": there})
    values = raw_values(model, batch)
    assert values.shape == (4, 3 * SIZE * SIZE + 3)
    torch.testing.assert_close(values[0, -3:], torch.tensor([58 / 64, 4 / 64, 2 / 64]))
    assert values[2, :-3].abs().max() == 0
    tokens = model.tokenise(batch)["image"].values
    torch.testing.assert_close(values[3, :-3], tokens[3].flatten())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"inputs": ["imag"]}, "evaluate.tasks.read.inputs: the model encodes no `imag`.*image"),
        ({"pool": "class"}, "evaluate.tasks.read.pool: the encoder has no class token; use `mean`"),
        ({"layer": 2}, "evaluate.tasks.read.layer: there is no block 2; the last of 2 is number 1"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings, sentence):
    with pytest.raises(M3Error, match=sentence):
        build_tasks({"read": {"type": "probe", "label": "bright", **settings}}, make(class_tokens=0), seed=0)


def test_the_table_explains_the_baselines():
    rows = [
        Row("read", "accuracy of x", 0.5, 0.25, name, True)
        for name in ("raw", "pca", "random", "majority", "of a plugin")
    ]
    caption = str(metrics_table(rows).caption)
    lines = [
        "normalised values themselves",
        "as the model has features",
        "with fresh weights",
        "for all of them",
        "of a plugin",
    ]
    assert [line.endswith(end) for line, end in zip(caption.splitlines(), lines, strict=True)] == [True] * 5


def test_an_unknown_label_is_named():
    with pytest.raises(M3Error, match=r"read.label: no sample \(train\) has the label `brigt` .*`bright`"):
        measure(make(), [batch_of(20, 1)], [batch_of(20, 2)], label="brigt")
