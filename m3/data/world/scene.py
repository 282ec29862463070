"""What is in a scene. One `Scene` is enough to render images, video, depth, sound and points of it.

World frame: x right, y ahead, z up, metres; the ground is z = 0. Objects stand upright on the ground.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.15, 0.65, 0.20),
    "blue": (0.15, 0.30, 0.85),
    "yellow": (0.92, 0.82, 0.15),
    "purple": (0.58, 0.20, 0.70),
    "cyan": (0.12, 0.75, 0.78),
    "orange": (0.95, 0.52, 0.10),
}
MATERIALS = ("metal", "rubber", "wood", "glass")
TEXTURES = ("plain", "stripes", "checker")
GROUNDS = ("plain", "checker", "noise")
RADII = {"small": (0.32, 0.48), "large": (0.68, 0.95)}

Vector = tuple[float, float, float]
Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Object:
    """One upright primitive on the ground.

    Attributes:
        shape: one of SHAPES; a cube has edge 1.7 radius, cylinder and cone have height 2 radius.
        size: small or large.
        radius: metres.
        colour: one of COLOURS.
        texture: one of TEXTURES.
        material: one of MATERIALS; says how it shines and how it sounds.
        x: metres.
        y: metres.
        yaw: rotation about the vertical, radians.
        velocity: metres per second along x and y.
        glow: how far it lights up towards white, in [0, 1].
    """

    shape: str
    size: str
    radius: float
    colour: str
    texture: str
    material: str
    x: float
    y: float
    yaw: float
    velocity: tuple[float, float]
    glow: float = 0.0

    @property
    def height(self) -> float:
        """Metres from the ground to the top."""
        return 1.7 * self.radius if self.shape == "cube" else 2 * self.radius

    @property
    def centre(self) -> Vector:
        """Middle of the object, metres."""
        return (self.x, self.y, self.height / 2)

    @property
    def reach(self) -> float:
        """Radius of the sphere around `centre` that holds the object, metres."""
        return {"sphere": 1.0, "cube": 1.7 * math.sqrt(3) / 2}.get(self.shape, math.sqrt(2.0)) * self.radius


@dataclass(frozen=True)
class Camera:
    """A pinhole camera on a slow circle around what it looks at.

    Attributes:
        target: point it looks at, metres.
        distance: horizontal metres to the target.
        azimuth: direction from the target to the camera, radians.
        height: metres above the ground.
        view: vertical field of view, radians.
        turn: radians per second on the circle.
    """

    target: Vector
    distance: float
    azimuth: float
    height: float
    view: float
    turn: float = 0.0

    @property
    def position(self) -> Vector:
        """Metres."""
        x = self.target[0] + self.distance * math.cos(self.azimuth)
        return (x, self.target[1] + self.distance * math.sin(self.azimuth), self.height)

    def axes(self) -> np.ndarray:
        """Return (3, 3) float32: rows are the unit vectors right, up and forward in the world frame."""
        forward = np.subtract(self.target, self.position)
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        right = right / np.linalg.norm(right)
        return np.stack([right, np.cross(right, forward), forward]).astype(np.float32)

    def close_to(self, thing: Object) -> Camera:
        """Return the camera in the same place, aimed at an object that fills two thirds of the picture's height."""
        away = np.subtract(self.position, thing.centre)
        view = 2 * math.atan(1.5 * thing.reach / float(np.linalg.norm(away)))
        return Camera(
            target=thing.centre,
            distance=math.hypot(away[0], away[1]),
            azimuth=math.atan2(away[1], away[0]),
            height=self.height,
            view=min(view, math.radians(100)),
            turn=self.turn,
        )

    def at(self, time: float) -> Camera:
        """Return the camera at a time in seconds."""
        return replace(self, azimuth=self.azimuth + self.turn * time)


@dataclass(frozen=True)
class Light:
    """One far light and an even one.

    Attributes:
        direction: unit vector towards the light.
        strength: of the far light.
        ambient: of the even light.
    """

    direction: Vector
    strength: float
    ambient: float


@dataclass(frozen=True)
class Scene:
    """Objects on a ground under a light, seen by a camera.

    Attributes:
        objects: two to five, none touching another at time 0.
        camera: the observer.
        light: the lights.
        ground: one of GROUNDS.
        ground_colour: rgb in [0, 1].
        sky_colour: rgb in [0, 1] at the top of the sky.
        pattern: seed of the ground's noise.
    """

    objects: tuple[Object, ...]
    camera: Camera
    light: Light
    ground: str
    ground_colour: Vector
    sky_colour: Vector
    pattern: int

    def at(self, time: float) -> Scene:
        """Return the scene at a time in seconds: objects and camera have moved, in straight lines and a circle."""
        moved = tuple(replace(o, x=o.x + o.velocity[0] * time, y=o.y + o.velocity[1] * time) for o in self.objects)
        return replace(self, objects=moved, camera=self.camera.at(time))


