"""Point clouds: unordered lists of points in space, with other values per point where there are such.

Letters: B batch, P points, A other values per point (colour, normal, intensity).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from m3.data.clouds import read_cloud
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict
from m3.points import chamfer

PICTURE = 224
"""Height and width of a drawn cloud in pixels."""

AZIMUTH, ELEVATION = 30.0, 20.0
"""Degrees: where a cloud is looked at from, beside the -y axis and above the plane z = 0."""


class Points(Modality):
    """Raw: float32 (P, 3 + A), NaN rows where there are fewer points. Normalised: the same, around 0."""

    class Spec(Strict):
        """Settings of `type: points`.

        Attributes:
            count: points that the model reads of a cloud.
            attributes: A, values per point besides x, y and z, e.g. 3 for colours in [0, 1].
            normalise: `unit_sphere`: per cloud, the centroid moves to 0 and the farthest point to distance 1
                (ModelNet); `unit_sphere_first`: the same as soon as a cloud is loaded, so that what `data.augment`
                makes of its size and place is kept (Point-MAE); `fixed`: by `mean` and `scale`, so that size and
                place are those of the data.
            mean: x, y, z in the cloud's unit, for `fixed`.
            scale: in the cloud's unit, for `fixed`; one number, so that shapes keep their proportions.
            attribute_mean: per attribute; 0 if left out.
            attribute_std: per attribute; 1 if left out.
        """

        count: PositiveInt = 1024
        attributes: NonNegativeInt = 0
        normalise: Literal["unit_sphere", "unit_sphere_first", "fixed"] = "unit_sphere"
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
        scale: PositiveFloat = 1.0
        attribute_mean: tuple[float, ...] | None = None
        attribute_std: tuple[PositiveFloat, ...] | None = None

    extensions = (".ply", ".pcd", ".npy", ".npz", ".xyz", ".txt")
    measure = "chamfer"
    padding = float("nan")

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.attribute_mean = spec.attribute_mean or (0.0,) * spec.attributes
        self.attribute_std = spec.attribute_std or (1.0,) * spec.attributes
        lengths = len(self.attribute_mean), len(self.attribute_std)
        if lengths != (spec.attributes, spec.attributes):
            raise M3Error(
                f"points: attribute_mean and attribute_std must have {spec.attributes} values, one per attribute, "
                f"got {lengths[0]} and {lengths[1]}."
            )

    @property
    def signal(self) -> Signal:
        """Values (B, P, 3 + A); rows without a point are NaN."""
        return Signal("values", 3 + self.spec.attributes, (self.spec.count,), has_gaps=True, channel_axis=-1)

    @property
    def follows(self) -> frozenset[str]:
        """A flip mirrors x, which points to the picture's right; attributes may be directions, which it would miss."""
        return frozenset({"crop"} if self.spec.attributes else {"crop", "flip"})

    def blank(self, count: int) -> Tensor:
        """Return clouds of points at 0, float32 (B, P, 3 + A)."""
        return torch.zeros(count, self.spec.count, 3 + self.spec.attributes)

    def load(self, file: File) -> np.ndarray:
        """Read x, y, z and the first A other columns of a file (colours first) -> float64 (P, up to 3 + A)."""
        return read_cloud(file)[..., : 3 + self.spec.attributes]

    def to_raw(self, sample: Any) -> Tensor:
        """Check numbers (P, 3 + A) and leave out rows whose coordinates are all NaN -> float32 (points, 3 + A)."""
        try:
            given = np.asarray(sample)
        except (TypeError, ValueError) as error:
            raise M3Error(f"a point cloud must be one array of numbers ({error}); convert it first.") from error
        width = 3 + self.spec.attributes
        if given.ndim != 2 or given.shape[1] != width or given.dtype.kind not in "fiu":
            raise M3Error(
                f"a point cloud must hold numbers of shape (points, {width}), got {given.dtype} of shape "
                f"{given.shape}; change its columns or set `attributes`."
            )
        given = torch.from_numpy(given.astype(np.float64))
        given = given[~given[:, :3].isnan().all(1)]
        if not len(given):
            raise M3Error("a point cloud holds no points; leave the sample out.")
        raw = given.float()
        is_bad = ~raw.isfinite().all(1)
        if is_bad.any():
            raise M3Error(
                f"a point cloud holds NaN or infinite values at {int(is_bad.sum())} of {len(raw)} points; remove these "
                f"points, or set all their coordinates to NaN."
            )
        self._check_precision(given, raw)
        return raw.contiguous()

    def _check_precision(self, given: Tensor, raw: Tensor) -> None:
        """Refuse coordinates whose shape is lost in float32, as those of a map projection are."""
        extent = (given[:, :3].amax(0) - given[:, :3].amin(0)).max()
        lost = (given[:, :3] - raw[:, :3]).abs().max()
        if extent > 0 and lost > 1e-3 * extent:
            raise M3Error(
                "the coordinates of a point cloud are so large against its extent that float32 can't tell its points "
                "apart; subtract an offset from them."
            )

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Choose `count` points by a fixed permutation, in their old order, or fill up with NaN rows.

        Crops don't apply; a flip mirrors x about the centre that `normalise` subtracts. Attributes stay as
        they are, see `follows`.
        """
        total, count = len(raw), self.spec.count
        if total > count:
            shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(total))
            raw = raw[shuffled[torch.arange(count) * total // count].sort().values]
        if self.spec.normalise == "unit_sphere_first":
            raw = torch.cat([in_unit_sphere(raw[None, :, :3])[0], raw[:, 3:]], 1)
        fitted = torch.full((count, raw.shape[1]), torch.nan)
        fitted[: len(raw)] = raw
        if crop.is_flipped:
            fitted[:, 0] = 2 * self._mean()[0] - fitted[:, 0]
        return fitted

    def normalise(self, raw: Tensor) -> Tensor:
        """Move and scale clouds (B, P, 3 + A); NaN rows stay NaN."""
        xyz, attributes = raw[..., :3], raw[..., 3:]
        if self.spec.normalise == "fixed":
            xyz = (xyz - raw.new_tensor(self.spec.mean)) / self.spec.scale
        elif self.spec.normalise == "unit_sphere":
            xyz = in_unit_sphere(xyz)
        attributes = (attributes - raw.new_tensor(self.attribute_mean)) / raw.new_tensor(self.attribute_std)
        return torch.cat([xyz, attributes], -1)

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (P, 3 + A) from the side and slightly above, z upwards, near points over far ones.

        Colours are the attributes if there are three, else the height; hidden points are small and light grey.
        """
        points = signal.float().cpu().numpy()
        is_known_point = np.ones(len(points), bool) if is_known is None else is_known.bool().cpu().numpy()
        is_point = ~np.isnan(points).any(1)
        points, is_known_point = points[is_point], is_known_point[is_point]
        reach = 1.0
        if self.spec.normalise != "unit_sphere" and len(points):
            reach = max(float(np.linalg.norm(points[:, :3], axis=1).max()), 1e-6)
        return splat(points[:, :3] / reach, self._colours(points, reach), is_known_point)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Sum the Chamfer distances of clouds (B, n, C) and (B, m, C), and count the clouds -> (2,).

        Args:
            predicted: points with normalised coordinates; attributes don't count.
            truth: the same; NaN rows are no points.
            weight: (B, m), True for points of `truth` that count, and for those of `predicted` at the same
                places where there are as many (groups of a tokenizer); else all of `predicted` count.
        """
        predicted, truth = predicted[..., :3].float(), truth[..., :3].float()
        is_asked = weight.bool() & ~truth.isnan().any(-1)
        is_own = is_asked if predicted.shape[1] == truth.shape[1] else None
        distance, counts = chamfer(predicted, truth, is_own, is_asked), is_asked.any(1)
        return torch.stack([distance[counts].sum(), counts.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Mean squared Chamfer distance per cloud, in squared units of `normalise`."""
        return float(sums[0] / sums[1])

    def _mean(self) -> tuple[float, float, float]:
        return self.spec.mean if self.spec.normalise == "fixed" else (0.0, 0.0, 0.0)

    def _colours(self, points: np.ndarray, reach: float) -> np.ndarray:
        """Return (P, 3) colours in [0, 1]."""
        if self.spec.attributes == 3:
            return (points[:, 3:] * self.attribute_std + self.attribute_mean).clip(0, 1)
        from matplotlib import colormaps

        return colormaps["viridis"]((points[:, 2] / reach + 1) / 2)[:, :3]


