"""True sentences about a scene."""

from __future__ import annotations

import numpy as np

from m3.data.world.scene import Object, Scene

SEEN_PIXELS = 0.004
"""Share of the picture from which an object is worth a word."""

MARGIN = 0.35
"""Metres by which two objects must differ before a relation is said."""


def caption(scene: Scene, visible_pixels: np.ndarray) -> str:
    """Describe the two most visible objects, e.g. `a large red sphere left of a small blue cube`.

    Args:
        scene: the scene, as seen at its own time.
        visible_pixels: (number of objects + 1,) share of the picture of nothing, object 0, object 1 ...
    """
    order = [i for i in np.argsort(-visible_pixels[1:], kind="stable") if visible_pixels[1 + i] >= SEEN_PIXELS]
    if not order:
        return "an empty ground"
    first = scene.objects[order[0]]
    if len(order) == 1:
        return _noun(first)
    second = scene.objects[order[1]]
    return f"{_noun(first)} {relation(scene, first, second)} {_noun(second)}"


def relation(scene: Scene, first: Object, second: Object) -> str:
    """Say how the first object lies to the second, as the camera sees it; `beside` when nothing is clear."""
    right, _, forward = scene.camera.axes()
    apart = np.subtract(first.centre, second.centre)
    sideways, ahead = float(apart @ right), float(apart @ forward)
    if abs(sideways) >= abs(ahead) and abs(sideways) > MARGIN:
        return "right of" if sideways > 0 else "left of"
    if abs(ahead) > MARGIN:
        return "behind" if ahead > 0 else "in front of"
    return "beside"


def _noun(thing: Object) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"
