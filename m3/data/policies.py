"""Changes of pictures for fine-tuning, by timm: RandAugment and random erasing.

timm draws from Python's and NumPy's global generators. Both are seeded for each sample by a number that is drawn from
torch's, which the caller has seeded, and put back afterwards.

Letters: C channels, T frames, H height, W width.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from m3.errors import M3Error
from m3.plugins import Strict


class RandAugment:
    """A few operations drawn from timm's list, geometric ones among them (Cubuk et al. 2020); RGB only."""

    class Spec(Strict):
        """Settings of `type: rand_augment`.

        Attributes:
            policy: timm's description; MAE's fine-tuning has `rand-m9-mstd0.5-inc1`, VideoMAE's
                `rand-m7-n4-mstd0.5-inc1`.
        """

        policy: str = "rand-m9-mstd0.5-inc1"

    moves = True

    def __init__(self, spec: Spec, mean: tuple[float, ...], std: tuple[float, ...], size: tuple[int, int]) -> None:
        """Build timm's transform for pictures of this mean, as shares of 255, and size."""
        timm = _timm("auto_augment")
        self.image: Any = importlib.import_module("PIL.Image")
        fill = tuple(min(255, round(255 * x)) for x in mean)
        bicubic = self.image.Resampling.BICUBIC
        options = {"translate_const": int(min(size) * 0.45), "img_mean": fill, "interpolation": bicubic}
        try:
            self.transform = timm.rand_augment_transform(spec.policy, options)
        except (AssertionError, ValueError, KeyError) as error:
            raise M3Error(f"policy: `{spec.policy}` is none of timm's; write e.g. rand-m9-mstd0.5-inc1.") from error

    def __call__(self, x: Tensor) -> Tensor:
        """Change uint8 (..., 3, H, W); all frames of a video alike."""
        seed = drawn_seed()
        changed = []
        for frame in x.reshape(-1, *x.shape[-3:]):
            with seeded(seed):
                picture = self.transform(self.image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()))
            changed.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        return torch.stack(changed).reshape(x.shape)


class RandomErasing:
    """Puts noise of the data's mean and deviation into a box (Zhong et al. 2020), the same one in all frames.

    timm does it after normalising; here the noise is rounded and cut to what uint8 holds, about two deviations.
    """

    class Spec(Strict):
        """Settings of `type: random_erasing`.

        Attributes:
            area: smallest and largest share of the picture; of the boxes that fit, timm draws one.
        """

        area: tuple[float, float] = Field(default=(0.02, 1 / 3))

    moves = False

    def __init__(self, spec: Spec, mean: tuple[float, ...], std: tuple[float, ...], size: tuple[int, int]) -> None:
        low, high = spec.area
        if not 0 < low <= high <= 1:
            raise M3Error(f"area: smallest, then largest share in (0, 1], got {list(spec.area)}; correct it.")
        self.erase = _timm("random_erasing").RandomErasing(1.0, low, high, mode="pixel", device="cpu")
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in (mean, std))

    def __call__(self, x: Tensor) -> Tensor:
        """Change uint8 (..., C, H, W)."""
        values = (x.float() - self.mean) / self.std
        flat = values.reshape(-1, *x.shape[-2:])
        with seeded(drawn_seed()):
            flat = self.erase(flat)
        return (flat.reshape(x.shape) * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


POLICIES = {"rand_augment": RandAugment, "random_erasing": RandomErasing}


def drawn_seed() -> int:
    """Draw a seed from torch's generator."""
    return int(torch.randint(2**32, ()))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's and NumPy's generators, and put back their states afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _timm(module: str) -> Any:
    try:
        return importlib.import_module(f"timm.data.{module}")
    except ImportError as error:
        raise M3Error("rand_augment and random_erasing need timm; run `pip install timm`.") from error
