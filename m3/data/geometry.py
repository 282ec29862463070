"""One geometric decision per sample, applied to every aligned map of it with torchvision.

Letters: C channels, H height, W width.
"""

from __future__ import annotations

import math
from random import Random
from typing import Literal

from torch import Tensor

from m3.errors import M3Error
from m3.plugins import Crop

Interpolation = Literal["bicubic", "nearest-exact"]

ASPECTS = (3 / 4, 4 / 3)
"""Narrowest and widest random crop, width over height in pixels."""

DRAWS = 10
"""Crops that are drawn until one lies within the sample."""


def random_crop(key: int, scale: tuple[float, float] | None, flip: float, size: tuple[int, int]) -> Crop:
    """Draw a crop from the sample's key alone, distributed as torchvision's RandomResizedCrop.

    Area uniform, aspect log-uniform, place uniform (Szegedy et al. 2014, section 6); where none of ten draws fits,
    the largest centred part of an allowed aspect. Torch's generator is not used: to set it aside and seed it takes
    as long as resizing a small picture.

    Args:
        key: decides the draw.
        scale: smallest and largest share of the area; None leaves the middle of the sample.
        flip: probability of a horizontal flip.
        size: (H, W) of the sample, since the aspect is one of pixels.
    """
    draws = Random(key)
    is_flipped = draws.random() < flip
    if scale is None:
        return Crop(None, is_flipped)
    for _ in range(DRAWS):
        area = draws.uniform(*scale) * size[0] * size[1]
        aspect = math.exp(draws.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height <= size[0] and 0 < width <= size[1]:
            top, left = draws.randint(0, size[0] - height), draws.randint(0, size[1] - width)
            return Crop((top / size[0], left / size[1], height / size[0], width / size[1]), is_flipped)
    aspect = min(max(size[1] / size[0], ASPECTS[0]), ASPECTS[1])
    return Crop(Crop().window(*size, (1, aspect)), is_flipped)


def fit_map(x: Tensor, size: tuple[int, int], crop: Crop, interpolation: Interpolation) -> Tensor:
    """Crop and resize maps (..., H, W) to (..., *size).

    Args:
        x: the map, or the frames of a video.
        size: (height, width) of the result.
        crop: which part, mirrored or not.
        interpolation: `bicubic` with antialiasing, or `nearest-exact` where values must not be
            mixed; both measure from pixel centres, so maps stay aligned.
    """
    height, width = x.shape[-2:]
    if crop == Crop() and (height, width) == size:
        return x
    top, left, part_height, part_width = crop.window(height, width, size)
    functional = _torchvision().transforms.v2.functional
    mode = _torchvision().transforms.InterpolationMode(interpolation)
    rows, columns = max(1, round(part_height * height)), max(1, round(part_width * width))
    # Rounding must not push the box over the edge, where torchvision would fill it with zeros.
    box = (min(round(top * height), height - rows), min(round(left * width), width - columns), rows, columns)
    x = functional.resized_crop(x, *box, size=list(size), interpolation=mode, antialias=interpolation == "bicubic")
    return functional.horizontal_flip(x) if crop.is_flipped else x


def _torchvision():
    try:
        import torchvision
        import torchvision.transforms.v2
    except ImportError as error:
        raise M3Error(
            "cropping and resizing need torchvision, which is not installed; run `pip install 'm3-multimodal[vision]'`."
        ) from error
    return torchvision
