"""Small pieces that modalities read samples with."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3.errors import M3Error


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
    except (TypeError, ValueError) as error:
        raise M3Error(f"{what} must be one array of numbers ({str(error).rstrip('.')}); convert it first.") from error
    if array.dtype.kind not in "biuf":
        raise M3Error(f"{what} must be one array of numbers, got {array.dtype}; convert it first.")
    if not array.size:
        raise M3Error(f"{what} of shape {array.shape} is empty; leave the sample out.")
    return array
