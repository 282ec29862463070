"""The world over many scenes: what a model may rely on when it learns from pictures alone.

Letters: H height, W width.
"""

import math
import re

import numpy as np
import pytest

from m3.data.world import FAR, Camera, Light, Object, Scene, WorldSource, caption, render, sample_scene
from m3.data.world.caption import SEEN_PIXELS
from m3.data.world.scene import COLOURS, SHAPES

COUNT = 300
RELATION = re.compile("left of|right of|in front of|behind|beside")


@pytest.fixture(scope="module")
def views():
    """Scenes and frames of (64, 64) pixels."""
    scenes = [sample_scene(11, index, "train") for index in range(COUNT)]
    return [(scene, render(scene, 64, 64)) for scene in scenes]


def pixels(scene: Scene, instance: np.ndarray) -> np.ndarray:
    return np.array([(instance == number + 1).sum() for number in range(len(scene.objects))])


def test_every_class_takes_its_part(views):
    share = np.mean([np.bincount(frame.semantic.ravel(), minlength=6) / 64**2 for _, frame in views], axis=0)
    sky, ground, *shapes = share
    assert 0.03 < sky < 0.15
    assert 0.55 < ground < 0.80
    assert min(shapes) > 0.02
    assert max(shapes) < 4 * min(shapes)


def test_objects_are_in_view_and_not_tiny(views):
    seen = np.concatenate([pixels(scene, frame.instance) > 0 for scene, frame in views])
    assert seen.mean() > 0.95
    largest = []
    for scene, frame in views:
        number = int(pixels(scene, frame.instance).argmax()) + 1
        rows = np.flatnonzero((frame.instance == number).any(1))
        largest.append((rows[-1] - rows[0] + 1) / 64)
    assert np.quantile(largest, 0.05) > 0.15
    assert np.median(largest) > 0.30


def test_every_label_is_common():
    """No label may be learnt by always saying the same."""
    source = WorldSource(11, "held_out", COUNT, signals=())
    labels = [source.read(index)["labels"] for index in range(COUNT)]
    for name, choices, least, most in (("shape", len(SHAPES), 0.10, 0.45), ("color", len(COLOURS), 0.07, 0.25)):
        share = np.bincount([label[name] for label in labels], minlength=choices) / COUNT
        assert share.min() > least
        assert share.max() < most
    assert {label["count"] for label in labels} >= {2, 3, 4, 5}


def test_depth_is_of_the_world_and_not_of_the_sky(views):
    for _, frame in views:
        solid = frame.depth[frame.semantic > 0]
        assert solid.min() > 1.0
        assert solid.max() <= FAR
        assert np.ptp(solid) > 1.0  # never a flat picture


def test_relations_hold_in_the_picture_alone(views):
    """Judge the relation by the mean column and the median depth of both objects, without the camera."""
    told = 0
    for scene, frame in views:
        count = pixels(scene, frame.instance)
        order = np.argsort(-count, kind="stable")
        if count[order[1]] < SEEN_PIXELS * 64**2:
            continue
        relation = RELATION.search(caption(scene, np.r_[0, count] / 64**2)).group()
        masks = [frame.instance == number + 1 for number in order[:2]]
        first, second = (np.argwhere(mask)[:, 1].mean() for mask in masks)
        near, far = (np.median(frame.depth[mask]) for mask in masks)
        assert {
            "left of": first < second,
            "right of": first > second,
            "in front of": near < far,
            "behind": near > far,
        }.get(relation, True)
        told += 1
    assert told > 0.9 * COUNT


@pytest.mark.parametrize("shape", ["cube", "cylinder"])
def test_a_flat_top_has_one_tone(shape):
    """A top lies just where a band would end, so rounding must not choose the tone of each pixel."""
    for radius in np.linspace(0.32, 0.95, 40):
        solid = Object(shape, "large", float(radius), "red", "stripes", "rubber", 0.13, -0.21, 0.4, (0.0, 0.0))
        camera = Camera((0.0, 0.0, 0.5), distance=3.0, azimuth=0.7, height=4.0, view=math.radians(45))
        light = Light((0.0, 0.0, 1.0), strength=0.6, ambient=0.3)
        scene = Scene((solid,), camera, light, "plain", (0.5, 0.5, 0.5), (0.4, 0.6, 0.9), pattern=0)
        frame = render(scene, 64, 64)
        top = (frame.instance == 1) & (frame.normals[..., 2] > 0.99)
        assert top.sum() > 20
        assert len(np.unique(frame.image[top], axis=0)) == 1