def generator(seed: int, index: int, split: Split, use: int = 0) -> np.random.Generator:
    """Return the random numbers of scene `index` for one use: 0 the scene itself, others what is drawn on top of it.

    The key is (seed, 2 * index + split): no two splits share a key, so they share no scene. The use starts the
    counter elsewhere under the same key, so that a new use changes no number of another.

    Raises:
        ValueError: for any other split, which would otherwise be drawn from the keys of `train`.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be train or held_out, not {split!r}")
    key = [seed & 0xFFFFFFFFFFFFFFFF, 2 * index + (split == "held_out")]
    counter = np.array([0, 0, 0, use], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter))


def sample_scene(seed: int, index: int, split: Split) -> Scene:
    """Draw scene `index` of a split; the same arguments give the same scene everywhere.

    Raises:
        ValueError: for any other split.
    """
    random = generator(seed, index, split)
    scene = _draw(random)
    while not _is_worth_seeing(scene):
        scene = _draw(random)
    return scene


def _draw(random: np.random.Generator) -> Scene:
    objects = _place(random, count=int(random.integers(2, 6)))
    low, high = np.radians(22), np.radians(48)
    distance, elevation = random.uniform(4.6, 6.6), random.uniform(low, high)
    target = (float(random.normal(0, 0.25)), float(random.normal(0, 0.25)), float(random.uniform(0.3, 0.7)))
    camera = Camera(
        target=target,
        distance=distance * math.cos(elevation),
        azimuth=random.uniform(0, 2 * math.pi),
        height=target[2] + distance * math.sin(elevation),
        view=math.radians(random.uniform(40, 52)),
        turn=random.uniform(-0.35, 0.35),
    )
    slope, side = math.radians(random.uniform(35, 70)), random.uniform(0, 2 * math.pi)
    direction = (math.cos(slope) * math.cos(side), math.cos(slope) * math.sin(side), math.sin(slope))
    return Scene(
        objects=objects,
        camera=camera,
        light=Light(direction, strength=random.uniform(0.65, 0.9), ambient=random.uniform(0.25, 0.4)),
        ground=str(random.choice(GROUNDS)),
        ground_colour=_vector(random.uniform(0.35, 0.75) + random.uniform(-0.08, 0.08, 3)),
        sky_colour=_vector(random.uniform([0.35, 0.5, 0.75], [0.6, 0.75, 0.95])),
        pattern=int(random.integers(2**31)),
    )


def _is_worth_seeing(scene: Scene) -> bool:
    """Say whether there are two objects, for relations, and one has its centre in a square picture, for labels."""
    centres = np.subtract([o.centre for o in scene.objects], scene.camera.position) @ scene.camera.axes().T
    edge = math.tan(scene.camera.view / 2) * centres[:, 2]
    return len(scene.objects) >= 2 and bool((np.abs(centres[:, :2]).max(1) < edge).any())


def _place(random: np.random.Generator, count: int) -> tuple[Object, ...]:
    """Draw objects one by one, each where it keeps clear of those before; one that finds no room is left out."""
    placed: list[Object] = []
    for _ in range(count):
        size = "large" if random.random() < 0.5 else "small"
        radius = random.uniform(*RADII[size])
        angle, speed = random.uniform(0, 2 * math.pi), random.uniform(0, 0.5)
        drawn = Object(
            shape=SHAPES[random.integers(len(SHAPES))],
            size=size,
            radius=radius,
            colour=list(COLOURS)[random.integers(len(COLOURS))],
            texture=TEXTURES[random.integers(len(TEXTURES))],
            material=MATERIALS[random.integers(len(MATERIALS))],
            x=0.0,
            y=0.0,
            yaw=random.uniform(0, math.pi / 2),
            velocity=(speed * math.cos(angle), speed * math.sin(angle)),
        )
        for _ in range(20):
            x, y = random.uniform(-1.9, 1.9, 2)
            if all(math.hypot(x - o.x, y - o.y) > 1.25 * (radius + o.radius) + 0.1 for o in placed):
                placed.append(replace(drawn, x=float(x), y=float(y)))
                break
    return tuple(placed)


def _vector(values: np.ndarray) -> Vector:
    return (float(values[0]), float(values[1]), float(values[2]))
