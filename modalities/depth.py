"""Depth maps in metres, with holes.

Letters: B batch, H height, W width, n known positions of one map.
"""

from __future__ import annotations

from typing import Any, Literal

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


class Depth(Modality):
    """Raw: float32 (H, W) metres, NaN where unknown. Normalised: (B, 1, H, W), NaN where unknown."""

    class Spec(Strict):
        """Settings of `type: depth`.

        Attributes:
            size: height and width the model reads; one number for square maps.
            unit: metres per stored unit of an integer file (16-bit PNG in millimetres: 0.001).
            missing: stored number that means unknown (0 in most data sets); None: no holes.
            normalise: `truncated`: per map, by mean and deviation of the middle 80 % (MultiMAE); `fixed`: by
                `mean` and `std`.
            mean: metres, for `fixed`.
            std: metres, for `fixed`.
        """

        size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
        unit: float = 0.001
        missing: float | None = None
        normalise: Literal["truncated", "fixed"] = "truncated"
        mean: float = 0.0
        std: float = 1.0

    extensions = (".png", ".tif", ".tiff", ".npy")
    is_map = True
    centre = "median"
    measure = "L1 error"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.size = (spec.size, spec.size) if isinstance(spec.size, int) else spec.size

    @property
    def signal(self) -> Signal:
        """Values (B, 1, H, W)."""
        return Signal("values", 1, self.size, has_gaps=self.spec.missing is not None)

    def blank(self, count: int) -> Tensor:
        """Return maps of 0 metres, float32 (B, H, W)."""
        return torch.zeros(count, *self.size)

    def load(self, file: File) -> Any:
        """Read an integer or float image, or a .npy array."""
        if ending(file) == ".npy":
            return np.load(file, allow_pickle=False)
        with PILImage.open(file) as image:
            return np.array(image)

    def to_raw(self, sample: Any) -> Tensor:
        """Read (H, W) stored numbers: floats are metres, integers are in `unit`; unknown ones become NaN.

        Numbers that are unknown are NaN, infinite or `missing`, and allowed only with `missing` set.
        """
        stored = numbers(sample, "a depth map")
        if stored.squeeze().ndim != 2:
            raise M3Error(f"a depth map must have shape (height, width), got {stored.dtype} of shape {stored.shape}.")
        metres = stored.astype(np.float32)
        if stored.dtype.kind in "iu":
            metres *= np.float32(self.spec.unit)
        if self.spec.missing is not None:
            metres[stored == self.spec.missing] = np.nan
        elif not np.isfinite(metres).all():
            raise M3Error(
                "a depth map has NaN or infinite values; set `missing` in the recipe so that holes are known."
            )
        x = torch.from_numpy(metres).squeeze()
        return x.masked_fill(x.isinf(), torch.nan).contiguous()

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Crop and resize (nearest: depths across an edge must not be mixed) to `size`."""
        return fit_map(raw.unsqueeze(0), self.size, crop, "nearest-exact").squeeze(0)

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn (B, H, W) metres into (B, 1, H, W) float32 around 0."""
        if self.spec.normalise == "fixed":
            return ((raw - self.spec.mean) / self.spec.std).unsqueeze(1)
        return truncated_standardise(raw).unsqueeze(1)

    def metres(self, signal: Tensor) -> Tensor:
        """Undo `normalise: fixed`: (B, 1, H, W) -> (B, H, W) metres; what is normalised map by map has no scale."""
        if self.spec.normalise != "fixed":
            raise M3Error(
                "depth that is normalised map by map has no scale; set `normalise: fixed` with `mean` and `std`."
            )
        return signal.squeeze(1) * self.spec.std + self.spec.mean

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (1, H, W): near is bright, -2.5 to 2.5 deviations; unknown positions are grey."""
        from matplotlib import colormaps

        x = signal[0].float().cpu().numpy()
        colours = colormaps["magma_r"](np.clip((np.nan_to_num(x) + 2.5) / 5, 0, 1))[..., :3]
        colours[np.isnan(x)] = 0.5
        return hide((colours * 255).round().astype(np.uint8), is_known)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Sum absolute errors of known positions and their number -> (2,)."""
        is_known = ~truth.isnan().any(1) & weight.bool()
        error = (predicted.float() - truth.float()).abs().mean(1)
        return torch.stack([error[is_known].sum(), is_known.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Mean absolute error in units of `normalise`."""
        return float(sums[0] / sums[1])


def truncated_standardise(depth: Tensor, cut: float = 0.1, eps: float = 1e-6) -> Tensor:
    """Standardise each map by its middle values: (x - mean) / sqrt(variance + eps).

    Mean and unbiased variance are those of the sorted values [cut * n, (1 - cut) * n), so far sky and
    sensor spikes don't set the scale (MultiMAE, Bachmann et al. 2022, section 3.4).

    Args:
        depth: (B, H, W), NaN where unknown; n counts the known positions of a map.
        cut: share dropped at both ends.
        eps: keeps flat maps finite.
    """
    flat = depth.flatten(1).float()
    ordered = flat.sort(dim=1).values  # NaN last
    n = (~flat.isnan()).sum(1, keepdim=True)
    place = torch.arange(flat.shape[1], device=flat.device)
    is_middle = (place >= (n * cut).floor()) & (place < (n * (1 - cut)).floor())
    # A map with so few known positions that less than two are left uses them all.
    is_middle = torch.where(is_middle.sum(1, keepdim=True) < 2, place < n, is_middle)
    count = is_middle.sum(1, keepdim=True)
    middle = ordered.nan_to_num(0.0) * is_middle
    mean = middle.sum(1, keepdim=True) / count.clamp(min=1)
    variance = ((middle - mean).square() * is_middle).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return ((flat - mean) / (variance + eps).sqrt()).view(depth.shape)