def in_unit_sphere(xyz: Tensor) -> Tensor:
    """Move the centroids of clouds (B, P, 3) to 0 and their farthest points to distance 1; NaN rows are no points."""
    xyz = xyz - xyz.nanmean(1, keepdim=True)
    radius = xyz.square().sum(-1).sqrt().nan_to_num(0.0).amax(1).view(-1, 1, 1)
    return xyz / torch.where(radius > 0, radius, 1.0)


def splat(xyz: np.ndarray, colours: np.ndarray, is_known: np.ndarray) -> np.ndarray:
    """Draw points within the unit sphere as discs on white, orthographically -> uint8 (PICTURE, PICTURE, 3).

    Args:
        xyz: (P, 3).
        colours: (P, 3) in [0, 1].
        is_known: (P,) bool, False for points drawn as one light grey pixel.
    """
    a, e = np.radians(AZIMUTH), np.radians(ELEVATION)
    right = np.array([np.cos(a), np.sin(a), 0])
    away = np.array([-np.sin(a) * np.cos(e), np.cos(a) * np.cos(e), -np.sin(e)])
    up = np.cross(right, away)
    order = np.argsort(-(xyz @ away), kind="stable")
    xyz, colours, is_known = xyz[order], colours[order], is_known[order]
    centre = PICTURE / 2
    row = np.round(centre - xyz @ up * centre / 1.05).astype(np.int64)
    column = np.round(centre + xyz @ right * centre / 1.05).astype(np.int64)
    y, x = np.mgrid[-2:3, -2:3].reshape(2, 1, -1)
    is_drawn = (x**2 + y**2 <= 4) & (is_known[:, None] | ((x == 0) & (y == 0)))
    rows, columns = row[:, None] + y, column[:, None] + x
    is_drawn &= (rows >= 0) & (rows < PICTURE) & (columns >= 0) & (columns < PICTURE)
    paint = np.where(is_known[:, None], colours * 255, 205.0).round().astype(np.uint8)
    picture = np.full((PICTURE, PICTURE, 3), 255, np.uint8)
    # Row by row of the mask, far to near; where places repeat NumPy keeps the last.
    point = np.broadcast_to(np.arange(len(xyz))[:, None], is_drawn.shape)[is_drawn]
    picture[rows[is_drawn], columns[is_drawn]] = paint[point]
    return picture
