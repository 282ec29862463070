"""The loss of `classify` and its gradient against loops, its samples and processes, labels from sources, bad labels.

Letters: B batch, K classes, D width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor

from m3.config import M3Config
from m3.data.loader import Samples, first_batches
from m3.data.source import Split, open_source
from m3.errors import M3Error
from m3.evaluate.task import build_tasks
from m3.initialise import load_weights
from m3.model import M3Model
from m3.network import build_modalities
from m3.objectives.classify import START, Classify
from m3.recipe import DataSpec
from m3.types import Batch

IMAGE: dict[str, Any] = {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 8}}
LABEL: dict[str, Any] = {"type": "label", "classes": 5, "tokenizer": {"type": "label"}}
BACKBONE: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "final_norm": False}


def built(backbone: dict[str, Any] | None = None, label: dict[str, Any] | None = None, **settings: Any) -> M3Model:
    torch.manual_seed(0)
    objectives = {"classify": {"type": "classify", **settings}}
    modalities = {"image": IMAGE, "label": LABEL | (label or {})}
    model = M3Model(M3Config(modalities=modalities, backbone=BACKBONE | (backbone or {}), objectives=objectives))
    part = model.classifier()
    with torch.no_grad():  # far from the start, where all classes are alike
        part.head.weight.copy_(torch.arange(part.head.weight.numel()).view(part.head.weight.shape).sin())
        part.head.bias.copy_(torch.arange(len(part.head.bias)).cos())
    return model


def batch(count: int = 4, shares: Tensor | None = None, **more: Any) -> Batch:
    pixels = (torch.arange(count * 768) * 41 % 253).view(count, 3, 16, 16).to(torch.uint8)
    labels = torch.eye(5)[torch.tensor([3, 0, 4, 4, 1, 2, 0, 3])[:count]] if shares is None else shares
    return Batch({"image": pixels, "label": labels}, torch.arange(count), **more)


def mixed() -> Tensor:
    return torch.tensor([[0.3, 0.7, 0, 0, 0], [0, 0, 1.0, 0, 0], [0, 0.25, 0, 0, 0.75], [0.5, 0, 0, 0.5, 0]])


# ------------------------------------------------------------------------------------------------ the loss


def slow_loss(vectors: Tensor, weight: Tensor, bias: Tensor, truth: Tensor, smoothing: float, several: bool) -> Tensor:
    """Written from the formulas, class by class, without softmax or sigmoid of torch."""
    total = torch.zeros((), dtype=torch.float64)
    for x, shares in zip(vectors, truth.double(), strict=True):
        scores = [(x * w).sum() + b for w, b in zip(weight, bias, strict=True)]
        for score, share in zip(scores, shares, strict=True):
            if several:
                p = 1 / (1 + (-score).exp())
                total = total - (share * p.log() + (1 - share) * (1 - p).log()) / len(scores)
            else:
                wanted = (1 - smoothing) * share + smoothing / len(scores)
                total = total - wanted * (score.exp() / sum(s.exp() for s in scores)).log()
    return total / len(vectors)


@pytest.mark.parametrize(("smoothing", "several"), [(0.0, False), (0.1, False), (0.0, True)])
def test_the_loss_and_its_gradient_equal_the_formulas(smoothing: float, several: bool) -> None:
    model = built(label={"several": several}, smoothing=smoothing).double()
    shares = (mixed() > 0).float() if several else mixed()
    found = model(batch(shares=shares)).loss
    part = model.classifier()
    assert found is not None
    found.backward()
    states = model.encode(batch()).states.double()  # (B, 4, D), before any norm
    centred = states.mean(1) - states.mean((1, 2), keepdim=True)[:, 0]
    vectors = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    weight, bias = (p.detach().clone().requires_grad_() for p in (part.head.weight, part.head.bias))
    expected = slow_loss(vectors, weight, bias, shares, smoothing, several)
    expected.backward()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)  # the loss itself is in float32
    for own, slow in ((part.head.weight, weight), (part.head.bias, bias)):
        assert own.grad is not None
        assert slow.grad is not None
        torch.testing.assert_close(own.grad, slow.grad, rtol=0, atol=1e-6)


def test_smoothing_by_hand() -> None:
    """All scores equal: ln 5, whatever the smoothing; one score of 10 and the class itself: almost only smoothing."""
    model = built(smoothing=0.1)
    part = model.classifier()
    with torch.no_grad():
        part.head.weight.zero_()
        part.head.bias.zero_()
        assert model(batch(1)).loss.item() == pytest.approx(math.log(5), rel=1e-6)
        part.head.bias[3] = 10.0
        normaliser = math.log(math.exp(10) + 4)
        expected = 0.92 * (normaliser - 10) + 4 * 0.02 * normaliser
        assert model(batch(1)).loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_head_starts_near_zero_and_the_norm_stands_where_the_encoder_has_none() -> None:
    torch.manual_seed(0)
    modalities = {"image": IMAGE, "label": LABEL | {"classes": 4000}}
    config = M3Config(modalities=modalities, backbone=BACKBONE, objectives={"classify": {"type": "classify"}})
    part = M3Model(config).classifier()
    assert float(part.head.weight.detach().std()) == pytest.approx(START, rel=0.02)
    assert isinstance(part.norm, torch.nn.LayerNorm)
    assert part.norm.eps == 1e-6
    assert isinstance(built({"final_norm": True}, pool="class").classifier().norm, torch.nn.Identity)


@pytest.mark.parametrize("pool", ["mean", "class", "attention"])
def test_pools(pool: str) -> None:
    model = built(pool=pool)
    with torch.no_grad():
        encoded = model.encode(batch())
        part: Classify = model.classifier()
        if pool == "mean":
            vectors = encoded.states.mean(1)
        elif pool == "class":
            vectors = encoded.prefix[:, 0]
        else:
            vectors = part.pool(encoded)
            assert not torch.allclose(vectors, encoded.states.mean(1))
        expected = part.norm(vectors) @ part.head.weight.T + part.head.bias
        torch.testing.assert_close(model.classify(batch()), expected)


# ------------------------------------------------------------------------------------------- samples, processes


def test_samples_without_label_have_no_part_and_are_not_counted() -> None:
    model, whole = built(), batch()
    labelled = {"label": torch.tensor([True, False, True, False])}
    prepared = model.prepare(replace(whole, is_present=labelled))
    assert float(model.counts(prepared)["classify/label"]) == 2
    shorter = Batch({name: x[[0, 2]] for name, x in whole.signals.items()}, whole.keys[[0, 2]])
    torch.testing.assert_close(model(prepared).loss, model(shorter).loss)
    nobody = Batch({"image": whole.signals["image"]}, whole.keys)
    assert model(nobody).loss.item() == 0
    assert float(model.counts(model.prepare(nobody))["classify/label"]) == 0


def test_micro_batches_give_the_gradient_of_the_whole() -> None:
    """Divided by the counts of all, as the trainer does; the halves have different numbers of labels."""
    model = built(smoothing=0.1).double()
    whole = batch(8, is_present={"label": torch.tensor([True] * 3 + [False] * 4 + [True])})
    model(whole).loss.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    counts = model.counts(model.prepare(whole))
    for cut in (slice(0, 4), slice(4, 8)):
        signals = {name: x[cut] for name, x in whole.signals.items()}
        part = Batch(signals, whole.keys[cut], {"label": whole.is_present["label"][cut]})
        model(part).parts.total(counts).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-7)


def test_drop_path_is_off_in_evaluation_and_follows_the_keys_in_training() -> None:
    model = built({"drop_path": 0.5})
    plain = built()
    model.eval()
    plain.eval()
    assert torch.equal(model(batch()).loss, plain(batch()).loss)
    model.train()
    first = model(batch()).loss
    assert torch.equal(model(batch()).loss, first)
    assert not torch.equal(model(replace(batch(), keys=torch.arange(4) + 4)).loss, first)


def test_classify_says_nothing_of_a_sample_without_input() -> None:
    found = built().classify(replace(batch(), is_present={"image": torch.tensor([True, False, True, True])}))
    assert found.isnan().all(1).tolist() == [False, True, False, False]
    with pytest.raises(M3Error, match="the batch has none of image"):
        built().classify(Batch({"label": mixed()}, torch.arange(4)))


# ------------------------------------------------------------------------------------------------- the task


def test_accuracy_top_5_and_majority() -> None:
    model = built(label={"classes": 8}).eval()
    (task,) = build_tasks({"class": {"type": "accuracy"}}, model, 0)
    assert task.wants_training_samples
    task.fit(batch(shares=torch.eye(8)[torch.tensor([6, 6, 6, 2])]))
    truth = torch.tensor([6, 1, 2, 6])
    task.add(batch(shares=torch.eye(8)[truth]))
    first, top = task.rows()
    ranked = model.classify(batch(shares=torch.eye(8)[truth])).argsort(1, descending=True)
    assert first.model == pytest.approx(float((ranked[:, 0] == truth).float().mean()))
    assert top.model == pytest.approx(float((ranked[:, :5] == truth[:, None]).any(1).float().mean()))
    assert (first.baseline, first.baseline_name) == (0.5, "majority")
    assert (top.measure, first.measure) == ("top-5", "accuracy")
    assert not task.wants_training_samples


def test_mean_average_precision_of_several_classes() -> None:
    model = built(label={"several": True}).eval()
    truth = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 1, 0, 1.0]])
    (task,) = build_tasks({"tags": {"type": "accuracy"}}, model, 0)
    task.fit(batch(shares=truth))
    task.add(batch(shares=truth))
    (row,) = task.rows()
    logits = model.classify(batch(shares=truth)).detach().numpy()
    expected = [average_precision_score(truth[:, k].numpy(), logits[:, k]) for k in (0, 1, 4)]  # 2: all, 3: none
    assert row.model == pytest.approx(np.mean(expected))
    assert row.baseline == pytest.approx((2 + 1 + 2) / 4 / 3)
    assert row.measure == "mAP"


def test_what_cannot_be_measured_is_said() -> None:
    (task,) = build_tasks({"class": {"type": "accuracy"}}, built(), 0)
    task.fit(batch(shares=torch.eye(5)[[2, 2, 2, 2]]))
    task.add(batch(shares=torch.eye(5)[[2, 2, 2, 2]]))
    with pytest.raises(M3Error, match="all samples have class 2 of `label`, so there is nothing to tell apart"):
        task.rows()
    with pytest.raises(M3Error, match="no held-out sample has a `label` together with image"):
        task.rows()
    other = M3Model(M3Config(modalities={"image": IMAGE}, backbone=BACKBONE, objectives={}))
    with pytest.raises(M3Error, match=r"evaluate\.tasks\.class: the model has no objective of type `classify`"):
        build_tasks({"class": {"type": "accuracy"}}, other, 0)


# --------------------------------------------------------------------------------------------- labels of sources

PARTS = build_modalities({name: {k: v for k, v in x.items() if k != "tokenizer"} for name, x in
                          {"image": IMAGE, "label": LABEL}.items()})  # fmt: skip


def folder(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number * 9, 0, 0)).save(root / name)


def classes(root: Path, split: Split = "train", parts: Any = PARTS, **spec: Any) -> list[int]:
    data = DataSpec(source="folder", root=str(root), **spec)
    samples = Samples(open_source(data, parts, 0, split), parts, data, 0)
    (found,) = first_batches(samples, 99, 99)
    return found.signals["label"].argmax(1).tolist()


def test_folders_are_classes_in_the_order_of_the_training_samples(tmp_path: Path) -> None:
    folder(tmp_path / "train", ["b/1.png", "a/2.png", "c/3.png", "a/4.png"])
    folder(tmp_path / "val", ["c/1.png", "b/2.png"])
    assert classes(tmp_path) == [0, 0, 1, 2]
    assert classes(tmp_path, "held_out") == [1, 2]  # b and c, also where a is missing


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "train", ["b/1.png", "a/2.png"])
    folder(tmp_path / "val", ["d/1.png", "b/2.png"])
    with pytest.raises(M3Error, match=r"d/1.* has no label `label`.*put its class's folder among the training samples"):
        classes(tmp_path, "held_out")
    folder(tmp_path / "one", ["only/1.png", "only/2.png"])
    with pytest.raises(M3Error, match="all 2 training samples have the label `label` 0, so there is nothing to tell"):
        classes(tmp_path / "one", held_out=0)
    folder(tmp_path / "flat", ["1.png", "2.png"])
    with pytest.raises(
        M3Error, match=r"the data give no label `label` for the modality `label` \(labels there: none\)"
    ):
        classes(tmp_path / "flat")


def test_wrong_manifests_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, ["1.png", "2.png"])
    manifest = tmp_path / "data.csv"
    manifest.write_text("image,label\n1.png,0\n2.png,7\n")
    with pytest.raises(M3Error, match=r"00000001: class 7 is none of 0 to 4; correct the label, or set `classes` to"):
        _last(manifest)
    manifest.write_text("image,label\n1.png,0\n2.png,cat\n")
    with pytest.raises(M3Error, match="line 3: `label` must be the number of a class, got 'cat'"):
        classes(manifest)
    manifest.write_text("image,label\n1.png,0\n2.png,\n1.png,2\n")
    with pytest.raises(M3Error, match="00000001 has no label `label`"):
        classes(manifest, held_out=0)
    assert classes(manifest, held_out=0, missing="allow") == [0, 0, 2]


def _last(manifest: Path) -> None:
    """Say why sample 1 can't be read."""
    data = DataSpec(source="folder", root=str(manifest), held_out=0)
    samples = Samples(open_source(data, PARTS, 0, "train"), PARTS, data, 0)
    raise M3Error(samples[0, 1].skipped[0])


