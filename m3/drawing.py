"""Small pieces that modalities draw themselves with."""

from __future__ import annotations

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw
from torch import Tensor

HIDDEN = 128
"""Grey of positions that the encoder did not see."""

LETTER, LINE = 6, 12
"""Pixels of a letter's width and of a line's height."""


def hide(picture: np.ndarray, is_known: Tensor | None) -> np.ndarray:
    """Paint the positions of a picture (H, W, 3) grey where is_known (H, W) is False."""
    if is_known is None:
        return picture
    return np.where(is_known.cpu().numpy()[..., None], picture, np.uint8(HIDDEN))


def written(lines: list[str], width: int, height: int) -> np.ndarray:
    """Write lines black on white, uint8 (H, W, 3), where a picture has room for `height` lines of `width` letters."""
    picture = PILImage.new("RGB", (width * LETTER + 4, height * LINE + 4), "white")
    ImageDraw.Draw(picture).multiline_text((2, 1), "\n".join(lines[:height]), fill="black", spacing=1)
    return np.asarray(picture)
