"""Visual question answering: scores of answers by hand, what samples may be, the accuracy, questions of the world."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from m3 import M3Config, M3Model
from m3.data.loader import Samples, first_batches
from m3.data.source import open_source
from m3.data.world import Offer, WorldSource
from m3.data.world.question import QUESTIONS
from m3.errors import M3Error
from m3.evaluate.task import build_tasks
from m3.modalities.answers import Answers, vqa_score
from m3.network import build_modalities
from m3.recipe import DataSpec
from m3.types import Batch
from tests.unit.source_files import picture

NAMES = ["red", "dark red", "blue", "2"]


def part(**settings: Any) -> Answers:
    return Answers(Answers.Spec(**{"classes": 4, "names": NAMES, **settings}))


@pytest.mark.parametrize(("count", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_score_of_an_answer_is_the_mean_over_nine_of_ten_people(count: int, score: float) -> None:
    """By hand (0.3 of one in ten is 9 times 1/3 of 10), and by walking through the ten subsets of nine."""
    assert vqa_score(count, 10) == pytest.approx(score)
    people = [True] * count + [False] * (10 - count)
    subsets = [min(sum(nine) / 3, 1.0) for nine in combinations(people, 9)]
    assert vqa_score(count, 10) == pytest.approx(sum(subsets) / len(subsets))


def test_people_may_be_counted_or_listed_and_unknown_answers_count_nothing() -> None:
    expected = [0.9, 0.6, 0.0, 0.0]  # 3 red, 2 dark red, 5 others
    said = ["red", "Red ", "dark red", "red", "dark red", *"abcde"]
    counted = {"red": 2, "RED": 1, "dark red": 2, "crimson": 5}
    for sample in (said, counted, json.dumps(said), json.dumps(counted)):
        torch.testing.assert_close(part().to_raw(sample), torch.tensor(expected))
    torch.testing.assert_close(part().to_raw({"no idea": 10}), torch.zeros(4))
    torch.testing.assert_close(part(names=None).to_raw({2: 10}), torch.tensor([0.0, 0, 1, 0]))
    scored = part(given="scores").to_raw({"red": 1, "blue": 0.3})
    torch.testing.assert_close(scored, torch.tensor([1.0, 0, 0.3, 0]))


def test_the_names_go_from_their_file_into_the_config(tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("\n".join(NAMES) + "\n")
    settings = {"type": "answers", "classes": 4, "names": str(tmp_path / "answers.txt")}
    assert Answers.resolve(settings) == {**settings, "names": NAMES}
    assert part(names=str(tmp_path / "answers.txt")).numbers == {name: i for i, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    ("settings", "sample", "sentence"),
    [
        ({}, {"red": 1}, r"1 answers are too few .* set `given: scores`, or use `type: label`"),
        ({}, "red", r"answers are an object or a list in JSON, got .red.; write {\"red\": 9}"),
        ({}, {"red": "many"}, r"answers are names with numbers of people"),
        ({}, 3, r"answers are names with numbers of people, got 3"),
        ({"classes": 5}, None, r"4 names, 4 of them different, stand for 5 classes"),
        ({"names": ["red", "RED", "blue", "2"]}, None, r"4 names, 3 of them different"),
        ({"names": "nowhere.txt"}, None, r"there is no file nowhere.txt; write one answer in each line"),
    ],
)
def test_mistakes_are_sentences(settings: dict[str, Any], sample: Any, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        part(**settings).to_raw(sample)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_manifest_holds_the_answers(tmp_path: Path, ending: str) -> None:
    for name in ("1.png", "2.png"):
        picture(tmp_path / name, 100)
    rows = [("1.png", ["red"] * 8 + ["blue", "dark red"]), ("2.png", {"2": 3, "two": 7})]
    if ending == "jsonl":
        lines = [json.dumps({"image": image, "answers": answers}) for image, answers in rows]
    else:
        cells = [(image, json.dumps(answers).replace('"', '""')) for image, answers in rows]
        lines = ["image,answers", *(f'{image},"{answers}"' for image, answers in cells)]
    (tmp_path / f"data.{ending}").write_text("\n".join(lines) + "\n")
    parts = build_modalities(
        {"image": {"type": "image", "size": 16}, "answers": {"type": "answers", "classes": 4, "names": NAMES}}
    )
    data = DataSpec(source="folder", root=str(tmp_path / f"data.{ending}"), held_out=0)
    (found,) = first_batches(Samples(open_source(data, parts, 0, "train"), parts, data, 0), 2, 2)
    torch.testing.assert_close(found.signals["answers"], torch.tensor([[1.0, 0.3, 0.3, 0], [0, 0, 0, 0.9]]))


def test_accuracy_is_the_mean_score_of_the_answers_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = M3Model(
        M3Config(
            modalities={
                "image": {"type": "image", "size": 8, "tokenizer": {"type": "patch", "size": 4}},
                "answers": {"type": "answers", "classes": 4, "names": NAMES, "tokenizer": {"type": "label"}},
            },
            backbone={"width": 16, "depth": 1, "heads": 2},
            objectives={"classify": {"type": "classify", "label": "answers"}},
        )
    ).eval()
    logits = torch.tensor([[3.0, 1, 0, 0], [0, 2, 0, 1], [0, 0, 5, 1], [0, 0, 1, 4]])
    monkeypatch.setattr(model, "classify", lambda batch, objective: logits[batch.keys])
    truth = torch.tensor([[0.9, 1.0, 0, 0], [0.6, 0.3, 0, 1.0], [0, 0, 0, 0], [0, 1.0, 0.3, 0.6]])
    pictures = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    (task,) = build_tasks({"vqa": {"type": "vqa_accuracy"}}, model, 0)
    task.fit(Batch({"image": pictures, "answers": truth.flip(1)}, torch.arange(4)))  # most of all: `blue`
    task.add(Batch({"image": pictures, "answers": truth}, torch.arange(4)))
    (row,) = task.rows()
    assert row.model == pytest.approx((0.9 + 0.3 + 0.0 + 0.6) / 4)
    assert row.baseline == pytest.approx((0 + 0 + 0 + 0.3) / 4)
    assert row.interval is not None
    assert row.interval[0] < row.model < row.interval[1]
    assert (row.measure, row.baseline_name) == ("VQA accuracy", "majority")


def test_the_world_asks_and_answers() -> None:
    names = ("image", "text", "answers")
    scenes = WorldSource(3, "train", 24, 16, 16, signals=names, offer=Offer(is_asked=True))
    seen = set()
    for index in range(24):
        scene = scenes.read(index)
        (label,) = (name for name, text in QUESTIONS.items() if text == scene["signals"]["text"])
        answer = WorldSource.LABEL_NAMES[label][scene["labels"][label]]
        assert scene["signals"]["answers"] == {answer: 10}
        seen.add(label)
    assert seen == QUESTIONS.keys()
    plain = WorldSource(3, "train", 24, 16, 16, signals=("image", "text")).read(0)
    assert plain["signals"]["text"].startswith("a ")
    assert (plain["signals"]["image"] == scenes.read(0)["signals"]["image"]).all()


def test_a_world_that_is_not_asked_has_no_answers() -> None:
    parts = build_modalities({"answers": {"type": "answers", "classes": 4, "names": NAMES}})
    with pytest.raises(M3Error, match=r"the world answers only what it asks; set data.options.text=question"):
        open_source(DataSpec(), parts, 0, "train")


def test_one_class_for_each_sample_has_no_such_accuracy() -> None:
    model = M3Model(
        M3Config(
            modalities={
                "image": {"type": "image", "size": 8, "tokenizer": {"type": "patch", "size": 4}},
                "label": {"type": "label", "classes": 4, "tokenizer": {"type": "label"}},
            },
            backbone={"width": 16, "depth": 1, "heads": 2},
            objectives={"classify": {"type": "classify"}},
        )
    )
    with pytest.raises(M3Error, match=r"vqa: `label` has one class for each sample; use `type: accuracy`"):
        build_tasks({"vqa": {"type": "vqa_accuracy"}}, model, 0)
