"""The sound of a scene against acoustics worked out by hand and slow sums of sines; the sheet and its wav files.

Letters: S samples, K strikes.
"""

import math
import wave
from dataclasses import replace

import numpy as np
import pytest

from m3.data.sources.world import World
from m3.data.world import Camera, Light, Object, Offer, Scene, WorldSource, sample_scene
from m3.data.world import sound as acoustics
from m3.data.world.render import render
from m3.data.world.scene import MATERIALS, generator
from m3.data.world.sheet import contact_sheet
from m3.data.world.sound import record, strikes, struck
from m3.errors import M3Error
from m3.plugins import Signal
from m3.recipe import DataSpec

RATE = 16000


def thing(x: float = 0.0, y: float = 0.0, radius: float = 0.7, material: str = "metal") -> Object:
    return Object("sphere", "large", radius, "red", "plain", material, x, y, yaw=0.0, velocity=(0.0, 0.0))


def scene_of(*objects: Object) -> Scene:
    """A camera at (0, -5, 0.7) that looks along +y, so that a sphere at (x, y) is at (x, y + 5) from it."""
    camera = Camera((0.0, 0.0, 0.7), distance=5.0, azimuth=-math.pi / 2, height=0.7, view=math.radians(45))
    light = Light((0.0, 0.0, 1.0), strength=0.8, ambient=0.3)
    return Scene(objects, camera, light, "plain", (0.5, 0.5, 0.5), (0.4, 0.6, 0.9), pattern=0)


def dice(number: int = 0) -> np.random.Generator:
    return generator(7, number, "train", use=3)


@pytest.fixture
def struck_at(monkeypatch):
    """Set when every object is struck."""
    return lambda *times: monkeypatch.setattr(
        acoustics, "strikes", lambda scene, *_: [np.array(times)] * len(scene.objects)
    )


def ring(material: str, radius: float, time: np.ndarray) -> np.ndarray:
    """Return a strike at time 0, mode by mode, at amplitude 1."""
    ratios = {"metal": [1, 2.756, 5.423, 8.988, 13.448], "wood": [1, 1.47, 2.09, 2.56], "rubber": [1]}[material]
    pitch, friction = {"metal": (150, 0.004), "wood": (130, 0.06), "rubber": (40, 0.5)}[material]
    wave = np.zeros_like(time)
    for ratio in ratios:
        frequency = pitch * ratio / radius
        mode = np.sin(2 * math.pi * frequency * time) * np.exp(-math.pi * frequency * friction * time)
        wave += mode / ratio / sum(1 / r for r in ratios)
    return np.where(time > 0, wave * np.clip(time / 0.002, 0, 1), 0)


@pytest.mark.parametrize("material", ["metal", "wood", "rubber"])
def test_a_strike_is_a_sum_of_damped_sines(material, struck_at):
    struck_at(0.1234567)
    samples, rate = record(scene_of(thing(x=3.0, y=-1.0, material=material)), dice(), 1.5, RATE)
    assert (samples.shape, samples.dtype, rate) == ((2, 24000), np.float32, RATE)
    for channel, ear, angle in zip(samples, (-0.1, 0.1), (math.cos, math.sin), strict=True):
        arrival = 0.1234567 + math.hypot(3.0 - ear, 4.0) / 343
        gain = 0.4 / 5.0 * angle((1 + 3 / 5) * math.pi / 4)
        expected = gain * ring(material, 0.7, np.arange(24000) / RATE - arrival)
        np.testing.assert_allclose(channel, expected, atol=2e-5 * gain + 1e-4 * gain)
        first = math.ceil(arrival * RATE)
        assert not channel[:first].any()
        assert channel[first] != 0


def test_a_new_strike_damps_the_last_one(struck_at):
    struck_at(0.1, 0.3)
    samples, _ = record(scene_of(thing()), dice(), 0.8, RATE)
    delay = math.hypot(0.1, 5.0) / 343
    time = np.arange(round(0.8 * RATE)) / RATE - delay
    released = np.clip(1 - (time - 0.3) / 0.002, 0, 1)
    expected = 0.08 * math.sqrt(0.5) * (ring("metal", 0.7, time - 0.1) * released + ring("metal", 0.7, time - 0.3))
    np.testing.assert_allclose(samples[0], expected, atol=1e-5)
    np.testing.assert_array_equal(samples[0], samples[1])  # straight ahead


