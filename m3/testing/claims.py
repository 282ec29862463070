"""Small pieces of the kit: a claim with its sentence, comparisons, refusals, copies."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from m3.errors import M3Error

T = TypeVar("T")


def claim(is_kept: bool, sentence: str) -> None:
    """Raise AssertionError with the sentence; unlike `assert` it is also checked under `python -O`."""
    if not is_kept:
        raise AssertionError(sentence)


def same(a: Tensor, b: Tensor) -> bool:
    """Return True when dtype, shape and all values are equal, NaN being equal to NaN."""
    return (
        a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b) or ((a == b) | (a != a) & (b != b)).all())
    )


def near(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Return True when shapes are equal and values too, but for rounding (relative and absolute)."""
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), tolerance, tolerance, equal_nan=True)


def attempt(call: Callable[[], T], where: str, what: str) -> T | None:
    """Return what a call on doubtful input returns, or None when it is refused as it should be.

    Raises:
        AssertionError: another exception than M3Error, or one that is not a sentence on one line.
    """
    try:
        return call()
    except M3Error as error:
        text = str(error)
        claim(
            len(text.split()) >= 4 and "\n" not in text,
            f"{where}: {what} is refused with the text {text!r}; write one sentence that names place and remedy.",
        )
        return None
    except Exception as error:
        raise AssertionError(
            f"{where}: {what} ends in {type(error).__name__} ({error}); raise M3Error with one sentence instead."
        ) from error


def copied(part: T, where: str) -> T:
    """Return the part after a round trip through pickle, as it travels to the workers of a loader."""
    try:
        return pickle.loads(pickle.dumps(part))
    except Exception as error:
        raise AssertionError(
            f"{where}: it can't be pickled ({error}), but loaders send it to their workers; keep no open files, "
            f"lambdas or local classes in it."
        ) from error


def without_gradient(module: nn.Module, loss: Tensor) -> list[str]:
    """Run backward and return the names of trained parameters that got no gradient, or only zeros or NaN."""
    module.zero_grad()
    if loss.requires_grad:
        loss.backward()
    trained = [(name, p.grad) for name, p in module.named_parameters() if p.requires_grad]
    return [n for n, g in trained if g is None or not g.isfinite().all() or not g.abs().sum() > 0]


def seeded(make: Callable[[], T]) -> T:
    """Make a part whose weights are always the same, and leave the random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def noise(shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Return normal float32 noise, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def name_of(settings: dict[str, Any]) -> str:
    """Return the type that settings name, for sentences."""
    return str(settings.get("type", "without type"))
