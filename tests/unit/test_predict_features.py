"""Predicted features on held-out samples against a plain computation of the loss and of the average of each place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m3 import M3Config, M3Model
from m3.errors import M3Error
from m3.evaluate.task import build_tasks
from m3.types import Batch

SIZE, PLACES = 16, 16


def make(**latent) -> M3Model:
    torch.manual_seed(3)
    return M3Model(
        M3Config(
            modalities={"image": {"type": "image", "size": SIZE, "tokenizer": {"type": "patch", "size": 4}}},
            backbone={"width": 24, "depth": 1, "heads": 2},
            objectives={
                "latent": {
                    "type": "latent",
                    "masking": {"type": "fixed", "visible": 4},
                    "decoder": {"type": "self_decoder", "width": 8, "depth": 1, "heads": 2},
                    **latent,
                }
            },
        )
    ).eval()


def batch_of(count: int, seed: int) -> Batch:
    pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    return Batch({"image": pixels.to(torch.uint8)}, torch.arange(count) + 100 * seed)


def test_model_and_average_of_each_place_by_hand():
    model = make(loss="mse")
    (task,) = build_tasks({"features": {"type": "predict_features"}}, model, seed=7)
    train, held_out = [batch_of(5, 1), batch_of(3, 2)], [batch_of(4, 3), batch_of(2, 4)]
    for batch in train:
        task.fit(batch)
    for batch in held_out:
        task.add(batch)
    (row,) = task.rows()

    def features(batch: Batch) -> torch.Tensor:
        return F.layer_norm(model.encode(batch).states, (24,))

    average = torch.cat([features(batch) for batch in train]).mean(0)
    own, errors = [], []
    for batch in held_out:
        prepared = model.prepare(batch, 7)
        with torch.no_grad():
            own.append((model(prepared).parts.parts["latent/image"].sum, len(batch)))
        (view,) = model.objectives["latent"].student_views
        hidden = prepared.plans[view].target["image"]
        truth = features(batch)
        for i in range(len(batch)):
            for place in hidden[i].tolist():
                errors.append((truth[i, place] - average[place]).square().mean())
    assert len(errors) == 6 * 12
    assert row.baseline == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert row.model == pytest.approx(float(sum(total for total, _ in own)) / (6 * 12 * 24), rel=1e-5)
    assert (row.measure, row.baseline_name, row.higher_is_better) == ("mse of features", "average_map", False)
    assert task.rows() == []


def test_a_model_without_such_an_objective_is_refused():
    with pytest.raises(M3Error, match=r"evaluate.tasks.f: the model has no objective of type `latent` `other`"):
        build_tasks({"f": {"type": "predict_features", "objective": "other"}}, make(), seed=0)
