"""Regions of a picture as a detector found them: a feature vector and a box each (UNITER, Chen et al. 2020).

Letters: B batch, R regions, F values of a feature vector.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw
from pydantic import PositiveInt
from torch import Tensor

from m3.drawing import HIDDEN
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict

PIXELS = 64
"""Height and width of a picture."""

SMALLEST = 0.02
"""Share of the picture's side below which what a crop leaves of a box is dropped."""


class Boxed(Modality):
    """Values of regions with their boxes: what `Regions` and `RegionLabels` share.

    Raw and normalised: float32 (R, F + 4), values, then left, top, right, bottom as shares of the picture; NaN where
    there is no region.
    """

    entry: ClassVar[str]
    """Array of a sample that holds the values."""

    width: int
    """F."""

    extensions = (".npz", ".npy")
    padding = float("nan")

    @property
    def signal(self) -> Signal:
        """Values (B, R, F + 4)."""
        return Signal("values", self.width + 4, (self.spec.count,), has_gaps=True, channel_axis=-1, is_boxed=True)

    def blank(self, count: int) -> Tensor:
        """Return regions of no extent, float32 (B, R, F + 4)."""
        return torch.zeros(count, self.spec.count, self.width + 4)

    def load(self, file: File) -> Any:
        """Read a .npz with the arrays `features` (R, F), `boxes` (R, 4) and, for labels, `soft_labels`; or a .npy."""
        found = np.load(file, allow_pickle=False)
        return found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}

    def to_raw(self, sample: Any) -> Tensor:
        """Read a mapping of arrays, or one array (R, F + 4), -> float32 (R, F + 4)."""
        if isinstance(sample, Mapping):
            lacking = [name for name in (self.entry, "boxes") if name not in sample]
            if lacking:
                raise M3Error(f"regions need an array `{lacking[0]}`, got {', '.join(sample)}; add it.")
            own, boxes = (np.asarray(sample[name]) for name in (self.entry, "boxes"))
            if own.ndim != 2 or boxes.shape != (len(own), 4):
                raise M3Error(
                    f"regions need `{self.entry}` (regions, values) and `boxes` (regions, 4), got {own.shape} and "
                    f"{boxes.shape}."
                )
            sample = np.concatenate([own, boxes], axis=1)
        table = np.asarray(sample)
        if table.dtype.kind not in "fiu" or table.ndim != 2 or table.shape[1] != self.width + 4 or not len(table):
            raise M3Error(
                f"regions must be numbers of shape (regions, {self.width} + 4), at least one region, got {table.dtype} "
                f"of shape {table.shape}; a sample without any lacks the modality."
            )
        table = table.astype(np.float32)
        x0, y0, x1, y1 = table[:, -4:].T
        if not (np.isfinite(table).all() and bool(((x0 >= 0) & (x0 <= x1) & (x1 <= 1)).all())
                and bool(((y0 >= 0) & (y0 <= y1) & (y1 <= 1)).all())):  # fmt: skip
            raise M3Error(
                "regions must be finite, with boxes in [0, 1], left <= right and top <= bottom; correct them."
            )
        return torch.from_numpy(table)

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Move the boxes along with the crop, cut them at its edge, drop those outside, keep the first `count`."""
        x = raw.clone()
        if crop.box is not None:
            top, left, height, width = crop.box
            x[:, [-4, -2]] = ((x[:, [-4, -2]] - left) / width).clamp(0, 1)
            x[:, [-3, -1]] = ((x[:, [-3, -1]] - top) / height).clamp(0, 1)
            x = x[(x[:, -2] - x[:, -4] > SMALLEST) & (x[:, -1] - x[:, -3] > SMALLEST)]
        x = x[: self.spec.count]
        return x if len(x) else raw.new_full((1, raw.shape[1]), torch.nan)

    def normalise(self, raw: Tensor) -> Tensor:
        """Return a raw batch as it is."""
        return raw

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (R, F + 4) as frames, in the colours of `colour`; hidden ones are left out."""
        picture = PILImage.new("RGB", (PIXELS, PIXELS), (HIDDEN,) * 3 if is_known is not None else (255, 255, 255))
        signal = signal.float().cpu()
        for number, (colour, box) in enumerate(zip(self.colours(signal[:, :-4]), signal[:, -4:], strict=True)):
            if not box.isnan().any() and (is_known is None or bool(is_known[number])):
                x0, y0, x1, y1 = (box.clamp(0, 1) * (PIXELS - 1)).tolist()
                corners = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
                ImageDraw.Draw(picture).rectangle(corners, outline=tuple(colour.tolist()), width=2)
        return np.asarray(picture)

    @abstractmethod
    def colours(self, values: Tensor) -> Tensor:
        """Return uint8 (R, 3), a colour for the values (R, F) of each region."""


class Regions(Boxed):
    """Feature vectors, see `Boxed`; they stay as they are: the tokenizer's LayerNorm scales their projection."""

    class Spec(Strict):
        """Settings of `type: regions`.

        Attributes:
            features: F (2048 of a Faster R-CNN).
            count: R that the model is built for; further regions are left out, so sort them by confidence.
        """

        features: PositiveInt = 2048
        count: PositiveInt = 100

    measure = "MSE"
    entry = "features"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.width = spec.features

    def colours(self, values: Tensor) -> Tensor:
        """Return uint8 (R, 3) colours of features (R, F): a fixed random projection, so that pictures compare."""
        axes = torch.randn(values.shape[1], 3, generator=torch.Generator().manual_seed(0)) / values.shape[1] ** 0.5
        return ((values.nan_to_num(0.0) @ axes).sigmoid() * 200).to(torch.uint8)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Sum squared errors of features, in their own unit, and regions -> (2,)."""
        counts = weight.bool() & ~truth.isnan().any(-1)
        error = (predicted.float() - truth).nan_to_num(0.0)[..., :-4].square().mean(-1)
        return torch.stack([(error * counts).sum(), counts.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Mean squared error of features."""
        return float(sums[0] / sums[1])
