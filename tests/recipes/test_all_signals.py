"""All signals of the world in one model, with dropped modalities and repeated crops: trains, resumes, batches alike."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3.checkpoint import newest
from m3.data.loader import Order, Samples
from m3.data.source import open_source as open_data
from m3.errors import M3Error
from m3.evaluate.task import Row
from m3.model import M3Model
from m3.network import build_modalities
from m3.processor import M3Processor
from m3.recipe import Recipe, recipe_from
from m3.schedule import plan_run
from m3.train import build_model, gradients, open_source, train

WORDS = (
    "a an empty ground small large red green blue yellow purple cyan orange sphere cube cylinder cone left right of in"
)
MODALITIES = {
    "image": {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 4}, "positions": {"type": "learned"}},
    "depth": {"type": "depth", "size": 16, "tokenizer": {"type": "patch", "size": 4}},
    "semantic": {
        "type": "semantic_map",
        "size": 16,
        "classes": 6,
        "tokenizer": {"type": "class_patch", "size": 4, "class_width": 8},
    },
    "normals": {"type": "normals", "size": 16, "has_holes": True, "tokenizer": {"type": "patch", "size": 4}},
    "video": {
        "type": "video",
        "size": 16,
        "frames": 4,
        "stride": 1,
        "positions": {"type": "rotary"},
        "tokenizer": {"type": "tube", "size": 8, "frames": 2, "fps": 4},
    },
    "text": {
        "type": "text",
        "length": 12,
        "vocabulary": WORDS.split(),
        "tokenizer": {"type": "embedding"},
        "positions": {"type": "rotary"},
    },
    "audio": {"type": "audio", "frames": 64, "bands": 16, "tokenizer": {"type": "spectrogram", "size": 8}},
    "boxes": {
        "type": "boxes",
        "labels": ["sphere", "cube", "cylinder", "cone"],
        "count": 4,
        "bins": 20,
        "tokenizer": {"type": "embedding"},
        "positions": {"type": "learned"},
    },
    "points": {
        "type": "points",
        "count": 64,
        "attributes": 3,
        "positions": {"type": "coordinates"},
        "tokenizer": {"type": "point_group", "groups": 8, "neighbours": 8, "embed_width": [8, 16, 16]},
    },
}
LOSSES = {
    "depth": "l1",
    "semantic": "cross_entropy",
    "text": "cross_entropy",
    "boxes": "cross_entropy",
    "points": "chamfer",
}


def recipe(out: Path, **changes) -> Recipe:
    settings = {
        "out": str(out),
        "modalities": MODALITIES,
        "backbone": {"width": 32, "depth": 2, "heads": 2, "axis_order": "yx", "modality_embedding": True},
        "objectives": {
            "reconstruct": {
                "type": "reconstruct",
                "masking": {"type": "dirichlet", "visible": 40},
                "decoder": {"type": "cross_decoder", "width": 24, "depth": 1, "heads": 2},
                "average": "sample",
                "targets": {name: {"loss": LOSSES.get(name, "mse")} for name in MODALITIES},
            }
        },
        "data": {
            "source": "world",
            "samples": 16,
            "held_out": 4,
            "workers": 0,
            "drop": 0.5,
            "repeats": 2,
            "crop": [0.5, 1.0],
            "augment": {"image": [{"type": "color_jitter", "brightness": 0.4}]},
        },
        "train": {
            "steps": 3,
            "batch_size": 8,
            "micro_batch": 4,
            "lr": 1e-3,
            "log_every": 1,
            "save_every": 2,
            "trackers": [],
            "precision": "fp32",
            "threads": 1,
        },
        "evaluate": {
            "samples": 4,
            "preview_rows": 2,
            "tasks": {name: {"target": name} for name in MODALITIES},
        },
    }
    for key, value in changes.items():
        settings[key] = {**settings[key], **value}
    return recipe_from(settings, "all_signals")


def lines_of(run: Path) -> list[dict]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "lr" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[Row]]:
    own = recipe(tmp_path_factory.mktemp("all") / "run")
    return own, train(own)


def test_it_trains_and_measures_every_signal(trained: tuple[Recipe, list[Row]]) -> None:
    own, rows = trained
    assert {row.task for row in rows} == set(MODALITIES)
    assert all(torch.isfinite(torch.tensor([row.model, row.baseline])).all() for row in rows)
    lines = lines_of(own.folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for name in MODALITIES:
        assert any(line[f"reconstruct/{name}"] > 0 for line in lines), name
    assert (own.folder / "preview.png").stat().st_size > 1000


def test_it_resumes_to_the_bit(trained: tuple[Recipe, list[Row]]) -> None:
    own, _ = trained
    final, before = load_file(own.folder / "model" / "model.safetensors"), lines_of(own.folder)
    shutil.rmtree(newest(own.folder) or own.folder)
    train(own, resume=True)
    again = load_file(own.folder / "model" / "model.safetensors")
    assert again.keys() == final.keys()
    assert all(torch.equal(again[key], value) for key, value in final.items())
    for new, old in zip(lines_of(own.folder), before, strict=True):
        assert {k: v for k, v in new.items() if "/" in k} == {k: v for k, v in old.items() if "/" in k}


def test_the_saved_model_reads_any_subset(trained: tuple[Recipe, list[Row]]) -> None:
    model = M3Model.from_pretrained(trained[0].folder / "model")
    processor = M3Processor.from_pretrained(trained[0].folder / "model")
    batch = processor(
        text=["a red cube", None, "a small blue sphere left of a cone"], boxes=[None, [("cube", 0, 0, 1, 1)], None]
    )
    assert model.encode(batch).sequence.isfinite().all()
    predicted = model.reconstruct(batch, visible=1.0).predicted
    assert set(predicted) == set(MODALITIES)
    assert predicted["video"].shape == (3, 3, 4, 16, 16)
    assert predicted["audio"].shape == (3, 1, 64, 16)
    assert predicted["text"].shape == (3, 8)


@contextmanager
def nothing(*_: object) -> Iterator[None]:
    yield


class Alone:
    """The part of Accelerate that one process needs."""

    num_processes = 1

    no_sync = autocast = nothing

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def reduce(self, x: torch.Tensor, how: str) -> torch.Tensor:
        return x


def test_one_batch_of_eight_is_two_of_four_and_eight_of_one(tmp_path: Path) -> None:
    """The same gradients and losses, although a longer sentence in the other half changes what is filled up."""
    own = recipe(tmp_path)
    model = build_model(own)
    samples = Samples(open_source(own, model, "train"), model.modalities, own.data, own.seed)
    found = {}
    for micro in (8, 4, 1):
        model.zero_grad()
        order = Order(16, own.seed, micro, 8 // micro, stop=1, repeats=2)
        prepared = [model.prepare(samples.collate([samples[at] for at in batch])) for batch in order]
        assert len(prepared) == 8 // micro
        _, sums, counts, _ = gradients(Alone(), model, model, prepared)  # type: ignore[arg-type]
        found[micro] = (sums, counts, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for micro in (4, 1):
        torch.testing.assert_close(found[micro][0], found[8][0], rtol=1e-4, atol=1e-4)
        assert torch.equal(found[micro][1], found[8][1])
        for name, gradient in found[8][2].items():
            torch.testing.assert_close(found[micro][2][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


# -- drop and repeats -----------------------------------------------------------------------------------


def samples_with(**data) -> Samples:
    own = recipe(Path("unused"), data=data)
    modalities = build_modalities({name: MODALITIES[name] for name in ("image", "text", "boxes")})
    return Samples(open_data(own.data, modalities, 0, data.get("split", "train")), modalities, own.data, 0)


def test_each_modality_is_dropped_with_its_probability_and_one_always_stays() -> None:
    half = [set(samples_with(drop=0.5)[(position, position % 16)].signals) for position in range(300)]
    assert all(half)
    # Of three, all are lost with 1/8; then one of them stays: 1/2 + 1/8 * 1/3.
    for name in ("image", "text", "boxes"):
        assert abs(sum(name in there for there in half) / 300 - (0.5 + 1 / 24)) < 0.09
    only = samples_with(drop={"text": 1.0})
    assert all(set(only[(p, p % 16)].signals) == {"image", "boxes"} for p in range(20))
    everything = samples_with(drop=1.0)
    assert {len(everything[(p, p % 16)].signals) for p in range(20)} == {1}


def test_a_dropped_modality_must_exist() -> None:
    with pytest.raises(M3Error, match=r"^data.drop names `texts`, which is no modality. Did you mean `text`\?$"):
        samples_with(drop={"texts": 0.5})


def test_repeats_take_each_sample_several_times_in_a_row_and_read_it_once() -> None:
    order = [pair for batch in Order(5, 0, 4, stop=5, repeats=2) for pair in batch]
    assert [position for position, _ in order] == list(range(20))
    indices = [index for _, index in order]
    assert indices[::2] == indices[1::2]
    assert sorted(indices[:10:2]) == sorted(indices[10::2]) == list(range(5)), "two whole epochs"
    samples = samples_with(drop=0.0)
    reads = []
    read = samples.source.read
    samples.source.read = lambda number: (reads.append(number), read(number))[1]  # type: ignore[method-assign]
    loaded = [samples[pair] for pair in order[:8]]
    assert reads == indices[:8:2]
    assert not torch.equal(loaded[0].signals["image"], loaded[1].signals["image"]), "another crop"


def test_an_epoch_counts_every_repeat(tmp_path: Path) -> None:
    own = recipe(tmp_path, train={"steps": None, "epochs": 3})
    assert plan_run(own.train, 16 * own.data.repeats, 1).steps == 3 * 16 * 2 // 8
