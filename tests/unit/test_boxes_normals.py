"""Boxes and normals: crops and mirrors, ids by hand, files, measures, errors."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from m3.data.files import Member, encode
from m3.data.loader import Samples, fit_together
from m3.data.source import open_source
from m3.data.world import WorldSource
from m3.errors import M3Error
from m3.modalities.boxes import Boxes
from m3.modalities.normals import Normals
from m3.network import build_modalities
from m3.plugins import Crop
from m3.processor import M3Processor
from m3.recipe import DataSpec

NAN = math.nan


def boxes(**settings) -> Boxes:
    settings = {"labels": ["cat", "dog"], "bins": 100, **settings}
    return build_modalities({"x": {"type": "boxes", **settings}})["x"]  # type: ignore[return-value]


def normals(**settings) -> Normals:
    return build_modalities({"x": {"type": "normals", "size": [4, 6], **settings}})["x"]  # type: ignore[return-value]


# -- boxes ----------------------------------------------------------------------------------------------


def test_ids_of_boxes_by_hand() -> None:
    """100 bins: left 0.25 is bin 25, top 0.5 is 100 + 50, right 1.0 falls into the last bin, 299, dog is 401."""
    part = boxes(count=3)
    raw = part.to_raw([("dog", 0.25, 0.5, 1.0, 0.999), ["cat", 0, 0, 0, 0.005]])
    assert raw.tolist() == [pytest.approx([0.25, 0.5, 1.0, 0.999, 1]), pytest.approx([0, 0, 0, 0.005, 0])]
    assert part.signal.classes == 402
    assert part.signal.size == (15,)
    ids = part.normalise(torch.stack([raw, torch.full((2, 5), NAN)]))
    assert ids.tolist() == [[25, 150, 299, 399, 401, 0, 100, 200, 300, 400], [-1] * 10]
    assert part.normalise(part.blank(1)).tolist() == [[0, 100, 200, 300, 400] * 3]


def test_decode_is_the_middle_of_the_bin_and_refuses_ids_of_another_kind() -> None:
    part = boxes()
    found = part.decode(torch.tensor([25, 150, 299, 399, 401, 25, 25, 299, 399, 400, -1, -1, -1, -1, -1]))
    assert found[0].tolist() == pytest.approx([0.255, 0.505, 0.995, 0.995, 1])
    assert found[1].isnan().tolist() == [False, True, False, False, False], "25 is no top"
    assert found[2].isnan().all()
    assert part.decode(torch.tensor([[0, 100, 200, 300, 402]]))[0, 0].isnan().tolist() == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        (Crop(), [[0.2, 0.4, 0.6, 0.8, 1], [0.0, 0.0, 0.1, 0.1, 0]]),
        (Crop(None, True), [[0.4, 0.4, 0.8, 0.8, 1], [0.9, 0.0, 1.0, 0.1, 0]]),
        (Crop((0.0, 0.0, 0.5, 0.5)), [[0.4, 0.8, 1.0, 1.0, 1], [0.0, 0.0, 0.2, 0.2, 0]]),
        (Crop((0.5, 0.4, 0.5, 0.4)), [[0.0, 0.0, 0.5, 0.6, 1]]),
        (Crop((0.5, 0.4, 0.5, 0.4), True), [[0.5, 0.0, 1.0, 0.6, 1]]),
        (Crop((0.0, 0.595, 0.5, 0.4)), [[NAN] * 5]),  # 0.005 of the picture is left of the first: too thin
    ],
)
def test_a_crop_moves_cuts_mirrors_and_drops_boxes(crop: Crop, expected: list[list[float]]) -> None:
    part = boxes()
    raw = part.to_raw([("dog", 0.2, 0.4, 0.6, 0.8), ("cat", 0.0, 0.0, 0.1, 0.1)])
    given = raw.clone()
    torch.testing.assert_close(part.fit(raw, crop), torch.tensor(expected), equal_nan=True)
    assert torch.equal(raw, given), "a sample may be cropped again"


def test_the_count_is_of_boxes_that_the_crop_leaves() -> None:
    part = boxes(count=2)
    raw = part.to_raw([("dog", 0.1 * i, 0.0, 0.1 * i + 0.1, 1.0) for i in range(5)])
    assert len(raw) == 5
    assert part.fit(raw, Crop()).tolist() == raw[:2].tolist()
    assert part.fit(raw, Crop((0.0, 0.3, 1.0, 0.2)))[:, 0].tolist() == pytest.approx([0.0, 0.5], abs=1e-6)


@pytest.mark.parametrize(
    "crop", [Crop(), Crop((0.25, 0.125, 0.5, 0.75), False), Crop((0.1, 0.25, 0.6, 0.5), True), Crop(None, True)]
)
def test_boxes_stay_around_their_things_in_a_wide_picture(crop: Crop) -> None:
    """A box around a bright patch, in pixels of what the model reads, is where the bright pixels are."""
    parts = build_modalities(
        {"image": {"type": "image", "size": [40, 40]}, "boxes": {"type": "boxes", "labels": ["x"]}}
    )
    picture = np.zeros((80, 160, 3), np.uint8)
    picture[24:60, 60:90] = 255
    raw = {
        "image": parts["image"].to_raw(picture),
        "boxes": parts["boxes"].to_raw([("x", 60 / 160, 0.3, 90 / 160, 0.75)]),
    }
    fitted = fit_together(raw, parts, crop)
    rows, columns = (fitted["image"][0] > 127).nonzero().T
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert (fitted["boxes"][0, :4] * 40).tolist() == pytest.approx([float(e) for e in edges], abs=1.01)
    if crop == Crop():
        batch = M3Processor(
            {"image": {"type": "image", "size": [40, 40]}, "boxes": {"type": "boxes", "labels": ["x"]}}
        )(image=picture, boxes=[[("x", 60 / 160, 0.3, 90 / 160, 0.75)]])
        assert torch.equal(batch.signals["boxes"][0], fitted["boxes"])


def test_intersection_over_union_by_hand() -> None:
    """Bins 10 to 30 against 20 to 40 along x, equal along y: 10 of 30. A box of the wrong kind scores 0."""
    part = boxes(count=3)
    truth = torch.tensor([[10, 100, 230, 350, 400, 0, 100, 250, 350, 401, -1, -1, -1, -1, -1]])
    predicted = torch.tensor([[20, 100, 240, 350, 401, 0, 0, 250, 350, 401, 1, 101, 250, 350, 400]])
    everywhere = torch.ones(1, 15, dtype=torch.bool)
    sums = part.score(predicted, truth, everywhere)
    assert sums.tolist() == pytest.approx([1 / 3, 2])
    assert part.finish_score(sums) == pytest.approx(1 / 6)
    only_one_token = torch.zeros(1, 15, dtype=torch.bool)
    only_one_token[0, 2] = True
    assert part.score(predicted, truth, only_one_token).tolist() == pytest.approx([1 / 3, 1])
    assert part.score(truth, truth, everywhere).tolist() == pytest.approx([2, 2])


def test_boxes_are_drawn_as_frames_in_the_colour_of_their_class() -> None:
    part = boxes()
    picture = part.show(torch.tensor([25, 125, 275, 375, 400, -1, -1, -1, -1, -1]))
    assert picture.shape == (64, 64, 3)
    assert picture[32, 32].tolist() == [255, 255, 255]
    assert picture[16, 32].tolist() == picture[32, 16].tolist() == [31, 119, 180]
    is_known = torch.ones(10, dtype=torch.bool)
    is_known[1] = False
    assert (part.show(torch.tensor([25, 125, 275, 375, 400, 0, 100, 210, 310, 401]), is_known)[32] == 128).all()


def test_box_files_and_batches(tmp_path: Path) -> None:
    part = boxes()
    rows = [["dog", 0.1, 0.2, 0.3, 0.4], ["cat", 0, 0, 1, 1]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for file in (tmp_path / "a.json", Member(json.dumps(rows).encode(), "a.json")):
        assert torch.equal(part.to_raw(part.load(file)), part.to_raw(rows))
    settings = {"boxes": {"type": "boxes", "labels": ["cat", "dog"], "bins": 100}}
    batch = M3Processor(settings)(boxes=[rows, rows[:1]])
    assert batch.signals["boxes"].shape == (2, 2, 5)
    assert part.normalise(batch.signals["boxes"])[1].tolist()[5:] == [-1] * 5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], r"^boxes must be a list of at least one, got \[\]; a sample without any lacks the modality.$"),
        (None, "^boxes must be a list of at least one, got None"),
        (5, "^boxes must be a list of at least one, got 5"),
        ({"cat": [0, 0, 1, 1]}, "^boxes must be a list of at least one, got {'cat'"),
        (
            ["cat", 0, 0, 1, 1],
            "^a box must be .label, left, top, right, bottom. with a label of cat, dog and numbers, got 'cat'.$",
        ),
        ([["cow", 0, 0, 1, 1]], r"got \['cow', 0, 0, 1, 1\].$"),
        ([[["cat"], 0, 0, 1, 1]], r"got \[\['cat'\], 0, 0, 1, 1\].$"),
        ([["cat", 0, 0, 1]], r"got \['cat', 0, 0, 1\].$"),
        ([["cat", 0, 0, 1, "1"]], r"got \['cat', 0, 0, 1, '1'\].$"),
        ([["cat", 0, 0, 1, None]], r"got \['cat', 0, 0, 1, None\].$"),
        (
            [["cat", 0.5, 0, 0.4, 1]],
            r"^a box must lie in \[0, 1\] with left <= right and top <= bottom, got \['cat', 0.5, 0, 0.4, 1\].$",
        ),
        ([["cat", 0, 0, 1, NAN]], r"^a box must lie in \[0, 1\]"),
        ([["cat", 0, 0, 1, 1.01]], r"^a box must lie in \[0, 1\]"),
        ([["cat" * 1000, 0, 0, 1, 1]], r"got \['catcat.{60,80}\.\.\.\.$"),
    ],
)
def test_wrong_boxes_are_refused(given: object, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        boxes().to_raw(given)


# -- normals --------------------------------------------------------------------------------------------


def tilted() -> np.ndarray:
    """Unit vectors (4, 6, 3), all different."""
    x, y = np.meshgrid(np.linspace(-0.6, 0.7, 6), np.linspace(-0.4, 0.5, 4))
    return np.stack([x, y, np.sqrt(1 - x**2 - y**2)], -1).astype(np.float32)


def test_a_mirrored_map_has_mirrored_vectors() -> None:
    part = normals()
    raw = part.to_raw(tilted())
    assert torch.equal(part.fit(raw, Crop()), raw)
    mirrored = part.fit(raw, Crop(None, True))
    for row in range(4):
        for column in range(6):
            x, y, z = tilted()[row, 5 - column]
            assert mirrored[:, row, column].tolist() == pytest.approx([-x, y, z], abs=1e-6)
    cropped = part.fit(raw, Crop((0.5, 0.5, 0.5, 0.5), True))
    assert cropped[:, 0, 0].tolist() == pytest.approx([-tilted()[2, 5, 0], *tilted()[2, 5, 1:]], abs=1e-6)
    assert cropped.norm(dim=0).flatten().tolist() == pytest.approx([1] * 24, abs=1e-5), "nothing is mixed"


def test_png_and_npy_round_trips(tmp_path: Path) -> None:
    part = normals()
    PILImage.fromarray(np.round((tilted() + 1) * 127.5).astype(np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", tilted() * 3)
    exact = part.to_raw(part.load(tmp_path / "a.npy"))
    torch.testing.assert_close(exact, torch.from_numpy(tilted()).permute(2, 0, 1))
    near = part.to_raw(part.load(tmp_path / "a.png"))
    assert torch.rad2deg(torch.acos((near * exact).sum(0).clamp(-1, 1))).max() < 0.6
    assert torch.equal(part.to_raw(part.load(Member((tmp_path / "a.npy").read_bytes(), "a.npy"))), exact)
    shown = part.show(exact)
    assert np.abs(shown.astype(int) - np.round((tilted() + 1) * 127.5)).max() <= 1
    again = io.BytesIO()
    PILImage.fromarray(shown).save(again, "PNG")
    assert torch.equal(part.to_raw(part.load(Member(again.getvalue(), "b.png"))), near)


def test_holes_are_known_or_refused() -> None:
    given = tilted()
    given[0, 0], given[1, 1], given[2, 2, 1], given[3, 3] = 0, np.nan, np.inf, 1e-3
    with pytest.raises(
        M3Error, match=r"^a normal map has zero, NaN or infinite vectors; set `has_holes: true` so that ho"
    ):
        normals().to_raw(given)
    raw = normals(has_holes=True).to_raw(given)
    assert raw.isnan().all(0).nonzero().tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert torch.equal(raw.isnan().any(0), raw.isnan().all(0))
    assert (normals(has_holes=True).show(raw)[0, 0] == 128).all()


def test_very_long_and_very_short_vectors_have_a_direction() -> None:
    raw = normals().to_raw(np.full((4, 6, 3), 1e30))
    torch.testing.assert_close(raw, torch.full((3, 4, 6), 3**-0.5))


def test_mean_angle_by_hand() -> None:
    part = normals(has_holes=True)
    truth = torch.tensor([[0.0, 0, 1], [0, 0, 1], [1, 0, 0], [NAN, NAN, NAN]]).T.reshape(1, 3, 1, 4)
    predicted = torch.tensor([[0.0, 3, 3], [0, 0, -2], [5, 0, 0], [1, 0, 0]]).T.reshape(1, 3, 1, 4)
    weight = torch.ones(1, 1, 4, dtype=torch.bool)
    sums = part.score(predicted, truth, weight)
    assert sums.tolist() == pytest.approx([45 + 180 + 0, 3], abs=0.1)
    assert part.finish_score(sums) == pytest.approx(75, abs=0.05)
    weight[0, 0, 1] = False
    assert part.score(predicted, truth, weight).tolist() == pytest.approx([45, 2], abs=0.1)


@pytest.mark.parametrize("given", [np.zeros((4, 6)), np.zeros((4, 6, 3), np.uint8), np.zeros((3, 4, 6))])
def test_wrong_normals_are_refused(given: np.ndarray) -> None:
    with pytest.raises(
        M3Error, match=r"^normals must be floats of shape \(height, width, 3\), got (float64|uint8) of \(.+\)\.$"
    ):
        normals().to_raw(given)


def test_blanks_look_like_what_fit_returns() -> None:
    for part, sample in ((normals(), tilted()), (boxes(count=1), [("dog", 0, 0, 1, 1)])):
        fitted = part.fit(part.to_raw(sample), Crop())
        assert part.blank(2).shape == (2, *fitted.shape)
        assert part.blank(2).dtype == fitted.dtype


# -- the world ------------------------------------------------------------------------------------------


def world_parts() -> dict:
    return build_modalities(
        {
            "image": {"type": "image", "size": 64},
            "semantic": {"type": "semantic_map", "size": 64, "classes": 6},
            "normals": {"type": "normals", "size": 64},
            "boxes": {"type": "boxes", "labels": ["sphere", "cube", "cylinder", "cone"], "count": 16},
        }
    )


def test_boxes_and_normals_of_the_world_follow_the_crop_of_the_image() -> None:
    """Each training crop: a box that is not cut holds all pixels of its class at its edges; sky never lies inside."""
    parts = world_parts()
    spec = DataSpec(source="world", samples=8, held_out=0, crop=(0.3, 1.0), flip=0.5)
    samples = Samples(open_source(spec, parts, 3, "train"), parts, spec, 3)
    checked = 0
    for position in range(40):
        loaded = samples[(position, position % 8)]
        things = loaded.signals["semantic"] >= 2
        covered = torch.zeros(64, 64, dtype=torch.bool)
        for x0, y0, x1, y1, label in loaded.signals["boxes"].tolist():
            if math.isnan(x0):
                continue
            left, top, right, bottom = (round(v * 64) for v in (x0, y0, x1, y1))
            covered[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = True
            inside = loaded.signals["semantic"][top:bottom, left:right]
            if inside.numel() > 50:
                assert (inside >= 2).any(), "something is in the box"
                checked += int((inside == 2 + label).any())
        assert (things & ~covered).float().mean() < 0.01, "nothing lies outside of all boxes"
        ground = loaded.signals["semantic"] == 1
        flat = loaded.signals["normals"][:, ground]
        assert flat.numel() == 0 or flat.std(1).max() < 1e-3, "the ground has one direction"
    assert checked > 40


def test_a_flipped_scene_is_a_mirrored_scene() -> None:
    signals = WorldSource(0, "train", 4).read(1)["signals"]
    parts = world_parts()
    names = ("image", "normals", "boxes")
    plain, flipped = (
        fit_together({n: parts[n].to_raw(signals[n]) for n in names}, parts, Crop(None, f)) for f in (False, True)
    )
    assert torch.equal(plain["image"].flip(2), flipped["image"])
    torch.testing.assert_close(plain["normals"].flip(2)[1:], flipped["normals"][1:])
    torch.testing.assert_close(plain["normals"].flip(2)[0], -flipped["normals"][0])
    assert plain["boxes"][:, 0].tolist() == pytest.approx((1 - flipped["boxes"][:, 2]).tolist(), abs=1e-6)
    assert torch.equal(plain["boxes"][:, [1, 3, 4]], flipped["boxes"][:, [1, 3, 4]])


def test_boxes_of_a_scene_are_stored_as_the_file_that_is_read_again() -> None:
    found = WorldSource(0, "train", 4).read(1)["signals"]["boxes"]
    stored = encode(found)
    assert stored.ending in Boxes.extensions
    part = world_parts()["boxes"]
    again = part.load(Member(stored.data, f"000001{stored.ending}"))
    assert torch.equal(part.to_raw(again), part.to_raw(found))
    assert encode([(1.5, 2.0), (3.0, 4.0)]).ending == ".npy", "numbers alone are an array"
