"""Random changes in training: crops as torchvision's, flips only where everything can follow, colours of pictures."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from m3.data.augment import PHOTOMETRIC, Augmentation
from m3.data.geometry import random_crop
from m3.data.loader import Samples
from m3.data.source import open_source
from m3.errors import M3Error
from m3.network import build_modalities
from m3.plugins import Crop
from m3.recipe import DataSpec

SETTINGS: dict[str, dict[str, Any]] = {
    "image": {"type": "image", "size": 16},
    "depth": {"type": "depth", "size": 16},
    "semantic": {"type": "semantic_map", "size": 16, "classes": 3},
    "normals": {"type": "normals", "size": 16},
    "boxes": {"type": "boxes", "labels": ["cube"]},
    "video": {"type": "video", "size": 16, "frames": 4},
    "sound": {"type": "audio", "frames": 8, "bands": 4},
    "stereo": {"type": "audio", "frames": 8, "bands": 4, "channels": 2},
    "ambisonic": {"type": "audio", "frames": 8, "bands": 4, "channels": 4},
    "points": {"type": "points", "count": 5},
    "coloured": {"type": "points", "count": 5, "attributes": 3},
    "text": {"type": "text", "vocabulary": ["left", "right", "cube"]},
}


def parts(*names: str) -> dict[str, Any]:
    return build_modalities({name: SETTINGS[name] for name in names})


def samples(spec: DataSpec, *names: str, split: Any = "train") -> Samples:
    known = parts(*names)
    return Samples(open_source(spec, known, 0, split), known, spec, 5)


# ----------------------------------------------------------------------------------------- geometry


def measures(crops: torch.Tensor) -> list[torch.Tensor]:
    """Areas, aspects and places of crops (n, 4): height, width, top, left."""
    height, width, top, left = crops.unbind(1)
    return [height * width / 10800, (width / height).log(), top / 90, left / 120]


def test_crops_are_distributed_as_torchvisions() -> None:
    """Areas, aspects and places of 3000 crops against RandomResizedCrop's own draws."""
    theirs = v2.RandomResizedCrop(8, scale=(0.2, 0.7), ratio=(3 / 4, 4 / 3))
    torch.manual_seed(0)
    drawn = [theirs.make_params([torch.empty(1, 90, 120)]) for _ in range(3000)]
    expected = torch.tensor([[p["height"], p["width"], p["top"], p["left"]] for p in drawn]).double()
    boxes = [random_crop(key, (0.2, 0.7), 0.0, (90, 120)).box or () for key in range(3000)]
    found = torch.tensor([[h * 90, w * 120, t * 90, x * 120] for t, x, h, w in boxes]).double()
    for own, other in zip(measures(found), measures(expected), strict=True):
        assert abs(float(own.mean() - other.mean())) < 4 * math.sqrt(2 / 3000) * float(other.std())
        assert abs(float(own.std() / other.std()) - 1) < 0.06
    aspects = found[:, 1] / found[:, 0]
    assert (aspects.min() > 0.73) & (aspects.max() < 1.37)


CAN_FLIP = {"image", "depth", "semantic", "normals", "boxes", "video", "sound", "stereo", "points"}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_flip_is_refused_where_a_modality_cannot_follow_it(name: str) -> None:
    data = {"crop": (0.5, 1.0), "samples": 4, "held_out": 1}
    names = dict.fromkeys(["image", name])
    assert samples_or_error(DataSpec(**data), *names) is None  # every one follows crops
    error = samples_or_error(DataSpec(flip=0.5, **data), *names)
    if name in CAN_FLIP:
        assert error is None
    else:
        expected = f"data.flip: pictures are mirrored at random, which `{name}` can't follow, so it would no longer"
        assert error == f"{expected} say what they show; set data.flip=0."


def samples_or_error(spec: DataSpec, *names: str) -> str | None:
    known = parts(*names)
    try:
        Samples(open_source(spec, parts("image"), 0, "train"), known, spec, 0)
    except M3Error as error:
        return str(error)
    return None


def test_a_part_that_cannot_follow_crops_refuses_them(monkeypatch: Any) -> None:
    known = parts("image", "sound")
    monkeypatch.setattr(type(known["sound"]), "follows", frozenset())
    spec = DataSpec(crop=(0.5, 1.0), samples=4)
    source = open_source(spec, parts("image"), 0, "train")
    with pytest.raises(M3Error, match=r"data.crop: pictures are cropped at random, which `sound` .*set data.crop=null"):
        Samples(source, known, spec, 0)
    Samples(source, {"sound": known["sound"]}, spec, 0)  # without pictures nothing is cropped


def test_a_flip_changes_the_ears_of_a_stereo_sound() -> None:
    raw = torch.arange(8 * 2 * 4.0).view(8, 2, 4)
    stereo = parts("stereo")["stereo"]
    assert torch.equal(stereo.fit(raw, Crop(None, True)), raw[:, [1, 0]])
    assert torch.equal(stereo.fit(raw, Crop((0.1, 0.1, 0.5, 0.5))), raw)


# ------------------------------------------------------------------------------------------- colours

JITTER = {"type": "color_jitter", "brightness": 0.4, "hue": 0.1}


def augmented(entries: list[dict[str, Any]], **more: Any) -> DataSpec:
    return DataSpec(samples=6, held_out=2, augment={"image": entries}, **more)