def test_a_strike_sounds_from_where_object_and_camera_are_then(struck_at):
    """After 2 s the object has gone 2 m to the right; after a quarter turn the camera has it in front, 5 + 2 m."""
    struck_at(2.0)
    moving = scene_of(replace(thing(), velocity=(1.0, 0.0)))
    one, _ = record(moving, dice(), 3.0, RATE)
    two, _ = record(scene_of(thing(x=2.0)), dice(), 3.0, RATE)
    np.testing.assert_allclose(one, two, atol=1e-6)
    turning = replace(moving, camera=replace(moving.camera, turn=-math.pi / 4))  # at 2 s at (-5, 0), looks along +x
    three, _ = record(turning, dice(), 3.0, RATE)
    four, _ = record(scene_of(thing(y=2.0)), dice(), 3.0, RATE)
    np.testing.assert_allclose(three, four, atol=1e-6)


def test_a_struck_object_glows_and_fades_while_the_others_stay_as_they_are():
    scene = scene_of(thing(x=-1.0, material="wood"), thing(x=1.0))
    times = [np.array([0.5, 1.0]), np.array([2.0])]
    glows = [[o.glow for o in struck(scene, times, now).objects] for now in (0.25, 0.5, 0.75, 1.5)]
    assert glows == [[0, 0], [1, 0], [pytest.approx(math.exp(-1)), 0], [pytest.approx(math.exp(-2)), 0]]
    metal = struck(scene, times, 2.5).objects[1]
    assert metal.glow == pytest.approx(math.exp(-0.5))
    dark, lit = render(scene, 32, 32), render(struck(scene, times, 1.0), 32, 32)
    own = dark.instance == 1
    assert own.any()
    assert (lit.image[own] == 255).all()
    assert (lit.image[~own] == dark.image[~own]).all()


def test_a_video_shows_the_strikes_that_its_sound_lets_hear():
    source = WorldSource(0, "train", 20, 64, 64, signals=("video", "audio"), offer=Offer(frames=16, fps=8.0))
    brightness, loudness = [], []
    for index in range(20):
        signals = source.read(index)["signals"]
        steps = np.diff(signals["video"].frames.astype(float), axis=0)
        brightness.append(np.maximum(steps, 0).mean((1, 2, 3)))
        loudness.append(np.abs(signals["audio"].samples).mean(0).reshape(16, -1).mean(1)[:-1])
    jump = np.diff(np.pad(np.array(loudness), ((0, 0), (1, 0))), axis=1)
    assert np.corrcoef(np.array(brightness).ravel(), jump.ravel())[0, 1] > 0.2
    assert abs(np.corrcoef(np.roll(brightness, 1, axis=0).ravel(), jump.ravel())[0, 1]) < 0.1  # another scene's


def test_strikes_leave_room_for_each_other():
    counts = set()
    for number in range(100):
        (times,) = strikes(scene_of(thing()), dice(number), 2.0)
        counts.add(len(times))
        share = 2.0 / len(times)
        assert ((times >= np.arange(len(times)) * share) & (times < (np.arange(len(times)) + 0.8) * share)).all()
    assert counts == {1, 2, 3}


def test_left_is_louder_and_earlier_on_the_left(struck_at):
    struck_at(0.2)
    for x, near, far in ((-2.5, 0, 1), (2.5, 1, 0)):
        samples, _ = record(scene_of(thing(x=x)), dice(), 1.0, RATE)
        first = [(channel != 0).argmax() for channel in samples]
        assert first[near] < first[far]
        power = (samples.astype(float) ** 2).sum(1)
        assert power[near] > 1.5 * power[far]


def test_loudness_falls_with_distance(struck_at):
    struck_at(0.2)
    near, far = (record(scene_of(thing(y=y, material="wood")), dice(), 1.0, RATE)[0] for y in (-1.0, 3.0))
    assert np.linalg.norm(near) / np.linalg.norm(far) == pytest.approx(8 / 4, rel=0.01)


@pytest.mark.parametrize("material", MATERIALS)
def test_bigger_is_lower(material, struck_at):
    struck_at(0.1)
    centroids = []
    for radius in (0.35, 0.6, 0.9):
        samples, _ = record(scene_of(thing(radius=radius, material=material)), dice(), 1.0, RATE)
        power = abs(np.fft.rfft(samples[0])) ** 2
        centroids.append((power * np.fft.rfftfreq(RATE, 1 / RATE)).sum() / power.sum())
    assert centroids[0] > 1.3 * centroids[1] > 1.3**2 * centroids[2]


