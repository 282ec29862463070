"""Ray casting of a scene with numpy: one ray per pixel, one shadow ray per hit.

Letters: H height, W width, P rays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m3.data.world.scene import COLOURS, SHAPES, Object, Scene

FAR = 14.0
"""Metres; depth is clipped here, and the sky has this depth."""

SKY, GROUND, FIRST_SHAPE = 0, 1, 2
"""Class ids; the shapes follow in the order of SHAPES."""

SHINE = {"metal": 0.55, "glass": 0.45, "wood": 0.08, "rubber": 0.0}
EPS = 1e-4
SLACK = 1.001
"""Widens the spheres around objects, so that rounding never hides a ray that grazes one."""


@dataclass(frozen=True)
class Frame:
    """What a camera sees.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        depth: float32 (H, W) metres along the optical axis, at most FAR.
        semantic: uint8 (H, W) class ids: sky 0, ground 1, sphere 2, cube 3, cylinder 4, cone 5.
        instance: uint8 (H, W), 0 where there is no object, else the object's number plus 1.
        normals: float32 (H, W, 3) unit vectors in the world frame; the sky's point at the camera.
    """

    image: np.ndarray
    depth: np.ndarray
    semantic: np.ndarray
    instance: np.ndarray
    normals: np.ndarray


def render(scene: Scene, height: int, width: int, time: float = 0.0) -> Frame:
    """Render a scene at a time in seconds."""
    scene = scene.at(time) if time else scene
    origin = np.array(scene.camera.position, np.float32)
    rays, cosine = _rays(scene, height, width)
    distance = np.full(len(rays), np.inf, np.float32)
    normals = -rays
    instance = np.zeros(len(rays), np.uint8)

    is_ground = rays[:, 2] < -EPS
    ground_distance = -origin[2] / rays[is_ground, 2]
    distance[is_ground] = ground_distance
    normals[is_ground] = (0.0, 0.0, 1.0)
    for number, thing in enumerate(scene.objects):
        near = _near(thing, origin, rays)
        hit, normal = intersect(thing, origin, rays[near])
        is_closer = hit < distance[near]
        near = near[is_closer]
        distance[near], normals[near], instance[near] = hit[is_closer], normal[is_closer], number + 1

    is_sky = distance * cosine > FAR
    instance[is_sky] = 0  # an object that has moved beyond FAR is as gone as the ground there
    depth = np.minimum(distance * cosine, FAR).astype(np.float32)
    semantic = np.where(is_sky, SKY, GROUND).astype(np.uint8)
    shapes = np.array([0] + [FIRST_SHAPE + SHAPES.index(o.shape) for o in scene.objects], np.uint8)
    semantic = np.where(instance > 0, shapes[instance], semantic)
    normals = np.where(is_sky[:, None], -rays, normals)
    points = origin + rays * np.where(is_sky, 0, distance)[:, None]
    image = _shade(scene, rays, points, normals, instance, is_sky)
    size = (height, width)
    return Frame(
        image=(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).reshape(*size, 3),
        depth=depth.reshape(size),
        semantic=semantic.reshape(size),
        instance=instance.reshape(size),
        normals=normals.reshape(*size, 3),
    )


def intersect(thing: Object, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Meet one object.

    Args:
        thing: the object.
        origin: (3,) or (P, 3) start of the rays, metres.
        rays: (P, 3) unit directions.

    Returns:
        distance (P,) metres, inf for a miss; normal (P, 3), undefined for a miss.
    """
    local = (origin - np.array([thing.x, thing.y, 0.0], np.float32)).astype(np.float32)
    local = np.broadcast_to(local, rays.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _MEET[thing.shape](thing, local, rays)


def _rays(scene: Scene, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit directions (P, 3), row by row, and the cosine (P,) of each with the optical axis."""
    axes = scene.camera.axes()
    half = np.tan(scene.camera.view / 2)
    y = (1 - 2 * (np.arange(height) + 0.5) / height) * half
    x = (2 * (np.arange(width) + 0.5) / width - 1) * half * width / height
    rays = (x[None, :, None] * axes[0] + y[:, None, None] * axes[1] + axes[2]).reshape(-1, 3).astype(np.float32)
    length = np.sqrt(np.einsum("pc,pc->p", rays, rays))
    return rays / length[:, None], 1 / length


def _near(thing: Object, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Return the numbers of the rays that pass the sphere around an object; all others surely miss it."""
    to = np.array(thing.centre, np.float32) - origin
    along = rays @ to
    return np.flatnonzero((to @ to - along * along < (SLACK * thing.reach) ** 2) & (along > -thing.reach))


def _quadratic(a: np.ndarray | np.float32, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both solutions of a t^2 + 2 b t + c = 0, nan where there is none."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _first(t: np.ndarray, is_hit: np.ndarray) -> np.ndarray:
    return np.where(is_hit & (t > EPS), t, np.inf).astype(np.float32)


def _sphere(thing: Object, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    o = o - np.array([0, 0, thing.radius], np.float32)
    t, _ = _quadratic(np.float32(1.0), (o * d).sum(1), (o * o).sum(1) - np.float32(thing.radius**2))
    t = _first(t, ~np.isnan(t))
    return t, (o + d * np.where(np.isinf(t), 0, t)[:, None]) / np.float32(thing.radius)


def _cube(thing: Object, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = thing.height / 2
    c, s = np.cos(thing.yaw), np.sin(thing.yaw)
    turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]], np.float32)
    o, d = (o - np.array([0, 0, half], np.float32)) @ turn.T, d @ turn.T
    first, second = (-half - o) / d, (half - o) / d
    enter, leave = np.minimum(first, second), np.maximum(first, second)
    axis = enter.argmax(1)
    t = np.take_along_axis(enter, axis[:, None], 1)[:, 0]
    normal = np.zeros_like(d)
    np.put_along_axis(normal, axis[:, None], -np.sign(np.take_along_axis(d, axis[:, None], 1)), 1)
    return _first(t, t < leave.min(1)), normal @ turn


def _cylinder(thing: Object, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r, h = np.float32(thing.radius), np.float32(thing.height)
    a, b = (d[:, :2] ** 2).sum(1), (o[:, :2] * d[:, :2]).sum(1)
    side, _ = _quadratic(a, b, (o[:, :2] ** 2).sum(1) - r * r)
    z = o[:, 2] + d[:, 2] * side
    side = _first(side, (z >= 0) & (z <= h))
    top = (h - o[:, 2]) / d[:, 2]
    at = o[:, :2] + d[:, :2] * top[:, None]
    top = _first(top, ((at**2).sum(1) <= r * r) & (d[:, 2] < 0))
    t = np.minimum(side, top)
    point = o + d * np.where(np.isinf(t), 0, t)[:, None]
    normal = np.concatenate([point[:, :2] / r, np.zeros((len(t), 1), np.float32)], 1)
    return t, np.where((top <= side)[:, None], np.array([0, 0, 1], np.float32), normal)


def _cone(thing: Object, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    h = np.float32(thing.height)
    k = np.float32((thing.radius / thing.height) ** 2)
    a = (d[:, :2] ** 2).sum(1) - k * d[:, 2] ** 2
    b = (o[:, :2] * d[:, :2]).sum(1) + k * (h - o[:, 2]) * d[:, 2]
    c = (o[:, :2] ** 2).sum(1) - k * (h - o[:, 2]) ** 2
    t = np.full(len(d), np.inf, np.float32)
    for root in _quadratic(a, b, c):
        z = o[:, 2] + d[:, 2] * root
        t = np.minimum(t, _first(root, (z >= 0) & (z <= h)))
    point = o + d * np.where(np.isinf(t), 0, t)[:, None]
    normal = np.concatenate([point[:, :2], (k * (h - point[:, 2]))[:, None]], 1)
    return t, normal / np.maximum(np.sqrt((normal**2).sum(1, keepdims=True)), 1e-8)


_MEET = {"sphere": _sphere, "cube": _cube, "cylinder": _cylinder, "cone": _cone}


def _shade(
    scene: Scene, rays: np.ndarray, points: np.ndarray, normals: np.ndarray, instance: np.ndarray, is_sky: np.ndarray
) -> np.ndarray:
    """Return colours (P, 3) in [0, 1]: texture, ambient and direct light with cast shadows, highlights, haze."""
    towards = np.array(scene.light.direction, np.float32)
    facing = np.maximum(normals @ towards, 0)
    facing[_is_shadowed(scene, points, normals, facing, is_sky)] = 0
    albedo = _ground_colour(scene, points)
    shine = np.zeros(len(rays), np.float32)
    for number, thing in enumerate(scene.objects):
        own = instance == number + 1
        albedo[own] = object_colour(thing, points[own])
        shine[own] = SHINE[thing.material]
    colour = albedo * (scene.light.ambient + scene.light.strength * facing)[:, None]
    mirrored = rays - 2 * np.einsum("pc,pc->p", rays, normals)[:, None] * normals
    colour += (shine * (facing > 0) * np.maximum(mirrored @ towards, 0) ** 24)[:, None]
    for number, thing in enumerate(scene.objects):
        if thing.glow:
            own = instance == number + 1
            colour[own] += np.float32(thing.glow) * (1 - colour[own])
    height = np.clip(rays[:, 2:] * 2 + 0.6, 0, 1)
    sky = (1 - height) * 0.92 + height * np.array(scene.sky_colour, np.float32)
    return np.where(is_sky[:, None], sky, colour)


def _is_shadowed(
    scene: Scene, points: np.ndarray, normals: np.ndarray, facing: np.ndarray, is_sky: np.ndarray
) -> np.ndarray:
    """Return (P,) True where an object stands between a lit point and the light."""
    shadowed = np.zeros(len(points), bool)
    lit = np.flatnonzero(~is_sky & (facing > 0))
    start = points[lit] + normals[lit] * np.float32(5e-3)
    light = np.array(scene.light.direction, np.float32)
    towards = np.broadcast_to(light, start.shape)
    for thing in scene.objects:
        to = np.array(thing.centre, np.float32) - start
        along = to @ light
        apart = np.einsum("pc,pc->p", to, to) - along * along
        near = np.flatnonzero((apart < (SLACK * thing.reach) ** 2) & (along > -thing.reach))
        distance, _ = intersect(thing, start[near], towards[near])
        shadowed[lit[near[np.isfinite(distance)]]] = True
    return shadowed


def _ground_colour(scene: Scene, points: np.ndarray) -> np.ndarray:
    base = np.array(scene.ground_colour, np.float32)
    x, y = points[:, 0], points[:, 1]
    if scene.ground == "checker":
        tone = 0.72 + 0.28 * ((np.floor(x) + np.floor(y)) % 2)
    elif scene.ground == "noise":
        phase = np.random.Generator(np.random.Philox(scene.pattern)).uniform(0, 2 * np.pi, 3)
        waves = np.sin(2.3 * x + phase[0]) + np.sin(2.9 * y + phase[1]) + np.sin(1.7 * (x - y) + phase[2])
        tone = 0.86 + 0.07 * waves
    else:
        tone = np.ones_like(x)
    return tone[:, None].astype(np.float32) * base


def object_colour(thing: Object, points: np.ndarray) -> np.ndarray:
    """Return the albedo (P, 3) in [0, 1] of points (P, 3) on an object, world frame, metres: colour times texture."""
    base = np.array(COLOURS[thing.colour], np.float32)
    z = points[:, 2] / thing.height
    if thing.texture == "plain":
        tone = np.ones_like(z)
    else:
        bands = np.clip(np.floor(z * 4), 0, 3)  # a flat top lies where a fifth band would begin
        if thing.texture == "checker":
            angle = np.arctan2(points[:, 1] - thing.y, points[:, 0] - thing.x) - thing.yaw
            bands = bands + np.floor(angle / (np.pi / 4))
        tone = 1 - 0.3 * (bands % 2)
    return tone[:, None].astype(np.float32) * base
