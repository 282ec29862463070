"""How well a model foresees class ids, in nats per token: words, codes, value tokens.

Letters: B batch, T targets, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from m3.errors import M3Error, nearest
from m3.evaluate.task import Row, Task
from m3.masking import Amount
from m3.model import M3Model
from m3.objectives.translate import Translate
from m3.plugins import Strict
from m3.types import Batch


class Likelihood(Task):
    """Mean cross-entropy of the hidden tokens of a modality; of sequences, given the true words before each.

    Only for objectives of type `translate`.
    """

    class Spec(Strict):
        """Settings of `type: likelihood`.

        Attributes:
            target: one of the objective's outputs.
            visible: what the encoder sees, as in `M3Model.reconstruct`; null: the recipe's masking.
            baseline: `unigram`: the frequencies of the ids that are asked for in training samples; `nothing`: the same
                model, which is shown nothing.
        """

        target: str
        visible: dict[str, Amount] | None = None
        baseline: Literal["unigram", "nothing"] = "unigram"

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        able = {n: part for n, part in model.objectives.items() if isinstance(part, Translate)}
        outputs = {output: n for n, part in able.items() for output in part.outputs}
        if spec.target not in outputs:
            raise M3Error(
                f"evaluate.tasks.{name}.target: no objective of type `translate` predicts `{spec.target}`."
                f"{nearest(spec.target, outputs)}"
            )
        self.objective = outputs[spec.target]
        self.part = able[self.objective]
        for other in spec.visible or {}:
            if other not in self.part.views[0].modalities:
                raise M3Error(f"evaluate.tasks.{name}.visible: the encoder never sees `{other}`; leave it out.")
        if spec.baseline == "nothing" and (spec.visible is None or spec.target in spec.visible):
            raise M3Error(
                f"evaluate.tasks.{name}: against `nothing`, `visible` must name other modalities than `{spec.target}`, "
                f"so that the same tokens are asked for."
            )
        # One more than was counted, so that what never occurred is possible.
        self._frequency = torch.ones(self.part.classes[spec.target], device=model.device)
        self._is_fitted = spec.baseline != "unigram"
        self._sums: Tensor | None = None

    @property
    def wants_training_samples(self) -> bool:
        """True until the ids of the training samples are counted."""
        return not self._is_fitted

    def fit(self, batch: Batch) -> None:
        """Count the ids that are asked for."""
        name = self.spec.target
        _, tokens, plan = self.model.losses(batch, self.spec.visible, self.seed, self.objective)
        truth, is_asked = self.part.asked(name, plan, tokens)
        self._frequency += torch.bincount(truth[is_asked], minlength=len(self._frequency))

    def add(self, batch: Batch) -> None:
        """Add up the cross-entropy of the model, that of the baseline, and the tokens."""
        self._is_fitted, name = True, self.spec.target
        loss, tokens, plan = self.model.losses(batch, self.spec.visible, self.seed, self.objective)
        own = loss.parts[name]
        if self.spec.baseline == "unigram":
            truth, is_asked = self.part.asked(name, plan, tokens)
            other = -(self._frequency / self._frequency.sum()).log()[truth[is_asked]].sum()
        else:
            other = self.model.losses(batch, {}, self.seed, self.objective)[0].parts[name].sum
        sums = torch.stack([own.sum, other, own.count]).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def rows(self) -> list[Row]:
        """Return one row."""
        if self._sums is None:
            return []
        own, other, count = self._sums.tolist()
        self._sums = None
        if not count:
            return []
        return [Row(self.name, "nats per token", own / count, other / count, self.spec.baseline, False)]
