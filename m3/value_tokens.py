"""Value tokens: numbers as consecutive ids, so that structured signals are sequences (4M, Mizrahi et al. 2023).

4M writes every number as one of 1000 words that boxes, palettes and metadata share. Here each kind of number has ids
of its own, so an id alone tells what it is about.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from m3.plugins import File


@dataclass(frozen=True)
class Bins:
    """The ids first ... first + count - 1, for the equal parts of a range of numbers; all four may be tensors.

    Attributes:
        low: smallest number.
        high: largest number.
        count: parts of the range.
        first: id of the lowest part.
    """

    low: Any
    high: Any
    count: Any
    first: Any

    def ids(self, values: Tensor) -> Tensor:
        """Turn numbers into ids int64; those outside the range go into its first or last part, NaN is -1."""
        part = ((values - self.low) * (self.count / (self.high - self.low))).floor()
        top = part.new_tensor(self.count - 1) if isinstance(self.count, int) else self.count - 1
        return (part.clamp(min=0).minimum(top) + self.first).nan_to_num(-1.0).long()

    def part_of(self, ids: Tensor) -> Tensor:
        """Return the number of an id's part, float; NaN for ids of another kind."""
        part = ids.float() - self.first
        return part.masked_fill((part < 0) | (part >= self.count), float("nan"))

    def values(self, ids: Tensor) -> Tensor:
        """Return the middle of an id's part; NaN for ids of another kind."""
        return self.low + (self.part_of(ids) + 0.5) * (self.high - self.low) / self.count


def read_json(file: File) -> Any:
    """Read a JSON file, given by path or as a binary file."""
    return json.loads(file.read_bytes() if isinstance(file, Path) else file.read())


def short(value: Any) -> str:
    """Return what a message shows of a value of any size."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."
