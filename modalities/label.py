"""What a sample is: one of K classes, or several of them at once.

Letters: B batch, K classes.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from m3.drawing import hide
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict

HEIGHT, BAR = 32, 4
"""Of a picture: pixels of the highest bar, and across one."""


class Label(Modality):
    """Raw: float32 (K,), the share of each class: 1 and 0, or between where samples are mixed. Normalised: (B, K, 1).

    A single class is read from the labels of the data: the column `label` or `label:NAME` of a manifest, folders that
    are classes, what the world knows of a scene. Several classes are a signal of their own: a sentence of numbers in
    the manifest's column of the modality's name ("3 17", or with shares "3:0.6 17", as the answers of VQA have), a .txt
    file with one, or a list.
    """

    class Spec(Strict):
        """Settings of `type: label`.

        Attributes:
            classes: K.
            of: name of the data's label; nothing is read from it where there are several classes.
            several: a sample may have any number of the classes (audio tagging) instead of exactly one.
        """

        classes: int = Field(ge=2)
        of: str = "label"
        several: bool = False

    extensions = (".txt",)
    is_inline = True
    measure = "accuracy"
    higher_is_better = True

    @property
    def from_label(self) -> str | None:
        """Name of the data's label that it is made of; several classes are a signal of their own."""
        return None if self.spec.several else self.spec.of

    @property
    def signal(self) -> Signal:
        """Values (B, K, 1)."""
        return Signal("values", self.spec.classes, (1,), label="several" if self.spec.several else "one")

    def blank(self, count: int) -> Tensor:
        """Return labels without any class, float32 (B, K)."""
        return torch.zeros(count, self.spec.classes)

    def example_samples(self) -> list[Any]:
        """Return four samples of the first and the last class; with several, also of two and of none."""
        last = self.spec.classes - 1
        return [[0], [last], [0, last], []] if self.spec.several else [0, last, 1, 0]

    def load(self, file: File) -> str:
        """Read a text of class numbers."""
        return (file.read_bytes() if isinstance(file, Path) else file.read()).decode("utf-8")

    def to_raw(self, sample: Any) -> Tensor:
        """Check class numbers (a number, a list, a text of numbers) -> float32 (K,)."""
        found = sample.replace(",", " ").split() if isinstance(sample, str) else np.asarray(sample).ravel().tolist()
        classes, several = self.spec.classes, self.spec.several
        shares = [1.0] * len(found)
        try:
            if several and isinstance(sample, str) and ":" in sample:
                pairs = [one.partition(":") for one in found]
                found, shares = [name for name, _, _ in pairs], [float(share or 1) for _, _, share in pairs]
            numbers = [int(one) for one in found]
        except (TypeError, ValueError) as error:
            raise M3Error(f"a label must be the number of a class, got {said(sample)}; correct it.") from error
        if [float(one) for one in found] != numbers:
            raise M3Error(f"a label must be the whole number of a class, got {said(sample)}; correct it.")
        if not several and len(numbers) != 1:
            raise M3Error(f"a label must be one class, got {len(numbers)}; set `several: true` where it may be many.")
        if wrong := [number for number in numbers if not 0 <= number < classes]:
            raise M3Error(
                f"class {wrong[0]} is none of 0 to {classes - 1}; correct the label, or set `classes` to the largest "
                f"number plus 1."
            )
        if wrong := [share for share in shares if not 0 <= share <= 1]:
            raise M3Error(f"the share of a class lies in [0, 1], got {wrong[0]}; correct the label.")
        raw = torch.zeros(classes)
        raw[numbers] = torch.tensor(shares)
        return raw

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Keep a label as it is: a crop of a picture still shows it."""
        return raw

    @property
    def follows(self) -> frozenset[str]:
        """A class stays true in the mirror."""
        return frozenset({"crop", "flip"})

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn (B, K) into (B, K, 1)."""
        return raw.unsqueeze(-1)

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (K, 1) as a bar for each class; the full height is 1."""
        shares = signal[:, 0].float().cpu().nan_to_num(0.0).clamp(0, 1)
        level = torch.linspace(1, 0, HEIGHT + 1)[:HEIGHT].unsqueeze(1)
        is_bar = (shares.repeat_interleave(BAR) >= level).numpy()
        picture = np.full((*is_bar.shape, 3), 255, np.uint8)
        picture[is_bar] = (40, 80, 160)
        return hide(picture, None if is_known is None else is_known.view(1, 1).expand(is_bar.shape))

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Count right answers and all -> (2,): the most likely class, or with several the yes or no to each class."""
        counts = weight.bool()[:, 0]
        predicted, truth = predicted[counts, :, 0], truth[counts, :, 0]
        if self.spec.several:
            is_right = ((predicted > 0.5) == (truth > 0.5)).flatten()
        else:
            is_right = predicted.argmax(1) == truth.argmax(1)
        return torch.stack([is_right.sum(), torch.tensor(is_right.numel(), device=is_right.device)]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Share of right answers in [0, 1]."""
        return float(sums[0] / sums[1])


def said(sample: Any) -> str:
    """Return a sample in few words on one line."""
    return reprlib.repr(sample) if isinstance(sample, str | int | float | list) else f"{type(sample).__name__}"
