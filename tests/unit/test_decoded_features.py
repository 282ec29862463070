"""Features decoded from codes on held-out samples, against plain cosines with the teacher's and the means of places."""

from __future__ import annotations

import pytest
import torch

from m3 import M3Config, M3Model
from m3.errors import M3Error
from m3.evaluate.task import build_tasks
from m3.types import Batch

SIZE = 32
TEACHER = {"type": "teacher", "model": "timm:vit_tiny_patch16_224", "size": 64}


def make(**settings) -> M3Model:
    torch.manual_seed(3)
    objective = {
        "type": "autoencode",
        "of": "image",
        "coder": {"type": "vit", "depth": 1},
        "quantiser": {"type": "fsq", "levels": [4, 4]},
        **settings,
    }
    return M3Model(
        M3Config(
            modalities={"image": {"type": "image", "size": SIZE, "tokenizer": {"type": "patch", "size": 8}}},
            backbone={"width": 24, "depth": 1, "heads": 2},
            objectives={"codes": objective},
        )
    ).eval()


def batch_of(count: int, seed: int) -> Batch:
    pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    return Batch({"image": pixels.to(torch.uint8)}, torch.arange(count) + 100 * seed)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt()))


@torch.no_grad()
def test_model_and_average_of_each_place_by_hand() -> None:
    model = make(target=TEACHER, loss="cosine")
    (task,) = build_tasks({"features": {"type": "decoded_features"}}, model, seed=7)
    train, held_out = [batch_of(5, 1), batch_of(3, 2)], [batch_of(4, 3), batch_of(2, 4)]
    assert task.wants_training_samples
    for batch in train:
        task.fit(batch)
    assert not task.wants_training_samples, "the teacher stays as it is"
    for batch in held_out:
        task.add(batch)
    (row,) = task.rows()

    coder = model.objectives["codes"]
    features = [coder.truth("image", model.tokenise(batch)["image"]) for batch in train]
    average = torch.cat(features).mean(0)
    own, baseline = [], []
    for batch in held_out:
        tokens = model.tokenise(batch)["image"]
        decoded = coder._decode(coder.quantiser.decode(coder.indices(tokens)), tokens)
        for guess, truth in zip(decoded, coder.truth("image", tokens), strict=True):
            own += [cosine(guess[n], truth[n]) for n in range(16)]
            baseline += [cosine(average[n], truth[n]) for n in range(16)]
    assert len(own) == 6 * 16
    assert row.model == pytest.approx(sum(own) / len(own), rel=1e-4)
    assert row.baseline == pytest.approx(sum(baseline) / len(baseline), rel=1e-4)
    assert (row.measure, row.baseline_name, row.higher_is_better) == ("cosine of features", "average_map", True)
    assert task.rows() == []


def test_a_model_whose_codes_stand_for_pictures_is_refused() -> None:
    with pytest.raises(
        M3Error, match=r"evaluate.tasks.f: the model has no objective of type `autoencode` that decodes"
    ):
        build_tasks({"f": {"type": "decoded_features"}}, make(), seed=0)