def test_metal_rings_longer_than_glass_than_wood_than_rubber(struck_at):
    struck_at(0.1)
    lasting = {}
    for material in MATERIALS:
        samples, _ = record(scene_of(thing(material=material)), dice(), 2.0, RATE)
        power = np.cumsum(samples[0].astype(float) ** 2)
        lasting[material] = (power < 0.99 * power[-1]).sum() / RATE - 0.1
    assert lasting["metal"] > 2 * lasting["glass"] > 4 * lasting["wood"] > 6 * lasting["rubber"]
    assert lasting["rubber"] < 0.06


def test_the_loudest_possible_scene_stays_within_bounds(struck_at):
    """Five objects at the ear, struck together and again: near the bound, never beyond."""
    struck_at(0.1, 0.1015, 0.4)
    samples, _ = record(scene_of(*[thing(x=-1.0, y=-5.0)] * 5), dice(), 1.0, RATE)
    assert 0.5 < abs(samples).max() <= 1
    assert abs(samples[1]).max() < 1e-6
    peaks = [abs(record(sample_scene(0, i, "train"), dice(i), 2.0, RATE).samples).max() for i in range(100)]
    assert max(peaks) < 0.3
    assert min(peaks) > 0.01


def test_modes_beyond_the_rate_are_left_out(struck_at):
    """Glass of 0.35 m has its modes at 1286, 2983, 5464, 8524 and 12060 Hz: at 16 kHz the last two would fold back."""
    struck_at(0.1)
    samples, _ = record(scene_of(thing(radius=0.35, material="glass")), dice(), 1.0, RATE)
    spectrum = abs(np.fft.rfft(samples[0]))
    assert spectrum[5400:5530].max() > 20 * spectrum[7300:7600].max()  # 16000 - 8524 = 7476
    finer, _ = record(scene_of(thing(radius=0.35, material="glass")), dice(), 1.0, 48000)
    spectrum = abs(np.fft.rfft(finer[0]))
    assert spectrum[8460:8590].max() > 20 * spectrum[7300:7600].max()


def test_a_sound_lasts_as_long_as_the_video_and_differs_between_scenes():
    source = WorldSource(0, "train", 6, signals=("audio",), offer=Offer(frames=6, fps=4.0, sound_rate=8000))
    sounds = [source.read(i)["signals"]["audio"] for i in range(6)]
    assert all(sound.samples.shape == (2, 12000) and sound.rate == 8000 for sound in sounds)
    assert len({sound.samples.tobytes() for sound in sounds}) == 6


def test_the_sheet_and_its_sounds_are_written(tmp_path):
    contact_sheet(0, "train", 2, tmp_path / "new" / "sheet.png")
    assert (tmp_path / "new" / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    with wave.open(str(tmp_path / "new" / "sheet_1.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 16000)
        written = np.frombuffer(file.readframes(40000), "<i2").reshape(-1, 2).T
    samples = WorldSource(0, "train", 2).read(1)["signals"]["audio"].samples
    np.testing.assert_allclose(written / 32767, samples, atol=0.51 / 32767)


class Part:
    """As much of a modality as the source of scenes looks at."""

    def __init__(self, *size: int) -> None:
        self.signal, self.reads = Signal("values", 1, size), ""


class Video(Part): ...


class Audio(Part): ...


class SemanticMap(Part): ...


class Smell(Part): ...


def test_the_source_makes_what_the_modalities_read():
    parts = {
        "clip": Video(4, 48, 40),
        "noise": Audio(128, 512),
        "ears": Audio(
            8,
        ),
        "labels": SemanticMap(32, 56),
    }
    options = {"frames": 2, "sound_rate": 4000}
    world = World(DataSpec(samples=5, options=options), parts, 3, "train")  # pyright: ignore[reportArgumentType]
    assert world.scenes.signals == ("video", "audio", "semantic_map")
    signals = world.read(2).signals
    assert list(signals) == list(parts)
    assert signals["clip"].frames.shape == (2, 48, 56, 3)  # the largest picture; a spectrogram is none
    assert signals["noise"] is signals["ears"]
    assert signals["noise"].samples.shape == (2, 2000)
    with pytest.raises(M3Error, match=r"modalities\.nose: the world makes no `smell`; it offers image, depth, .*boxes"):
        World(DataSpec(), {"nose": Smell(3)}, 0, "train")  # pyright: ignore[reportArgumentType]
