"""Do frozen features tell samples apart at all: their effective rank and deviation, without a label.

Letters: B batch, n samples, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3.evaluate.encodings import FeatureSpec
from m3.evaluate.features import check_features
from m3.evaluate.task import Row, Task
from m3.model import M3Model
from m3.monitors import deviation, effective_rank
from m3.types import Batch


class Spread(Task):
    """RankMe (Garrido et al. 2023) and the relative deviation of held-out features, beside fresh weights'.

    Both are 1 and 0 for features that say the same of every sample. The rank can't be higher than the number of
    samples, and low values of either are a sign, not a proof: fresh networks spread little and yet lose nothing.
    """

    class Spec(FeatureSpec):
        """Settings of `type: spread`."""

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        self.inputs = check_features(model, spec, f"evaluate.tasks.{name}")
        self._features: dict[str, list[Tensor]] = {"model": [], "random": []}

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Keep features of held-out samples that have any of the inputs."""
        if not any(name in batch.signals for name in self.inputs):
            return
        for name in ("model", "random"):
            features, is_there = self.encodings.of(batch, self.inputs, self.spec, is_fresh=name == "random")
            self._features[name].append(features[is_there.cpu()])

    def rows(self) -> list[Row]:
        """Return a row for the rank and one for the deviation."""
        found = {name: torch.cat(parts) for name, parts in self._features.items() if parts}
        self._features = {"model": [], "random": []}
        self.encodings.forget()
        if len(found.get("model", ())) < 2:
            return []
        width = found["model"].shape[1]
        ranks = {name: float(effective_rank(x)) for name, x in found.items()}
        shares = {name: float(deviation(x) / x.square().mean().sqrt()) for name, x in found.items()}
        return [
            Row(f"{self.name}, rank", f"RankMe of {width}", ranks["model"], ranks["random"], "random", True),
            Row(f"{self.name}, deviation", "share of size", shares["model"], shares["random"], "random", True),
        ]
