"""What codes tell of a teacher's features on held-out samples, beside the average feature of each place.

Letters: B batch, N tokens of the modality, C channels of the teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m3.evaluate.bootstrap import Tally, ratio
from m3.evaluate.task import Row, Task, chosen
from m3.model import M3Model
from m3.objectives.autoencode import Autoencode
from m3.plugins import Strict
from m3.types import Batch, Tokens


class DecodedFeatures(Task):
    """Cosine between a teacher's features and what an `autoencode` objective decodes from its codes (VQ-KD).

    The baseline says at every place the mean of the teacher's features there over training samples.
    """

    class Spec(Strict):
        """Settings of `type: decoded_features`.

        Attributes:
            objective: name of the `autoencode` objective with a teacher; the first one if left out.
        """

        objective: str | None = None

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        found = {n: o for n, o in model.objectives.items() if isinstance(o, Autoencode) and not o.is_signal}
        self.objective = chosen(name, "`autoencode` that decodes features", spec.objective, found)
        self._sums: Tensor | None = None
        self._tally = Tally()

    @property
    def wants_training_samples(self) -> bool:
        """True until the mean is known: the teacher stays as it is."""
        return self._sums is None

    @torch.no_grad()
    def fit(self, batch: Batch) -> None:
        """Add up the teacher's features of each place."""
        own, there = self._tokens(batch)
        sums = (self.objective.truth(self.objective.spec.of, own).double() * there.unsqueeze(-1)).sum(0)
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Add up the cosines of the model and of the baseline; the length of the mean does not matter."""
        own, there = self._tokens(batch)
        name = self.objective.spec.of
        everything = torch.arange(own.count, device=own.values.device).expand(len(own.values), -1)
        truth = self.objective.truth(name, own).float()
        decoded = self.objective.predict(name, None, {name: own}, everything).float()
        assert self._sums is not None
        guesses = (decoded, self._sums.float().expand_as(truth))
        found = [(F.cosine_similarity(guess, truth, dim=-1) * there).sum(1) for guess in guesses]
        self._tally.add(batch.keys, *(torch.stack([sums, there.sum(1)], dim=-1) for sums in found))

    def rows(self) -> list[Row]:
        """Return one row."""
        scores = self._tally.scores(ratio)
        self._tally = Tally()
        if scores is None or not scores.own[:, 1].sum():
            return []
        return [Row.of(scores, self.name, "cosine of features", "average_map", True, self.seed)]

    def _tokens(self, batch: Batch) -> tuple[Tokens, Tensor]:
        """Return the modality's tokens and (B, N) 1 for those that exist."""
        own = self.model.tokenise(batch.to(self.model.device))[self.objective.spec.of]
        there = torch.ones(own.values.shape[:2], device=own.values.device)
        return own, there if own.is_valid is None else own.is_valid.to(there.dtype)
