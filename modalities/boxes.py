"""Boxes around things, as five value tokens each: left, top, right, bottom, class (4M, Mizrahi et al. 2023).

Letters: B batch, n boxes, L = 5 n tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw
from pydantic import Field, PositiveInt
from torch import Tensor

from m3.drawing import HIDDEN
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict
from m3.value_tokens import Bins, read_json, short

PIXELS = 64
"""Height and width of a picture."""

SMALLEST = 0.02
"""Share of the picture's side below which what a crop leaves of a box is dropped."""


class Boxes(Modality):
    """Raw: float32 (n, 5), left, top, right, bottom as shares of the picture, class number. Normalised: int64 (B, L).

    Token 5 i + a of box i holds a coordinate's bin plus a times the number of bins, so an id tells what it is
    about; the classes follow behind the coordinates. -1 where there is no box.
    """

    class Spec(Strict):
        """Settings of `type: boxes`.

        Attributes:
            labels: names of the classes.
            count: n that the model is built for; further boxes are left out.
            bins: into which a coordinate is sorted (4M: 1000).
        """

        labels: tuple[str, ...] = Field(min_length=1)
        count: PositiveInt = 8
        bins: PositiveInt = 1000

    extensions = (".json",)
    measure = "mean IoU"
    higher_is_better = True
    padding = float("nan")

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        classes = len(spec.labels)
        edges = [Bins(0.0, 1.0, spec.bins, a * spec.bins) for a in range(4)]
        self.parts = [*edges, Bins(0.0, float(classes), classes, 4 * spec.bins)]

    @property
    def signal(self) -> Signal:
        """Ids (B, L)."""
        last = self.parts[-1]
        return Signal("classes", 1, (5 * self.spec.count,), last.first + last.count, has_gaps=True)

    @property
    def follows(self) -> frozenset[str]:
        """Boxes are cut and mirrored like the picture."""
        return frozenset({"crop", "flip"})

    def blank(self, count: int) -> Tensor:
        """Return boxes of no extent, float32 (B, n, 5)."""
        return torch.zeros(count, self.spec.count, 5)

    def load(self, file: File) -> list[Any]:
        """Read a JSON list of [label, left, top, right, bottom]."""
        return read_json(file)

    def to_raw(self, sample: Any) -> Tensor:
        """Check a list of (label, left, top, right, bottom), shares in [0, 1] -> float32 (boxes of the picture, 5)."""
        if not isinstance(sample, list | tuple) or not sample:
            raise M3Error(
                f"boxes must be a list of at least one, got {short(sample)}; a sample without any lacks the modality."
            )
        return torch.tensor([self._row(entry) for entry in sample], dtype=torch.float32)

    def _row(self, entry: Any) -> tuple[float, ...]:
        is_box = isinstance(entry, list | tuple) and len(entry) == 5 and entry[0] in self.spec.labels
        if not is_box or not all(isinstance(edge, float | int) for edge in entry[1:]):
            raise M3Error(
                f"a box must be (label, left, top, right, bottom) with a label of {', '.join(self.spec.labels)} and "
                f"numbers, got {short(entry)}."
            )
        label, x0, y0, x1, y1 = entry
        if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
            raise M3Error(f"a box must lie in [0, 1] with left <= right and top <= bottom, got {short(entry)}.")
        return float(x0), float(y0), float(x1), float(y1), float(self.spec.labels.index(label))

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Move the boxes along with the crop, cut them at its edge, drop those outside, mirror the first `count`."""
        x = raw.clone()
        if crop.box is not None:
            top, left, height, width = crop.box
            x[:, [0, 2]] = ((x[:, [0, 2]] - left) / width).clamp(0, 1)
            x[:, [1, 3]] = ((x[:, [1, 3]] - top) / height).clamp(0, 1)
            x = x[(x[:, 2] - x[:, 0] > SMALLEST) & (x[:, 3] - x[:, 1] > SMALLEST)]
        x = x[: self.spec.count]
        if crop.is_flipped:
            x[:, [0, 2]] = 1 - x[:, [2, 0]]
        return x if len(x) else torch.full((1, 5), torch.nan)

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn (B, n, 5) into ids (B, L)."""
        return torch.stack([part.ids(raw[..., a]) for a, part in enumerate(self.parts)], dim=-1).flatten(1)

    def groups(self, signal: Tensor) -> Tensor:
        """Number the boxes of (B, L) ids, five tokens each -> int64 (B, L)."""
        return (torch.arange(signal.shape[1], device=signal.device) // 5).expand(signal.shape)

    def decode(self, ids: Tensor) -> Tensor:
        """Turn ids (..., L) into boxes float32 (..., n, 5), NaN where an id is not of the kind its place asks for."""
        *edges, label = ids.unflatten(-1, (-1, 5)).unbind(-1)
        values = [part.values(x) for part, x in zip(self.parts, edges, strict=False)]
        return torch.stack([*values, self.parts[4].part_of(label)], dim=-1)

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (L,) ids as frames, a colour for each class; boxes of which a token is hidden are left out."""
        from matplotlib import colormaps

        picture = PILImage.new("RGB", (PIXELS, PIXELS), (HIDDEN,) * 3 if is_known is not None else (255, 255, 255))
        boxes = self.decode(signal.cpu())
        if is_known is not None:
            boxes[~is_known.cpu().unflatten(-1, (-1, 5)).all(-1)] = torch.nan
        for x0, y0, x1, y1, label in boxes[~boxes.isnan().any(-1)].tolist():
            colour = tuple(round(255 * c) for c in colormaps["tab10"](int(label) % 10)[:3])
            corners = (min(x0, x1) * PIXELS, min(y0, y1) * PIXELS, max(x0, x1) * PIXELS, max(y0, y1) * PIXELS)
            ImageDraw.Draw(picture).rectangle(corners, outline=colour, width=2)
        return np.asarray(picture)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Add up intersection over union of boxes that are asked for, box by box in their order -> (2,)."""
        own, theirs = self.decode(predicted), self.decode(truth)
        counts = weight.bool().unflatten(-1, (-1, 5)).any(-1) & ~theirs.isnan().any(-1)
        low, high = torch.maximum(own[..., :2], theirs[..., :2]), torch.minimum(own[..., 2:4], theirs[..., 2:4])
        shared = (high - low).clamp(min=0).prod(-1)
        areas = [(x[..., 2:4] - x[..., :2]).clamp(min=0).prod(-1) for x in (own, theirs)]
        union = areas[0] + areas[1] - shared
        overlap = (shared / union.clamp(min=1e-9)).nan_to_num(0.0)
        return torch.stack([(overlap * counts).sum(), counts.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Mean intersection over union, in [0, 1]."""
        return float(sums[0] / sums[1])