def test_several_classes_are_numbers_in_a_column_of_their_own(tmp_path: Path) -> None:
    parts = build_modalities(
        {"image": {"type": "image", "size": 16}, "tags": {"type": "label", "classes": 5, "several": True}}
    )
    folder(tmp_path, ["1.png", "2.png"])
    (tmp_path / "data.csv").write_text('image,tags\n1.png,0 3\n2.png,"4,1"\n')
    data = DataSpec(source="folder", root=str(tmp_path / "data.csv"), held_out=0)
    (found,) = first_batches(Samples(open_source(data, parts, 0, "train"), parts, data, 0), 2, 2)
    assert found.signals["tags"].tolist() == [[1, 0, 0, 1, 0], [0, 1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (5, "class 5 is none of 0 to 4"),
        (-1, "class -1 is none of 0 to 4"),
        ([1, 2], "must be one class, got 2; set `several: true`"),
        ("cat", "must be the number of a class, got 'cat'"),
        (1.5, "must be the whole number of a class, got 1.5"),
        (float("nan"), "must be the number of a class, got nan"),
    ],
)
def test_wrong_labels_are_refused(sample: Any, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        PARTS["label"].to_raw(sample)


def test_digits_have_pictures_and_labels() -> None:
    parts = build_modalities(
        {"image": {"type": "image", "size": 8}, "label": {"type": "label", "of": "digit", "classes": 10}}
    )
    data = DataSpec(source="digits", held_out=179)
    train, held_out = (Samples(open_source(data, parts, 0, split), parts, data, 0) for split in ("train", "held_out"))
    assert (len(train.source), len(held_out.source)) == (1618, 179)
    (found,) = first_batches(held_out, 179, 179)
    assert len(found.signals["label"].argmax(1).unique()) == 10
    assert found.signals["image"].shape == (179, 3, 8, 8)
    assert torch.equal(found.signals["image"][:, 0], found.signals["image"][:, 2])


# ----------------------------------------------------------------------------------------------- settings, init


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(M3Error, match="classify: label names `x`"):
        _build({"label": "x"})
    with pytest.raises(M3Error, match="`image` holds no classes of samples"):
        _build({"label": "image"})
    with pytest.raises(M3Error, match="the label can't be what its own prediction is made of"):
        _build({"inputs": ["image", "label"]})
    with pytest.raises(M3Error, match="several classes at once share no sum to smooth"):
        built(label={"several": True}, smoothing=0.1)


def _build(settings: dict[str, Any]) -> M3Model:
    objectives = {"classify": {"type": "classify", **settings}}
    return M3Model(M3Config(modalities={"image": IMAGE, "label": LABEL}, backbone=BACKBONE, objectives=objectives))


def test_a_head_of_other_classes_starts_anew(tmp_path: Path) -> None:
    built(label={"classes": 7}).save_pretrained(tmp_path)
    model = built()
    before = model.classifier().head.weight.clone()
    said = load_weights(model, str(tmp_path))
    assert "the head of 7 classes is left" in said
    assert "fresh: objectives.classify" in said
    assert torch.equal(model.classifier().head.weight, before)
