"""Neighbours, probes by gradient descent, ranks and intervals: against scikit-learn and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from m3 import M3Config, M3Model
from m3.backbone import BackboneSpec
from m3.errors import M3Error
from m3.evaluate.linear import Attentive, train_linear
from m3.evaluate.task import Row, Task, build_tasks
from m3.evaluate.tasks.zero_shot import classes_of, templates_of
from m3.show import metrics_table
from m3.types import Batch


def make() -> M3Model:
    torch.manual_seed(3)
    return M3Model(
        M3Config(
            modalities={"image": {"type": "image", "size": 8, "tokenizer": {"type": "patch", "size": 4}}},
            backbone={"width": 24, "depth": 1, "heads": 2},
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "decoder": {"type": "self_decoder", "width": 8, "depth": 1, "heads": 2},
                    "targets": {"image": {}},
                }
            },
        )
    ).eval()


def digits(numbers: slice, classes: int = 10) -> Batch:
    data = load_digits()
    pixels = torch.from_numpy(data.images[numbers] * 15).to(torch.uint8).unsqueeze(1).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(data.target[numbers]).long()
    return Batch({"image": pixels}, torch.arange(len(pixels)), labels={"digit": labels.where(labels < classes, -1)})


def task_of(**settings) -> Task:
    (task,) = build_tasks({"read": settings}, make(), seed=5)
    return task


def measure(task: Task, train: Batch, held_out: Batch) -> list[Row]:
    task.fit(train)
    task.add(held_out)
    return task.rows()


def votes_by_hand(x: np.ndarray, y: np.ndarray, others: np.ndarray, k: int, temperature: float | None) -> np.ndarray:
    """Vote sample by sample; equal votes go to the smallest class."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    guesses = []
    for other in others:
        alike = unit @ (other / np.linalg.norm(other))
        best = np.argsort(-alike, kind="stable")[:k]
        votes = np.zeros(y.max() + 1)
        for i in best:
            votes[y[i]] += 1.0 if temperature is None else math.exp(alike[i] / temperature)
        guesses.append(votes.argmax())
    return np.array(guesses)


@pytest.mark.parametrize(("weights", "temperature"), [("uniform", None), ("softmax", 0.07)])
def test_neighbours_vote_as_in_a_plain_loop(weights, temperature):
    task = task_of(type="knn", label="digit", k=[7], weights=weights, baseline="majority")
    train, held_out = digits(slice(0, 200)), digits(slice(200, 300))
    (row,) = measure(task, train, held_out)
    x, z = (task.model.encode(batch).pooled.numpy() for batch in (train, held_out))
    y, truth = train.labels["digit"].numpy(), held_out.labels["digit"].numpy()
    expected = votes_by_hand(x, y, z, 7, temperature)
    assert 0.4 < row.model < 1
    assert row.model == pytest.approx((expected == truth).mean())
    assert row.notes["k"] == 7


def test_the_number_of_neighbours_is_chosen_on_training_samples_alone():
    task = task_of(type="knn", label="digit", k=[1, 150], baseline=["majority"])
    (row,) = measure(task, digits(slice(0, 200)), digits(slice(200, 260)))
    assert row.notes["k"] == 1  # nearly all 160 others vote otherwise
    assert row.notes["k tried"]["1"] > row.notes["k tried"]["150"]


def test_a_row_for_every_baseline_with_intervals_and_notes():
    task = task_of(type="knn", label="digit", baseline=["random", "pca", "raw", "majority"])
    rows = measure(task, digits(slice(0, 200)), digits(slice(200, 300)))
    assert [row.baseline_name for row in rows] == ["random", "pca", "raw", "majority"]
    assert len({row.model for row in rows}) == 1
    assert len({row.baseline for row in rows}) > 2
    for row in rows:
        low, high = row.interval
        assert low < row.model < high
        assert row.difference[0] <= row.model - row.baseline <= row.difference[1]
        assert row.notes["samples"] == 100
    assert rows[-1].is_sure is True
    text = metrics_table([Row("a", "m", 0.5, 0.4, "raw", True, difference=(-0.1, 0.2))])
    assert "no more than chance" in str(text.caption)


