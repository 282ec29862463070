"""Contrastive losses: by hand, against the plain loss of one large batch, and cut into micro-batches.

Letters: B samples, E width of the shared space.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3 import M3Config, M3Model
from m3.errors import M3Error
from m3.plugins import Pool
from m3.processes import concatenate
from m3.types import Batch

WORDS = "a b c d e f g h"


def make(loss: str = "softmax", names: tuple[str, ...] = ("image", "text"), **changes) -> M3Model:
    torch.manual_seed(3)
    text = {"type": "text", "vocabulary": f"words:{WORDS}", "length": 5, "tokenizer": {"type": "embedding"}}
    image = {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 8}}
    small = {"width": 24, "depth": 1, "heads": 2}
    every = {
        "image": {"masking": {"type": "fixed", "visible": 0.5}, "pool": "all"},
        "text": {"pool": "first"},
        "depth": {"pool": "mean"},
    }
    depth = {"type": "depth", "size": 16, "tokenizer": {"type": "patch", "size": 8}}
    modalities = {"image": image, "text": text, "depth": depth}
    kind = {"loss": "softmax", "smoothing": 0.1} if loss == "smoothed" else {"loss": loss}
    settings = {"type": "contrast", "width": 12, **kind, "sides": {name: every[name] for name in names}}
    model = M3Model(
        M3Config(
            modalities={name: modalities[name] for name in names},
            backbone=small,
            towers={"words": {**small, "width": 16, "modalities": ["text"]}} if "text" in names else {},
            objectives={"contrast": settings | changes},
        )
    )
    with torch.no_grad():
        for p in model.objectives["contrast"].parameters():
            if not p.ndim:
                p.add_(0.1)
    return model.double()


def batch_of(model: M3Model, count: int = 8, is_present: dict[str, list[bool]] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(5)
    raw = {
        "image": torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8),
        "text": torch.randint(1, 9, (count, 5), generator=generator, dtype=torch.int32),
        "depth": torch.rand((count, 16, 16), generator=generator) * 5 + 1,
    }
    there = {name: torch.tensor(flags) for name, flags in (is_present or {}).items()}
    return Batch({name: raw[name] for name in model.modalities}, torch.arange(count), there)


def embeddings(model: M3Model, batch: Batch) -> dict[str, Tensor]:
    prepared = model.prepare(batch)
    encoded = {view: model.encode_tokens(prepared.tokens, plan) for view, plan in prepared.plans.items()}
    contrast = model.objectives["contrast"]
    return {side: contrast.embed(side, encoded[view]) for side, view in contrast.side_views.items()}


def plain(model: M3Model, batch: Batch, a: str, b: str, is_there: list[bool] | None = None) -> Tensor:
    """The loss as the papers write it, on one batch, left to autograd."""
    contrast = model.objectives["contrast"]
    x, y = (embeddings(model, batch)[side] for side in (a, b))
    if is_there is not None:
        x, y = x[torch.tensor(is_there)], y[torch.tensor(is_there)]
    scale = torch.exp(contrast.logit_scale)
    logits = scale * x @ y.T
    if contrast.spec.loss == "softmax":
        right = torch.arange(len(x))
        smooth = contrast.spec.smoothing
        rows = F.cross_entropy(logits, right, label_smoothing=smooth)
        return (rows + F.cross_entropy(logits.T, right, label_smoothing=smooth)) / 2
    sign = 2 * torch.eye(len(x), dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * (logits + contrast.logit_bias)).sum() / len(x)


def gradients(model: M3Model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("loss", ["softmax", "smoothed", "sigmoid"])
def test_loss_and_gradients_are_those_of_the_plain_loss(loss):
    model = make(loss)
    batch = batch_of(model)
    expected = plain(model, batch, "image", "text")
    expected.backward()
    theirs = gradients(model)
    found = model(batch).loss
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    ours = gradients(model)
    assert ours.keys() == theirs.keys() == {name for name, _ in model.named_parameters()}
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("loss", ["softmax", "smoothed", "sigmoid"])
def test_samples_without_one_side_neither_count_nor_serve_as_negatives(loss):
    model = make(loss)
    flags = {"image": [True, False, True, True, True, True, True, True], "text": [True] * 5 + [False] * 2 + [True]}
    both = [i and t for i, t in zip(flags["image"], flags["text"], strict=True)]
    batch = batch_of(model, is_present=flags)
    expected = plain(model, batch, "image", "text", both)
    prepared = model.prepare(batch)
    assert model.counts(prepared)["contrast/image-text"] == sum(both) == 5
    assert model(prepared).loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "smoothed"])
def test_a_step_without_any_pair_gives_zero_gradients(loss):
    model = make(loss)
    batch = batch_of(model, 4, {"image": [True, True, False, False], "text": [False, False, True, True]})
    loss = model(batch).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("loss", ["softmax", "smoothed", "sigmoid"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_with_the_rows_of_the_step_add_up_to_the_whole(loss, size):
    model = make(loss)
    batch = batch_of(model)
    whole = model(batch)
    whole.loss.backward()
    theirs = gradients(model)
    pieces = [
        Batch({n: x[i : i + size] for n, x in batch.signals.items()}, batch.keys[i : i + size])
        for i in range(0, 8, size)
    ]
    with torch.no_grad():
        rows = [model(piece, is_only_rows=True).rows["contrast"] for piece in pieces]
    total = 0.0
    for turn, piece in enumerate(pieces):
        pool = {"contrast": Pool(concatenate(rows), turn * size)}
        part = model(piece, pool).parts.parts["contrast/image-text"]
        (part.sum / 8).backward()
        total += part.sum.item() / 8
    assert total == pytest.approx(whole.loss.item(), rel=1e-10)
    ours = gradients(model)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12, msg=name)


def test_three_sides_give_three_pairs():
    model = make(names=("image", "text", "depth"))
    batch = batch_of(model)
    parts = model(batch).parts.parts
    assert list(parts) == ["contrast/image-text", "contrast/image-depth", "contrast/text-depth"]
    for name, part in parts.items():
        a, b = name.removeprefix("contrast/").split("-")
        expected = plain(model, batch, a, b).item()
        assert (part.sum / part.count).item() == pytest.approx(expected, rel=1e-6)


def test_a_hand_made_loss_of_two_samples():
    """Similarities 1 on the diagonal and 0 beside it: each row is -log(e^s / (e^s + 1)) with s = 1 / temperature."""
    contrast = make().objectives["contrast"]
    torch.nn.init.constant_(contrast.logit_scale, math.log(2))
    eye = torch.eye(2, 12)
    own = {"image": eye, "text": eye, "image is there": torch.ones(2).bool(), "text is there": torch.ones(2).bool()}
    part = contrast._part("image", "text", own, Pool(own, 0))
    assert (part.sum / part.count).item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)


def test_a_hand_made_smoothed_loss_of_two_samples():
    """As above, but a twentieth of the target is the wrong one: -0.95 log p - 0.05 log (1 - p)."""
    contrast = make("smoothed").objectives["contrast"]
    torch.nn.init.constant_(contrast.logit_scale, math.log(2))
    eye = torch.eye(2, 12)
    own = {"image": eye, "text": eye, "image is there": torch.ones(2).bool(), "text is there": torch.ones(2).bool()}
    part = contrast._part("image", "text", own, Pool(own, 0))
    p = math.exp(2) / (math.exp(2) + 1)
    expected = -0.95 * math.log(p) - 0.05 * math.log(1 - p)
    assert (part.sum / part.count).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_fresh_weights_have_the_temperature_and_bias_of_the_settings(loss: str):
    model = make(loss, temperature=0.2, bias=-3.0)
    contrast = model.objectives["contrast"]
    model._init_weights(contrast)
    assert contrast.scale.item() == pytest.approx(5, rel=1e-6)
    assert (contrast.logit_bias is None) if loss == "softmax" else (contrast.logit_bias.item() == -3)


def test_the_temperature_stays_within_its_bounds():
    contrast = make().objectives["contrast"]
    with torch.no_grad():
        contrast.logit_scale.fill_(50.0)
    contrast.after_step()
    assert contrast.scale.item() == pytest.approx(100, rel=1e-6)
    with torch.no_grad():
        contrast.logit_scale.fill_(-50.0)
    contrast.after_step()
    assert contrast.scale.item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sides": {"image": {}, "speech": {}}}, "`speech`, which is no modality"),
        ({"sides": {"image": {}}}, "sides"),
        ({"loss": "sigmoid", "smoothing": 0.1}, "smoothing is for loss softmax"),
        ({"sides": {"both": {"modalities": ["image", "text"]}, "text": {}}}, "different towers read them"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(M3Error, match=message):
        make(**changes)
