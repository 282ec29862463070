"""How well a model foresees class ids, in nats per token: words, codes, value tokens.

Letters: B batch, T targets, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch

from m3.errors import M3Error, nearest
from m3.evaluate.bootstrap import Tally, ratio
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
        self._tally = Tally()

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
        found, tokens, plan = self.model.sample_losses(batch, self.spec.visible, self.seed, self.objective)
        own, count = found[name]
        if self.spec.baseline == "unigram":
            truth, is_asked = self.part.asked(name, plan, tokens)
            usual = -(self._frequency / self._frequency.sum()).log()
            other = (usual[truth.clamp(min=0)] * is_asked).sum(1)
        else:
            other = self.model.sample_losses(batch, {}, self.seed, self.objective)[0][name][0]
        self._tally.add(batch.keys, torch.stack([own, count], 1), torch.stack([other, count], 1))

    def rows(self) -> list[Row]:
        """Return one row."""
        scores = self._tally.scores(ratio)
        if scores is None or not scores.own[:, 1].sum():
            return []
        return [Row.of(scores, self.name, "nats per token", self.spec.baseline, False, self.seed)]
