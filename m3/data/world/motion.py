"""How an object moves in the picture: what can be told from a video and from no single frame of it."""

from __future__ import annotations

import math

import numpy as np

from m3.data.world.scene import Scene

DIRECTIONS = ("right", "up right", "up", "up left", "left", "down left", "down", "down right")
"""Sectors of 45 degrees, in the order of the angle; each has its name's direction in its middle."""

SPEEDS = ("slow", "fast")
FAST = 0.065
"""Picture heights per second from which a motion is fast: about the median over scenes."""


def velocity(scene: Scene, number: int, duration: float) -> tuple[float, float]:
    """Return how fast the middle of object `number` moves in the picture: right and up, in picture heights per second.

    Both the object and the camera move. It is the mean over the `duration` in seconds, which is more than 0.
    """
    first, last = (_seen_at(scene.at(time), number) for time in (0.0, duration))
    right, up = (last - first) / duration
    return float(right), float(up)


def motion_labels(scene: Scene, number: int, duration: float) -> dict[str, int]:
    """Return the sector of `DIRECTIONS` and the class of `SPEEDS` of object `number`; nothing if no time passes."""
    if not duration:
        return {}
    right, up = velocity(scene, number, duration)
    sector = round(math.atan2(up, right) / (2 * math.pi / len(DIRECTIONS))) % len(DIRECTIONS)
    return {"direction": sector, "speed": int(math.hypot(right, up) >= FAST)}


def _seen_at(scene: Scene, number: int) -> np.ndarray:
    """Return (2,) where the middle of an object is seen: right and up of the picture's middle, picture heights."""
    right, up, ahead = scene.camera.axes() @ np.subtract(scene.objects[number].centre, scene.camera.position)
    return np.array([right, up]) / (2 * ahead * math.tan(scene.camera.view / 2))
