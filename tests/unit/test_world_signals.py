"""Video, points, normals and boxes of a scene, against geometry worked out by hand; sound has a file of its own.

Letters: H height, W width, P points.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from m3.data.world import Camera, Frame, Light, Object, Offer, Scene, WorldSource, render, sample_scene
from m3.data.world.caption import SEEN_PIXELS
from m3.data.world.cloud import sample_points
from m3.data.world.derived import boxes, camera_normals
from m3.data.world.scene import COLOURS, SHAPES, generator
from m3.data.world.sound import strikes, struck
from m3.data.world.source import POINTS, SOUND
from m3.errors import M3Error

LIGHT = Light((0.0, 0.0, 1.0), strength=0.8, ambient=0.3)


def thing(shape: str = "sphere", x: float = 0.0, y: float = 0.0, radius: float = 0.7, **changes) -> Object:
    plain = Object(shape, "large", radius, "red", "plain", "rubber", x, y, yaw=0.0, velocity=(0.0, 0.0))
    return replace(plain, **changes)


def scene_of(*objects: Object, height: float = 0.7, aim: float = 0.7) -> Scene:
    """A camera at (0, -5, height) that looks along +y at (0, 0, aim): the observer's frame is the world's."""
    camera = Camera((0.0, 0.0, aim), distance=5.0, azimuth=-math.pi / 2, height=height, view=math.radians(45))
    return Scene(objects, camera, LIGHT, "plain", (0.5, 0.5, 0.5), (0.4, 0.6, 0.9), pattern=0)


def dice(number: int = 0) -> np.random.Generator:
    return generator(7, number, "train", use=3)


def test_the_scenes_of_a_seed_stay_the_same():
    """Numbers of the first version: a new signal must not move them, or trained models meet another world."""
    scene = sample_scene(5, 0, "train")
    first = scene.objects[0]
    assert (first.shape, first.colour, first.texture, first.material) == ("cylinder", "cyan", "checker", "metal")
    assert (first.radius, first.x) == pytest.approx((0.3532494305059314, 1.3222250740472314), rel=1e-12)
    assert (scene.camera.turn, scene.pattern) == (pytest.approx(0.21327728666000623, rel=1e-12), 675172055)
    frame = render(scene, 64, 64)
    np.testing.assert_allclose(frame.image.mean((0, 1)), [104.51831055, 111.17553711, 101.93994141], atol=0.01)
    assert np.bincount(frame.semantic.ravel(), minlength=6).tolist() == [754, 2650, 0, 0, 692, 0]


def test_uses_of_a_scene_share_no_numbers():
    drawn = [generator(1, 2, "train", use).integers(2**62, size=50) for use in (0, SOUND, POINTS)]
    assert len(set(np.concatenate(drawn).tolist())) == 150


def test_wrong_texts_are_captions_of_other_scenes_of_the_training_split_alone():
    offer, count = Offer(wrong_texts=0.3), 200
    texts = [
        [WorldSource(3, split, count, signals=("text",), offer=o).read(i)["signals"]["text"] for i in range(count)]
        for split in ("train", "held_out")
        for o in (Offer(), offer)
    ]
    assert texts[2] == texts[3]
    wrong = [(right, said) for right, said in zip(*texts[:2], strict=True) if right != said]
    assert 0.2 < len(wrong) / count < 0.4
    assert all(said in texts[0] for _, said in wrong)
    picture = [WorldSource(3, "train", 2, signals=("image",), offer=o).read(1)["signals"] for o in (Offer(), offer)]
    np.testing.assert_array_equal(picture[0]["image"], picture[1]["image"])


def test_same_bits_in_any_order_and_any_company():
    forward = [WorldSource(3, "train", 4).read(i) for i in range(4)]
    for name in WorldSource.SIGNALS:
        alone = WorldSource(3, "train", 4, signals=(name,))
        for index in (3, 0):
            sample = alone.read(index)
            assert list(sample["signals"]) == [name]
            np.testing.assert_equal(sample["signals"][name], forward[index]["signals"][name])
            assert sample["labels"] == forward[index]["labels"]
    other = WorldSource(3, "held_out", 4).read(0)["signals"]
    for name in ("video", "audio", "points", "normals"):
        one, two = (np.asarray(s[name][0] if isinstance(s[name], tuple) else s[name])
                    for s in (forward[0]["signals"], other))  # fmt: skip
        assert not np.array_equal(one, two)


def test_what_nobody_asked_for_is_not_made(monkeypatch):
    def refuse(*_):
        raise AssertionError("made without need")

    for name in ("record", "sample_points", "boxes", "camera_normals", "caption"):
        monkeypatch.setattr(f"m3.data.world.source.{name}", refuse)
    WorldSource(0, "train", 1, signals=("image", "depth", "semantic_map", "video")).read(0)
    with pytest.raises(AssertionError, match="made without need"):
        WorldSource(0, "train", 1, signals=("audio",)).read(0)


def test_an_unknown_signal_is_named():
    with pytest.raises(M3Error, match=r"^signals: the world makes no `smell`; choose from image, depth, semantic_map"):
        WorldSource(0, "train", 1, signals=("image", "smell"))


def test_a_video_starts_with_the_image_and_follows_the_scene():
    sample = WorldSource(0, "train", 9, 48, 40, offer=Offer(frames=5, fps=2.0)).read(8)["signals"]
    frames, times = sample["video"]
    assert (frames.shape, frames.dtype, times.dtype) == ((5, 48, 40, 3), np.uint8, np.float32)
    assert times.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert np.array_equal(frames[0], sample["image"])
    scene = sample_scene(0, 8, "train")
    hits = strikes(scene, generator(0, 8, "train", SOUND), 2.5)
    assert np.array_equal(frames[3], render(struck(scene, hits, 1.5), 48, 40, 1.5).image)
    assert not np.array_equal(frames[3], frames[2])


def test_nothing_moves_in_a_static_scene_that_nobody_strikes(monkeypatch):
    monkeypatch.setattr("m3.data.world.source.strikes", lambda scene, *_: [np.array([]) for _ in scene.objects])
    monkeypatch.setattr("m3.data.world.source.sample_scene", lambda *_: scene_of(thing("cone", texture="checker")))
    frames = WorldSource(0, "train", 1, signals=("video",)).read(0)["signals"]["video"].frames
    assert len(frames) == 8
    assert (frames == frames[0]).all()


def off_surface(solid: Object, place: np.ndarray) -> np.ndarray:
    """Return how far points (P, 3) lie from the surface, by the definition of each shape."""
    r, (x, y, z) = solid.radius, (place - [solid.x, solid.y, 0]).T
    out = np.hypot(x, y)
    if solid.shape == "sphere":
        return abs(np.sqrt(x**2 + y**2 + (z - r) ** 2) - r)
    if solid.shape == "cube":
        along = abs(x * math.cos(solid.yaw) + y * math.sin(solid.yaw))
        across = abs(-x * math.sin(solid.yaw) + y * math.cos(solid.yaw))
        return abs(np.maximum.reduce([along, across, z - 0.85 * r]) - 0.85 * r) + np.maximum(-z, 0)
    outside = np.maximum(-z, 0) + np.maximum(z - 2 * r, 0)
    if solid.shape == "cylinder":
        return np.minimum(abs(out - r), abs(z - 2 * r) + np.maximum(out - r, 0)) + outside
    return abs(out - (r - z / 2)) * 2 / math.sqrt(5) + outside  # the side rises 2 for every 1 inwards


@pytest.mark.parametrize("shape", SHAPES)
def test_points_lie_on_their_object_and_wear_its_colour(shape):
    solid = thing(shape, x=0.3, y=-0.4, radius=0.8, yaw=0.6, texture="stripes", colour="cyan")
    points = sample_points(scene_of(solid), dice(), 3000)
    assert (points.shape, points.dtype) == ((3000, 6), np.float32)
    assert off_surface(solid, points[:, :3]).max() < 1e-4
    band = np.minimum(np.floor(points[:, 2] / solid.height * 4), 3)
    is_edge = abs(points[:, 2] / solid.height * 4 - np.round(points[:, 2] / solid.height * 4)) < 1e-4
    colour = np.where(band % 2 == 1, 0.7, 1.0)[:, None] * COLOURS["cyan"]
    is_top = band == 3  # the edge above the last band is no edge between bands
    np.testing.assert_allclose(points[~is_edge | is_top, 3:], colour[~is_edge | is_top], atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ("sphere", lambda p: [p[:, 2] < 0.4, p[:, 0] > 0, p[:, 1] > 0.4]),  # 1/4 of the height, half, quarter
        ("cube", lambda p: [p[:, 2] > 1.36 - 1e-4, p[:, 0] > 0.68 - 1e-4, p[:, 1] < -0.68 + 1e-4]),
        ("cylinder", lambda p: [p[:, 2] > 1.6 - 1e-4, p[:, 2] < 0.8, p[:, 0] > 0]),
        ("cone", lambda p: [p[:, 2] < 0.8, p[:, 2] > 1.2, p[:, 1] > 0]),
    ],
)
def test_points_are_even_by_area(shape, parts):
    shares = {
        "sphere": [1 / 4, 1 / 2, 1 / 4],
        "cube": [1 / 5, 1 / 5, 1 / 5],
        "cylinder": [1 / 5, 2 / 5, 1 / 2],  # top pi r^2 of 5 pi r^2; the lower half of the side 2 pi r^2
        "cone": [3 / 4, 1 / 16, 1 / 2],  # the tip from half the height on is a quarter, from three quarters a sixteenth
    }[shape]
    points = sample_points(scene_of(thing(shape, radius=0.8)), dice(), 20000)
    for is_in, share in zip(parts(points), shares, strict=True):
        assert is_in.mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 20000))


def test_every_object_gets_points_by_its_area():
    r, colours = 0.5, ("red", "green", "blue", "yellow")
    solids = [thing(s, x=3.0 * n, radius=r, colour=c) for n, (s, c) in enumerate(zip(SHAPES, colours, strict=True))]
    points = sample_points(scene_of(*solids), dice(), 20000)
    counts = np.array([np.isclose(points[:, 3:], COLOURS[c], atol=1e-6).all(1).sum() for c in colours])
    pi = math.pi
    areas = np.array([4 * pi, 5 * 1.7**2, 5 * pi, pi * math.sqrt(5)]) * r * r
    expected = 20000 * areas / areas.sum()
    assert counts.sum() == 20000
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom: p = 0.001


def test_the_observers_frame_by_hand():
    """A camera at +x looks along -x: its right is +y, ahead is -x; the origin lies below its target."""
    camera = Camera((1.0, 2.0, 0.5), distance=4.0, azimuth=0.0, height=2.0, view=0.8)
    far = thing(radius=0.01, x=-2.0, y=5.0)  # 3 m to the right of the target and 3 m behind it
    points = sample_points(replace(scene_of(far), camera=camera), dice(), 100)
    np.testing.assert_allclose(points[:, :3].mean(0), [3.0, 3.0, 0.01], atol=0.005)


@pytest.mark.parametrize("shape", SHAPES)
def test_points_land_on_the_pixels_of_their_object(shape):
    camera = Camera((0.2, -0.1, 0.5), distance=4.0, azimuth=0.9, height=2.5, view=math.radians(45))
    scene = replace(scene_of(thing(shape, x=0.3, y=0.2, yaw=0.3)), camera=camera)
    own = render(scene, 64, 80).instance == 1
    x, y, z = sample_points(scene, dice(), 4000)[:, :3].T
    tilt = math.atan2(2.5 - 0.5, 4.0)
    depth = (y + 4.0) * math.cos(tilt) - (z - 2.5) * math.sin(tilt)
    up = (y + 4.0) * math.sin(tilt) + (z - 2.5) * math.cos(tilt)
    half = math.tan(math.radians(45) / 2)
    rows = ((1 - up / depth / half) / 2 * 64).astype(int)
    columns = ((1 + x / depth / half * 64 / 80) / 2 * 80).astype(int)
    padded = np.pad(own, 1)
    near = np.any([padded[1 + a : 65 + a, 1 + b : 81 + b] for a in (-1, 0, 1) for b in (-1, 0, 1)], axis=0)
    assert own[rows, columns].mean() > 0.85
    assert near[rows, columns].all()  # the border runs through pixels whose centre lies outside
    hit = np.zeros_like(own)
    hit[rows, columns] = True
    assert hit[own].mean() > 0.9


def test_normals_in_the_cameras_frame():
    level = scene_of(thing())
    normals = camera_normals(level.camera, render(level, 65, 65))
    assert (normals.shape, normals.dtype) == ((65, 65, 3), np.float32)
    np.testing.assert_allclose(normals[32, 32], [0, 0, 1], atol=1e-4)
    assert normals[32, 36, 0] > 0.1
    assert normals[28, 32, 1] > 0.1
    for index in range(5):
        scene = sample_scene(0, index, "train")
        np.testing.assert_allclose(
            np.linalg.norm(camera_normals(scene.camera, render(scene, 32, 48)), axis=2), 1, atol=1e-4
        )


def test_normals_fit_the_slope_of_the_depth():
    """Neighbouring points of the ground, found from depth alone, span a plane that the normals stand on."""
    camera = Camera((0.3, 0.1, 0.0), distance=4.0, azimuth=1.1, height=3.0, view=math.radians(45))
    scene = replace(scene_of(), camera=camera)
    frame = render(scene, 40, 40)
    grid = (2 * (np.arange(40) + 0.5) / 40 - 1) * math.tan(math.radians(45) / 2)
    x, y = np.meshgrid(grid, -grid)
    place = frame.depth[..., None] * np.stack([x, y, -np.ones_like(x)], -1)
    spanned = np.cross(place[:-1, 1:] - place[:-1, :-1], place[:-1, :-1] - place[1:, :-1])
    spanned /= np.linalg.norm(spanned, axis=2, keepdims=True)
    normals = camera_normals(camera, frame)
    np.testing.assert_allclose(normals[:-1, :-1], spanned, atol=2e-3)
    np.testing.assert_allclose(normals[5, 5], [0, 0.8, 0.6], atol=1e-4)  # a tilt of atan(3 / 4)


def test_boxes_by_hand():
    instance = np.zeros((10, 20), np.uint8)
    instance[2:5, 3:8] = 1
    instance[9, 19] = 3
    instance[0:10, 10] = 2
    blank = np.zeros((10, 20))
    frame = Frame(blank, blank, blank, instance, blank)
    scene = scene_of(thing("cube"), thing("cone"), thing("sphere"), thing("cylinder"))
    assert boxes(scene, frame) == [
        ("cube", 0.15, 0.2, 0.4, 0.5),
        ("cone", 0.5, 0.0, 0.55, 1.0),
        ("sphere", 0.95, 0.9, 1.0, 1.0),  # 1 of 200 pixels is 0.005, enough to be seen
    ]


def test_boxes_hold_their_objects_tightly():
    for index in range(20):
        sample = WorldSource(4, "train", 20, 40, 56, signals=("boxes",)).read(index)
        scene = sample_scene(4, index, "train")
        instance = render(scene, 40, 56).instance
        expected = []
        for number, solid in enumerate(scene.objects):
            rows, columns = (instance == number + 1).nonzero()
            if len(rows) >= SEEN_PIXELS * 40 * 56:
                edges = (min(columns) / 56, min(rows) / 40, (max(columns) + 1) / 56, (max(rows) + 1) / 40)
                expected.append((solid.shape, *map(float, edges)))
        found = sample["signals"]["boxes"]
        assert sorted(found) == sorted(expected)
        areas = [(x1 - x0) * (y1 - y0) for _, x0, y0, x1, y1 in found]
        assert areas == sorted(areas, reverse=True)
        assert len(found) == sample["labels"]["count"]
