"""One geometric decision per sample, applied to every aligned map of it with torchvision.

Letters: C channels, H height, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from m3.errors import M3Error
from m3.plugins import Crop

Interpolation = Literal["bicubic", "nearest-exact"]


def random_crop(key: int, scale: tuple[float, float] | None, flip: float, size: tuple[int, int]) -> Crop:
    """Draw a crop as torchvision's RandomResizedCrop does (aspect 3/4 to 4/3), from the sample's key alone.

    Args:
        key: decides the draw.
        scale: smallest and largest share of the area; None leaves the middle of the sample.
        flip: probability of a horizontal flip.
        size: (H, W) of the sample, since the aspect is one of pixels.
    """
    transforms = _torchvision().transforms
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
        is_flipped = bool(torch.rand(()) < flip)
        if scale is None:
            return Crop(None, is_flipped)
        canvas = torch.empty(1, *size)
        top, left, height, width = transforms.RandomResizedCrop.get_params(canvas, list(scale), [3 / 4, 4 / 3])
    return Crop((top / size[0], left / size[1], height / size[0], width / size[1]), is_flipped)


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
