"""How well a classifier answers questions, by the score of visual question answering.

Letters: n samples, K answers.
"""

from __future__ import annotations

from torch import Tensor

from m3.errors import M3Error
from m3.evaluate.bootstrap import of_hits
from m3.evaluate.task import Row
from m3.evaluate.tasks.accuracy import Accuracy
from m3.model import M3Model


class VqaAccuracy(Accuracy):
    """Mean score of the most likely answer, beside the one answer that scores best on the training samples.

    The score of each answer is the truth that the classifier was trained with, see the modality `answers`; a sample
    whose answers are all unknown counts with 0. Accuracy in the sense of Antol et al. 2015, section 4.
    """

    class Spec(Accuracy.Spec):
        """Settings of `type: vqa_accuracy`, those of `accuracy`."""

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        if not self.part.several:
            raise M3Error(
                f"evaluate.tasks.{name}: `{self.part.spec.label}` has one class for each sample; use `type: accuracy`, "
                f"or a label of `type: answers`."
            )

    def _several(self, keys: Tensor, guesses: Tensor, truth: Tensor, frequency: Tensor) -> Row:
        own = truth.gather(1, guesses.argmax(1, keepdim=True))[:, 0]
        scores = of_hits(keys, own, truth[:, frequency.argmax()])
        return Row.of(scores, self.name, "VQA accuracy", "majority", True, self.seed)
