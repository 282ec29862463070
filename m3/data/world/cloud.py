"""Coloured points on the surfaces of a scene.

Letters: P points.
"""

from __future__ import annotations

import math

import numpy as np

from m3.data.world.render import object_colour
from m3.data.world.scene import Camera, Object, Scene


def sample_points(scene: Scene, random: np.random.Generator, count: int) -> np.ndarray:
    """Draw points evenly by area from the surfaces of all objects, hidden sides included.

    The faces on which objects stand are left out. The order is random: any part of the points is a smaller cloud.

    Returns:
        float32 (P, 6): x, y, z metres in the observer's frame, see `to_observer`; r, g, b in [0, 1], the colour
        of the object with its texture, without light.
    """
    areas = np.array([area(thing) for thing in scene.objects])
    owner = random.choice(len(areas), count, p=areas / areas.sum())
    points = np.empty((count, 6), np.float32)
    for number, thing in enumerate(scene.objects):
        own = np.flatnonzero(owner == number)
        place = _DRAW[thing.shape](thing, *random.random((3, len(own)))) + np.array([thing.x, thing.y, 0.0])
        points[own, :3] = to_observer(scene.camera, place)
        points[own, 3:] = object_colour(thing, place)
    return points


def area(thing: Object) -> float:
    """Return the surface of an object in square metres, without the face on which it stands."""
    r, h = thing.radius, thing.height
    return {
        "sphere": 4 * math.pi * r * r,
        "cube": 5 * h * h,
        "cylinder": math.pi * r * (r + 2 * h),
        "cone": math.pi * r * math.hypot(r, h),
    }[thing.shape]


def to_observer(camera: Camera, place: np.ndarray) -> np.ndarray:
    """Bring points (P, 3) from the world into the frame of an observer who keeps upright.

    Its origin lies on the ground below the camera's target; x goes to the camera's right, y ahead, z up; metres.
    """
    c, s = math.cos(camera.azimuth), math.sin(camera.azimuth)
    return (place - np.array([*camera.target[:2], 0.0])) @ np.array([[-s, c, 0], [-c, -s, 0], [0, 0, 1]]).T


# Each takes three arrays (P,) of even numbers in [0, 1) and returns points (P, 3) relative to the object's foot.


def _sphere(thing: Object, u: np.ndarray, v: np.ndarray, _: np.ndarray) -> np.ndarray:
    """By Archimedes every slice of the same height has the same area."""
    z = 2 * u - 1
    return thing.radius * np.concatenate([_circle(v) * np.sqrt(1 - z * z)[:, None], 1 + z[:, None]], 1)


def _cube(thing: Object, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The first of five faces is the top, the others stand a quarter turn apart."""
    face = np.floor(5 * w)
    half = np.full_like(u, 0.5)
    flat = np.where((face == 0)[:, None], np.stack([u - 0.5, v - 0.5, 2 * half], 1), np.stack([half, u - 0.5, v], 1))
    angle = thing.yaw + face * math.pi / 2
    c, s = np.cos(angle), np.sin(angle)
    x, y, z = flat.T
    return thing.height * np.stack([c * x - s * y, s * x + c * y, z], 1)


def _cylinder(thing: Object, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
    is_top = w * (thing.radius + 2 * thing.height) < thing.radius
    r = thing.radius * np.where(is_top, np.sqrt(u), 1.0)
    z = thing.height * np.where(is_top, 1.0, u)
    return np.concatenate([_circle(v) * r[:, None], z[:, None]], 1)


def _cone(thing: Object, u: np.ndarray, v: np.ndarray, _: np.ndarray) -> np.ndarray:
    """The part of the side within a share s of the way from the tip has the share s^2 of its area."""
    s = np.sqrt(u)[:, None]
    return np.concatenate([_circle(v) * s * thing.radius, (1 - s) * thing.height], 1)


def _circle(turn: np.ndarray) -> np.ndarray:
    """Return points (P, 2) of the unit circle at these shares of a turn."""
    return np.stack([np.cos(2 * math.pi * turn), np.sin(2 * math.pi * turn)], 1)


_DRAW = {"sphere": _sphere, "cube": _cube, "cylinder": _cylinder, "cone": _cone}
