"""Small pieces that modalities draw themselves with."""

from __future__ import annotations

import numpy as np
from torch import Tensor

HIDDEN = 128
"""Grey of positions that the encoder did not see."""


def hide(picture: np.ndarray, is_known: Tensor | None) -> np.ndarray:
    """Paint the positions of a picture (H, W, 3) grey where is_known (H, W) is False."""
    if is_known is None:
        return picture
    return np.where(is_known.cpu().numpy()[..., None], picture, np.uint8(HIDDEN))
