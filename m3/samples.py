"""Small pieces that modalities read samples with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from m3.errors import M3Error


def split_ending(name: str, endings: Iterable[str]) -> tuple[str, str] | None:
    """Split a file's name or path before the longest ending that it has; None when it has none of them.

    An ending may have several dots: of `.nii.gz` and `.gz` the file a.nii.gz has the first.
    """
    for ending in sorted(endings, key=len, reverse=True):
        if name.lower().endswith(ending):
            return name[: -len(ending)], ending
    return None


def numbers(sample: Any, what: str) -> np.ndarray:
    """Return a sample (array, tensor, picture, nested list) as an array of real numbers.

    Args:
        sample: what a source or a user gave.
        what: its kind, to open the sentence with, e.g. `a depth map`.

    Raises:
        M3Error: it is no array of numbers, or an empty one.
    """
    try:
        array = np.asarray(sample)
    except (TypeError, ValueError, RuntimeError) as error:
        raise M3Error(f"{what} must be one array of numbers ({str(error).rstrip('.')}); convert it first.") from error
    if array.dtype.kind not in "biuf":
        raise M3Error(f"{what} must be one array of numbers, got {array.dtype}; convert it first.")
    if not array.size:
        raise M3Error(f"{what} of shape {array.shape} is empty; leave the sample out.")
    return array
