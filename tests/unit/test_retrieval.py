"""Retrieval against plain loops over all orders, zero-shot classes by hand, runs compared at equal steps and time.

Letters: N candidates, E width of the shared space.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3 import M3Config, M3Model
from m3.cli import main
from m3.compare import compare
from m3.errors import M3Error
from m3.evaluate.task import Task, build_tasks
from m3.evaluate.tasks import retrieval
from m3.evaluate.tasks.retrieval import recall
from m3.progress import Clock
from m3.types import Batch


def means(found: tuple[Tensor, Tensor]) -> tuple[float, float]:
    return float(found[0].mean()), float(found[1].mean())


def slow(likeness: list[list[float]], right: list[set[int]], k: int) -> float:
    """Share of queries with a right one among the first k, averaged over all orders of equally alike candidates."""
    hits = []
    for row, wanted in zip(likeness, right, strict=True):
        found, orders = 0, 0
        for shuffled in itertools.permutations(range(len(row))):
            ranked = sorted(shuffled, key=lambda j: -row[j])
            found += bool(wanted & set(ranked[:k]))
            orders += 1
        hits.append(found / orders)
    return sum(hits) / len(hits)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("ties", [False, True])
def test_recall_is_that_of_plain_loops(k: int, ties: bool, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", 4)  # two chunks of the six queries
    generator = torch.Generator().manual_seed(4)
    queries = F.normalize(torch.randint(-2, 3, (6, 2), generator=generator).float() + 0.1, dim=-1)
    candidates = F.normalize(torch.randint(-2, 3, (6, 2), generator=generator).float() + 0.2, dim=-1)
    candidates[4] = candidates[1]
    contents = torch.tensor([0, 1, 2, 3, 1, 5])
    likeness = queries @ candidates.T
    right = [{j for j in range(6) if i == j or (ties and contents[i] == contents[j])} for i in range(6)]
    found, chance = means(recall(queries, candidates, k, [contents] if ties else []))
    assert found == pytest.approx(slow(likeness.tolist(), right, k))
    assert chance == pytest.approx(slow([[0.0] * 6] * 6, right, k))
    assert ties or chance == pytest.approx(k / 6)


def test_a_perfect_and_a_collapsed_model():
    eye = torch.eye(5)
    assert means(recall(eye, eye, 1)) == pytest.approx((1.0, 0.2))
    same = torch.ones(5, 3)
    assert means(recall(same, same, 2)) == pytest.approx((0.4, 0.4)), "a model that says the same of all is chance"
    assert means(recall(eye, eye.roll(1, 0), 1)) == pytest.approx((0.0, 0.2))


# -- as a task --------------------------------------------------------------------------------------------

VECTORS = {
    "image": torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]]),
    "text": torch.tensor([[0.8, 0.6], [0.0, 1.0], [-1.0, 0.0], [0.8, 0.6]]),
}
CAPTIONS = torch.tensor([[1, 2], [3, -1], [4, -1], [1, 2]], dtype=torch.int32)


def make(tasks: dict) -> list[Task]:
    image = {"type": "image", "size": 8, "tokenizer": {"type": "patch", "size": 8}}
    text = {"type": "text", "vocabulary": "words:red blue cube cone", "length": 2, "tokenizer": {"type": "embedding"}}
    contrast = {"type": "contrast", "width": 2, "sides": {"image": {}, "text": {}}}
    model = M3Model(
        M3Config(
            modalities={"image": image, "text": text},
            backbone={"width": 8, "depth": 1, "heads": 2},
            objectives={"contrast": contrast},
        )
    )
    return build_tasks(tasks, model, 0)


def batch(rows: slice, is_present: list[bool] | None = None, labels: list[int] | None = None) -> Batch:
    count = len(CAPTIONS[rows])
    signals = {"image": torch.zeros(count, 3, 8, 8, dtype=torch.uint8), "text": CAPTIONS[rows]}
    signals["image"] += torch.arange(4, dtype=torch.uint8)[rows].reshape(-1, 1, 1, 1)
    there = {} if is_present is None else {"text": torch.tensor(is_present)}
    return Batch(signals, torch.arange(4)[rows], there, {} if labels is None else {"shape": torch.tensor(labels)})


def answer(task: Task, vectors: dict[str, Tensor], monkeypatch) -> None:
    """Let the model embed sample i of image colour i as row i."""

    def embed(given: Batch, objective: str | None) -> dict[str, Tensor]:
        rows = given.signals["image"][:, 0, 0, 0].long()
        return {side: x[rows] for side, x in vectors.items()}

    monkeypatch.setattr(task.model, "embed", embed)


def test_both_ways_over_all_batches_and_then_anew(monkeypatch):
    (task,) = make({"found": {"type": "retrieval", "k": [1, 2]}})
    answer(task, VECTORS, monkeypatch)
    for rows in (slice(0, 3), slice(3, 4)):
        task.add(batch(rows))
    rows = task.rows()
    named = {row.task: (row.measure, row.model, row.baseline) for row in rows}
    # image 0 finds text 0 or its equal 3; 1 its own; 2 its own; 3 (0.6, 0.8): text 0 and 3 at 0.96, text 1 at 0.8.
    assert named == {
        "found, image to text @1": ("recall@1 of 4", 0.75, 0.25),
        "found, image to text @2": ("recall@2 of 4", 1.0, 0.5),
        # text 0 (0.8, 0.6): image 3 at 0.96, then 0 at 0.8; text 1, 2: their own; text 3: image 3.
        "found, text to image @1": ("recall@1 of 4", 0.75, 0.25),
        "found, text to image @2": ("recall@2 of 4", 1.0, 0.5),
    }
    assert all(row.baseline_name == "chance" and row.higher_is_better for row in rows)
    assert task.rows() == []


def test_equal_captions_count_where_the_recipe_says_so(monkeypatch):
    (task,) = make({"found": {"type": "retrieval", "ties": "any"}})
    answer(task, VECTORS, monkeypatch)
    task.add(batch(slice(0, 2)))
    task.add(batch(slice(2, 4)))
    to_text, to_image = task.rows()
    # Samples 0 and 3 have one caption, so either text, or either picture, is right for both.
    assert (to_text.model, to_image.model) == (1.0, 1.0)
    assert to_text.baseline == pytest.approx((0.5 + 0.25 + 0.25 + 0.5) / 4)


def test_samples_without_one_side_are_neither_asked_nor_found(monkeypatch):
    (task,) = make({"found": {"type": "retrieval"}})
    there = {"image": VECTORS["image"], "text": VECTORS["text"].clone()}
    there["text"][3] = torch.nan
    answer(task, there, monkeypatch)
    task.add(batch(slice(0, 4)))
    assert [(row.measure, row.model) for row in task.rows()] == [("recall@1 of 3", 1.0)] * 2


def test_a_real_model_gives_rows():
    (task,) = make({"found": {"type": "retrieval", "ties": "any"}})
    task.add(batch(slice(0, 4), [True, True, False, True]))
    assert [row.task for row in task.rows()] == ["found, image to text", "found, text to image"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"type": "retrieval", "sides": ["image", "texts"]},
            r"evaluate.tasks.t.sides: there is no side `texts`.*`text`",
        ),
        ({"type": "retrieval", "objective": "x"}, r"evaluate.tasks.t: the model has no contrastive objective `x`"),
        (
            {"type": "zero_shot", "label": "s", "classes": ["a", "b"], "of": "x"},
            r"there is no side `x` in the contrast\.",
        ),
        (
            {"type": "zero_shot", "label": "s", "classes": ["a", "b"], "templates": ["a b"]},
            r"evaluate.tasks.t.templates: `a b` has no place for the class; write {}",
        ),
    ],
)
def test_mistakes_are_named(task: dict, message: str):
    with pytest.raises(M3Error, match=message):
        make({"t": task})


def test_zero_shot_by_hand(monkeypatch):
    """Class vectors are the means of two templates: (0.8, 0.6) + (1, 0) and (0, 1) + (-0.6, 0.8), made unit again."""
    spec = {"type": "zero_shot", "label": "shape", "classes": ["cube", "cone"], "templates": ["red {}", "blue {}"]}
    (task,) = make({"shape": spec})
    told = {
        "red cube": [0.8, 0.6], "blue cube": [1.0, 0.0], "red cone": [0.0, 1.0], "blue cone": [-0.6, 0.8]
    }  # fmt: skip
    vocabulary = task.model.modalities["text"].vocabulary
    pictures = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, -0.6], [torch.nan] * 2])

    def embed(given: Batch, objective: str | None) -> dict[str, Tensor]:
        if "image" in given.signals:
            return {"image": pictures}
        return {"text": torch.tensor([told[vocabulary.decode(row.tolist())] for row in given.signals["text"]])}

    monkeypatch.setattr(task.model, "embed", embed)
    means = torch.tensor([[1.8, 0.6], [-0.6, 1.8]])
    torch.testing.assert_close(task._class_vectors(), means / means.norm(dim=-1, keepdim=True))
    task.add(batch(slice(0, 4), labels=[0, 0, 0, 1]))
    (row,) = task.rows()
    assert (row.measure, row.model, row.baseline) == ("accuracy of 2", pytest.approx(2 / 3), 1.0)
    task.add(batch(slice(0, 4), labels=[0, -1, 1, 1]))
    (row,) = task.rows()
    assert (row.model, row.baseline) == (0.5, 0.5)
    with pytest.raises(M3Error, match=r"evaluate.tasks.shape.label: the data give no `shape`"):
        task.add(batch(slice(0, 4)))


# -- runs side by side ------------------------------------------------------------------------------------


def write_run(folder: Path, seconds: float, values: dict[int, float]) -> Path:
    """A run of which every step took `seconds`, after a first one that is not timed."""
    folder.mkdir()
    lines = []
    for step in range(1, max(values) + 1):
        lines.append(
            {"step": step, "lr": 0.1} | ({"samples_per_second": 8 / seconds, "seconds": seconds} if step > 1 else {})
        )
        if step in values:
            lines.append({"step": step, "held_out/r": values[step], "baseline/r": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_at_equal_steps_and_equal_time(tmp_path: Path, capsys):
    slow_run = write_run(tmp_path / "slow", 2.0, {2: 0.2, 4: 0.4})
    fast_run = write_run(tmp_path / "fast", 1.0, {2: 0.1, 4: 0.3, 6: 0.5})
    found = compare([slow_run, fast_run])
    # Both were measured at step 4; the fast one ended after 5 s, when the slow one had last been measured at 2 s.
    assert found == [
        {
            "run": "slow",
            "at step": {"step": 4, "seconds": 6.0, "r": 0.4},
            "at time": {"step": 2, "seconds": 2.0, "r": 0.2},
        },
        {
            "run": "fast",
            "at step": {"step": 4, "seconds": 3.0, "r": 0.3},
            "at time": {"step": 6, "seconds": 5.0, "r": 0.5},
        },
    ]
    assert main(["compare", str(slow_run), str(fast_run)]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    at_step, at_time = printed.split("after 4 steps")[1].split("after 5 s of training")
    assert "seconds 6 3" in at_step
    assert "r 0.400 0.300" in at_step
    assert "step 2 6" in at_time
    assert "r 0.200 0.500" in at_time


def test_what_can_not_be_compared_is_named(tmp_path: Path, capsys):
    run = write_run(tmp_path / "run", 1.0, {2: 0.2})
    assert main(["compare", str(run), str(tmp_path / "none")]) == 2
    assert "it has no metrics.jsonl" in capsys.readouterr().err
    assert main(["compare", str(run)]) == 2
    assert "give at least two runs of different names" in capsys.readouterr().err
    other = write_run(tmp_path / "other", 1.0, {3: 0.2})
    assert main(["compare", str(run), str(other)]) == 2
    assert "no evaluated step in common" in capsys.readouterr().err


def test_saving_and_evaluating_take_no_time_of_training(monkeypatch):
    now = 0.0
    monkeypatch.setattr("m3.progress.time.perf_counter", lambda: now)
    clock = Clock(0, 8)
    now = 4.0
    first = clock.line(4, {}, 0.1, 1.0, {})
    now = 10.0  # evaluated from 4 to 10
    clock.leave_out(4.0)
    now = 12.0
    second = clock.line(6, {}, 0.1, 1.0, {})
    assert (first["seconds"], second["seconds"]) == (4.0, 2.0)
    assert second["samples_per_second"] == 8.0


def test_bench_measures_further_recipes_with_the_same_changes(monkeypatch, capsys):
    from m3 import bench

    given = []
    monkeypatch.setattr(bench, "bench", lambda recipes, *rest: given.append((recipes, rest)))
    assert main(["bench", "clip_tiny", "flip_tiny", "flip_tiny_75", "train.precision=fp32", "--batch", "64"]) == 0
    ((recipes, rest),) = given
    assert [recipe.name for recipe in recipes] == ["clip_tiny", "flip_tiny", "flip_tiny_75"]
    assert {recipe.train.precision for recipe in recipes} == {"fp32"}
    assert rest[-1] == 64
    assert [bench.with_batch(recipe, 64).train.micro_batch for recipe in recipes] == [64] * 3
    monkeypatch.undo()
    assert main(["bench", "clip_tiny", "clip_tiny"]) == 2
    assert "bench: name each recipe once" in capsys.readouterr().err
