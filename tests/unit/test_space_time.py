"""Positions over time and space, the nearest visible token as a baseline, how things move in the world."""

import math

import numpy as np
import pytest
import torch

from m3.data.source import open_source
from m3.data.world import Camera, Light, Object, Scene, WorldSource, render, sample_scene
from m3.data.world.motion import DIRECTIONS, FAST, SPEEDS, motion_labels, velocity
from m3.data.world.source import Offer
from m3.errors import M3Error
from m3.evaluate.baselines import nearest_visible, repeated
from m3.modalities.video import Video
from m3.positions import FlatSincos, Separable, grid
from m3.recipe import DataSpec
from m3.types import Tokens

CPU = torch.device("cpu")


class Grid:
    """What positions ask of a tokenizer."""

    def __init__(self, *counts: int) -> None:
        self.reference, self.axes = counts, len(counts)


# -- positions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counts", "width"), [((4, 3, 5), 24), ((2, 2, 2), 7), ((9,), 6), ((8, 14, 14), 16)])
def test_flat_positions_are_videomaes_table_written_with_loops(counts: tuple[int, ...], width: int) -> None:
    total = math.prod(counts)
    table = np.zeros((total, width))
    for n in range(total):
        for j in range(width):
            angle = n / 10000 ** (2 * (j // 2) / width)
            table[n, j] = math.sin(angle) if j % 2 == 0 else math.cos(angle)
    found = FlatSincos(FlatSincos.Spec(), Grid(*counts), width, "xy")(grid(counts, counts, CPU))  # type: ignore[arg-type]
    assert (found.dtype, found.shape) == (torch.float32, (1, total, width))
    np.testing.assert_allclose(found[0].numpy(), table, atol=1e-7)


def test_a_token_has_its_number_whatever_is_around_it() -> None:
    """A clip that is shorter in space lies on the same grid; an image at time 0 has the first slot's rows."""
    flat = FlatSincos(FlatSincos.Spec(), Grid(8, 3, 4), 10, "xy")  # type: ignore[arg-type]
    whole = flat(grid((8, 3, 4), (8, 3, 4), CPU))
    assert torch.equal(flat(torch.tensor([[[2.0, 1, 3], [0, 0, 1]]])), whole[:, [2 * 12 + 1 * 4 + 3, 1]])


def test_separable_positions_are_a_vector_of_time_plus_one_of_space() -> None:
    part = Separable(Separable.Spec(), Grid(3, 2, 4), 5, "xy")  # type: ignore[arg-type]
    with torch.no_grad():
        part.first.copy_(torch.arange(15.0).view(5, 3))
        part.others.copy_(100 * torch.arange(40.0).view(5, 2, 4))
    assert sum(p.numel() for p in part.parameters()) == 5 * (3 + 8)
    found = part(grid((3, 2, 4), (3, 2, 4), CPU))[0]
    for t in range(3):
        for y in range(2):
            for x in range(4):
                expected = [d * 3 + t + 100 * (d * 8 + y * 4 + x) for d in range(5)]
                assert found[t * 8 + y * 4 + x].tolist() == expected
    between = part(torch.tensor([[[0.5, 0.0, 1.25]]]))[0, 0]
    assert between.tolist() == pytest.approx([d * 3 + 0.5 + 100 * (d * 8 + 1.25) for d in range(5)])


def test_positions_without_a_grid_are_refused() -> None:
    points = type("Points", (), {"reference": (), "axes": 3})()
    with pytest.raises(M3Error, match=r"^positions `flat_sincos` number the places of a grid; use `sincos` or"):
        FlatSincos(FlatSincos.Spec(), points, 8, "xy")
    with pytest.raises(M3Error, match=r"^separable positions need a grid of two or three axes; use `learned`"):
        Separable(Separable.Spec(), points, 8, "xy")


# -- the nearest visible token --------------------------------------------------------------------------------


def test_the_nearest_visible_token_by_hand() -> None:
    """Slots x rows x columns 2 x 2 x 3, numbered 0 to 11; visible are 0, 8 and 9."""
    tokens = Tokens(torch.arange(12.0).view(1, 12, 1), grid((2, 2, 3), (2, 2, 3), CPU))
    seen = torch.zeros(1, 12, dtype=torch.bool)
    seen[0, [0, 8, 9]] = True
    # Squared distances to 0, 8 = (1, 0, 2) and 9 = (1, 1, 0), of equal ones the first: 1 = (0, 0, 1): 1 2 3;
    # 2: 4 1 6; 3 = (0, 1, 0): 1 6 1; 4: 2 3 2; 5: 5 2 5; 6 = (1, 0, 0): 1 4 1; 7: 2 1 2; 10: 3 2 1; 11: 6 1 4.
    expected = [0, 0, 8, 0, 0, 8, 0, 8, 8, 9, 9, 8]
    assert nearest_visible(tokens, seen).tolist() == [expected]
    values = torch.arange(12.0).view(1, 12, 1) * 2 + 1
    assert repeated(tokens, values, seen)[0, :, 0].tolist() == [2 * n + 1 for n in expected]


def test_without_visible_tokens_nothing_is_repeated() -> None:
    tokens = Tokens(torch.ones(2, 4, 1), grid((2, 2), (2, 2), CPU))
    seen = torch.tensor([[False] * 4, [False, True, False, False]])
    values = torch.tensor([[1.0, 2, 3, 4], [5, torch.nan, 7, 8]]).unsqueeze(-1)
    assert repeated(tokens, values, seen).squeeze(-1).tolist() == [[0.0] * 4] * 2


# -- motion in the world --------------------------------------------------------------------------------------


def scene_with(velocity: tuple[float, float], turn: float = 0.0, y: float = 0.0) -> Scene:
    """A camera at (0, -5, 0.7) that looks along +y: right is +x, away is +y; half a height is tan(22.5 deg) x 5 m."""
    thing = Object("sphere", "large", 0.7, "red", "plain", "rubber", 0.0, y, yaw=0.0, velocity=velocity)
    camera = Camera((0, 0, 0.7), distance=5.0, azimuth=-math.pi / 2, height=0.7, view=math.radians(45), turn=turn)
    return Scene((thing,), camera, Light((0, 0, 1.0), 0.8, 0.3), "plain", (0.5,) * 3, (0.4, 0.6, 0.9), pattern=0)


def test_the_velocity_in_the_picture_by_hand() -> None:
    right, up = velocity(scene_with((0.4, 0.0)), 0, duration=2.0)
    assert (right, up) == pytest.approx((0.4 / (2 * 5 * math.tan(math.radians(22.5))), 0.0))
    assert velocity(scene_with((-0.4, 0.0)), 0, 2.0)[0] == pytest.approx(-right)


@pytest.mark.parametrize(
    ("motion", "turn", "y", "direction"),
    [
        ((0.4, 0.0), 0.0, 0.0, "right"),
        ((-0.4, 0.0), 0.0, 0.0, "left"),
        ((0.0, 0.0), 0.3, 1.5, "right"),  # the camera walks to the right, and what lies behind its target with it
        ((0.0, 0.0), 0.3, -1.5, "left"),
    ],
)
def test_directions_are_those_that_are_seen(motion, turn, y, direction) -> None:
    scene = scene_with(motion, turn, y)
    seen = []
    for time in (0.0, 1.0):
        rows, columns = np.nonzero(render(scene, 64, 64, time).instance)
        seen.append((columns.mean(), -rows.mean()))
    right = seen[1][0] - seen[0][0]
    found = DIRECTIONS[motion_labels(scene, 0, 1.0)["direction"]]
    assert abs(right) > 1
    assert ("right" if right > 0 else "left") == direction
    assert direction in found


def test_labels_of_the_world_are_those_of_the_rendered_motion() -> None:
    """Where the main object stays whole in the picture, its pixels move as the labels say."""
    source = WorldSource(0, "train", 40, 64, 64, signals=("text",), offer=Offer(frames=16, fps=8.0))
    agree, checked = 0, 0
    for index in range(40):
        labels = source.read(index)["labels"]
        assert labels["direction"] in range(8)
        assert labels["speed"] in range(2)
        scene = sample_scene(0, index, "train")
        frames = [render(scene, 64, 64, time).instance for time in (0.0, 15 / 8)]
        number = int(np.bincount(frames[0].ravel(), minlength=6)[1:].argmax())
        places = [np.argwhere(frame == number + 1) for frame in frames]
        sizes = [len(place) for place in places]
        if min(sizes) < 0.8 * max(sizes) or any(p.min() == 0 or p.max() == 63 for p in places):
            continue  # hidden by another one, or cut by the edge
        down, right = (places[1].mean(0) - places[0].mean(0)) / 64 / (15 / 8)
        if math.hypot(down, right) < 0.02:
            continue  # too slow to tell in pixels
        checked += 1
        off = (math.degrees(math.atan2(-down, right)) - 45 * labels["direction"] + 180) % 360 - 180
        agree += abs(off) < 45 and (math.hypot(down, right) > FAST) == bool(labels["speed"])
    assert checked >= 10
    assert agree >= 0.85 * checked


def test_labels_are_spread_and_named() -> None:
    assert WorldSource.LABEL_NAMES["direction"] == DIRECTIONS
    assert WorldSource.LABEL_NAMES["speed"] == SPEEDS
    found = []
    for index in range(400):
        scene = sample_scene(1, index, "train")
        found.append(motion_labels(scene, 0, 15 / 8))
    shares = np.bincount([f["direction"] for f in found], minlength=8) / 400
    assert shares.min() > 0.02
    assert 0.3 < np.mean([f["speed"] for f in found]) < 0.7


def test_a_picture_without_time_has_no_motion() -> None:
    labels = WorldSource(0, "train", 3, 32, 32, signals=("image",), offer=Offer(frames=1)).read(1)["labels"]
    assert set(labels) == {"shape", "color", "count", "material"}


def test_clips_of_the_world_have_the_length_that_a_recipe_asks_for() -> None:
    parts = {"video": Video(Video.Spec(size=16, frames=12))}
    source = open_source(DataSpec(samples=3, options={"frames": 12, "fps": 6}), parts, 0, "train")
    clip = source.read(0).signals["video"]
    assert (len(clip.frames), clip.times[-1]) == (12, pytest.approx(11 / 6))
    with pytest.raises(M3Error, match=r"^data.options.frame: unknown key. Did you mean `frames`\?$"):
        open_source(DataSpec(options={"frame": 12}), parts, 0, "train")
