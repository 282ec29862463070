"""Mixup and cutmix: pairs of training samples become mixtures of both, and so do their labels.

The partner of a sample is its neighbour in the order of the run, which is shuffled; so the result depends on the seed
and the position alone, not on how a batch is cut into micro-batches and processes. Every pair draws for itself, as with
timm's `mode: pair`.

Letters: B batch, H height, W width, K classes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from torch import Tensor

from m3.errors import M3Error
from m3.plugins import Modality
from m3.random import stream_number
from m3.recipe import DataSpec, MixupSpec
from m3.types import Batch


class Mixup:
    """Mixes the samples of a micro-batch two by two."""

    def __init__(self, spec: MixupSpec, data: DataSpec, modalities: dict[str, Modality], seed: int) -> None:
        """Check that what is to be mixed can be.

        Raises:
            M3Error: a modality has no mean of two samples, or no place for a box.
        """
        self.spec, self.seed, self.repeats = spec, seed, data.repeats
        self.labels = [name for name, part in modalities.items() if part.signal.label]
        self.signals = [name for name in modalities if name not in self.labels]
        for name in self.signals:
            part = modalities[name]
            if part.signal.kind != "values" or part.signal.channel_axis != 1 or part.signal.is_boxed:
                raise M3Error(f"data.mixup: two samples of `{name}` have no mean; remove data.mixup or this modality.")
            if spec.cutmix and not part.is_map:
                raise M3Error(f"data.mixup.cutmix: `{name}` is no picture that a box can be cut from; set it to 0.")

    def __call__(self, batch: Batch) -> Batch:
        """Mix a micro-batch. A pair of which one lacks a modality that the other has stays as it is.

        Raises:
            M3Error: its size is odd.
        """
        unit = 2 * self.repeats
        if len(batch) % unit:
            raise M3Error(
                f"data.mixup mixes samples two by two, but a micro-batch has {len(batch)}; make it a multiple of "
                f"{unit} (train.batch_size, or train.micro_batch)."
            )
        signals = {name: x.clone() for name, x in batch.signals.items()}
        for first in range(0, len(batch), unit):
            for shift in range(self.repeats):  # crops of one sample lie side by side and are no partners
                a, b = first + shift, first + unit - 1 - shift
                if all(bool(there[a] == there[b]) for there in batch.is_present.values()):
                    self._mix_pair(signals, a, b, int(batch.keys[a]))
        return replace(batch, signals=signals)

    def _mix_pair(self, signals: dict[str, Tensor], a: int, b: int, position: int) -> None:
        draws = Random(stream_number(f"mixup/{self.seed}/{position}"))
        share, is_cut = draw_share(self.spec, draws)
        if share == 1:
            return
        centre = draws.random(), draws.random()
        kept = share
        for name in (name for name in self.signals if name in signals):
            x = signals[name]
            if is_cut:
                box, kept = box_of(x.shape[-2], x.shape[-1], share, centre)
                x[a][box], x[b][box] = x[b][box].clone(), x[a][box].clone()
            else:
                x[a], x[b] = blend(x[a], x[b], share), blend(x[b], x[a], share)
        for name in (name for name in self.labels if name in signals):
            x = signals[name]
            x[a], x[b] = blend(x[a], x[b], kept), blend(x[b], x[a], kept)


def draw_share(spec: MixupSpec, draws: Random) -> tuple[float, bool]:
    """Draw the share in [0, 1] that a sample keeps of itself, and whether the rest is cut from its partner."""
    is_mixed = draws.random() < spec.chance
    is_cut = spec.cutmix > 0 and (spec.mixup == 0 or draws.random() < spec.switch)
    alpha = spec.cutmix if is_cut else spec.mixup
    share = draws.betavariate(alpha, alpha)
    return (share if is_mixed else 1.0), is_cut


def blend(own: Tensor, other: Tensor, share: float) -> Tensor:
    """Return share * own + (1 - share) * other, rounded where the values are whole numbers."""
    mixed = own.float() * share + other.float() * (1 - share)
    return mixed if own.is_floating_point() else mixed.round().to(own.dtype)


def box_of(height: int, width: int, share: float, centre: tuple[float, float]) -> tuple[tuple, float]:
    """Return the box that is exchanged, as an index, and the share that stays outside it.

    Args:
        height: of the picture.
        width: of the picture.
        share: of the picture that would stay if the box lay inside it.
        centre: of the box in [0, 1), down and across; what reaches over the edge is cut off.
    """
    edges = []
    for extent, at in zip((height, width), centre, strict=True):
        side, middle = int(extent * math.sqrt(1 - share)), int(at * extent)
        edges.append((max(0, middle - side // 2), min(extent, middle + (side + 1) // 2)))
    (top, bottom), (left, right) = edges
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return (..., slice(top, bottom), slice(left, right)), kept
