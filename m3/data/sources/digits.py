"""Scikit-learn's handwritten digits: 1797 real pictures with their class, within an installed package."""

from __future__ import annotations

from functools import cache

import numpy as np

from m3.data.source import Sample, Source, Split, numbers_of_split
from m3.errors import M3Error
from m3.parts import type_name
from m3.plugins import Modality
from m3.recipe import DataSpec


class Digits(Source):
    """Grey pictures of 8 x 8 pixels (UCI "Optical Recognition of Handwritten Digits"), label `digit`.

    Every modality of type `image` gets the picture; at most a tenth is held out.
    """

    def __init__(self, spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> None:
        super().__init__(spec, modalities, seed, split)
        for name, part in modalities.items():
            if type_name(type(part).__name__) != "image":
                raise M3Error(
                    f"modalities.{name}: the digits are pictures alone; remove it or use another data.source."
                )
        self.pictures, self.labels = _digits()
        self.numbers = numbers_of_split([f"digit-{i}" for i in range(len(self.labels))], spec, split)

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> Sample:
        """Return one picture, uint8 (8, 8, C) with as many equal channels as the modality has."""
        number = self.numbers[index]
        picture = self.pictures[number][:, :, None]
        signals = {name: picture.repeat(part.signal.channels, 2) for name, part in self.modalities.items()}
        return Sample(signals, f"digit-{number}", {"digit": int(self.labels[number])})


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return (1797, 8, 8) uint8 in 0..240 and (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * 15).astype(np.uint8), data.target