def test_colours_of_the_named_pictures_change_and_nothing_else() -> None:
    plain, own = (
        samples(DataSpec(samples=6, held_out=2), "image", "depth"),
        samples(augmented([JITTER]), "image", "depth"),
    )
    for position in range(6):
        before, after = plain[(position, 2)].signals, own[(position, 2)].signals
        assert torch.equal(before["depth"], after["depth"])
        assert not torch.equal(before["image"], after["image"])
        assert after["image"].dtype == torch.uint8
    cropped = [samples(augmented(e, crop=(0.3, 0.6)), "depth", "image")[(3, 1)].signals for e in ([], [JITTER])]
    assert torch.equal(cropped[0]["depth"], cropped[1]["depth"])  # the crop is drawn as without


def test_what_is_drawn_depends_on_the_position_alone_and_moves_no_generator() -> None:
    own = samples(augmented([JITTER]), "image")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = own[(9, 2)].signals["image"]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(samples(augmented([JITTER]), "image")[(9, 2)].signals["image"], first)
    assert not torch.equal(own[(8, 2)].signals["image"], first)


def test_transforms_are_torchvisions_in_their_order() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8))
    entries = [{"type": "random_invert", "p": 1.0}, {"type": "random_posterize", "bits": 2, "p": 1.0}]
    made = Augmentation({"image": entries}, parts("image"))
    assert torch.equal(made({"image": image}, "key")["image"], (255 - image) & 0b11000000)
    swapped = Augmentation({"image": entries[::-1]}, parts("image"))
    assert torch.equal(swapped({"image": image}, "key")["image"], 255 - (image & 0b11000000))


def test_chance_leaves_some_samples_as_they_are() -> None:
    made = Augmentation({"image": [{"type": "random_invert", "p": 1.0, "chance": 0.25}]}, parts("image"))
    image = torch.arange(3 * 16 * 16).view(3, 16, 16).to(torch.uint8)
    changed = [not torch.equal(made({"image": image}, str(key))["image"], image) for key in range(400)]
    assert 0.18 < sum(changed) / 400 < 0.32


def test_a_video_is_changed_alike_in_all_frames() -> None:
    made = Augmentation({"video": [JITTER]}, parts("video"))
    frame = torch.arange(3 * 16 * 16).view(3, 1, 16, 16).to(torch.uint8)
    out = made({"video": frame.expand(3, 4, 16, 16).contiguous()}, "key")["video"]
    assert out.shape == (3, 4, 16, 16)
    assert not torch.equal(out[:, :1], frame)
    assert all(torch.equal(out[:, i], out[:, 0]) for i in range(4))
    alone = Augmentation({"image": [JITTER]}, parts("image"))
    assert alone({"image": frame[:, 0]}, "key")["image"].shape == (3, 16, 16)


def test_held_out_samples_keep_their_colours() -> None:
    plain = samples(DataSpec(samples=6, held_out=2), "image", split="held_out")
    own = samples(augmented([JITTER]), "image", split="held_out")
    assert torch.equal(plain[(1, 1)].signals["image"], own[(1, 1)].signals["image"])


def test_without_torchvision_its_extra_is_named(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(M3Error, match=r"data.augment.image.0 needs torchvision; run `pip install 'm3-mul.*\[vision\]'"):
        Augmentation({"image": [JITTER]}, parts("image"))


@pytest.mark.parametrize("kind", PHOTOMETRIC)
def test_every_transform_keeps_size_and_type(kind: str) -> None:
    more = {"gaussian_blur": {"kernel_size": 3}, "random_posterize": {"bits": 3}, "random_solarize": {"threshold": 99}}
    more["random_adjust_sharpness"] = {"sharpness_factor": 2}
    made = Augmentation({"image": [{"type": kind, **more.get(kind, {})}]}, parts("image"))
    out = made({"image": torch.arange(768).view(3, 16, 16).to(torch.uint8)}, "key")["image"]
    assert (out.shape, out.dtype, out.is_contiguous()) == ((3, 16, 16), torch.uint8, True)


@pytest.mark.parametrize(
    ("augment", "sentence"),
    [
        ({"imag": []}, r"data.augment names `imag`, which is no modality. Did you mean `image`\?"),
        ({"depth": [JITTER]}, r"data.augment.depth: only pictures and points can be changed; remove this entry"),
        ({"image": [{"brightness": 1}]}, r"data.augment.image.0.type: this key is required; add it"),
        ({"image": [{"type": "color_jiter"}]}, r"image.0.type: `color_jiter` is no change of colours. Did you mean `c"),
        ({"image": [{"type": "random_rotation"}]}, r"image.0.type: `random_rotation` is no change of colours"),
        ({"image": [JITTER, {"type": "color_jitter", "hue": 7}]}, r"image.1: ColorJitter does not take these settings"),
        ({"image": [{**JITTER, "chance": 2}]}, r"image.0.chance: input should be less than or equal to 1, got 2"),
        ({"image": [{**JITTER, "bright": 2}]}, r"image.0: ColorJitter does not take these settings: .*`?'?bright"),
    ],
)
def test_a_wrong_entry_is_named(augment: dict[str, Any], sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        samples(DataSpec(augment=augment, samples=2), "image", "depth")
