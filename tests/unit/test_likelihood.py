"""Nats per token: the model's by the loss itself, the baselines by hand.

Letters: B samples, K classes.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from m3 import M3Config, M3Model
from m3.errors import M3Error
from m3.evaluate.task import build_tasks
from m3.types import Batch

TEXT = {"type": "text", "vocabulary": "words:a b c", "length": 4, "sentinels": 3, "tokenizer": {"type": "embedding"}}
CODES = {"type": "semantic_map", "size": 2, "classes": 5, "tokenizer": {"type": "embedding"}}


def build() -> M3Model:
    torch.manual_seed(1)
    masking = {"type": "budget", "visible": [0, 4], "targets": 4}
    return M3Model(
        M3Config(
            modalities={"codes": CODES, "text": TEXT},
            backbone={"width": 16, "depth": 1, "heads": 2, "class_tokens": 0, "modality_embedding": True},
            objectives={"translate": {"type": "translate", "masking": masking}},
        )
    ).eval()


def batch_of(texts: list[list[int]], first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first)
    text = torch.tensor([words + [-1] * (4 - len(words)) for words in texts], dtype=torch.int32)
    codes = torch.randint(0, 5, (len(texts), 2, 2), generator=generator).to(torch.uint8)
    return Batch({"codes": codes, "text": text}, torch.arange(first, first + len(texts)))


def measure(model: M3Model, settings: dict, train: list[Batch], held_out: list[Batch]) -> tuple[float, float]:
    (task,) = build_tasks({"it": {"type": "likelihood", **settings}}, model, seed=3)
    assert task.wants_training_samples == (settings.get("baseline", "unigram") == "unigram")
    for batch in train:
        task.fit(batch)
    for batch in held_out:
        task.add(batch)
    (row,) = task.rows()
    assert (row.measure, row.higher_is_better, task.rows()) == ("nats per token", False, [])
    assert not task.wants_training_samples
    return row.model, row.baseline


def test_unigram_by_hand():
    """Sentences that are hidden whole: their words and the sentinel 5 that closes them are asked for, one more each."""
    train, held_out = [[1, 2], [1, 1, 3]], [[1], [2, 2, 2]]
    model = build()
    found = measure(model, {"target": "text", "visible": {"codes": 1.0}}, [batch_of(train)], [batch_of(held_out, 9)])
    counts = Counter(dict.fromkeys(range(7), 1)) + Counter([1, 2, 5, 1, 1, 3, 5])
    asked = [1, 5, 2, 2, 2, 5]
    expected = -sum(math.log(counts[k] / sum(counts.values())) for k in asked) / len(asked)
    assert found[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("baseline", ["unigram", "nothing"])
def test_the_models_value_is_the_mean_over_all_batches(baseline):
    model = build()
    batches = [batch_of([[1, 2, 3], [2], [1, 1]], 4), batch_of([[3, 3, 3, 3]], 20)]
    settings = {"target": "codes", "visible": {"text": 1.0}, "baseline": baseline}
    own, other = measure(model, settings, batches if baseline == "unigram" else [], batches)
    total = blind = 0.0
    for batch in batches:
        for visible, sums in (({"text": 1.0}, "own"), ({}, "blind")):
            loss, _, _ = model.losses(batch, visible, 3, "translate")
            part = loss.parts["codes"]
            assert part.count == 4 * len(batch)
            total += part.sum.item() * (sums == "own")
            blind += part.sum.item() * (sums == "blind")
    assert own == pytest.approx(total / 16, rel=1e-6)
    if baseline == "nothing":
        assert other == pytest.approx(blind / 16, rel=1e-6)
        assert other != pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "text"}, None),
        ({"target": "tex"}, r"no objective of type `translate` predicts `tex`.* Did you mean `text`"),
        ({"target": "text", "visible": {"image": 1.0}}, "the encoder never sees `image`"),
        ({"target": "text", "baseline": "nothing"}, "`visible` must name other modalities than `text`"),
        ({"target": "text", "visible": {"text": 0.5}, "baseline": "nothing"}, "must name other modalities"),
    ],
)
def test_settings_are_checked(settings, message):
    if message is None:
        assert len(build_tasks({"it": {"type": "likelihood", **settings}}, build(), 0)) == 1
        return
    with pytest.raises(M3Error, match=message):
        build_tasks({"it": {"type": "likelihood", **settings}}, build(), 0)


@pytest.mark.parametrize("target", ["codes", "text"])
def test_what_a_sample_adds_is_what_it_adds_alone(target):
    model, batch = build(), batch_of([[1, 2, 3], [2], [1, 1]], 4)
    visible = {"text": 1.0} if target == "codes" else {"codes": 1.0}
    sums, counts = model.sample_losses(batch, visible, 3, "translate")[0][target]
    for i in range(3):
        alone = Batch({name: x[i : i + 1] for name, x in batch.signals.items()}, batch.keys[i : i + 1])
        part = model.losses(alone, visible, 3, "translate")[0].parts[target]
        assert (float(sums[i]), int(counts[i])) == (pytest.approx(part.sum.item(), rel=1e-5), part.count)
