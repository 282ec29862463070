"""Semantic maps: a class for every position.

Letters: B batch, H height, W width, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from pydantic import PositiveInt
from torch import Tensor

from m3.data.geometry import fit_map
from m3.drawing import hide
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict, ending
from m3.samples import numbers


class SemanticMap(Modality):
    """Raw: (H, W) class ids in uint8 (or wider). Normalised: int64 (B, H, W) in [0, K), -1 where unknown."""

    class Spec(Strict):
        """Settings of `type: semantic_map`.

        Attributes:
            size: height and width the model reads; MultiMAE takes a quarter of the image's.
            classes: K.
            ignore: stored id of positions without a class (255 in most data sets); None: there are none.
        """

        size: PositiveInt | tuple[PositiveInt, PositiveInt] = 56
        classes: PositiveInt
        ignore: int | None = None

    extensions = (".png", ".tif", ".tiff", ".npy")
    is_map = True
    measure = "mIoU"
    higher_is_better = True

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.size = (spec.size, spec.size) if isinstance(spec.size, int) else spec.size
        self._stored = torch.uint8 if spec.classes <= 255 else torch.int16 if spec.classes <= 32767 else torch.int32
        self._unknown = 255 if spec.classes <= 255 else -1

    @property
    def signal(self) -> Signal:
        """Class ids (B, H, W)."""
        return Signal("classes", 1, self.size, self.spec.classes, has_gaps=self.spec.ignore is not None)

    def blank(self, count: int) -> Tensor:
        """Return maps of class 0, (B, H, W)."""
        return torch.zeros(count, *self.size, dtype=self._stored)

    def load(self, file: File) -> np.ndarray:
        """Read an image of class ids (palette images: the index) or a .npy array -> integer (H, W)."""
        if ending(file) == ".npy":
            return np.load(file, allow_pickle=False)
        with PILImage.open(file) as image:
            return np.array(image)

    def to_raw(self, sample: Any) -> Tensor:
        """Check integer (H, W) class ids, so that a wrong label is named here and not by a GPU's assertion."""
        given = numbers(sample, "a semantic map")
        x = torch.as_tensor(given.astype(np.int64) if given.dtype.kind in "iu" else given).squeeze()
        if x.ndim != 2 or given.dtype.kind not in "iu":
            raise M3Error(
                f"a semantic map must hold integer class ids of shape (height, width), got {x.dtype} of shape "
                f"{tuple(x.shape)}; colour-coded maps must be turned into ids first."
            )
        is_bad = (x < 0) | (x >= self.spec.classes)
        if self.spec.ignore is not None:
            is_unknown = x == self.spec.ignore
            is_bad &= ~is_unknown
            x = x.masked_fill(is_unknown, self._unknown)
        if is_bad.any():
            raise M3Error(
                f"a semantic map holds class {int(x[is_bad][0])}, but `classes` is {self.spec.classes}; raise "
                f"`classes` or name the id of unlabelled positions with `ignore`."
            )
        return x.to(self._stored).contiguous()

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Crop and resize (nearest) to `size`."""
        return fit_map(raw.unsqueeze(0), self.size, crop, "nearest-exact").squeeze(0)

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn stored ids (B, H, W) into int64 class ids, -1 where unknown."""
        classes = raw.long()
        return classes if self.spec.ignore is None else classes.masked_fill(classes == self._unknown, -1)

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (H, W) ids in distinct colours; unknown positions are black."""
        from matplotlib import colormaps

        ids = signal.cpu().numpy()
        colours = (colormaps["tab20"](range(20))[:, :3] * 255).round().astype(np.uint8)[ids % 20]
        colours[ids < 0] = 0
        return hide(colours, is_known)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Count intersections, predicted and true positions of each class -> (3, K)."""
        counts = weight.bool() & (truth >= 0)
        predicted, truth = predicted[counts], truth[counts]

        def histogram(ids: Tensor) -> Tensor:
            return torch.bincount(ids, minlength=self.spec.classes).double()

        return torch.stack([histogram(truth[predicted == truth]), histogram(predicted), histogram(truth)])

    def finish_score(self, sums: Tensor) -> float:
        """Mean intersection over union of the classes that occur in truth or prediction, in [0, 1]."""
        union = sums[1] + sums[2] - sums[0]
        return float((sums[0] / union.clamp(min=1))[union > 0].mean())
