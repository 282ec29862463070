"""Points written a second time, as Python loops over single numbers: the same choices, exactly.

Coordinates are multiples of 1/256, so that sums and squares are exact in float32 and ties are ties.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from m3.plugins import Signal
from m3.points import chamfer, farthest_points, morton, nearest
from m3.tokenizers.point_group import PointGroup

NAN = float("nan")


def drawn(count: int, seed: int, spread: int = 512) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-spread, spread, (count, 3), generator=generator) / 256).tolist()


CLOUDS = {
    "random": drawn(40, 1),
    "coarse, many ties": drawn(40, 2, spread=3),
    "a grid": [[float(x), float(y), float(z)] for x in range(3) for y in range(4) for z in range(3)],
    "duplicates": drawn(5, 3) * 6,
    "one place": [[0.5, -1.0, 2.0]] * 30,
    "collinear": [[i / 4, i / 2, -i / 4] for i in (5, 2, 9, 2, 0, 7, 1, 8, 3)],
    "one point": [[1.0, 2.0, 3.0]],
    "holes": [[NAN] * 3 if i % 3 == 0 else point for i, point in enumerate(drawn(40, 4))],
    "few and padding": drawn(5, 5) + [[NAN] * 3] * 20,
    "one and padding": [[NAN] * 3] * 7 + [[0.25, 0.0, -3.0]] + [[NAN] * 3] * 7,
}


def distance(a: list[float], b: list[float]) -> np.float32:
    dx, dy, dz = (np.float32(p) - np.float32(q) for p, q in zip(a[:3], b[:3], strict=True))
    return (dx * dx + dy * dy) + dz * dz


def existing(cloud: list[list[float]]) -> list[int]:
    return [i for i, point in enumerate(cloud) if not any(map(math.isnan, point))]


def slow_farthest(cloud: list[list[float]], count: int) -> list[int]:
    there = existing(cloud)
    centre = [float(np.float32(math.fsum(cloud[i][axis] for i in there)) / np.float32(len(there))) for axis in range(3)]
    chosen: list[int] = []
    while len(chosen) < min(count, len(there)):
        best, best_gap = -1, -1.0
        for i in there:
            gap = min([distance(cloud[i], cloud[j]) for j in chosen] or [distance(cloud[i], centre)])
            if i not in chosen and gap > best_gap:
                best, best_gap = i, gap
        chosen.append(best)
    return [chosen[i % len(chosen)] for i in range(count)]


def slow_nearest(query: list[float], cloud: list[list[float]], k: int) -> list[int]:
    order = sorted(existing(cloud), key=lambda i: (distance(query, cloud[i]), i))[:k]
    return [order[i % len(order)] for i in range(k)]


def slow_chamfer(a: list[list[float]], b: list[list[float]]) -> float:
    def one_way(one: list[list[float]], other: list[list[float]]) -> float:
        best = [min(math.fsum((x - y) ** 2 for x, y in zip(p, q, strict=True)) for q in other) for p in one]
        return math.fsum(best) / len(best)

    return one_way(a, b) + one_way(b, a)


def slow_morton(cloud: list[list[float]], bits: int = 10) -> list[int]:
    axes = list(zip(*cloud, strict=True))
    low = [np.float32(min(axis)) for axis in axes]
    extent = max(np.float32(max(axis)) - np.float32(min(axis)) for axis in axes) or np.float32(1)
    codes = []
    for point in cloud:
        cells = [
            min(int((np.float32(x) - at) / extent * 2**bits), 2**bits - 1) for x, at in zip(point, low, strict=True)
        ]
        digits = [f"{cell:0{bits}b}" for cell in cells]
        codes.append(int("".join(z + y + x for x, y, z in zip(*digits, strict=True)), 2))
    return codes


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("count", [1, 8, 50])
def test_farthest_points(name: str, count: int) -> None:
    found = farthest_points(torch.tensor([CLOUDS[name]]), count)
    assert found.dtype == torch.int64
    assert found[0].tolist() == slow_farthest(CLOUDS[name], count)


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("k", [1, 7, 50])
def test_nearest(name: str, k: int) -> None:
    queries = drawn(6, 6) + [CLOUDS[name][i] for i in existing(CLOUDS[name])[:3]]
    found = nearest(torch.tensor([queries]), torch.tensor([CLOUDS[name]]), k)
    assert found.dtype == torch.int64
    assert found[0].tolist() == [slow_nearest(query, CLOUDS[name], k) for query in queries]


def test_nearest_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, cloud = torch.tensor([drawn(23, 7)]), torch.tensor([CLOUDS["coarse, many ties"]])
    whole = nearest(queries, cloud, 5)
    monkeypatch.setattr("m3.points.ELEMENTS", 3 * cloud.shape[1])
    assert torch.equal(nearest(queries, cloud, 5), whole)


def test_neighbours_far_from_the_origin_are_exact() -> None:
    """At 10,000 the short formula of squared distances loses all digits of gaps below 1."""
    near = torch.tensor([drawn(60, 8, spread=64)])
    far = near + torch.tensor([10000.0, -9000.0, 12000.0])
    assert torch.equal(nearest(far, far, 9), nearest(near, near, 9))
    short = torch.cdist(far, far, compute_mode="use_mm_for_euclid_dist").topk(9, largest=False).indices
    assert (short != nearest(far, far, 9)).float().mean() > 0.1
    # Moved by whole numbers the centroid is another sum, so only the choices after a common start must agree.
    start = torch.cat([near, torch.full((1, 1, 3), 4.0)], 1)
    moved = start + torch.tensor([10000.0, -9000.0, 12000.0])
    assert torch.equal(farthest_points(moved, 20), farthest_points(start, 20))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (9, 9), (4, 30), (30, 1)])
def test_chamfer(n: int, m: int) -> None:
    """Sums are exact here; the two divisions and the last addition are rounded."""
    a = [[*point, point[0]] for point in drawn(n, 9)]
    b = [[*point, point[2]] for point in drawn(m, 10)]
    found = chamfer(torch.tensor([a]), torch.tensor([b]))
    assert found.tolist() == pytest.approx([slow_chamfer(a, b)], rel=3e-7)


def test_chamfer_passes_over_points_that_do_not_exist() -> None:
    a, b = torch.tensor([drawn(12, 11)]), torch.tensor([drawn(9, 12)])
    is_a, is_b = torch.arange(12) % 3 > 0, torch.arange(9) < 4
    expected = slow_chamfer(a[0, is_a].tolist(), b[0, is_b].tolist())
    a[0, ~is_a], b[0, ~is_b] = NAN, NAN
    assert chamfer(a, b, is_a[None], is_b[None]).item() == pytest.approx(expected, rel=3e-7)


@pytest.mark.parametrize("name", [name for name in CLOUDS if "ding" not in name and name != "holes"])
def test_morton(name: str) -> None:
    assert morton(torch.tensor([CLOUDS[name]]))[0].tolist() == slow_morton(CLOUDS[name])


@pytest.mark.parametrize("coordinates", ["relative", "absolute"])
@pytest.mark.parametrize("name", CLOUDS)
def test_groups(name: str, coordinates: str) -> None:
    """Values, positions and validity of each token from the definitions, with a fourth channel."""
    cloud = [[*point, float(i)] for i, point in enumerate(CLOUDS[name])]
    spec = PointGroup.Spec(groups=7, neighbours=4, coordinates=coordinates)
    tokens = PointGroup(spec, Signal("values", 4, (len(cloud),), has_gaps=True, channel_axis=-1), 8).tokenize(
        torch.tensor([cloud])
    )
    there = existing(CLOUDS[name])
    centres = slow_farthest(CLOUDS[name], 7)
    is_valid = [i < len(there) for i in range(7)]
    if coordinates == "absolute":
        codes = slow_morton([CLOUDS[name][i] for i in centres])
        order = sorted(range(7), key=lambda i: (not is_valid[i], codes[i] if is_valid[i] else 0, i))
        centres, is_valid = [centres[i] for i in order], [is_valid[i] for i in order]
    offset = {"relative": 1.0, "absolute": 0.0}[coordinates]
    for i, centre in enumerate(centres):
        at = CLOUDS[name][centre]
        expected = [
            value
            for j in slow_nearest(at, CLOUDS[name], 4)
            for value in (*(c - offset * o for c, o in zip(CLOUDS[name][j], at, strict=True)), float(j))
        ]
        assert tokens.values[0, i].tolist() == expected
        assert tokens.positions[0, i].tolist() == (at if coordinates == "relative" else [float(i)])
    assert tokens.is_valid is not None
    assert tokens.is_valid[0].tolist() == is_valid


def test_neighbours_on_the_curve_are_neighbours_in_space() -> None:
    """Sorted by code, the points of a fine grid take steps far shorter than in a random order."""
    grid = torch.cartesian_prod(*[torch.arange(8.0)] * 3)

    def steps(order: Tensor) -> float:
        return sum(float((grid[a] - grid[b]).norm()) for a, b in pairwise(order.tolist())) / 511

    assert steps(morton(grid[None])[0].argsort()) < 2
    assert steps(torch.randperm(512, generator=torch.Generator().manual_seed(1))) > 4
