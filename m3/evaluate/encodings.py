"""Frozen features of a batch, worked out once for all tasks that ask for the same.

Letters: B batch, N tokens, D width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from m3.config import M3Config
from m3.model import M3Model
from m3.plugins import Strict
from m3.types import Batch

Found = tuple[Tensor, Tensor]


class FeatureSpec(Strict):
    """Settings of every task that reads frozen features.

    Attributes:
        inputs: modalities that are encoded together; null: those of the model's first view.
        pool: `mean` of the tokens' states; `class`: the class token's; `attentive`: a learned query attends to all of
            them (V-JEPA's probe), which only a probe with `classifier: sgd` can learn.
        layer: number of the block whose states are read (0 = the first); null: the encoder's result.
    """

    inputs: tuple[str, ...] | None = None
    pool: Literal["mean", "class", "attentive"] = "mean"
    layer: NonNegativeInt | None = None


class Encodings:
    """Encodes the batch that the tasks are at, with the model and with the same network of fresh weights."""

    def __init__(self, model: M3Model, seed: int) -> None:
        self.model, self.seed = model, seed
        self._batch: Batch | None = None
        self._found: dict[tuple[Any, ...], Found] = {}

    @cached_property
    def fresh(self) -> M3Model:
        """The model of the same config with weights of another seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            return M3Model(cast(M3Config, copy.deepcopy(self.model.config))).eval()

    def of(self, batch: Batch, inputs: tuple[str, ...], spec: FeatureSpec, *, is_fresh: bool = False) -> Found:
        """Return the features (B, D) float32 on the host, and (B,) bool, True for samples that have any of the inputs.

        To be pooled attentively, they are the states of all tokens (B, N D), NaN where one does not exist.

        Args:
            batch: it may hold more than the inputs; the next task that asks about the same object shares the result.
            inputs: modalities that are encoded together.
            spec: how states become features.
            is_fresh: by the network with fresh weights instead of the model.
        """
        if batch is not self._batch:
            self._batch, self._found = batch, {}
        key = (inputs, spec.pool, spec.layer, is_fresh)
        if key not in self._found:
            model = self.model
            if is_fresh:
                model = self.fresh
                model.to(self.model.device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
            self._found[key] = _encode(model, only(batch, inputs), spec)
        return self._found[key]

    def forget(self) -> None:
        """Keep nothing of the last batch: the weights may change before it is asked for again."""
        self._batch, self._found = None, {}


def only(batch: Batch, inputs: tuple[str, ...]) -> Batch:
    """Return the batch with these modalities alone."""
    return replace(batch, signals={name: x for name, x in batch.signals.items() if name in inputs})


@torch.no_grad()
def _encode(model: M3Model, batch: Batch, spec: FeatureSpec) -> Found:
    layer = spec.layer
    found = model.encode(batch, () if layer is None else (layer,))
    if layer is not None:
        found = replace(found, sequence=found.layers[layer])
    is_valid = found.plan.is_valid
    is_there = torch.ones_like(batch.keys, dtype=torch.bool) if is_valid is None else is_valid.any(1)
    if spec.pool == "attentive":
        states = found.sequence.float()
        if found.is_valid is not None:
            states = states.masked_fill(~found.is_valid.unsqueeze(-1), float("nan"))
        return states.flatten(1).cpu(), is_there
    pooled = found.prefix[:, 0] if spec.pool == "class" else found.pooled
    return pooled.float().cpu(), is_there
