"""Surface normals in the camera's frame: x right, y up, z towards the viewer.

Letters: B batch, H height, W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from pydantic import PositiveInt
from torch import Tensor

from m3.data.geometry import fit_map
from m3.drawing import hide
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict, ending


class Normals(Modality):
    """Raw: float32 (3, H, W) unit vectors, NaN where unknown. Normalised: the same, (B, 3, H, W)."""

    class Spec(Strict):
        """Settings of `type: normals`.

        Attributes:
            size: height and width the model reads; one number for square maps.
            has_holes: some positions may be unknown (zero vectors or NaN).
        """

        size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
        has_holes: bool = False

    extensions = (".png", ".npy")
    measure = "angle degrees"
    is_map = True

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.size = (spec.size, spec.size) if isinstance(spec.size, int) else spec.size

    @property
    def signal(self) -> Signal:
        """Values (B, 3, H, W)."""
        return Signal("values", 3, self.size, has_gaps=self.spec.has_holes)

    def blank(self, count: int) -> Tensor:
        """Return maps that face the viewer, float32 (B, 3, H, W)."""
        return torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(count, 3, *self.size).contiguous()

    def load(self, file: File) -> np.ndarray:
        """Read a .npy array (H, W, 3), or an 8-bit picture that stores (n + 1) / 2."""
        if ending(file) == ".npy":
            return np.load(file, allow_pickle=False)
        with PILImage.open(file) as image:
            return np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1

    def to_raw(self, sample: Any) -> Tensor:
        """Check (H, W, 3) vectors and bring them to length 1 -> float32 (3, H, W)."""
        given = np.asarray(sample)
        if given.ndim != 3 or given.shape[2] != 3 or given.dtype.kind != "f":
            raise M3Error(f"normals must be floats of shape (height, width, 3), got {given.dtype} of {given.shape}.")
        x = torch.from_numpy(given.astype(np.float64)).permute(2, 0, 1)
        length = x.norm(dim=0, keepdim=True)
        is_hole = ~((length > 0.1) & length.isfinite())
        if is_hole.any() and not self.spec.has_holes:
            raise M3Error(
                "a normal map has zero, NaN or infinite vectors; set `has_holes: true` so that holes are known."
            )
        return (x / length).masked_fill(is_hole, torch.nan).float().contiguous()

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Crop and resize (nearest) to `size`; a mirrored map's vectors are mirrored too."""
        x = fit_map(raw, self.size, crop, "nearest-exact")
        return x * x.new_tensor([-1.0, 1.0, 1.0]).view(3, 1, 1) if crop.is_flipped else x

    def normalise(self, raw: Tensor) -> Tensor:
        """Return (B, 3, H, W) as it is."""
        return raw

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (3, H, W) in the usual colours, (n + 1) / 2; unknown positions are grey."""
        unit = F.normalize(signal.float().nan_to_num(0.0), dim=0)
        colours = ((unit + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        return hide(colours, is_known)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Sum angles of known positions and their number -> (2,)."""
        is_known = ~truth.isnan().any(1) & weight.bool()
        cosine = F.cosine_similarity(predicted.float(), truth.float().nan_to_num(0.0), dim=1)
        angle = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
        return torch.stack([angle[is_known].sum(), is_known.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Mean angle between predicted and true vectors, degrees."""
        return float(sums[0] / sums[1])
