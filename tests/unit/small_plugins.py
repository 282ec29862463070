"""The smallest modality and tokenizer that keep every contract, and how tests break them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict, Tokenizer
from m3.positions import grid
from m3.samples import numbers
from m3.types import Tokens


class Fine(Modality):
    """Lists of eight floats, the smallest modality that keeps every contract."""

    class Spec(Strict):
        """It has no settings."""

    measure = "L1 error"

    @property
    def signal(self) -> Signal:
        return Signal("values", 1, (8,))

    def blank(self, count: int) -> Tensor:
        return torch.zeros(count, 8)

    def load(self, file: File) -> Any:
        return np.load(file)

    def to_raw(self, sample: Any) -> Tensor:
        x = torch.tensor(numbers(sample, "a list"), dtype=torch.float32)
        if x.shape != (8,) or not x.isfinite().all():
            raise M3Error(f"a list must hold 8 finite numbers, got shape {tuple(x.shape)}; correct it.")
        return x

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        return raw

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw / 4 - 1).unsqueeze(1)

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        grey = ((signal.detach().clamp(-2, 2) + 2) * 60).to(torch.uint8)
        grey = grey if is_known is None else grey.masked_fill(~is_known, 255)
        return grey.unsqueeze(-1).expand(-1, -1, 3).numpy()

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        error = (predicted - truth).abs().squeeze(1)
        return torch.stack([(error * weight).sum(), weight.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1])


class Pairs(Tokenizer):
    """Two values are a token."""

    class Spec(Strict):
        """It has no settings."""

    axes = 1

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        self.reference = (signal.size[0] // 2,)
        self.value_width = self.output_width = 2
        self.projection = nn.Linear(2, width)

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        if signal.shape[2] % 2:
            raise M3Error(f"a list of {signal.shape[2]} can't be cut into pairs; give it an even length.")
        values = signal.unflatten(2, (-1, 2)).squeeze(1)
        return Tokens(values, grid((values.shape[1],), self.reference, signal.device))

    def embed(self, values: Tensor) -> Tensor:
        return self.projection(values)

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        return values.flatten(1).unsqueeze(1)

    def decode(self, output: Tensor) -> Tensor:
        return output


LISTS = [np.arange(8.0) + i for i in range(4)]


def plugin(part: type) -> dict[str, Any]:
    """Name a class of this file as a recipe names a class of another package."""
    globals()[part.__qualname__] = part
    return {"type": f"{part.__module__}:{part.__qualname__}"}


def broken(base: type, **methods: Any) -> dict[str, Any]:
    return plugin(type("Broken", (base,), {"__module__": __name__, "__qualname__": "Broken", **methods}))
