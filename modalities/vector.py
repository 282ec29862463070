"""Vectors: one list of numbers for a whole sample, such as a global feature of a teacher or a station's readings.

Letters: B batch, D numbers of a vector.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from m3.drawing import hide
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict, ending
from m3.samples import numbers

HEIGHT, BAR, PER_ROW = 32, 2, 64
"""Of a picture: pixels of a row of bars, pixels across one bar, bars in a row."""

REACH = 3.0
"""Value at which a bar meets the upper edge."""


class Vector(Modality):
    """Raw: float32 (D,). Normalised: (B, D, 1), D channels at one place; with `unit` of length sqrt(D)."""

    class Spec(Strict):
        """Settings of `type: vector`.

        Attributes:
            size: D.
            normalise: `fixed`: (x - mean) / std; `unit`: by its own length, for features of which the direction
                counts (CLIP, DINO, ImageBind).
            mean: of the data, one for all or D numbers; the recipe `m3 data stats` prints both.
            std: likewise.
        """

        size: PositiveInt
        normalise: Literal["fixed", "unit"] = "fixed"
        mean: float | tuple[float, ...] = 0.0
        std: PositiveFloat | tuple[PositiveFloat, ...] = 1.0

        @model_validator(mode="after")
        def _one_or_all(self) -> Vector.Spec:
            for name, value in (("mean", self.mean), ("std", self.std)):
                if isinstance(value, tuple) and len(value) != self.size:
                    raise ValueError(f"`{name}` has {len(value)} numbers, but `size` is {self.size}; give one or all")
            return self

    extensions = (".npy", ".npz")
    measure = "MSE"

    @property
    def signal(self) -> Signal:
        """Values (B, D, 1)."""
        return Signal("values", self.spec.size, (1,))

    def blank(self, count: int) -> Tensor:
        """Return vectors of zeros, float32 (B, D)."""
        return torch.zeros(count, self.spec.size)

    def example_samples(self) -> list[np.ndarray]:
        """Return four vectors of mixed numbers."""
        return list(np.random.default_rng(0).normal(size=(4, self.spec.size)).astype(np.float32))

    def load(self, file: File) -> np.ndarray:
        """Read a .npy array, or the only array of an .npz."""
        if ending(file) == ".npy":
            return np.load(file, allow_pickle=False)
        with np.load(file, allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                raise M3Error(f"an .npz with a vector must hold one array, this one holds {len(arrays.files)}.")
            return arrays[arrays.files[0]]

    def to_raw(self, sample: Any) -> Tensor:
        """Check D finite numbers -> float32 (D,)."""
        array = numbers(sample, "a vector")
        if array.shape != (self.spec.size,):
            raise M3Error(f"a vector must have shape ({self.spec.size},), got {array.shape}; set `size` to its length.")
        x = torch.from_numpy(array.astype(np.float32))
        if not x.isfinite().all():
            raise M3Error("a vector has NaN or infinite numbers; repair it or leave the sample out.")
        return x

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Keep a vector as it is: a picture's crop means nothing to it."""
        return raw

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn (B, D) into (B, D, 1) around 0."""
        if self.spec.normalise == "unit":
            x = F.normalize(raw, dim=1) * self.spec.size**0.5
        else:
            x = (raw - raw.new_tensor(self.spec.mean)) / raw.new_tensor(self.spec.std)
        return x.unsqueeze(-1)

    def statistics(self, raw: Tensor) -> Tensor:
        """Return count, sum and sum of squares of each number -> (3, D)."""
        x = raw.double()
        return torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)])

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (D, 1) as bars from the middle up and down, `PER_ROW` in a row; -3 to 3 fills the height."""
        values = signal[:, 0].float().cpu()
        rows = F.pad(values, (0, -len(values) % PER_ROW)).view(-1, PER_ROW).repeat_interleave(BAR, 1)  # (R, W)
        level = torch.linspace(REACH, -REACH, HEIGHT).view(1, -1, 1)
        is_bar = (level * rows.unsqueeze(1) > 0) & (level.abs() <= rows.abs().unsqueeze(1))
        is_bar = is_bar.flatten(0, 1).numpy()
        picture = np.full((*is_bar.shape, 3), 255, np.uint8)
        picture[is_bar] = (40, 80, 160)
        return hide(picture, None if is_known is None else is_known.view(1, 1).expand(is_bar.shape))

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Sum squared errors and their number -> (2,)."""
        error = (predicted.float() - truth.float()).square().mean(1)[weight.bool()]
        return torch.stack([error.sum(), error.new_tensor(float(error.numel()))]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Mean squared error in units of `normalise`; with `unit`, 2 (1 - cosine) between vectors of full length."""
        return float(sums[0] / sums[1])
