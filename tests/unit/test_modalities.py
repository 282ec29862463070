"""Image, depth and semantic map: real files, checks and their sentences, values by hand, alignment, measures."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from m3.data.files import Member
from m3.data.geometry import fit_map
from m3.errors import M3Error
from m3.network import build_modalities
from m3.plugins import Crop, Modality

RANDOM = np.random.default_rng(5)
PIXELS = RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8)


def image(**settings) -> Modality:
    return build_modalities({"x": {"type": "image", "size": [6, 8], **settings}})["x"]


def depth(**settings) -> Modality:
    return build_modalities({"x": {"type": "depth", "size": [6, 8], **settings}})["x"]


def semantic(**settings) -> Modality:
    return build_modalities({"x": {"type": "semantic_map", "size": [6, 8], "classes": 4, **settings}})["x"]


def from_file(part: Modality, path: Path) -> torch.Tensor:
    return part.to_raw(part.load(path))


# -- files ----------------------------------------------------------------------------------------------


def test_a_colour_png_comes_in_as_it_is_and_a_jpeg_nearly(tmp_path: Path) -> None:
    smooth = np.stack(np.meshgrid(np.arange(32), np.arange(24)), -1)[..., [0, 1, 0]].astype(np.uint8) * 5
    PILImage.fromarray(PIXELS).save(tmp_path / "a.png")
    PILImage.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    assert torch.equal(from_file(image(), tmp_path / "a.png"), torch.from_numpy(PIXELS).permute(2, 0, 1))
    read = from_file(image(), tmp_path / "a.jpg")
    assert read.shape == (3, 24, 32)
    assert (read.int() - torch.from_numpy(smooth).permute(2, 0, 1).int()).abs().float().mean() < 4


@pytest.mark.parametrize("orientation", [None, 6])
def test_a_jpeg_is_decoded_to_the_values_that_pillow_gives(orientation: int | None, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (45, 61, 3), np.uint8)
    exif = PILImage.Exif()
    if orientation:
        exif[274] = orientation  # 6: the camera was turned, the picture must be turned to the right
    for options in ({}, {"subsampling": 0, "quality": 60}, {"progressive": True}, {"restart_marker_rows": 1}):
        PILImage.fromarray(noise).save(tmp_path / "a.jpg", exif=exif, **options)
        with PILImage.open(tmp_path / "a.jpg") as picture:
            expected = np.array(picture)
        expected = np.rot90(expected, -1) if orientation else expected
        for file in (tmp_path / "a.jpg", Member((tmp_path / "a.jpg").read_bytes(), "a.jpg")):
            assert np.array_equal(np.asarray(image().load(file)), expected)


def test_a_jpeg_that_torchvision_refuses_is_left_to_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PILImage.fromarray(PIXELS).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    expected = from_file(image(), tmp_path / "a.jpg")
    monkeypatch.setitem(sys.modules, "torchvision.io", None)  # what an import then says: there is no such module
    assert torch.equal(from_file(image(), tmp_path / "a.jpg"), expected)
    monkeypatch.undo()
    for file in (tmp_path / "cut.jpg", Member(data[:-20], "cut.jpg")):
        (tmp_path / "cut.jpg").write_bytes(data[:-20])
        with pytest.raises(OSError, match="image file is truncated"):
            image().load(file)


def test_grey_palette_and_transparent_files_become_three_channels(tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    PILImage.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.equal(from_file(image(), tmp_path / "grey.png"), torch.from_numpy(grey).expand(3, 6, 8))
    PILImage.fromarray(PIXELS).save(tmp_path / "colour.png")
    weights = torch.tensor([0.299, 0.587, 0.114])
    luma = (torch.from_numpy(PIXELS).float() * weights).sum(-1)
    assert (from_file(image(channels=1), tmp_path / "colour.png")[0] - luma).abs().max() <= 1
    palette = PILImage.fromarray((np.arange(48) % 3).astype(np.uint8).reshape(6, 8), mode=None).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "palette.png")
    assert from_file(image(), tmp_path / "palette.png")[:, 0, :3].tolist() == [[10, 40, 70], [20, 50, 80], [30, 60, 90]]
    alpha = np.concatenate([PIXELS, PIXELS[..., :1]], -1)
    PILImage.fromarray(alpha).save(tmp_path / "alpha.png")
    assert torch.equal(from_file(image(), tmp_path / "alpha.png"), torch.from_numpy(PIXELS).permute(2, 0, 1))
    assert torch.equal(from_file(image(channels=4), tmp_path / "alpha.png"), torch.from_numpy(alpha).permute(2, 0, 1))


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    palette = PILImage.fromarray((np.arange(48) % 3).astype(np.uint8).reshape(6, 8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "p.png", transparency=b"\x00\x80\xff")
    assert from_file(image(), tmp_path / "p.png")[:, 0, 2].tolist() == [70, 80, 90]


def test_a_16_bit_picture_is_not_clipped_to_white(tmp_path: Path) -> None:
    """A picture with 65,536 greys keeps their order, or is refused: it must not turn white without a word."""
    stored = (np.arange(48, dtype=np.uint16) * 1300).reshape(6, 8)
    PILImage.fromarray(stored).save(tmp_path / "deep.png")
    try:
        read = from_file(image(), tmp_path / "deep.png")[0].flatten().int()
    except M3Error:
        return
    assert (read - torch.from_numpy(stored.astype(np.int32) // 256).flatten()).abs().max() <= 1


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    PILImage.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    expected = torch.from_numpy(np.rot90(PIXELS, k=-1).copy()).permute(2, 0, 1)
    assert torch.equal(from_file(image(), tmp_path / "turned.png"), expected)


def test_depth_files_give_metres_and_holes(tmp_path: Path) -> None:
    stored = (np.arange(48, dtype=np.uint16) * 1000).reshape(6, 8)
    PILImage.fromarray(stored).save(tmp_path / "mm.png")
    expected = torch.arange(48.0).reshape(6, 8)
    torch.testing.assert_close(from_file(depth(), tmp_path / "mm.png"), expected)
    torch.testing.assert_close(from_file(depth(unit=0.0002), tmp_path / "mm.png"), expected / 5)
    holes = from_file(depth(missing=0), tmp_path / "mm.png")
    assert holes.isnan().nonzero().tolist() == [[0, 0]]
    np.save(tmp_path / "m.npy", np.arange(48, dtype=np.float64).reshape(6, 8) / 8)
    torch.testing.assert_close(from_file(depth(), tmp_path / "m.npy"), expected / 8)
    PILImage.fromarray(np.arange(48, dtype=np.float32).reshape(6, 8) / 8).save(tmp_path / "m.tif")
    torch.testing.assert_close(from_file(depth(), tmp_path / "m.tif"), expected / 8)
    marked = from_file(depth(missing=-1), _saved(tmp_path / "n.npy", np.array([[-1.0, 0.0], [2.0, -1.0]])))
    assert marked.isnan().tolist() == [[True, False], [False, True]]


def _saved(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


def test_semantic_files_give_ids(tmp_path: Path) -> None:
    ids = (np.arange(48) % 4).astype(np.uint8).reshape(6, 8)
    palette = PILImage.fromarray(ids).convert("P")
    palette.putpalette(RANDOM.integers(0, 256, 30).tolist())
    palette.putdata(ids.flatten().tolist())
    palette.save(tmp_path / "palette.png")
    PILImage.fromarray(ids).save(tmp_path / "grey.png")
    np.save(tmp_path / "ids.npy", ids.astype(np.int64))
    for name in ("palette.png", "grey.png", "ids.npy"):
        read = from_file(semantic(), tmp_path / name)
        assert read.dtype == torch.uint8
        assert torch.equal(read, torch.from_numpy(ids)), name


def test_semantic_files_of_16_bits_give_ids(tmp_path: Path) -> None:
    ids = (np.arange(48, dtype=np.uint16) * 6).reshape(6, 8)
    PILImage.fromarray(ids).save(tmp_path / "many.png")
    read = from_file(semantic(classes=300), tmp_path / "many.png")
    assert read.tolist() == ids.tolist()


# -- checks ---------------------------------------------------------------------------------------------


def test_arrays_and_tensors_in_either_order_are_the_same_image() -> None:
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for given in (PIXELS, torch.from_numpy(PIXELS), expected, PILImage.fromarray(PIXELS)):
        assert torch.equal(image().to_raw(given), expected)
    assert torch.equal(image(channels=1).to_raw(PIXELS[..., 0]), torch.from_numpy(PIXELS[None, ..., 0]))


@pytest.mark.parametrize(
    ("part", "given", "sentence"),
    [
        (
            image(),
            PIXELS / 255,
            r"^an image must be uint8 with 3 channels, got torch.float64 of shape \(3, 6, 8\); con",
        ),
        (image(), PIXELS[..., :2], r"^an image must be uint8 with 3 channels, got torch.uint8 of shape \(6, 8, 2\); "),
        (image(), PIXELS[..., 0], r"with 3 channels, got torch.uint8 of shape \(1, 6, 8\); .* or set `channels`.$"),
        (depth(), PIXELS, r"^a depth map must have shape \(height, width\), got uint8 of shape \(6, 8, 3\).$"),
        (depth(), np.array([[1, np.nan]]).repeat(2, 0), "^a depth map has NaN or infinite values; set `missing` in"),
        (depth(), np.array([[1, np.inf]]).repeat(2, 0), "^a depth map has NaN or infinite values; set `missing` in"),
        (semantic(), PIXELS, r"^a semantic map must hold integer class ids of shape .* of shape \(6, 8, 3\); colour-"),
        (semantic(), np.arange(4.0).reshape(2, 2), "^a semantic map must hold integer class ids .*, got torch.float64"),
        (semantic(), np.arange(6).reshape(2, 3), "^a semantic map holds class 4, but `classes` is 4; raise `classes`"),
        (semantic(ignore=255), np.array([[255, 3], [-2, 0]]), "^a semantic map holds class -2, but `classes` is 4; "),
    ],
)
def test_a_wrong_sample_is_refused(part: Modality, given: np.ndarray, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        part.to_raw(given)


def test_statistics_must_fit_the_channels() -> None:
    with pytest.raises(M3Error, match=r"^image: mean and std must have 3 values, one per channel, got 2 and 3.$"):
        image(mean=[0.1, 0.2])


def test_infinite_depth_never_reaches_the_model() -> None:
    """With `missing` set, an infinite value is refused or unknown, but no number to be predicted."""
    part = depth(missing=0)
    try:
        raw = part.to_raw(np.array([[1.0, 2.0, np.inf], [3.0, 4.0, 5.0]]))
    except M3Error:
        return
    assert not part.normalise(raw[None]).isinf().any()


@pytest.mark.parametrize("ignore", [-1, 255, 300, 65535])
def test_any_stored_id_can_mean_unknown(ignore: int) -> None:
    part = semantic(ignore=ignore)
    raw = part.to_raw(np.array([[0, ignore, 3], [ignore, 2, 1]]))
    assert part.normalise(raw[None]).tolist() == [[[0, -1, 3], [-1, 2, 1]]]


# -- normalising ----------------------------------------------------------------------------------------


def test_images_are_normalised_by_hand() -> None:
    raw = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert image().normalise(raw).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    own = image(channels=1, mean=[0.4], std=[0.1]).normalise(raw[:, 1:2])
    assert own.dtype == torch.float32
    assert own.item() == pytest.approx(-2, abs=1e-5)


def test_fixed_depth_by_hand() -> None:
    part = depth(normalise="fixed", mean=2.0, std=0.5)
    assert part.normalise(torch.tensor([[[1.0, 4.0]]])).tolist() == [[[[-2.0, 4.0]]]]


def test_truncated_depth_by_hand_with_holes() -> None:
    """Of ten known values the smallest and the largest are left out: 2 .. 9 have mean 5.5 and variance 6."""
    values = torch.tensor([[math.nan, 7, 2, 9, 1000, 4, 3, 8, 6, -50, 5, math.nan]]).reshape(1, 3, 4)
    found = depth(missing=0).normalise(values)
    assert found.shape == (1, 1, 3, 4)
    torch.testing.assert_close(found[0, 0], (values[0] - 5.5) / math.sqrt(6 + 1e-6), equal_nan=True)


def test_semantic_ids_by_hand() -> None:
    raw = torch.tensor([[[0, 3, 255]]], dtype=torch.uint8)
    found = semantic(ignore=255).normalise(raw)
    assert found.dtype == torch.int64
    assert found.tolist() == [[[0, 3, -1]]]


# -- fitting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [Crop(), Crop((0.25, 0.125, 0.5, 0.75)), Crop((0.25, 0.125, 0.5, 0.75), True)])
def test_one_crop_puts_a_rectangle_at_the_same_place_in_all_maps(crop: Crop) -> None:
    sizes = {"image": [24, 32], "depth": [24, 32], "semantic": [6, 8]}
    settings = {name: {"type": name, "size": size} for name, size in sizes.items()}
    settings["semantic"] |= {"type": "semantic_map", "classes": 4}
    parts = build_modalities(settings)
    colours, metres, ids = np.full((96, 96, 3), 20, np.uint8), np.full((96, 96), 1.5), np.zeros((96, 96), np.uint8)
    inside = np.s_[32:64, 16:56]
    colours[inside], metres[inside], ids[inside] = 220, 6.5, 3
    given = {"image": colours, "depth": metres, "semantic": ids}
    fitted = {name: parts[name].fit(parts[name].to_raw(x), crop) for name, x in given.items()}
    assert fitted["image"].shape == (3, 24, 32)
    is_inside = {"image": fitted["image"][0] > 120, "depth": fitted["depth"] > 4, "semantic": fitted["semantic"] == 3}
    top, left, height, width = crop.box or (0.125, 0, 0.75, 1)
    y, x = (torch.arange(24) + 0.5) / 24 * height + top, (torch.arange(32) + 0.5) / 32 * width + left
    expected = ((y > 1 / 3) & (y < 2 / 3))[:, None] & ((x > 1 / 6) & (x < 56 / 96))
    expected = expected.flip(1) if crop.is_flipped else expected
    assert 0.05 < expected.float().mean() < 0.6
    assert torch.equal(is_inside["depth"], expected)
    assert (is_inside["image"] == expected).float().mean() > 0.97
    enlarged = is_inside["semantic"].repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (enlarged == expected).float().mean() > 0.9


def test_the_middle_is_taken_where_the_shape_differs() -> None:
    raw = torch.arange(6 * 20, dtype=torch.float32).reshape(6, 20)
    assert torch.equal(depth().fit(raw, Crop()), raw[:, 6:14])
    assert torch.equal(depth().fit(raw, Crop(None, True)), raw[:, 6:14].flip(1))


def test_a_sample_of_the_right_size_is_not_touched_and_a_flip_mirrors_it() -> None:
    raw = torch.from_numpy(PIXELS).permute(2, 0, 1)
    assert torch.equal(image().fit(raw, Crop()), raw)
    assert torch.equal(image().fit(raw, Crop(None, True)), raw.flip(2))


def test_a_crop_at_the_edge_invents_nothing() -> None:
    """Rounding of top and height must not reach past the last row: all values are the map's own."""
    raw = torch.arange(1, 31, dtype=torch.uint8).reshape(1, 5, 6)
    fitted = fit_map(raw, (4, 6), Crop((0.3, 0.0, 0.7, 1.0)), "nearest-exact")
    assert int(fitted.min()) >= 1, fitted


