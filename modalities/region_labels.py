"""What a detector says that regions show, as probabilities of classes; a target, for regions that are hidden.

Letters: B batch, R regions, K classes.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor

from m3.modalities.regions import Boxed
from m3.plugins import Strict


class RegionLabels(Boxed):
    """Probabilities of classes, see `Boxed`.

    Made of the same files as `regions`, cropped and cut alike, so that label i is that of region i.
    """

    class Spec(Strict):
        """Settings of `type: region_labels`.

        Attributes:
            classes: K, the first of which is the background.
            count: R, as that of the regions.
        """

        classes: PositiveInt = 1601
        count: PositiveInt = 100

    reads = "regions"
    measure = "accuracy"
    higher_is_better = True
    entry = "soft_labels"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.width = spec.classes

    def colours(self, values: Tensor) -> Tensor:
        """Return uint8 (R, 3), a colour for each most likely class of probabilities (R, K)."""
        from matplotlib import colormaps

        best = _best(values).tolist()
        return torch.tensor([[round(200 * c) for c in colormaps["tab20"](k % 20)[:3]] for k in best]).to(torch.uint8)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Count regions whose most likely class, the background left out, is right, and regions -> (2,)."""
        counts = weight.bool() & ~truth.isnan().any(-1)
        is_right = _best(predicted[..., :-4]) == _best(truth[..., :-4])
        return torch.stack([(is_right & counts).sum(), counts.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Share of regions that are right, in [0, 1]."""
        return float(sums[0] / sums[1])


def _best(values: Tensor) -> Tensor:
    """Return the most likely class of probabilities (..., K) but the first, the background."""
    return values[..., 1:].nan_to_num(0.0).argmax(-1) + 1
