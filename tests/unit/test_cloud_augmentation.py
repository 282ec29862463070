"""Clouds that are stretched and moved in training, and scenes of one object."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from m3.data.augment import Augmentation, ScaleTranslate
from m3.data.loader import Samples
from m3.data.source import open_source
from m3.data.world import WorldSource
from m3.data.world.cloud import to_observer
from m3.data.world.scene import Object, Scene, generator, sample_scene
from m3.data.world.sound import record
from m3.data.world.source import SOUND, Offer
from m3.errors import M3Error
from m3.network import build_modalities
from m3.plugins import Crop
from m3.recipe import DataSpec

POINTS = {"type": "points", "count": 6, "attributes": 3, "normalise": "unit_sphere_first"}


def parts(**settings: Any) -> dict[str, Any]:
    return build_modalities({"cloud": POINTS | settings, "image": {"type": "image", "size": 16}})


def make(**settings: Any) -> Augmentation:
    return Augmentation({"cloud": [{"type": "scale_translate", **settings}]}, parts())


def cloud_of() -> torch.Tensor:
    cloud = torch.arange(36, dtype=torch.float32).view(6, 6) - 17
    cloud[5] = torch.nan
    return cloud


def test_each_axis_has_its_own_factor_and_shift() -> None:
    cloud = cloud_of()
    factors, shifts = [], []
    for key in range(300):
        changed = make()({"cloud": cloud}, str(key))["cloud"]
        torch.testing.assert_close(changed[:, 3:], cloud[:, 3:], equal_nan=True)
        assert changed[5].isnan().all()
        factor = (changed[4, :3] - changed[0, :3]) / (cloud[4, :3] - cloud[0, :3])
        factors.append(factor)
        shifts.append(changed[0, :3] - factor * cloud[0, :3])
        torch.testing.assert_close(changed[:5, :3], cloud[:5, :3] * factor + shifts[-1], rtol=1e-4, atol=1e-4)
    for found, low, high in ((torch.stack(factors), 2 / 3, 3 / 2), (torch.stack(shifts), -0.2, 0.2)):
        assert low - 1e-4 <= found.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < found.max() <= high + 1e-4
        torch.testing.assert_close(found.mean(0), torch.full((3,), (low + high) / 2), atol=0.1 * (high - low), rtol=0)
        assert torch.corrcoef(found.T).fill_diagonal_(0).abs().max() < 0.25


def test_what_is_drawn_depends_on_the_key_alone_and_chance_leaves_some_as_they_are() -> None:
    cloud = cloud_of()[:5]
    first, again, other = (make()({"cloud": cloud}, key)["cloud"] for key in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rarely = make(chance=0.25)
    same = sum(torch.equal(rarely({"cloud": cloud}, str(key))["cloud"], cloud) for key in range(400))
    assert 0.68 < same / 400 < 0.82
    assert isinstance(pickle.loads(pickle.dumps(rarely)).transforms["cloud"][0], ScaleTranslate)


def test_only_training_samples_change_and_pictures_stay() -> None:
    found = {}
    for split in ("train", "held_out"):
        for entries in ((), ({"type": "scale_translate"},)):
            known = parts()
            spec = DataSpec(samples=3, held_out=3, augment={"cloud": list(entries)} if entries else {})
            samples = Samples(open_source(spec, known, 0, split), known, spec, 5)  # type: ignore[arg-type]
            found[split, len(entries)] = samples[(1, 1)].signals
    assert torch.equal(found["held_out", 0]["cloud"], found["held_out", 1]["cloud"])
    assert not torch.equal(found["train", 0]["cloud"], found["train", 1]["cloud"])
    assert torch.equal(found["train", 0]["image"], found["train", 1]["image"])


def test_a_cloud_that_is_normalised_first_keeps_what_augmentation_makes_of_it() -> None:
    raw = torch.tensor([[2.0, 0, 0], [4, 0, 0], [3, 4, 0], [3, 0, 0], [3, 1, 0], [3, 1, 0]])
    raw = torch.cat([raw, torch.rand(6, 3)], 1)
    first = parts()["cloud"]
    fitted = first.fit(raw, Crop())
    assert fitted[:, :3].mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert fitted[:, :3].norm(dim=1).max().item() == pytest.approx(1)
    torch.testing.assert_close(first.normalise(fitted[None] * 3)[0, :, :3], fitted[:, :3] * 3)
    usual = parts(normalise="unit_sphere")["cloud"]
    assert torch.equal(usual.fit(raw, Crop()), raw)
    torch.testing.assert_close(usual.normalise(raw[None])[0, :, :3], fitted[:, :3])
    mirrored = first.fit(raw, Crop(is_flipped=True))
    torch.testing.assert_close(mirrored[:, 0], -fitted[:, 0])


@pytest.mark.parametrize(
    ("augment", "sentence"),
    [
        ({"cloud": [{"type": "color_jitter"}]}, "cloud.0.type: `color_jitter` is no change of points; use `scale_tran"),
        ({"cloud": [{"type": "scale_translate", "scal": 2}]}, "data.augment.cloud.0.*scal"),
        ({"cloud": [{"type": "scale_translate", "translate": -1}]}, "data.augment.cloud.0.translate"),
        ({"image": [{"type": "scale_translate"}]}, "image.0.type: `scale_translate` is no change of colours"),
    ],
)
def test_a_wrong_entry_is_named(augment: dict[str, Any], sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        Augmentation(augment, parts())


def test_a_scene_can_be_left_with_its_main_object() -> None:
    signals = ("image", "points", "audio", "semantic_map")
    all_of_it = WorldSource(3, "train", 20, 48, 48, signals=signals)
    alone = WorldSource(3, "train", 20, 48, 48, signals=signals, offer=Offer(is_alone=True))
    for index in range(20):
        full, one = all_of_it.read(index), alone.read(index)
        assert {k: one["labels"][k] for k in ("shape", "color", "material")} == {
            k: full["labels"][k] for k in ("shape", "color", "material")
        }
        assert one["labels"]["count"] == 1
        classes = set(np.unique(one["signals"]["semantic_map"])) - {0, 1}
        assert classes == {2 + one["labels"]["shape"]}
        extent = np.ptp(one["signals"]["points"][:, :3], axis=0)
        assert extent[:2].max() < 2.8  # the widest object; a scene of several is wider
        assert np.ptp(full["signals"]["points"][:, :3], axis=0)[:2].max() > extent[:2].max()
        scene = sample_scene(3, index, "train")
        (only,) = (
            o for o in scene.objects if is_labelled(o, full["labels"]) and is_in(o, scene, one["signals"]["points"])
        )
        expected = record(replace(scene, objects=(only,)), generator(3, index, "train", SOUND), 2.0, 16000)
        assert np.array_equal(one["signals"]["audio"].samples, expected.samples)


def is_labelled(thing: Object, labels: dict[str, int]) -> bool:
    return (thing.shape, thing.material) == tuple(WorldSource.LABEL_NAMES[k][labels[k]] for k in ("shape", "material"))


def is_in(thing: Object, scene: Scene, points: np.ndarray) -> bool:
    """The middle of the cloud lies above the object's foot."""
    foot = to_observer(scene.camera, np.array([[thing.x, thing.y, 0.0]]))[0, :2]
    return float(np.linalg.norm(points[:, :2].mean(0) - foot)) < 0.2


def test_the_option_reaches_the_world() -> None:
    known = build_modalities({"points": {"type": "points", "count": 64, "attributes": 3}})
    spec = DataSpec(samples=4, options={"objects": "main"})
    sample = open_source(spec, known, 0, "train").read(2)
    assert sample.labels["count"] == 1
    with pytest.raises(M3Error, match=r"data\.options\.objects"):
        open_source(DataSpec(options={"objects": "some"}), known, 0, "train")


def test_the_world_gives_as_many_colours_as_are_read() -> None:
    known = build_modalities(
        {"plain": {"type": "points", "count": 8}, "coloured": {"type": "points", "count": 8, "attributes": 3}}
    )
    signals = open_source(DataSpec(samples=4), known, 0, "train").read(1).signals
    assert np.array_equal(signals["plain"], signals["coloured"][:, :3])
    assert signals["coloured"].shape == (1024, 6)