def test_blanks_look_like_what_fit_returns() -> None:
    samples = {image(): PIXELS, depth(): np.arange(48.0).reshape(6, 8), semantic(): PIXELS[..., 0] % 4}
    for part, sample in samples.items():
        fitted = part.fit(part.to_raw(sample), Crop())
        blank = part.blank(3)
        assert blank.dtype == fitted.dtype
        assert blank.shape == (3, *fitted.shape)
        assert part.normalise(blank).isfinite().all()


# -- pictures and measures ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image", "grey", "depth", "semantic"])
def test_show_draws_uint8_pictures(name: str) -> None:
    parts = {"image": image(), "grey": image(channels=1), "depth": depth(missing=0), "semantic": semantic(ignore=255)}
    signals = {
        "image": torch.arange(144.0).reshape(3, 6, 8) / 48 - 1.5,
        "grey": torch.arange(48.0).reshape(1, 6, 8) / 24 - 1,
        "depth": (torch.arange(48.0).reshape(1, 6, 8) / 8 - 3).index_fill(1, torch.tensor([2]), math.nan),
        "semantic": (torch.arange(48) % 5 - 1).reshape(6, 8),
    }
    picture = parts[name].show(signals[name])
    assert isinstance(picture, np.ndarray)
    assert (picture.dtype, picture.shape) == (np.uint8, (6, 8, 3))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) >= 5
    if name == "semantic":
        assert picture[0, 0].tolist() == [0, 0, 0], "an unknown position is black"
    if name == "depth":
        assert np.ptp(picture[2]) == 0, "holes are grey"
        assert picture[0].sum() != picture[5].sum()


