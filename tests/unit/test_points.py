"""Point clouds: checks and their sentences, values by hand, pictures, groups and gradients."""

import numpy as np
import pytest
import torch

from m3.errors import M3Error
from m3.modalities.points import Points
from m3.network import build_modalities
from m3.parts import find
from m3.plugins import Crop, Signal
from m3.points import chamfer, farthest_points, nearest
from m3.tokenizers.point_group import PointGroup

NAN = float("nan")
XYZ = (np.arange(15, dtype=np.float64).reshape(5, 3) - 4) / 8
NOISE = torch.randn(8, 64, 5, generator=torch.Generator().manual_seed(3))


def points(**settings) -> Points:
    return build_modalities({"x": {"type": "points", "count": 5, **settings}})["x"]  # type: ignore[return-value]


def groups(channels: int = 5, coordinates: str = "relative", **settings) -> PointGroup:
    torch.manual_seed(1)
    spec = PointGroup.Spec(
        **{"groups": 6, "neighbours": 4, "embed_width": (8, 12, 10), "coordinates": coordinates, **settings}
    )
    return PointGroup(spec, Signal("values", channels, (64,), has_gaps=True, channel_axis=-1), width=16)


# -- checks ---------------------------------------------------------------------------------------------


def test_rows_without_coordinates_are_left_out() -> None:
    given = np.array([[1, 2, 3, 4.0], [NAN, NAN, NAN, 4], [5, 6, 7, 8], [NAN] * 4])
    raw = points(attributes=1).to_raw(given)
    assert raw.dtype == torch.float32
    assert raw.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert torch.equal(points(attributes=1).to_raw(torch.tensor(given)), raw)
    assert points().to_raw([[1, 2, 3]]).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (XYZ[:, :2], r"must hold numbers of shape \(points, 3\), got float64 of shape \(5, 2\); change its columns or"),
        (XYZ.repeat(2, 1), r"must hold numbers of shape \(points, 3\), got float64 of shape \(5, 6\)"),
        (XYZ[0], r"got float64 of shape \(3,\)"),
        ([["a", "b", "c"]], "got <U1 of shape"),
        ([[1, 2, 3], [1, 2]], "a point cloud must be one array of numbers"),
        ([[1, NAN, 3], [1, 2, 3]], "holds NaN or infinite values at 1 of 2 points; remove these points"),
        ([[1, 1e300, 3], [np.inf, 2, 3]], "holds NaN or infinite values at 2 of 2 points"),
        ([[NAN, NAN, NAN]], "^a point cloud holds no points; leave the sample out.$"),
        (np.zeros((0, 3)), "^a point cloud holds no points"),
        (XYZ + 5e6, "so large against its extent that float32 can't tell its points apart; subtract an offset"),
    ],
)
def test_a_wrong_sample_is_refused(given: object, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        points().to_raw(given)


def test_settings_must_fit_the_attributes() -> None:
    with pytest.raises(M3Error, match="attribute_std must have 2 values, one per attribute, got 2 and 1"):
        points(attributes=2, attribute_std=[1.0])
    with pytest.raises(M3Error, match=r"x\.scale: .*greater than 0"):
        points(scale=0)


# -- fitting and normalising ----------------------------------------------------------------------------


def test_fewer_points_are_filled_up_and_more_are_thinned_out() -> None:
    few = points().fit(torch.arange(6.0).reshape(2, 3), Crop())
    assert few[:2].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert few[2:].isnan().all()
    assert few.shape == (5, 3)
    many = torch.arange(3000.0).reshape(1000, 3)
    part = points(count=100)
    thin = part.fit(many, Crop())
    assert torch.equal(part.fit(many, Crop()), thin)
    place = thin[:, 0] / 3
    assert (place.diff() > 0).all(), "the points keep their order and none is twice"
    assert torch.equal(thin, many[place.long()])
    assert 30 < int((place < 500).sum()) < 70, "points come from everywhere"
    assert place.diff().unique().numel() > 10, "no stride that beats with the order of the points"


def test_a_flip_mirrors_x_about_the_centre_of_normalise() -> None:
    raw = points().to_raw(XYZ)
    assert torch.equal(points().fit(raw, Crop(None, True)), raw * torch.tensor([-1.0, 1, 1]))
    part = points(normalise="fixed", mean=[0.5, 1.0, 2.0], scale=4.0)
    straight, turned = (part.normalise(part.fit(raw, Crop(None, x))[None]) for x in (False, True))
    torch.testing.assert_close(turned, straight * torch.tensor([-1.0, 1, 1]))


def test_unit_sphere_by_hand() -> None:
    """Centroid (2, 0, 1), farthest point 4 away; attributes by their own statistics; the hole stays one."""
    raw = torch.tensor([[[-2.0, 0, 1, 10], [5, 0, 1, 30], [3, 0, 1, 20], [NAN] * 4]])
    found = points(attributes=1, attribute_mean=[20.0], attribute_std=[5.0]).normalise(raw)
    expected = torch.tensor([[[-1.0, 0, 0, -2], [0.75, 0, 0, 2], [0.25, 0, 0, 0], [NAN] * 4]])
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_fixed_by_hand_and_degenerate_clouds() -> None:
    part = points(normalise="fixed", mean=[1.0, 2.0, 3.0], scale=2.0)
    assert part.normalise(torch.tensor([[[3.0, 2.0, -3.0]]])).tolist() == [[[1.0, 0.0, -3.0]]]
    one = torch.tensor([[[7.0, 8.0, 9.0], [NAN] * 3]])
    assert points().normalise(one)[0, 0].tolist() == [0, 0, 0]
    assert points().normalise(torch.full((2, 5, 3), NAN)).isnan().all()
    blank = points(attributes=2).blank(3)
    assert blank.shape == (3, 5, 5)
    assert points(attributes=2).normalise(blank).isfinite().all()


# -- pictures and measures ------------------------------------------------------------------------------


def test_near_points_cover_far_ones_and_up_is_up() -> None:
    part = points(attributes=3)
    signal = torch.tensor([[0, 0, 0.9, 1, 0, 0], [0, -0.9, 0, 0, 1, 0], [0, 0.9, 0, 0, 0, 1], [NAN] * 6])
    picture = part.show(signal)
    assert (picture.dtype, picture.shape) == (np.uint8, (224, 224, 3))
    red, green, blue = ((picture == np.eye(3)[i] * 255).all(-1).nonzero() for i in range(3))
    assert len(red[0]) == len(green[0]) == len(blue[0]) == 13
    assert red[0].mean() < blue[0].mean() < green[0].mean(), "seen from above, what is near lies lower"
    hiding = signal.clone()
    e, a = np.radians(20), np.radians(30)
    toward = torch.tensor([np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)])
    hiding[0, :3], hiding[1, :3], hiding[2] = toward * -0.5, toward * 0.5, NAN
    covered = part.show(hiding).reshape(-1, 3)
    assert np.unique(covered, axis=0).tolist() == [[0, 255, 0], [255, 255, 255]]
    assert np.array_equal(part.show(hiding.flip(0)), part.show(hiding))


