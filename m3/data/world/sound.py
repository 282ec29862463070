"""The sound of a scene: every object is struck now and then and rings as its material and size let it.

A struck solid is a sum of damped sines, its modes (van den Doel and Pai, The Sounds of Physical Objects, 1998).
The frequencies fall with the size, their ratios and the internal friction tell the material (Wildes and Richards,
Recovering Material Properties from Sound, 1988). Two ears hear each strike from where object and camera are then.

Letters: S samples, K strikes of an object, M modes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from m3.data.recording import Sound
from m3.data.world.scene import Camera, Object, Scene

SPEED = 343.0
"""Metres per second of sound in air."""

EARS = 0.2
"""Metres between the ears, which sit left and right of the camera."""

NEAREST = 2.0
"""Metres; a source that comes nearer gets no louder, which bounds the loudness."""

LEVEL = NEAREST / 5
"""Amplitude of a strike heard at 1 m. Five objects at NEAREST, each ringing at its fullest, reach just 1."""

CONTACT = 0.002
"""Seconds a strike takes to build up. Meanwhile it damps what the object still rang from the strike before."""

AFTERGLOW = {"metal": 1.0, "glass": 0.5, "wood": 0.25, "rubber": 0.12}
"""Seconds in which the glow of a struck object falls to 1 / e, so that a video shows what is heard: when an object is
struck, and by how long it glows what it is made of. The order is that of the sounds."""

QUIET = 1e-4
"""Share of its first amplitude at which a strike ends."""

BLOCK = 256
"""Samples per row when a strike is computed as a product of two short tables."""


@dataclass(frozen=True)
class Timbre:
    """How a material sounds.

    Attributes:
        pitch: frequency of the lowest mode of an object of radius 1 m, Hz; inversely proportional to the radius.
        ratios: frequencies of the modes as multiples of the lowest.
        friction: tangent of the loss angle; a mode of f Hz decays at pi * f * friction per second.
    """

    pitch: float
    ratios: tuple[float, ...]
    friction: float


# Ratios: an aluminium bar, a wine glass, a red cedar plate (The Canonical Csound Reference Manual, appendix
# "Modal Frequency Ratios"). Pitch and friction are chosen to sound well on these sizes, in the order of nature.
TIMBRES = {
    "metal": Timbre(150.0, (1.0, 2.756, 5.423, 8.988, 13.448), 0.004),
    "glass": Timbre(450.0, (1.0, 2.32, 4.25, 6.63, 9.38), 0.007),
    "wood": Timbre(130.0, (1.0, 1.47, 2.09, 2.56), 0.06),
    "rubber": Timbre(40.0, (1.0,), 0.5),
}


def record(scene: Scene, random: np.random.Generator, duration: float, rate: int) -> Sound:
    """Record a scene from time 0 on.

    Args:
        scene: the scene at time 0.
        random: draws when the objects are struck.
        duration: seconds.
        rate: samples per second; modes from rate / 2 on are not heard.
    """
    samples = np.zeros((2, round(duration * rate)), np.float32)
    for thing, times in zip(scene.objects, strikes(scene, random, duration), strict=True):
        arrivals, gains = hear(scene.camera, thing, times)
        strike = _Strike(thing, rate)
        for channel, arrival, gain in zip(samples, arrivals * rate, gains, strict=True):
            for start, end, loudness in zip(arrival, [*arrival[1:], math.inf], gain, strict=True):
                strike.add(channel, start, end, loudness)
    return Sound(samples, rate)


def strikes(scene: Scene, random: np.random.Generator, duration: float) -> list[np.ndarray]:
    """Draw when each object is struck: one to three times, ascending, seconds (K,).

    Each falls into the first four fifths of its own share of the duration, so that it has time to sound.
    """
    times = []
    for _ in scene.objects:
        count = int(random.integers(1, 4))
        times.append((np.arange(count) + 0.8 * random.random(count)) * duration / count)
    return times


def struck(scene: Scene, times: list[np.ndarray], now: float) -> Scene:
    """Let every object glow that was struck at its `times` (K,) before `now`, seconds: the later, the less."""
    since = [min((now - past for past in own if past <= now), default=math.inf) for own in times]
    objects = zip(scene.objects, since, strict=True)
    return replace(scene, objects=tuple(replace(o, glow=math.exp(-gap / AFTERGLOW[o.material])) for o, gap in objects))


def hear(camera: Camera, thing: Object, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell when and how loud both ears hear an object that is struck at `times` (K,), seconds.

    Returns:
        arrivals (2, K) seconds and gains (2, K), left and right. The gains are panned by the sine of the angle to
        the side with equal power (their squares add up to the same from all directions) and fall as 1 / distance.
    """
    azimuth = camera.azimuth + camera.turn * times
    level = np.zeros_like(times)
    out = np.stack([np.cos(azimuth), np.sin(azimuth), level], 1)
    right = np.stack([-np.sin(azimuth), np.cos(azimuth), level], 1)
    head = np.array([*camera.target[:2], camera.height]) + camera.distance * out
    to = np.array(thing.centre) + np.outer(times, [*thing.velocity, 0.0]) - head
    distance = np.linalg.norm(to, axis=1)
    side = np.array([[[-1.0]], [[1.0]]]) * EARS / 2
    arrivals = times + np.linalg.norm(to - side * right, axis=2) / SPEED
    angle = (1 + (to * right).sum(1) / distance) * math.pi / 4
    return arrivals, LEVEL * np.stack([np.cos(angle), np.sin(angle)]) / np.maximum(distance, NEAREST)


class _Strike:
    """What a strike on one object sounds like, computed for as long as it is heard.

    A mode's n-th sample is the imaginary part of exp(step * n). With n = BLOCK * i + j that is a product of a
    factor of i and one of j, so all modes together are one small matrix product instead of many sines.
    """

    def __init__(self, thing: Object, rate: int) -> None:
        timbre = TIMBRES[thing.material]
        ratios = np.array(timbre.ratios)
        frequency = timbre.pitch / thing.radius * ratios
        share = (1 / ratios) / (1 / ratios).sum()
        is_heard = frequency < rate / 2
        self.share = share[is_heard]
        self.step = math.pi * frequency[is_heard] * (2j - timbre.friction) / rate
        self.length = math.ceil(-math.log(QUIET) * rate / (math.pi * frequency[0] * timbre.friction))
        self.contact = CONTACT * rate
        within = np.exp(np.outer(self.step, np.arange(BLOCK)))
        self.within = np.concatenate([np.imag(within), np.real(within)]).astype(np.float32)

    def add(self, channel: np.ndarray, start: float, end: float, gain: float) -> None:
        """Add the strike to `channel` (S,) from `start` on, damped from `end` on; both in samples, also between two."""
        first = math.ceil(start)
        last = math.ceil(min(len(channel), first + self.length, end + self.contact))
        if last <= first:
            return
        blocks = BLOCK * np.arange(-(-(last - first) // BLOCK)) + (first - start)
        table = gain * self.share * np.exp(np.outer(blocks, self.step))
        wave = (np.concatenate([np.real(table), np.imag(table)], 1).astype(np.float32) @ self.within).ravel()[
            : last - first
        ]
        number = np.arange(first, last)
        envelope = np.clip(np.minimum(number - start, end + self.contact - number) / self.contact, 0, 1)
        channel[first:last] += wave * envelope