def test_classes_that_training_lacks_are_named_in_the_notes():
    task = task_of(type="probe", label="digit", baseline="majority")
    (row,) = measure(task, digits(slice(0, 200), classes=8), digits(slice(200, 300)))
    assert row.notes["classes without training samples"] == [8, 9]
    assert row.model < 0.9


def test_pictures_show_confusion_and_neighbours(tmp_path):
    for kind, title in (("probe", "read: what is taken for what"), ("knn", "read: nearest neighbours")):
        task = task_of(type=kind, label="digit", baseline="majority")
        measure(task, digits(slice(0, 100)), digits(slice(200, 230)))
        ((found, figure),) = task.figures().items()
        assert found == title
        figure.savefig(tmp_path / f"{kind}.png")
        assert (tmp_path / f"{kind}.png").stat().st_size > 3000


# -- by gradient descent ----------------------------------------------------------------------------------


def features(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes, told apart by columns of very different sizes."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    centres = np.random.default_rng(0).normal(size=(3, 6)) * 3
    return ((centres[labels] + random.normal(size=(count, 6))) * 10.0 ** np.arange(-2, 4)).astype(np.float32), labels


@pytest.mark.parametrize(("optimizer", "rate"), [("lars", 1.0), ("sgd", 0.1), ("adamw", 0.01)])
def test_descent_finds_what_logistic_regression_finds(optimizer, rate):
    (x, y), (z, truth) = features(1, 400), features(2, 300)
    guesses = train_linear({"train": x, "held_out": z}, y, optimizer, rate, epochs=20, batch_size=64, seed=0)
    assert (guesses == truth).mean() > 0.95
    again = train_linear({"train": x, "held_out": z}, y, optimizer, rate, epochs=20, batch_size=64, seed=0)
    assert (guesses == again).all()


def test_every_learning_rate_is_reported_and_the_best_counts():
    task = task_of(type="probe", label="digit", classifier="sgd", rates=[1e-6, 1.0], epochs=20, baseline="majority")
    (row,) = measure(task, digits(slice(0, 300)), digits(slice(300, 400)))
    tried = row.notes["learning rates tried"]
    assert row.model == max(tried.values()) == tried["1.0"] > tried["1e-06"]


# -- spread ---------------------------------------------------------------------------------


def test_rank_and_deviation_are_those_of_the_features():
    task = task_of(type="spread")
    batch = digits(slice(0, 60))
    task.add(batch)
    rank, deviation = task.rows()
    x = task.model.encode(batch).pooled.numpy()
    values = np.linalg.svd(x, compute_uv=False)
    share = values / values.sum()
    assert rank.model == pytest.approx(math.exp(-(share * np.log(share + 1e-7)).sum()), rel=1e-4)
    assert deviation.model == pytest.approx(x.std(0, ddof=1).mean() / np.sqrt((x**2).mean()), rel=1e-4)
    assert rank.baseline != rank.model
    assert task.rows() == []


def test_a_label_that_nothing_has_is_refused():
    with pytest.raises(M3Error, match=r"read.label: no sample \(train\) has the label `digi` .*`digit`"):
        measure(task_of(type="knn", label="digi"), digits(slice(0, 20)), digits(slice(20, 30)))


# -- zero-shot names --------------------------------------------------------------------------------------


def test_the_classes_and_templates_of_imagenet_are_open_clips():
    import open_clip

    names, templates = classes_of("imagenet"), templates_of("openai")
    assert (len(names), len(templates), len(templates_of("simple"))) == (1000, 80, 7)
    assert names[0] == "tench"
    sentences = [text.replace("{}", names[7]) for text in templates]
    assert sentences == [template(names[7]) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert (classes_of(("a", "b")), templates_of(("a {}",))) == (("a", "b"), ("a {}",))


def test_an_attentive_probe_finds_what_the_mean_of_the_tokens_hides():
    """The class is the value of one token of many, whose place changes; tokens that do not exist are never read."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (256,), generator=random)
    states = torch.randn(256, 6, 8, generator=random)
    states[:, :, 0] = 0
    place = torch.randint(0, 5, (256,), generator=random)
    states[torch.arange(256), place, 0] = 8.0  # which token it is
    states[torch.arange(256), place, 1] = 3.0 * (2 * labels - 1)
    states[:, 5] = torch.nan
    x = states.flatten(1).numpy()
    features = {"train": x[:200], "held_out": x[200:]}
    pool = Attentive(BackboneSpec(width=8, depth=1, heads=2), seed=1)
    before = torch.get_rng_state()
    guesses = train_linear(features, labels[:200].numpy(), "adamw", 0.01, 40, 50, 0, pool)
    assert torch.equal(torch.get_rng_state(), before)
    assert (guesses == labels[200:].numpy()).mean() > 0.9
    again = train_linear(
        {split: np.pad(part, ((0, 0), (0, 16)), constant_values=np.nan) for split, part in features.items()},
        *(labels[:200].numpy(), "adamw", 0.01, 40, 50, 0, Attentive(BackboneSpec(width=8, depth=1, heads=2), seed=1)),
    )
    assert (again == guesses).mean() > 0.97


def test_states_of_all_tokens_are_kept_for_an_attentive_probe():
    settings = {"classifier": "sgd", "optimizer": "adamw", "rates": [0.01], "epochs": 2, "baseline": "random"}
    task = task_of(type="probe", label="digit", pool="attentive", **settings)
    (row,) = measure(task, digits(slice(40)), digits(slice(40, 60)))
    assert row.baseline_name == "random"
    states = task.model.encode(digits(slice(40, 60))).sequence.detach()
    np.testing.assert_allclose(task.features["held_out"], states.flatten(1).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"type": "knn"}, r"pool: `attentive` is learned; use it with `type: probe, classifier: sgd`"),
        ({"type": "probe"}, r"pool: `attentive` is learned"),
        ({"type": "probe", "classifier": "sgd"}, r"baseline: `pca` has no tokens to attend to; set baseline: random"),
    ],
)
def test_what_can_not_attend_is_refused(settings, sentence):
    with pytest.raises(M3Error, match=sentence):
        task_of(label="digit", pool="attentive", **settings)


def test_tasks_share_the_features_of_a_batch_and_the_fresh_network(monkeypatch):
    """Two tasks, one of another layer, and both baselines: three encodings of a batch; alone each makes its own."""
    model, seen = make(), []
    settings = {"label": "digit", "baseline": "random"}
    tasks = build_tasks(
        {"a": {"type": "knn", **settings}, "b": {"type": "probe", **settings}, "c": {"type": "spread"}}
        | {"d": {"type": "probe", **settings, "layer": 0, "baseline": "majority"}},
        model,
        5,
    )
    assert len({id(task.encodings.fresh) for task in tasks}) == 1
    encode = M3Model.encode
    monkeypatch.setattr(M3Model, "encode", lambda self, *given: seen.append(self is model) or encode(self, *given))
    first, second = digits(slice(40)), digits(slice(40, 80))
    for batch in (first, second):
        for task in tasks:
            task.add(batch)
    assert seen == [True, False, True] * 2
    found = tasks[0]._kept["held_out"].features["model"]
    expected = [encode(model, batch).pooled.detach() for batch in (first, second)]
    torch.testing.assert_close(found, expected)
    tasks[0].add(first)
    assert len(seen) == 8
    for task in tasks[1:]:
        task.add(first)
    assert len(seen) == 9, "of another layer"
    tasks[2].rows()
    tasks[0].add(first)
    assert len(seen) == 11, "by then the weights may be others"