def test_hidden_points_are_small_and_grey_and_heights_have_colours() -> None:
    part = points(normalise="fixed")
    signal = torch.tensor([[0, 0, -50.0], [0, 0, 50.0], [30, 0, 0]])
    picture = part.show(signal, torch.tensor([True, True, False]))
    colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    assert len(colours) == 4
    assert counts[(colours == 205).all(-1)].tolist() == [1]
    assert part.show(torch.full((4, 3), NAN)).min() == 255


def test_chamfer_is_measured_where_it_is_asked_for() -> None:
    """To the asked-for points (0, 0, 0) and (2, 0, 0): 1 and 0 from the prediction, 1 and 0 back: 0.5 + 0.5."""
    part = points(attributes=1)
    truth = torch.tensor([[[0, 0, 0, 9.0], [2, 0, 0, 9], [50, 0, 0, 9], [NAN] * 4]])
    predicted = torch.tensor([[[1, 0, 0, 0.0], [2, 0, 0, 0], [-70, 0, 0, 0], [3, 3, 3, 0]]])
    weight = torch.tensor([[True, True, False, True]])
    sums = part.score(predicted, truth, weight)
    assert sums.tolist() == [1.0, 1.0]
    twice = sums + part.score(predicted + 1, truth, torch.zeros(1, 4))
    assert part.finish_score(twice) == 1.0, "a cloud that is asked for nothing does not count"
    assert part.score(predicted[:, :2], truth, weight).tolist() == [1.0, 1.0]
    assert part.score(predicted * NAN, truth, weight).isnan().any(), "NaN is no perfect prediction"


