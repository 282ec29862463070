"""How fast the device multiplies matrices: what utilisation is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from m3.linear import linear

MATMUL = 2048


def matmul_rate(dtype: torch.dtype, tries: int = 8) -> float:
    """Return FLOP/s of a square matrix product of random numbers: the best of several by torch's and our product.

    Args:
        dtype: of the matrices.
        tries: timed products of either kind, after a first one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    a, b = (torch.randn(MATMUL, MATMUL, device=device, generator=generator).to(dtype) for _ in range(2))
    with torch.no_grad():
        times = [min(seconds(lambda: a @ b), seconds(lambda: linear(a, b))) for _ in range(tries + 1)]
    return 2 * MATMUL**3 / min(times[1:])


def seconds(work: Callable[[], Any]) -> float:
    """Return how long something takes, on a GPU until it is done there."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
