"""Value tokens: bins by hand, metadata and palettes to ids and back, files, pictures, measures, errors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from m3.data.files import Member
from m3.data.source import open_source
from m3.errors import M3Error
from m3.modalities.metadata import Metadata
from m3.modalities.palette import Palette, main_colours
from m3.network import build_modalities
from m3.plugins import Crop
from m3.processor import M3Processor
from m3.recipe import DataSpec
from m3.value_tokens import Bins

NAN = math.nan
FIELDS = [
    {"name": "brightness", "low": 0, "high": 200, "bins": 4},
    {"name": "weather", "kind": "choice", "choices": ["sun", "rain", "snow"]},
    {"name": "tilt", "low": -1, "high": 1, "bins": 10},
]


def metadata(fields: list = FIELDS) -> Metadata:
    return build_modalities({"x": {"type": "metadata", "fields": fields}})["x"]  # type: ignore[return-value]


def palette(colours: object = (1, 7)) -> Palette:
    return build_modalities({"x": {"type": "palette", "colours": colours}})["x"]  # type: ignore[return-value]


# -- bins -----------------------------------------------------------------------------------------------


def test_bins_by_hand() -> None:
    """Five bins of width 2 from -4 to 6, with ids 10 to 14."""
    bins = Bins(-4.0, 6.0, 5, 10)
    numbers = torch.tensor([-4.0, -2.001, -2.0, 0.5, 5.9, 6.0, -99.0, 99.0, NAN])
    assert bins.ids(numbers).tolist() == [10, 10, 11, 12, 14, 14, 10, 14, -1]
    assert bins.values(torch.tensor([10, 12, 14])).tolist() == [-3.0, 1.0, 5.0]
    assert bins.part_of(torch.tensor([10, 14])).tolist() == [0.0, 4.0]
    assert bins.values(torch.tensor([9, 15, -1, 0])).isnan().all()
    assert bins.ids(bins.values(torch.arange(10, 15))).tolist() == [10, 11, 12, 13, 14]


# -- metadata -------------------------------------------------------------------------------------------


def test_ids_of_metadata_by_hand() -> None:
    """Ids 0 to 2 are the fields, 3 to 6 brightness, 7 to 9 weather, 10 to 19 tilt."""
    part = metadata()
    assert part.signal.classes == 20
    assert part.signal.size == (6,)
    raw = part.to_raw({"tilt": 0.25, "brightness": 149, "weather": "snow", "camera": "none of ours"})
    assert raw.tolist() == [[0, 149], [1, 2], [2, 0.25]]
    batch = torch.stack([raw, torch.tensor([[1, 0.0], [2, -1.0], [NAN, NAN]])])
    assert part.normalise(batch).tolist() == [[0, 5, 1, 9, 2, 16], [1, 7, 2, 10, -1, -1]]
    assert part.groups(part.normalise(batch)).tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert part.decode(part.normalise(batch)[0]) == pytest.approx(
        {"brightness": 125.0, "weather": "snow", "tilt": 0.3}, abs=1e-6
    )
    assert part.decode(part.normalise(batch)[1]) == pytest.approx({"weather": "sun", "tilt": -0.9}, abs=1e-6)


def test_numbers_beyond_the_range_count_as_its_ends() -> None:
    part = metadata()
    raw = part.to_raw({"brightness": 1e9, "tilt": -7})
    assert part.normalise(raw[None]).tolist() == [[0, 6, 2, 10]]


def test_lacking_and_null_fields_are_left_out() -> None:
    part = metadata()
    assert part.to_raw({"brightness": None, "weather": "rain"}).tolist() == [[1, 1]]
    settings = {"info": {"type": "metadata", "fields": FIELDS}}
    batch = M3Processor(settings)(info=[{"weather": "rain"}, {"tilt": 0, "brightness": 0}])
    assert part.normalise(batch.signals["info"]).tolist() == [[1, 8, -1, -1], [0, 3, 2, 15]]


def test_a_value_of_another_field_is_not_decoded() -> None:
    part = metadata()
    assert part.decode(torch.tensor([0, 7, 1, 8, 5, 3])) == {"weather": "rain"}
    assert part.decode(torch.tensor([-1, -1, 0, 0, 1, -1])) == {}


def test_the_accuracy_of_metadata_is_that_of_values() -> None:
    part = metadata()
    truth = torch.tensor([[0, 5, 1, 9, 2, 16], [1, 7, 2, 10, -1, -1]])
    predicted = torch.tensor([[1, 5, 1, 8, 2, 16], [2, 7, 2, 11, 0, 3]])
    everywhere = torch.ones(2, 6, dtype=torch.bool)
    assert part.score(predicted, truth, everywhere).tolist() == [3, 5]
    some = everywhere.clone()
    some[0, 3] = some[1, 1] = False
    assert part.finish_score(part.score(predicted, truth, some)) == pytest.approx(2 / 3)


def test_metadata_are_written_as_a_table() -> None:
    part = metadata()
    ids = torch.tensor([0, 5, 1, 9, 2, 16])
    whole = part.show(ids)
    is_known = torch.tensor([True, True, True, False, True, True])
    hidden = part.show(ids, is_known)
    assert whole.shape == hidden.shape
    rows = np.flatnonzero((whole != hidden).any(axis=(1, 2)))
    assert 12 < rows.min() <= rows.max() < 28, "only the second line differs"
    assert (whole != part.show(torch.tensor([0, 5, 1, 8, 2, 16]))).any()
    assert part.show(torch.tensor([5, 0, 1, 9, -1, -1])).shape == whole.shape


def test_metadata_files(tmp_path: Path) -> None:
    part = metadata()
    (tmp_path / "a.json").write_text(json.dumps({"tilt": 0.5}))
    for file in (tmp_path / "a.json", Member(b'{"tilt": 0.5}', "a.json")):
        assert part.to_raw(part.load(file)).tolist() == [[2, 0.5]]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([("tilt", 3)], r"^metadata must be a dict of fields and their values, got \[\('tilt', 3\)\].$"),
        ({"x": 1}, "^metadata has none of the fields brightness, weather, tilt, got {'x': 1}; leave the sample out.$"),
        ({"weather": "rein"}, r"^metadata: 'rein' is no `weather`. Did you mean `rain`\?$"),
        ({"weather": ["rain"]}, r"^metadata: \['rain'\] is no `weather`."),
        ({"tilt": "0.5"}, "^metadata: `tilt` must be a finite number, got '0.5'.$"),
        ({"tilt": True}, "^metadata: `tilt` must be a finite number, got True.$"),
        ({"tilt": NAN}, "^metadata: `tilt` must be a finite number, got nan.$"),
    ],
)
def test_wrong_metadata_are_refused(given: object, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        metadata().to_raw(given)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ([], "fields"),
        ([{"name": "a"}, {"name": "a"}], "`fields` must have different names, got a, a"),
        ([{"name": "a", "kind": "choice"}], "field `a`: a `choice` lists its `choices`, a `number` has none"),
        ([{"name": "a", "choices": ["x"]}], "field `a`: a `choice` lists its `choices`, a `number` has none"),
        ([{"name": "a", "kind": "choice", "choices": ["x", "x"]}], "field `a`: its `choices` must all be different"),
        ([{"name": "a", "low": 3}], "field `a`: `low` must be smaller than `high`, both finite"),
    ],
)
def test_wrong_fields_are_refused(fields: list, sentence: str) -> None:
    with pytest.raises(M3Error, match=rf"^modalities.x.*{sentence}"):
        metadata(fields)


# -- palettes -------------------------------------------------------------------------------------------

COLOURS = [[255, 0, 10], [1, 2, 3], [200, 100, 50]]


def test_ids_of_palettes_by_hand() -> None:
    """Four counts, then 256 ids for each of red, green and blue."""
    part = palette(4)
    assert part.signal.classes == 4 + 3 * 256
    assert part.signal.size == (13,)
    raw = part.to_raw(COLOURS[:2])
    batch = torch.stack([raw, torch.tensor([[7, 8, 9], [-1, -1, -1]], dtype=torch.int16)])
    ids = part.normalise(batch)
    assert ids.tolist() == [[1, 259, 260, 526, 5, 262, 519], [0, 11, 268, 525, -1, -1, -1]]
    assert part.groups(ids).tolist() == [[0, 1, 1, 1, 2, 2, 2]] * 2
    assert part.decode(ids)[0].tolist() == COLOURS[:2]
    assert part.decode(ids)[1, 0].tolist() == [7, 8, 9]
    assert part.decode(ids)[1, 1].isnan().all()
    assert part.decode(torch.tensor([1, 260, 4, 516])).isnan().tolist() == [[True, True, False]]


def test_main_colours_of_stripes_are_the_stripes_largest_first() -> None:
    pixels = np.zeros((20, 100, 3), np.uint8)
    pixels[:, :25], pixels[:, 25:90], pixels[:, 90:] = COLOURS
    found = main_colours(torch.from_numpy(pixels).permute(2, 0, 1), 3)
    assert found.tolist() == [COLOURS[1], COLOURS[0], COLOURS[2]]
    assert len(main_colours(torch.from_numpy(pixels).permute(2, 0, 1), 7)) == 3, "there are no more"
    (mean,) = main_colours(torch.from_numpy(pixels).permute(2, 0, 1), 1)
    assert mean.tolist() == pytest.approx(pixels.reshape(-1, 3).mean(0).tolist(), abs=1)


def test_more_colours_are_nearer_to_the_picture() -> None:
    """Mean distance of the pixels of a gradient to the nearest main colour falls with k."""
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    pixels = np.stack([4 * x, 4 * y, 255 - 2 * x - 2 * y], -1).astype(np.uint8)
    errors = []
    for k in (1, 2, 4, 7):
        found = main_colours(torch.from_numpy(pixels).permute(2, 0, 1), k)
        assert found.shape == (k, 3)
        errors.append(np.abs(pixels[:, :, None].astype(int) - found).sum(-1).min(-1).mean())
    assert errors[0] > 1.2 * errors[1] > 1.2**2 * errors[2] > 1.2**2 * errors[3]


def test_the_moment_draws_how_many_colours_there_are() -> None:
    part = palette((2, 4))
    picture = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    counts = [len(part.to_raw(part.cut(picture, moment))) for moment in np.linspace(0, 1, 301)]
    assert sorted(set(counts)) == [2, 3, 4]
    assert [counts.count(k) for k in (2, 3, 4)] == pytest.approx([100, 100, 101], abs=2)
    assert len(palette(3).cut(picture, 0.99)) == 3


def test_palettes_of_pictures_of_the_world() -> None:
    parts = {"palette": palette((1, 7)), "image": build_modalities({"i": {"type": "image", "size": 32}})["i"]}
    source = open_source(DataSpec(source="world", samples=3), parts, 0, "train")
    signals = source.read(1).signals
    assert torch.equal(parts["image"].to_raw(signals["palette"]), parts["image"].to_raw(signals["image"]))
    raw = parts["palette"].to_raw(parts["palette"].cut(signals["palette"], 1.0))
    assert raw.shape == (7, 3)
    assert torch.equal(parts["palette"].fit(raw, Crop(None, True)), raw)


def test_files_of_palettes(tmp_path: Path) -> None:
    part = palette((1, 3))
    each = {"1": COLOURS[2:], "2": COLOURS[:2], "3": COLOURS}
    for written, moment, expected in (
        (COLOURS, 1.0, COLOURS),
        (COLOURS, 0.5, COLOURS[:2]),
        (COLOURS[:1], 1.0, COLOURS[:1]),
        (each, 0.0, COLOURS[2:]),
        ([each], 0.5, COLOURS[:2]),
    ):
        (tmp_path / "a.json").write_text(json.dumps(written))
        assert part.to_raw(part.cut(part.load(tmp_path / "a.json"), moment)).tolist() == expected
    pixels = np.full((8, 8, 3), COLOURS[0], np.uint8)
    PILImage.fromarray(pixels).save(tmp_path / "a.png")
    assert part.to_raw(part.cut(part.load(tmp_path / "a.png"), 1.0)).tolist() == COLOURS[:1]
    batch = M3Processor({"p": {"type": "palette", "colours": [1, 3]}})(p=[tmp_path / "a.png", COLOURS, pixels])
    assert batch.signals["p"].tolist() == [[COLOURS[0], [-1] * 3], COLOURS[:2], [COLOURS[0], [-1] * 3]]
    with pytest.raises(M3Error, match=r"^the file holds palettes of 1, 2 colours, but none of 3.$"):
        part.cut({"1": COLOURS[2:], "2": COLOURS[:2]}, 1.0)


def test_the_error_of_colours_by_hand() -> None:
    """|255 - 250| + |0 - 0| + a blue where green should be (255), then one channel that counts, 30 off."""
    part = palette(3)
    truth = part.normalise(torch.stack([part.to_raw(COLOURS[:2])]))
    predicted = truth.clone()
    predicted[0, 1] -= 5
    predicted[0, 3] = truth[0, 2]
    predicted[0, 6] += 30
    weight = torch.tensor([[True, True, True, True, False, False, True]])
    sums = part.score(predicted, truth, weight)
    assert sums.tolist() == [5 + 0 + 255 + 30, 4]
    assert part.finish_score(sums) == 72.5
    holed = truth.clone()
    holed[0, 1:4] = -1
    assert part.score(predicted, holed, weight).tolist() == [30, 1]


def test_palettes_are_drawn_as_stripes() -> None:
    part = palette(3)
    ids = part.normalise(part.to_raw(COLOURS[:2])[None])[0]
    picture = part.show(ids)
    assert picture.shape == (48, 72, 3)
    assert [picture[5, x].tolist() for x in (0, 23, 24, 47, 48)] == [*COLOURS[:1] * 2, *COLOURS[1:2] * 2, [255] * 3]
    is_known = torch.ones(7, dtype=torch.bool)
    is_known[5] = False
    assert [part.show(ids, is_known)[5, x].tolist() for x in (0, 30)] == [COLOURS[0], [128] * 3]


@pytest.mark.parametrize(
    "given",
    [None, [], 5, "red", [[1, 2]], [[1, 2, 3], [4]], [[0, 0, 256]], [[-1, 0, 0]], [[0.5, 0, 0]], [[0, 0, 0]] * 4],
)
def test_wrong_palettes_are_refused(given: object) -> None:
    part = palette(3)
    with pytest.raises(
        M3Error, match=r"^a palette must be 1 to 3 colours of three whole numbers in 0 to 255, got .+\.$"
    ):
        part.to_raw(given)


def test_a_palette_from_more_to_less_is_refused() -> None:
    with pytest.raises(M3Error, match=r"^modalities.x.*`colours` is least, then most: write \[2, 5\]"):
        palette((5, 2))
