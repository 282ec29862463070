"""What is derived from a rendered frame: boxes and regions of the visible objects, normals as the camera sees them.

Letters: H height, W width.
"""

from __future__ import annotations

import math

import numpy as np

from m3.data.world.caption import SEEN_PIXELS
from m3.data.world.render import Frame
from m3.data.world.scene import SHAPES, Camera, Scene

SURE = 0.8
"""Probability of a region's true label."""

Box = tuple[str, float, float, float, float]
"""Label, x0, y0, x1, y1: edges as shares of the picture's width and height in [0, 1], from its top left corner."""


def boxes(scene: Scene, frame: Frame) -> list[Box]:
    """Return the tightest box around each visible object, labelled with its shape, the largest box first.

    Edges lie on the borders of pixels: x1 is (last column + 1) / W. An object is visible from SEEN_PIXELS on.
    """
    found: list[Box] = []
    height, width = frame.instance.shape
    for number, thing in enumerate(scene.objects):
        own = frame.instance == number + 1
        if own.mean() >= SEEN_PIXELS:
            rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
            x0, x1 = int(columns[0]) / width, int(columns[-1] + 1) / width
            y0, y1 = int(rows[0]) / height, int(rows[-1] + 1) / height
            found.append((thing.shape, x0, y0, x1, y1))
    return sorted(found, key=lambda box: (box[1] - box[3]) * (box[4] - box[2]))


def camera_normals(camera: Camera, frame: Frame) -> np.ndarray:
    """Return the unit normals float32 (H, W, 3) in the camera's frame: x right, y up, z towards the viewer."""
    right, up, forward = camera.axes()
    return frame.normals @ np.stack([right, up, -forward], 1)


def regions(scene: Scene, frame: Frame, width: int, classes: int) -> dict[str, np.ndarray]:
    """Return what a detector would say of the visible objects, the largest box first.

    Args:
        scene: the scene.
        frame: as seen.
        width: F, values of a feature.
        classes: K, background first, then the shapes, then others that never occur.

    Returns:
        `features` float32 (R, F), the first F of the box's pixels in [0, 1], sampled on the smallest square grid that
        has as many; `boxes` float32 (R, 4), x0, y0, x1, y1 as in `boxes`; `soft_labels` float32 (R, K): SURE for the
        true shape, the rest shared out evenly.
    """
    found = boxes(scene, frame)
    rows, columns = frame.instance.shape
    cells = math.ceil(math.sqrt(width / 3))
    steps = (np.arange(cells) + 0.5) / cells
    features = np.empty((len(found), width), np.float32)
    labels = np.full((len(found), classes), (1 - SURE) / (classes - 1), np.float32)
    for number, (label, x0, y0, x1, y1) in enumerate(found):
        row = ((y0 + steps * (y1 - y0)) * rows).astype(int)
        column = ((x0 + steps * (x1 - x0)) * columns).astype(int)
        features[number] = frame.image[np.ix_(row, column)].ravel()[:width] / np.float32(255)
        labels[number, 1 + SHAPES.index(label)] = SURE
    places = np.array([box[1:] for box in found], np.float32).reshape(len(found), 4)
    return {"features": features, "boxes": places, "soft_labels": labels}
