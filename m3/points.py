"""Geometry of point clouds in plain torch: farthest points, nearest neighbours, Chamfer distance.

All distances are sums of squared differences. The shorter |a|^2 + |b|^2 - 2 a b loses every digit where
coordinates are large against distances, and with them the order of the neighbours.
Letters: B batch, P points of a cloud, Q queries, k neighbours, C coordinates (3) and other values per point,
n and m points of two sets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3.types import take

ELEMENTS = 2**22
"""Distances that are held at once (about 50 MB with what sorts them); more queries are done in pieces."""


def farthest_points(xyz: Tensor, count: int, is_valid: Tensor | None = None) -> Tensor:
    """Choose points that lie far from each other: iterative farthest-point sampling (Eldar et al. 1997).

    The first is the point farthest from the centroid, each next one the point farthest from all chosen ones;
    ties go to the lowest index. So the choice doesn't depend on chance, and on the order of points only
    through ties.

    Args:
        xyz: (B, P, C) coordinates; points with a NaN don't exist.
        count: how many to choose.
        is_valid: (B, P) bool, False for further points that don't exist.

    Returns:
        (B, count) int64 in the order of choice. A cloud of n < count points gives all of them and then
        the same again, so index i is a repetition where i >= n. A cloud without points gives zeros.
    """
    known = _known(xyz, is_valid)
    planes = xyz.float().nan_to_num(0.0).unbind(-1)
    total = known.sum(1, keepdim=True).clamp(min=1)
    start = [(x * known).sum(1, keepdim=True) / total for x in planes]
    gap = _squared(planes, start)
    smallest = torch.full_like(gap, torch.inf)
    is_left, chosen = known, []
    for _ in range(count):
        index = gap.masked_fill(~is_left, -1.0).argmax(1, keepdim=True)
        # Never the same again while others are left, also where they are all duplicates at distance 0.
        is_left = is_left.scatter(1, index, False)
        gap = smallest = torch.minimum(smallest, _squared(planes, [x.gather(1, index) for x in planes]))
        chosen.append(index)
    return _repeat(torch.cat(chosen, 1), known.sum(1, keepdim=True))


def nearest(queries: Tensor, xyz: Tensor, k: int, is_valid: Tensor | None = None) -> Tensor:
    """Find the k nearest points of each query, exactly, compared as float32.

    Args:
        queries: (B, Q, C).
        xyz: (B, P, C); points with a NaN don't exist.
        k: number of neighbours.
        is_valid: (B, P) bool, False for further points that don't exist.

    Returns:
        (B, Q, k) int64, nearest first, ties to the lowest index. A cloud of n < k points gives all of them and
        then the same again. Those of a query with a NaN, or in a cloud without points, mean nothing.
    """
    known = _known(xyz, is_valid).unsqueeze(1)
    planes = xyz.float().nan_to_num(0.0).unsqueeze(1).unbind(-1)
    found = []
    for part in queries.float().nan_to_num(0.0).split(max(1, ELEMENTS // max(1, known.numel())), dim=1):
        distance = _squared(planes, part.unsqueeze(2).unbind(-1)).masked_fill(~known, torch.inf)
        found.append(_smallest(distance, min(k, xyz.shape[1])))
    return _repeat(torch.cat(found, 1), known.sum(2, keepdim=True), k)


def chamfer(a: Tensor, b: Tensor, is_valid_a: Tensor | None = None, is_valid_b: Tensor | None = None) -> Tensor:
    """Measure how far two sets of points are apart: squared L2 Chamfer distance, as in Point-MAE (Pang et al. 2022).

    The mean over a of the squared distance to the nearest point of b, plus the same from b to a; all C numbers
    of a point count. Differentiable in a and b.

    Args:
        a: (B, n, C).
        b: (B, m, C).
        is_valid_a: (B, n) bool, False for points that don't exist. A NaN in one that does is not passed over:
            a model that predicts NaN must not look perfect.
        is_valid_b: (B, m) bool, likewise.

    Returns:
        (B,) distances; 0 where one of the sets is empty.
    """
    known_a = a.new_ones(a.shape[:2], dtype=torch.bool) if is_valid_a is None else is_valid_a
    known_b = b.new_ones(b.shape[:2], dtype=torch.bool) if is_valid_b is None else is_valid_b
    # 0 in place of what doesn't exist: a NaN would reach the gradient even where its weight is 0.
    a, b = a.masked_fill(~known_a.unsqueeze(-1), 0.0), b.masked_fill(~known_b.unsqueeze(-1), 0.0)
    both_ways = _one_way(a, b, known_a, known_b) + _one_way(b, a, known_b, known_a)
    return both_ways.where(known_a.any(1) & known_b.any(1), 0.0)


def morton(xyz: Tensor, is_valid: Tensor | None = None, bits: int = 10) -> Tensor:
    """Number the cells of a cube around each cloud along a z-order curve (Morton 1966).

    Args:
        xyz: (B, P, 3); the cube starts at the smallest coordinates and is as wide as the longest axis.
        is_valid: (B, P) bool, False for points that don't count.
        bits: cells per axis are 2 ** bits, at most 20.

    Returns:
        (B, P) int64 codes, bit i of x, y and z at place 3 i, 3 i + 1 and 3 i + 2; the largest int64 for points
        that don't count.
    """
    known = _known(xyz, is_valid).unsqueeze(-1)
    low = xyz.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    high = xyz.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
    extent = (high - low).amax(-1, keepdim=True)
    share = (xyz - low) / torch.where(extent > 0, extent, 1.0)
    cell = (share.masked_fill(~known, 0.0) * 2**bits).long().clamp(0, 2**bits - 1)
    place = torch.arange(bits, device=xyz.device)
    bit = (cell.unsqueeze(-1) >> place) & 1  # (B, P, 3, bits)
    axis = torch.arange(3, device=xyz.device).unsqueeze(-1)
    code = (bit << (3 * place + axis)).sum((-2, -1))
    return code.masked_fill(~known.squeeze(-1), torch.iinfo(torch.int64).max)


def _known(x: Tensor, is_valid: Tensor | None) -> Tensor:
    known = ~x.isnan().any(-1)
    return known if is_valid is None else known & is_valid


def _squared(a: tuple[Tensor, ...], b: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Add up squared differences of coordinates that are given one by one, in their order."""
    total = (a[0] - b[0]).square()
    for x, y in zip(a[1:], b[1:], strict=True):
        total = total + (x - y).square()
    return total


