"""What is derived from a rendered frame: boxes and regions of the visible objects, normals as the camera sees them.

Letters: H height, W width.
"""

from __future__ import annotations

import numpy as np

from m3.data.world.caption import SEEN_PIXELS
from m3.data.world.render import Frame
from m3.data.world.scene import SHAPES, Camera, Scene

CELLS, SURE = 8, 0.8
"""Places along a side of a region's box whose pixels are its feature, and probability of its true label."""

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


def regions(scene: Scene, frame: Frame) -> dict[str, np.ndarray]:
    """Return what a detector would say of the visible objects, the largest box first.

    Returns:
        `features` float32 (R, 3 * CELLS ** 2), the box's pixels in [0, 1] at CELLS x CELLS places, row by row; `boxes`
        float32 (R, 4), x0, y0, x1, y1 as in `boxes`; `soft_labels` float32 (R, 1 + shapes), background first: SURE for
        the true shape, the rest shared out evenly.
    """
    found = boxes(scene, frame)
    height, width = frame.instance.shape
    steps = (np.arange(CELLS) + 0.5) / CELLS
    features, labels = [], []
    for label, x0, y0, x1, y1 in found:
        rows = ((y0 + steps * (y1 - y0)) * height).astype(int)
        columns = ((x0 + steps * (x1 - x0)) * width).astype(int)
        features.append(frame.image[np.ix_(rows, columns)].astype(np.float32).ravel() / 255)
        labels.append([SURE if shape == label else (1 - SURE) / len(SHAPES) for shape in ("background", *SHAPES)])
    return {
        "features": np.array(features, np.float32).reshape(len(found), 3 * CELLS**2),
        "boxes": np.array([box[1:] for box in found], np.float32).reshape(len(found), 4),
        "soft_labels": np.array(labels, np.float32).reshape(len(found), 1 + len(SHAPES)),
    }
