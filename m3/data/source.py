"""Sources: where samples come from. A source knows files and scenes; nothing after it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from m3.plugins import Modality
from m3.recipe import DataSpec

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Sample:
    """One sample as read.

    Attributes:
        signals: modality -> what `Modality.to_raw` accepts; a modality may be lacking.
        id: name for messages.
        labels: label name -> class number.
    """

    signals: dict[str, Any]
    id: str
    labels: dict[str, int] = field(default_factory=dict)


class Source(ABC):
    """Numbered samples. Reading one depends on nothing but its number, so workers may do it in any order."""

    def __init__(self, spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> None:
        self.spec = spec
        self.modalities = modalities
        self.seed = seed
        self.split = split

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples of this split."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Read sample `index`, 0 <= index < len. Raises any error whose text says what is wrong with it."""

    def name(self, index: int) -> str:
        """Return a sample's id without reading it."""
        return str(index)