def _smallest(distance: Tensor, k: int) -> Tensor:
    """Return the indices (..., k) of the k smallest of (..., P) distances >= 0, ties to the lowest index."""
    if k == 1:
        return distance.argmin(-1, keepdim=True)
    # The bits of floats >= 0 are ordered as the floats are: one number with distance and index has no ties.
    place = torch.arange(distance.shape[-1], device=distance.device)
    key = (distance.view(torch.int32).long() << 32) | place
    return key.topk(k, largest=False, sorted=True).values & 0xFFFFFFFF


def _repeat(index: Tensor, total: Tensor, count: int | None = None) -> Tensor:
    """Make rows of `index` (..., S) periodic after the first `total` (..., 1), `count` long."""
    place = torch.arange(count or index.shape[-1], device=index.device) % total.clamp(min=1)
    return index.gather(-1, place.expand(*index.shape[:-1], -1))


def _one_way(a: Tensor, b: Tensor, known_a: Tensor, known_b: Tensor) -> Tensor:
    """Mean over the points of a of the squared distance to the nearest of b -> (B,)."""
    with torch.no_grad():
        index = nearest(a, b, 1, known_b).squeeze(-1)
    distance = (a - take(b, index)).square().sum(-1)
    return (distance * known_a).sum(1) / known_a.sum(1).clamp(min=1)
