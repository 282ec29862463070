"""Palettes: the main colours of a picture, three value tokens each (4M-21, Bachmann et al. 2024).

Letters: B batch, k colours, K most colours, L = 1 + 3 K tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from pydantic import PositiveInt, model_validator
from torch import Tensor

from m3.drawing import HIDDEN
from m3.errors import M3Error
from m3.modalities.image import Image
from m3.plugins import Crop, File, Modality, Signal, Strict, ending
from m3.value_tokens import Bins, read_json, short

LEVELS = 256
SWATCH = 24
"""Width of a drawn colour in pixels."""


class Palette(Modality):
    """Raw: int16 (k, 3), red, green, blue in 0 ... 255. Normalised: int64 (B, L), -1 behind the last colour.

    The first token says how many colours there are (4M does the same, so that none is missed); then follow red,
    green and blue of each, from the one with the most pixels to the one with the fewest, or as a file orders them.
    """

    class Spec(Strict):
        """Settings of `type: palette`.

        Attributes:
            colours: k, or the least and most k, one of which is drawn anew at every reading (4M: 1 to 7).
        """

        colours: PositiveInt | tuple[PositiveInt, PositiveInt] = (1, 7)

        @model_validator(mode="after")
        def _no_contradiction(self) -> Palette.Spec:
            if isinstance(self.colours, tuple) and self.colours[0] > self.colours[1]:
                raise ValueError(f"`colours` is least, then most: write [{self.colours[1]}, {self.colours[0]}]")
            return self

    extensions = (".json", *Image.extensions)
    reads = "image"
    measure = "colour error"
    padding = -1

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.least, self.most = (spec.colours,) * 2 if isinstance(spec.colours, int) else spec.colours
        self.channels = [Bins(0.0, float(LEVELS), LEVELS, self.most + a * LEVELS) for a in range(3)]
        self.picture = Image(Image.Spec())

    @property
    def signal(self) -> Signal:
        """Ids (B, L)."""
        return Signal("classes", 1, (1 + 3 * self.most,), self.most + 3 * LEVELS, has_gaps=True)

    def blank(self, count: int) -> Tensor:
        """Return black colours, int16 (B, K, 3)."""
        return torch.zeros(count, self.most, 3, dtype=torch.int16)

    def load(self, file: File) -> Any:
        """Read a picture, or a JSON file with a list of colours [red, green, blue] or one such list for each k."""
        return read_json(file) if ending(file) == ".json" else self.picture.load(file)

    def cut(self, sample: Any, moment: float) -> Any:
        """Choose k by the moment and take so many colours: computed from a picture, the first of a list, or a file's.

        Raises:
            M3Error: a file has no palette of k colours.
        """
        k = self.least + min(int(moment * (self.most - self.least + 1)), self.most - self.least)
        if isinstance(sample, list) and len(sample) == 1 and isinstance(sample[0], dict):
            sample = sample[0]  # 4M's files hold a list of one dict
        if isinstance(sample, dict):
            if str(k) not in sample:
                raise M3Error(f"the file holds palettes of {', '.join(map(str, sample))} colours, but none of {k}.")
            return sample[str(k)]
        if isinstance(sample, PILImage.Image) or (isinstance(sample, np.ndarray | Tensor) and sample.ndim == 3):
            return main_colours(self.picture.to_raw(sample), k)
        return sample[:k] if isinstance(sample, list) else sample

    def to_raw(self, sample: Any) -> Tensor:
        """Check k colours (red, green, blue), whole numbers in 0 ... 255 -> int16 (k, 3)."""
        try:
            x = np.asarray(sample)
        except ValueError:  # rows of different lengths
            x = np.empty(0, dtype=object)
        is_right = x.ndim == 2 and x.shape[-1] == 3 and 0 < len(x) <= self.most and x.dtype.kind in "iu"
        if not is_right or x.min() < 0 or x.max() >= LEVELS:
            raise M3Error(
                f"a palette must be 1 to {self.most} colours of three whole numbers in 0 to 255, got {short(sample)}."
            )
        return torch.from_numpy(x.astype(np.int16))

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Keep it as it is: the colours are those of the whole picture (so does 4M)."""
        return raw

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn (B, k, 3) into ids (B, 1 + 3 k)."""
        count = (raw[..., 0] >= 0).sum(1, keepdim=True) - 1
        ids = torch.stack([part.ids(raw[..., a].float()) for a, part in enumerate(self.channels)], dim=-1)
        return torch.cat([count, ids.masked_fill(raw < 0, -1).flatten(1)], dim=1)

    def groups(self, signal: Tensor) -> Tensor:
        """Number the colours of (B, L) ids, behind the count -> int64 (B, L)."""
        return ((torch.arange(signal.shape[1], device=signal.device) + 2) // 3).expand(signal.shape)

    def decode(self, ids: Tensor) -> Tensor:
        """Turn ids (..., L) into colours float32 (..., k, 3), NaN where an id is not of the kind its place asks for."""
        channels = ids[..., 1:].unflatten(-1, (-1, 3)).unbind(-1)
        return torch.stack([part.part_of(x) for part, x in zip(self.channels, channels, strict=True)], dim=-1)

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (L,) ids as stripes; a colour of which a token is hidden is grey, and white is none."""
        colours = self.decode(signal.cpu())
        colours = colours.masked_fill(colours.isnan().any(-1, keepdim=True), 255.0)
        if is_known is not None:
            colours[~is_known.cpu()[1:].unflatten(-1, (-1, 3)).all(-1)] = HIDDEN
        row = torch.full((self.most, 3), 255.0)
        row[: len(colours)] = colours[: self.most]
        return row.to(torch.uint8).numpy().repeat(SWATCH, axis=0)[None].repeat(2 * SWATCH, axis=0)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Add up errors of red, green and blue, and count them -> (2,); an id of another kind is the worst error."""
        own, theirs = self.decode(predicted), self.decode(truth)
        counts = weight.bool()[..., 1:].unflatten(-1, (-1, 3)) & ~theirs.isnan()
        errors = (own - theirs).abs().nan_to_num(float(LEVELS - 1))
        return torch.stack([(errors * counts).sum(), counts.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Mean absolute error of a channel, in 0 ... 255."""
        return float(sums[0] / sums[1])


def main_colours(pixels: Tensor, k: int) -> np.ndarray:
    """Return up to k colours of a picture uint8 (3, H, W), most frequent first: median cut, then k-means of Pillow.

    Returns:
        int (k, 3); fewer where the picture has fewer colours.
    """
    picture = PILImage.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    reduced = picture.quantize(k, PILImage.Quantize.MEDIANCUT, kmeans=1)
    table = np.array(reduced.getpalette(), dtype=int).reshape(-1, 3)
    counts = np.bincount(np.asarray(reduced).ravel(), minlength=len(table))
    order = np.argsort(-counts, kind="stable")
    return table[order[counts[order] > 0]]
