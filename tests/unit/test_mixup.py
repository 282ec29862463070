"""Mixup and cutmix are timm's formulas, drawn from the position in the run; RandAugment and erasing follow the key."""

from __future__ import annotations

import random
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import mixup as theirs
from torch import Tensor

from m3.data.augment import Augmentation
from m3.data.loader import Order, Samples, train_loader
from m3.data.mixup import Mixup, box_of, draw_share
from m3.data.source import open_source
from m3.errors import M3Error
from m3.network import build_modalities
from m3.recipe import DataSpec, MixupSpec
from m3.types import Batch

IMAGE: dict[str, Any] = {"type": "image", "size": 16}
PARTS = build_modalities({"image": IMAGE, "label": {"type": "label", "of": "shape", "classes": 4}})


def pictures(count: int, shape: tuple[int, ...] = (3, 16, 16)) -> Tensor:
    return (torch.arange(count * int(np.prod(shape))) * 37 % 251).view(count, *shape).to(torch.uint8)


def batch(count: int, **more: Any) -> Batch:
    labels = torch.eye(4)[torch.arange(count) % 4]
    return Batch({"image": pictures(count), "label": labels}, torch.arange(count) + 8, **more)


def mixed(spec: MixupSpec, given: Batch, repeats: int = 1) -> Batch:
    return Mixup(spec, DataSpec(repeats=repeats), PARTS, 5)(given)


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_pair_is_mixed_by_timms_formula(is_cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same share, partner and box; timm's collate works on bytes, as ours."""
    share, centre = 0.3, (0.55, 0.2)
    spec = MixupSpec(mixup=0.0 if is_cut else 0.8, cutmix=1.0 if is_cut else 0.0)
    monkeypatch.setattr("m3.data.mixup.draw_share", lambda spec, draws: (share, is_cut))
    drawn = iter(centre)
    monkeypatch.setattr(Random, "random", lambda self: next(drawn))
    given = batch(2)
    found = mixed(spec, given)
    peer = theirs.FastCollateMixup(0.8, 1.0, mode="pair", label_smoothing=0.1, num_classes=4)
    monkeypatch.setattr(peer, "_params_per_elem", lambda n: (np.full(n, share, np.float32), np.full(n, is_cut)))
    at = iter(int(16 * c) for c in centre)
    monkeypatch.setattr(np.random, "randint", lambda *a, **k: next(at))
    pairs = [(x.numpy().copy(), int(k)) for x, k in zip(given.signals["image"], [0, 1], strict=True)]
    expected, target = peer(pairs)
    assert torch.equal(found.signals["image"], expected)
    assert not torch.equal(expected, given.signals["image"])
    smoothed = found.signals["label"].double() * 0.9 + 0.1 / 4
    torch.testing.assert_close(smoothed, target.double(), rtol=0, atol=1e-6)


def test_boxes_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = Random(3)
    for _ in range(200):
        height, width = draws.randint(3, 40), draws.randint(3, 40)
        share, centre = draws.random(), (draws.random(), draws.random())
        at = iter((int(centre[0] * height), int(centre[1] * width)))
        monkeypatch.setattr(np.random, "randint", lambda *a, _at=at, **k: next(_at))
        (top, bottom, left, right), kept = theirs.cutmix_bbox_and_lam((3, height, width), share)
        box, own = box_of(height, width, share, centre)
        assert box == (..., slice(int(top), int(bottom)), slice(int(left), int(right)))
        assert own == pytest.approx(kept)


def test_shares_are_distributed_as_beta() -> None:
    """Mean 1 / 2 and variance 1 / (4 (2 alpha + 1)) of Beta(alpha, alpha); chance and switch as shares."""
    draws, count = Random(1), 20_000
    found = [draw_share(MixupSpec(mixup=0.8, cutmix=1.0, chance=0.75, switch=0.25), draws) for _ in range(count)]
    assert sum(share == 1 for share, _ in found) / count == pytest.approx(0.25, abs=0.01)
    assert sum(is_cut for _, is_cut in found) / count == pytest.approx(0.25, abs=0.01)
    added = [share for share, is_cut in found if not is_cut and share < 1]
    assert np.mean(added) == pytest.approx(0.5, abs=0.01)
    assert np.var(added) == pytest.approx(1 / (4 * 2.6), abs=0.003)


def test_mixing_does_not_depend_on_how_the_batch_is_cut() -> None:
    spec, given = MixupSpec(), batch(8)
    whole = mixed(spec, given)
    for size in (2, 4):
        cut = [slice(i, i + size) for i in range(0, 8, size)]
        parts = [Batch({n: x[c] for n, x in given.signals.items()}, given.keys[c]) for c in cut]
        for name, x in whole.signals.items():
            assert torch.equal(torch.cat([mixed(spec, part).signals[name] for part in parts]), x)
    torch.testing.assert_close(whole.signals["label"].sum(1), torch.ones(8))
    assert not torch.equal(mixed(spec, Batch(given.signals, given.keys + 2)).signals["image"], whole.signals["image"])


def test_repeated_crops_are_no_partners() -> None:
    """With two crops of a sample in a row, 0 0 1 1: 0 with 3 and 1 with 2, in groups of four."""
    labels = torch.eye(4)[torch.tensor([0, 0, 1, 1])]
    found = mixed(MixupSpec(), Batch({"image": pictures(4), "label": labels}, torch.arange(4)), repeats=2)
    assert bool((found.signals["label"][:, :2].amax(1) < 1).all())
    torch.testing.assert_close(found.signals["label"][0], found.signals["label"][3].flip(0).roll(2))


def test_a_pair_of_which_one_lacks_the_label_stays() -> None:
    is_present = {"label": torch.tensor([True, False, True, True])}
    found = mixed(MixupSpec(), batch(4, is_present=is_present))
    assert torch.equal(found.signals["image"][:2], pictures(4)[:2])
    assert not torch.equal(found.signals["image"][2:], pictures(4)[2:])


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(M3Error, match=r"a micro-batch has 3; make it a multiple of 2 \(train\.batch_size"):
        mixed(MixupSpec(), batch(3))
    text = build_modalities({"text": {"type": "text", "vocabulary": ["a"]}})
    with pytest.raises(M3Error, match=r"data\.mixup: two samples of `text` have no mean"):
        Mixup(MixupSpec(), DataSpec(), text, 0)
    vector = build_modalities({"vector": {"type": "vector", "size": 4}})
    with pytest.raises(M3Error, match=r"data\.mixup\.cutmix: `vector` is no picture"):
        Mixup(MixupSpec(), DataSpec(), vector, 0)
    with pytest.raises(ValueError, match="`mixup` and `cutmix` are both 0"):
        MixupSpec(mixup=0, cutmix=0)


def test_only_training_samples_are_mixed() -> None:
    spec = DataSpec(samples=8, held_out=8, workers=0, mixup=MixupSpec())
    for split in ("train", "held_out"):
        samples = Samples(open_source(spec, PARTS, 0, split), PARTS, spec, 0)
        (found,) = train_loader(samples, Order(8, 0, 8), 0)
        is_whole = bool((found.signals["label"].amax(1) == 1).all())
        assert is_whole == (split == "held_out")


# ----------------------------------------------------------------------------------------- RandAugment, erasing


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def augmentation(*entries: dict[str, Any], **more: dict[str, Any]) -> Augmentation:
    return Augmentation({"image": list(entries)}, build_modalities({"image": IMAGE, **more}))


@pytest.mark.parametrize("kind", ["rand_augment", "random_erasing"])
def test_policies_depend_on_the_key_alone_and_leave_the_generators_alone(kind: str) -> None:
    change = augmentation({"type": kind})
    image = pictures(1)[0]
    seed_all(1)
    first = change({"image": image}, "0/1")["image"]
    after = random.random(), np.random.rand(), torch.rand(())
    seed_all(2)
    assert torch.equal(change({"image": image}, "0/1")["image"], first)
    seed_all(1)
    assert after == (random.random(), np.random.rand(), torch.rand(()))
    others = [change({"image": image}, f"0/{key}")["image"] for key in range(8)]
    assert any(not torch.equal(other, first) for other in others)
    assert first.dtype == torch.uint8
    assert torch.equal(image, pictures(1)[0])


def test_frames_of_a_video_are_changed_alike() -> None:
    video = build_modalities({"video": {"type": "video", "size": 16, "frames": 3}})
    frames = pictures(1)[0].unsqueeze(1).expand(-1, 3, -1, -1)
    found = Augmentation({"video": [{"type": "rand_augment"}]}, video)({"video": frames}, "0/3")["video"]
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert not torch.equal(found, frames)


def test_erasing_leaves_the_rest_and_puts_noise_of_the_datas_mean() -> None:
    image = torch.full((3, 16, 16), 7, dtype=torch.uint8)
    found = torch.stack(
        [augmentation({"type": "random_erasing"})({"image": image}, str(k))["image"] for k in range(60)]
    )
    is_noise = (found != 7).any(1)
    share = is_noise.float().mean((1, 2))
    assert bool(((share > 0.01) & (share < 0.36)).all())
    noise = found.movedim(1, -1)[is_noise].float().mean(0) / 255
    torch.testing.assert_close(noise, torch.tensor([0.485, 0.456, 0.406]), rtol=0, atol=0.03)


def test_policies_that_do_not_fit_are_refused() -> None:
    depth = {"type": "depth", "size": 16}
    with pytest.raises(M3Error, match=r"rand_augment` moves pixels of `image`, which `depth` can't follow"):
        augmentation({"type": "rand_augment"}, depth=depth)
    augmentation({"type": "random_erasing"}, depth=depth)
    with pytest.raises(M3Error, match=r"image\.0\.policy: `sharp` is none of timm's"):
        augmentation({"type": "rand_augment", "policy": "sharp"})
    with pytest.raises(M3Error, match=r"image\.0\.area: smallest, then largest"):
        augmentation({"type": "random_erasing", "area": [0.5, 0.1]})
    grey = build_modalities({"image": {**IMAGE, "channels": 1}})
    with pytest.raises(M3Error, match="changes pictures in RGB"):
        Augmentation({"image": [{"type": "rand_augment"}]}, grey)