def test_chamfer_by_hand_with_gradient() -> None:
    a = torch.tensor([[[0.0, 0, 0], [4, 0, 0]]], requires_grad=True)
    b = torch.tensor([[[1.0, 0, 0], [1, 2, 0], [NAN] * 3]])
    is_b = torch.tensor([[True, True, False]])
    found = chamfer(a, b, is_valid_b=is_b)
    assert found.item() == (1 + 9) / 2 + (1 + 5) / 2
    found.sum().backward()
    # From a: (a - b) each, over 2 points, twice; back: both of b have the first of a nearest.
    assert a.grad is not None
    assert a.grad.tolist() == [[[-1.0 - 1 - 1, -2.0, 0], [3.0, 0, 0]]]
    nothing = chamfer(a, b, is_valid_b=torch.zeros(1, 3, dtype=torch.bool))
    assert nothing.tolist() == [0.0]


def test_chamfer_gradients_are_those_of_finite_differences() -> None:
    x = NOISE[:2, :7, :4].double().requires_grad_()
    y = NOISE[2:4, :5, :4].double().requires_grad_()
    is_x = torch.arange(7).expand(2, -1) < torch.tensor([[7], [3]])
    assert torch.autograd.gradcheck(lambda p, q: chamfer(p, q, is_x), (x, y))


# -- choosing -------------------------------------------------------------------------------------------


def test_farthest_and_nearest_by_hand() -> None:
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0], [NAN, 0, 0]]])
    assert farthest_points(line, 4).tolist() == [[0, 4, 2, 1]], "both ends are equally far: the first; 1 ties with 3"
    assert farthest_points(line, 2, torch.tensor([[False, True, True, True, True, True]])).tolist() == [[1, 4]]
    assert nearest(line[:, 1:2], line, 4).tolist() == [[[1, 0, 2, 3]]]
    assert nearest(line[:, 1:2], line, 3, torch.arange(6)[None] > 1).tolist() == [[[2, 3, 4]]]
    nothing = torch.full((1, 5, 3), NAN)
    assert farthest_points(nothing, 3).tolist() == [[0, 0, 0]]
    assert nearest(line[:, 1:2], nothing, 2).tolist() == [[[0, 0]]]


# -- groups ---------------------------------------------------------------------------------------------


