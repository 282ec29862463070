"""What `m3 plugin new` writes: a small package with a modality, its tokenizer, and a test that runs the kit.

`$name` is the name in recipes, `$Class` the class that belongs to it.
"""

from __future__ import annotations

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "m3-$name"
version = "0.1.0"
description = "The modality `$name` for M3."
requires-python = ">=3.11"
dependencies = ["m3-multimodal"]

[project.entry-points."m3.modalities"]
$name = "m3_$name:$Class"

[project.entry-points."m3.tokenizers"]
${name}_pieces = "m3_$name:${Class}Pieces"

[tool.setuptools]
package-dir = {"" = "src"}
py-modules = ["m3_$name"]
"""

README = """\
# m3-$name

The modality `$name` for M3, with its tokenizer `${name}_pieces`.

    pip install -e .
    python -m pytest
    m3 plugin check $name

In a recipe: `$name: {type: $name, size: 64, tokenizer: {type: ${name}_pieces, size: 8}}`.
"""

TEST = """\
from m3.testing import check_modality
from m3_$name import $Class


def test_${name}_keeps_the_contracts() -> None:
    samples = $Class($Class.Spec()).example_samples()
    check_modality({"type": "m3_$name:$Class"}, samples, {"type": "m3_$name:${Class}Pieces"})
"""

CODE = '''\
"""The modality `$name`: recordings of numbers over time. Change what is said here into your own signal.

Letters: B batch, C channels, T steps in time, N pieces, P values per piece, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from m3.drawing import hide
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict, Tokenizer
from m3.positions import grid
from m3.samples import numbers
from m3.types import Tokens
from pydantic import PositiveInt
from torch import Tensor, nn


class $Class(Modality):
    """Raw: float32 (C, T). Normalised: (B, C, T), mean 0 and deviation 1 per channel of a recording."""

    class Spec(Strict):
        """Settings of `type: $name`: steps that the model reads, and values per step."""

        size: PositiveInt = 64
        channels: PositiveInt = 2

    extensions = (".npy",)
    measure = "L1 error"

    @property
    def signal(self) -> Signal:
        """What the tokenizer gets."""
        return Signal("values", self.spec.channels, (self.spec.size,))

    def blank(self, count: int) -> Tensor:
        """Return recordings of zeros, as `fit` returns them."""
        return torch.zeros(count, self.spec.channels, self.spec.size)

    def example_samples(self) -> list[np.ndarray]:
        """Waves of different lengths, for `m3 plugin check`."""
        time = np.linspace(0, 1, 100)
        return [np.stack([np.sin((i + c + 1) * 9 * time) for c in range(self.spec.channels)]) for i in range(4)]

    def load(self, file: File) -> np.ndarray:
        """Read an array (C, T) from a file."""
        return np.load(file, allow_pickle=False)

    def to_raw(self, sample: Any) -> Tensor:
        """Check one sample: what is wrong is said here, in one sentence."""
        x = torch.tensor(numbers(sample, "a recording"), dtype=torch.float32)
        if x.ndim != 2 or len(x) != self.spec.channels or not x.isfinite().all():
            raise M3Error(
                f"a recording must hold finite numbers of shape ({self.spec.channels}, steps), got {tuple(x.shape)}; "
                f"correct it or set `channels`."
            )
        return x

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Resample to `size` steps; crops are for maps and don't apply."""
        return F.interpolate(raw[None], self.spec.size, mode="linear", align_corners=False)[0]

    def normalise(self, raw: Tensor) -> Tensor:
        """Standardise a batch (B, C, T); the small number keeps blank recordings finite."""
        variance, mean = torch.var_mean(raw, dim=-1, keepdim=True)
        return (raw - mean) / (variance + 1e-6).sqrt()

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (C, T) as stripes, one row of 8 pixels per channel, -2 to 2 deviations from black to white."""
        grey = ((signal.float().cpu() + 2).clamp(0, 4) * 63).byte().repeat_interleave(8, 0).numpy()
        return hide(np.stack([grey] * 3, -1), None if is_known is None else is_known.expand(grey.shape))

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Sum the errors of the steps that count, and their number."""
        error = (predicted - truth).abs().mean(1)
        return torch.stack([(error * weight).sum(), weight.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Mean absolute error in deviations."""
        return float(sums[0] / sums[1])


class ${Class}Pieces(Tokenizer):
    """Pieces of equal length through one linear projection."""

    class Spec(Strict):
        """Settings of `type: ${name}_pieces`: steps in a piece."""

        size: PositiveInt = 8

    axes = 1

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        if signal.kind != "values" or len(signal.size) != 1 or signal.channel_axis != 1:
            raise M3Error(f"tokenizer `${name}_pieces` reads values over time, got {signal.kind} of {signal.size}.")
        self.reference = (self._count(signal.size[0]),)
        self.value_width = self.output_width = signal.channels * spec.size
        self.projection = nn.Linear(self.value_width, width)

    def _count(self, steps: int) -> int:
        if steps % self.spec.size:
            raise M3Error(f"{steps} steps can't be cut into pieces of {self.spec.size}; choose a multiple.")
        return steps // self.spec.size

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Cut (B, C, T) into (B, N, P)."""
        count = self._count(signal.shape[-1])
        values = signal.unflatten(-1, (count, self.spec.size)).transpose(1, 2).flatten(2)
        return Tokens(values, grid((count,), self.reference, signal.device))

    def embed(self, values: Tensor) -> Tensor:
        """Project (B, S, P) to (B, S, D)."""
        return self.projection(values)

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put pieces (B, N, P) together to (B, C, T)."""
        return values.unflatten(-1, (self.signal.channels, self.spec.size)).transpose(1, 2).flatten(2)

    def decode(self, output: Tensor) -> Tensor:
        """Return the prediction itself: a head predicts the values."""
        return output
'''

FILES = {
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    "src/m3_$name.py": CODE,
    "tests/test_$name.py": TEST,
}
