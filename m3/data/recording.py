"""Recordings as sources hand them over: a piece of video, a piece of sound.

Letters: T frames, H height, W width, S samples, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Clip(NamedTuple):
    """A piece of video.

    Attributes:
        frames: uint8 (T, H, W, 3) RGB.
        times: float32 (T,) seconds, or None where they are not known.
    """

    frames: np.ndarray
    times: np.ndarray | None = None


class Sound(NamedTuple):
    """A piece of sound.

    Attributes:
        samples: float32 (C, S) in [-1, 1].
        rate: samples per second.
    """

    samples: np.ndarray
    rate: int