def test_groups_are_put_together_to_points_of_the_cloud() -> None:
    for coordinates in ("relative", "absolute"):
        part = groups(coordinates=coordinates)
        tokens = part.tokenize(NOISE)
        cloud = part.detokenize(part.decode(tokens.values), tokens.positions, (64,))
        assert cloud.shape == (8, 24, 5)
        gap = torch.cdist(cloud, NOISE, compute_mode="donot_use_mm_for_euclid_dist").amin(-1)
        assert gap.max() < 1e-6
        is_seen = (torch.arange(6) % 2 == 0).view(1, 6, 1).expand(8, 6, 20)
        spread = part.detokenize(is_seen, tokens.positions, (64,)).all(-1)
        assert spread[3].tolist() == [i // 4 % 2 == 0 for i in range(24)]


def test_absolute_positions_say_nothing_about_the_cloud() -> None:
    part = groups(coordinates="absolute")
    assert (part.axes, part.reference) == (1, (6,))
    one, other = part.tokenize(NOISE), part.tokenize(NOISE * 3 + 1)
    assert one.positions.tolist() == [[[0], [1], [2], [3], [4], [5]]]
    assert torch.equal(one.positions, other.positions)
    assert not torch.equal(one.values, other.values)
    assert groups().axes == 3


def test_an_empty_cloud_has_no_tokens_and_no_gradient_of_nan() -> None:
    clouds = NOISE.clone()
    clouds[2], clouds[5, 3:] = NAN, NAN
    for coordinates in ("relative", "absolute"):
        part = groups(coordinates=coordinates)
        tokens = part.tokenize(clouds)
        assert tokens.is_valid is not None
        assert tokens.is_valid.sum(1).tolist() == [6, 6, 0, 6, 6, 3, 6, 6]
        assert not tokens.values[2].any()
        assert tokens.positions.isfinite().all()
        part.embed(tokens.values).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())


def test_every_parameter_learns() -> None:
    part = groups()
    part.embed(part.tokenize(NOISE).values).square().sum().backward()
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("coordinates", ["relative", "absolute"])
def test_a_cloud_does_not_see_the_others_of_its_batch(coordinates: str) -> None:
    part = groups(coordinates=coordinates)
    clouds = NOISE.clone()
    clouds[1, 40:], clouds[6] = NAN, NAN
    whole = part.tokenize(clouds)
    embedded = part.embed(whole.values)
    for size in (1, 4):
        pieces = [part.tokenize(piece) for piece in clouds.split(size)]
        assert torch.equal(torch.cat([piece.values for piece in pieces]), whole.values)
        assert whole.is_valid is not None
        assert torch.equal(
            torch.cat([piece.is_valid for piece in pieces if piece.is_valid is not None]), whole.is_valid
        )
        torch.testing.assert_close(torch.cat([part.embed(piece.values) for piece in pieces]), embedded)
    again = part.tokenize(clouds)
    assert torch.equal(again.values, whole.values)
    assert torch.equal(again.positions, whole.positions)


def test_the_order_of_points_does_not_matter() -> None:
    part, order = groups(), torch.randperm(64, generator=torch.Generator().manual_seed(4))
    tokens, shuffled = part.tokenize(NOISE), part.tokenize(NOISE[:, order])
    assert torch.equal(shuffled.values, tokens.values)
    mixed = tokens.values.unflatten(-1, (4, 5))[:, :, [2, 0, 3, 1]].flatten(2)
    torch.testing.assert_close(part.embed(mixed), part.embed(tokens.values))


def test_the_embedding_is_point_maes_layers_with_layer_norm() -> None:
    """The concatenation of the group's maximum and the point's own features, written out (Point-MAE, figure 3)."""
    part, values = groups(), groups().tokenize(NOISE).values
    x = values.unflatten(-1, (4, 5))
    features = part.point[3](torch.relu(part.point[1](part.point[0](x))))
    joined = torch.cat([features.amax(2, keepdim=True).expand_as(features), features], -1)
    weight = torch.cat([part.shared.weight, part.own.weight], 1)
    hidden = torch.relu(part.norm(joined @ weight.T + part.own.bias))
    torch.testing.assert_close(part.embed(values), part.projection(hidden).amax(2))


def test_parts_are_found_and_refuse_other_signals() -> None:
    assert find("modalities", "points") is Points
    assert find("tokenizers", "point_group") is PointGroup
    for signal in (Signal("values", 3, (4, 4)), Signal("classes", 3, (4,), 5), Signal("values", 3, (4,))):
        with pytest.raises(M3Error, match=r"`point_group` reads lists of points .*; use it for the modality `points`"):
            PointGroup(PointGroup.Spec(), signal, 8)
    assert points(attributes=3).signal == Signal("values", 6, (5,), has_gaps=True, channel_axis=-1)