def test_show_undoes_normalise() -> None:
    raw = torch.from_numpy(PIXELS).permute(2, 0, 1)[None].contiguous()
    assert np.array_equal(image().show(image().normalise(raw)[0]), PIXELS)


def test_psnr_by_hand() -> None:
    """Errors of 0.1 in one counted pixel and none in the other; a third one does not count: mse 0.005, 23.01 dB."""
    part = image(channels=1, mean=[0.0], std=[1.0])
    truth = torch.tensor([0.3, 0.6, 0.9]).reshape(1, 1, 1, 3)
    predicted = torch.tensor([0.4, 0.6, 0.1]).reshape(1, 1, 1, 3)
    sums = part.score(predicted, truth, torch.tensor([[[True, True, False]]]))
    assert sums.tolist() == pytest.approx([0.01, 2], rel=1e-5)
    assert part.finish_score(sums) == pytest.approx(-10 * math.log10(0.005), abs=1e-4)
    twice = part.score(predicted, truth, torch.tensor([[[False, False, True]]])) + sums
    assert part.finish_score(twice) == pytest.approx(-10 * math.log10(0.65 / 3), abs=1e-4)


def test_l1_by_hand_without_holes_and_hidden() -> None:
    part = depth(missing=0)
    truth = torch.tensor([1.0, math.nan, 3.0, -2.0]).reshape(1, 1, 1, 4)
    predicted = torch.tensor([1.5, 7.0, 1.0, 9.0]).reshape(1, 1, 1, 4)
    sums = part.score(predicted, truth, torch.tensor([[[True, True, True, False]]]))
    assert sums.tolist() == [2.5, 2.0]
    assert part.finish_score(sums) == 1.25


def test_mean_iou_by_hand() -> None:
    """Class 0: 1 of 3, class 1: 1 of 2, class 2: 0 of 1, class 3 occurs nowhere: (1/3 + 1/2 + 0) / 3."""
    part = semantic(ignore=255)
    truth = torch.tensor([[[0, 0, 1, -1, 0, 3]]])
    predicted = torch.tensor([[[0, 1, 1, 2, 2, 3]]])
    sums = part.score(predicted, truth, torch.tensor([[[True, True, True, True, True, False]]]))
    assert sums.tolist() == [[1, 1, 0, 0], [1, 2, 1, 0], [3, 1, 0, 0]]
    assert part.finish_score(sums) == pytest.approx((1 / 3 + 1 / 2) / 3)
