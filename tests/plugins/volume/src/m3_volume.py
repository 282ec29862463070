"""3-D medical volumes for M3: NIfTI files, (B, D, H, W), cut into cubes."""

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from m3.drawing import hide
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict, Tokenizer
from m3.positions import grid
from m3.samples import numbers
from m3.types import Tokens


class Volume(Modality):
    """Raw: float32 (D, H, W) of one contrast. Normalised: (B, 1, D, H, W), mean 0 and deviation 1 per volume."""

    class Spec(Strict):
        """Settings of `type: volume`: the size in voxels that the model reads."""

        size: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 64, 64)

    extensions = (".nii", ".nii.gz")
    measure = "L1 error"

    @property
    def signal(self) -> Signal:
        return Signal("values", 1, self.spec.size)

    def blank(self, count: int) -> Tensor:
        return torch.zeros(count, *self.spec.size)

    def example_samples(self) -> list[np.ndarray]:
        """Balls of different sizes."""
        at = np.stack(np.mgrid[-1:1:20j, -1:1:24j, -1:1:16j])
        return [np.exp(-(r**2) * (at**2).sum(0)) for r in (1, 2, 3, 4)]

    def load(self, file: File) -> np.ndarray:
        """Read a NIfTI file, from disk or out of an archive."""
        data = file.read_bytes() if isinstance(file, Path) else file.read()
        data = gzip.decompress(data) if file.name.lower().endswith(".gz") else data
        kind = nibabel.Nifti2Image if data[4:7] == b"n+2" else nibabel.Nifti1Image
        return kind.from_bytes(data).get_fdata(dtype=np.float32)

    def cut(self, sample: Any, moment: float) -> Any:
        """Take one volume of a 4-D recording."""
        return sample[..., round(moment * (sample.shape[3] - 1))] if np.ndim(sample) == 4 else sample

    def to_raw(self, sample: Any) -> Tensor:
        x = torch.tensor(numbers(sample, "a volume"), dtype=torch.float32)
        if x.ndim != 3 or not x.isfinite().all():
            raise M3Error(f"a volume needs 3 axes and finite numbers, got {tuple(x.shape)}; resample or fill its NaN.")
        return x

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Resample to `size`; crops are for flat maps and don't apply."""
        return F.interpolate(raw[None, None], self.spec.size, mode="trilinear", align_corners=False)[0, 0]

    def normalise(self, raw: Tensor) -> Tensor:
        variance, mean = torch.var_mean(raw, dim=(1, 2, 3), keepdim=True)
        return ((raw - mean) / (variance + 1e-6).sqrt()).unsqueeze(1)

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw four slices side by side; -2 to 2 deviations from black to white."""
        slices = torch.linspace(0, signal.shape[1] - 1, 6).long()[1:-1]
        grey = torch.cat(list((signal[0, slices].float().cpu() + 2).clamp(0, 4) * 63), dim=1).byte().numpy()
        return hide(np.stack([grey] * 3, -1), None if is_known is None else torch.cat(list(is_known[slices]), dim=1))

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([((predicted - truth).abs().squeeze(1) * weight).sum(), weight.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1])


class Cubes(Tokenizer):
    """Cubes of a volume through one linear projection; their positions have three axes."""

    class Spec(Strict):
        """Settings of `type: cubes`: the edge of a cube in voxels."""

        size: PositiveInt = 8

    axes = 3

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        if signal.kind != "values" or len(signal.size) != 3:
            raise M3Error(f"tokenizer `cubes` reads volumes of values, got {signal.kind} over {len(signal.size)} axes.")
        self.reference = self._counts(signal.size)
        self.value_width = self.output_width = signal.channels * spec.size**3
        self.projection = nn.Linear(self.value_width, width)

    def _counts(self, size: tuple[int, ...]) -> tuple[int, ...]:
        if any(n % self.spec.size for n in size):
            raise M3Error(f"a volume of {size} can't be cut into cubes of {self.spec.size}; resize it to multiples.")
        return tuple(n // self.spec.size for n in size)

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        edge, (d, h, w) = self.spec.size, self._counts(tuple(signal.shape[2:]))
        x = signal.reshape(len(signal), -1, d, edge, h, edge, w, edge).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return Tokens(x.reshape(len(x), d * h * w, -1), grid((d, h, w), self.reference, signal.device))

    def embed(self, values: Tensor) -> Tensor:
        return self.projection(values)

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        edge, counts = self.spec.size, self._counts(size)
        x = values.reshape(len(values), *counts, -1, edge, edge, edge).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return x.reshape(len(values), -1, *size)

    def decode(self, output: Tensor) -> Tensor:
        return output
