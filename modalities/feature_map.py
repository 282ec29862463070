"""Feature maps: what a frozen teacher makes of a picture (4M's CLIP and DINO modalities, Mizrahi et al. 2023).

Letters: B batch, C channels, H height, W width of the picture; h, w of the teacher's grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from m3.drawing import hide
from m3.modalities.image import Image
from m3.plugins import Crop, File, Modality, Signal, Strict
from m3.teachers import Teacher, open_teacher

DRAWN = 8
"""Pixels of one feature vector in a picture."""


class FeatureMap(Modality):
    """Raw: the picture, uint8 (3, H, W). Normalised: features (B, C, h, w), each vector of mean 0 and deviation 1."""

    class Spec(Strict):
        """Settings of `type: feature_map`.

        Attributes:
            teacher: `timm:MODEL`, `open_clip:MODEL`, or `m3:FOLDER` of a trained model of our own that reads pictures
                of this size.
            weights: file of the teacher's state; null: random weights, or those of a model of our own.
            size: height and width of the picture that the teacher sees.
        """

        teacher: str
        weights: str | None = None
        size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224

    extensions = Image.extensions
    reads = "image"
    measure = "cosine"
    higher_is_better = True
    is_map = True

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.picture = Image(Image.Spec(size=spec.size))
        self._shape: tuple[int, ...] | None = None

    @property
    def teacher(self) -> Teacher:
        """The frozen network; built when it is first needed, so that loading workers do without it."""
        return open_teacher(self.spec.teacher, self.spec.weights, self.picture.size)

    @property
    def signal(self) -> Signal:
        """Values (B, C, h, w)."""
        if self._shape is None:
            self._shape = tuple(self.teacher(self.picture.blank(1).to("meta")).shape[1:])
        return Signal("values", self._shape[0], self._shape[1:])

    def blank(self, count: int) -> Tensor:
        """Return black pictures, uint8 (B, 3, H, W)."""
        return self.picture.blank(count)

    def load(self, file: File) -> Any:
        """Decode an image file."""
        return self.picture.load(file)

    def to_raw(self, sample: Any) -> Tensor:
        """Read a picture -> uint8 (3, H, W)."""
        return self.picture.to_raw(sample)

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Crop and resize the picture."""
        return self.picture.fit(raw, crop)

    def normalise(self, raw: Tensor) -> Tensor:
        """Let the teacher look at (B, 3, H, W) -> (B, C, h, w), each vector shifted and scaled by itself."""
        features = self.teacher(raw)
        return F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (C, h, w) in three colours: a fixed random projection, so that pictures can be compared."""
        generator = torch.Generator().manual_seed(0)
        axes = torch.randn(3, signal.shape[0], generator=generator) / signal.shape[0] ** 0.5
        colours = torch.einsum("kc,chw->hwk", axes, signal.float().cpu()).sigmoid()
        picture = hide((colours * 255).to(torch.uint8).numpy(), is_known)
        return picture.repeat(DRAWN, 0).repeat(DRAWN, 1)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Sum cosines and their number -> (2,)."""
        cosine = F.cosine_similarity(predicted.float(), truth.float(), dim=1)
        return torch.stack([(cosine * weight).sum(), weight.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Mean cosine between predicted and true features, in [-1, 1]."""
        return float(sums[0] / sums[1])
