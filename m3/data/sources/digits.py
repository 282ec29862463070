"""scikit-learn's digits: 1797 handwritten digits of 8 x 8 pixels, in the package itself, with their labels.

Letters: C channels.
"""

from __future__ import annotations

import importlib

import numpy as np

from m3.data.source import Sample, Source, Split, numbers_of_split
from m3.errors import M3Error
from m3.parts import type_name
from m3.plugins import Modality
from m3.recipe import DataSpec


class Digits(Source):
    """Pictures of the digits 0 to 9 for every modality of type `image`, and the label `digit`.

    At most a tenth is held out, chosen by a hash of the id.
    """

    def __init__(self, spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> None:
        super().__init__(spec, modalities, seed, split)
        for name, part in modalities.items():
            if type_name(type(part).__name__) != "image":
                raise M3Error(f"modalities.{name}: `digits` are images and nothing else; use another data.source.")
        try:
            found = importlib.import_module("sklearn.datasets").load_digits()
        except ImportError as error:
            raise M3Error("data.source: `digits` needs scikit-learn; run `pip install scikit-learn`.") from error
        self.images = np.rint(found.images * (255 / 16)).astype(np.uint8)
        self.classes = found.target
        self.numbers = numbers_of_split([self._id(i) for i in range(len(self.images))], spec, split)

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> Sample:
        """Return one digit, with as many equal channels as are read."""
        number = self.numbers[index]
        picture = self.images[number][..., None]
        signals = {name: np.repeat(picture, part.signal.channels, -1) for name, part in self.modalities.items()}
        return Sample(signals, self._id(number), {"digit": int(self.classes[number])})

    def name(self, index: int) -> str:
        """Return digits/<number in the package>."""
        return self._id(self.numbers[index])

    def known_labels(self, name: str) -> list[int | None]:
        """Look them up."""
        return [int(self.classes[i]) if name == "digit" else None for i in self.numbers]

    def coverage(self) -> dict[str, float]:
        """Every sample has every picture."""
        return dict.fromkeys(self.modalities, 1.0)

    def _id(self, number: int) -> str:
        return f"digits/{number:04d}"
