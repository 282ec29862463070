"""Several clips, crops and random copies of a held-out sample, whose probabilities are averaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from m3.config import M3Config
from m3.data.loader import Samples, first_batches
from m3.data.source import Sample, Source, open_source
from m3.errors import M3Error
from m3.evaluate.task import build_tasks
from m3.evaluate.tasks.accuracy import mean_of_looks, spread
from m3.held_out import HeldOut
from m3.model import M3Model
from m3.network import build_modalities
from m3.plugins import Tokenizer
from m3.pooling import Pooling
from m3.progress import Lines, Skipped
from m3.recipe import DataSpec, recipe_from
from m3.signals import Look
from m3.types import Encoded, MaskPlan

CLIPS: dict[str, Any] = {
    "video": {
        "type": "video",
        "size": 4,
        "frames": 2,
        "stride": 2,
        "tokenizer": {"type": "tube", "size": 4, "frames": 2},
    },
    "label": {"type": "label", "classes": 3, "tokenizer": {"type": "label"}},
}


class Films(Source):
    """Videos of 11 frames of 4 x 8: the frame's number + 100 on the left, + 200 on the right."""

    def __len__(self) -> int:
        return 4

    def read(self, index: int) -> Sample:
        frames = np.zeros((11, 4, 8, 3), np.uint8) + np.arange(11, dtype=np.uint8)[:, None, None, None]
        frames[:, :, :4] += 100
        frames[:, :, 4:] += 200
        return Sample({"video": frames}, str(index), {"label": index % 3})


def films() -> Samples:
    modalities = build_modalities(CLIPS)
    source = Films(DataSpec(), {"video": modalities["video"]}, 0, "held_out")
    return Samples(source, modalities, DataSpec(augment={}), 0)


def test_a_look_chooses_the_clip_and_the_part() -> None:
    def shown(look: Look) -> tuple[list[int], list[int]]:
        video = next(first_batches(films().seen(look), 1, 1)).signals["video"][0]
        assert video.shape == (3, 2, 4, 4)
        return video[0, :, 0, 0].tolist(), video[0, :, 0, -1].tolist()

    assert shown(Look(0.0, 0.0)) == ([100, 102], [100, 102])
    assert shown(Look(1.0, 1.0)) == ([208, 210], [208, 210])
    assert shown(Look()) == ([104, 106], [204, 206])
    assert shown(Look(0.25, 0.0)) == ([102, 104], [102, 104])


def test_votes_are_other_changes_each_and_the_same_every_time() -> None:
    entry = {"type": "points", "count": 8, "tokenizer": {"type": "point_group", "groups": 2, "neighbours": 4}}
    modalities = build_modalities({"points": entry})
    spec = DataSpec(source="world", samples=4, held_out=4, augment={"points": [{"type": "scale_translate"}]})
    samples = Samples(open_source(spec, modalities, 0, "held_out"), modalities, spec, 0)

    def points(look: Look) -> torch.Tensor:
        return next(first_batches(samples.seen(look), 2, 2)).signals["points"]

    plain, first, second = (points(Look(vote=vote)) for vote in (None, 0, 1))
    assert torch.equal(plain, points(Look()))
    assert torch.equal(first, points(Look(vote=0)))
    assert not torch.equal(first, plain)
    assert not torch.equal(first, second)
    ratio = (first[0] - first[0, :1]) / (plain[0] - plain[0, :1])
    torch.testing.assert_close(ratio[2:], ratio[1:2].expand(6, -1), rtol=1e-3, atol=1e-3)


def test_views_are_spread_evenly() -> None:
    assert spread(1) == [0.5]
    assert spread(3) == [0.0, 0.5, 1.0]
    assert spread(5) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_the_mean_of_looks_by_hand() -> None:
    keys = torch.tensor([4, 2, 2, 4])
    guesses = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5], [0.6, 0.4]])
    truth = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    mean, same = mean_of_looks(keys, guesses, truth)
    torch.testing.assert_close(mean, torch.tensor([[0.75, 0.25], [0.4, 0.6]]))
    assert same.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def model() -> M3Model:
    torch.manual_seed(0)
    backbone = {"width": 16, "depth": 1, "heads": 2, "class_tokens": 0}
    return M3Model(M3Config(modalities=CLIPS, backbone=backbone, objectives={"c": {"type": "classify"}})).eval()


@torch.no_grad()
def test_accuracy_averages_the_probabilities_of_clips_and_crops(tmp_path: Path) -> None:
    part, samples = model(), films()
    part.classifier().head.weight.normal_()
    (task,) = build_tasks({"class": {"type": "accuracy", "clips": 3, "crops": 2}}, part, 0)
    assert len(task.looks) == 6
    settings = {"objectives": {"c": {"type": "classify"}}, "modalities": CLIPS, "train": {"steps": 1}}
    recipe = recipe_from({**settings, "evaluate": {"samples": 4, "fit_samples": 4}}, "films")
    console = Console(quiet=True)
    metrics = Lines(tmp_path / "metrics.jsonl", console)
    held_out = HeldOut(
        recipe, part, [task], samples.source, samples.source, Skipped(console, "s", 4, 0.0), console, metrics
    )
    looked = []
    original = part.classify

    def classify(batch: Any, objective: str | None = None) -> torch.Tensor:
        looked.append(original(batch, objective))
        return looked[-1]

    part.classify = classify  # type: ignore[method-assign]
    (row,) = held_out.measure()
    assert len(looked) == 6
    wanted = torch.stack([x.softmax(1) for x in looked]).mean(0).argmax(1)
    assert row.model == pytest.approx(float((wanted == torch.tensor([0, 1, 2, 0])).float().mean()))
    assert torch.stack(looked).std(0).max() > 1e-3


def test_the_class_token_beside_the_maximum() -> None:
    tokenizer: Tokenizer = model().tokenizers["video"]  # type: ignore[assignment]
    tower = tokenizer.tower.model_copy(update={"class_tokens": 1, "width": 2})
    pool = Pooling("class_max", tower)
    states = torch.tensor([[[9.0, 8.0], [1.0, -4.0], [3.0, -5.0], [7.0, 7.0]]])
    plan = MaskPlan({"video": torch.arange(3)[None]}, {})
    assert pool.width == 4
    assert pool(Encoded(states, 1, plan)).tolist() == [[9.0, 8.0, 7.0, 7.0]]
    plan = replace(plan, is_valid=torch.tensor([[True, True, False]]))
    assert pool(Encoded(states, 1, plan)).tolist() == [[9.0, 8.0, 3.0, -4.0]]
    with pytest.raises(M3Error, match="`class_max` needs a class token"):
        Pooling("class_max", tower.model_copy(update={"class_tokens": 0}))


def test_several_classes_may_have_shares() -> None:
    label = build_modalities({"a": {**CLIPS["label"], "several": True}})["a"]
    assert label.to_raw("2:0.25 0").tolist() == [1.0, 0.0, 0.25]
    assert label.to_raw("1").tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(M3Error, match=r"share of a class lies in \[0, 1\], got 1.5"):
        label.to_raw("2:1.5")
    with pytest.raises(M3Error, match="must be the number of a class"):
        label.to_raw("2:much")
