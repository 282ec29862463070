"""Metadata: what is known of a sample beside its signals, as pairs of a field and its value (4M-21, Bachmann 2024).

Letters: B batch, n fields of a sample, F declared fields, L = 2 n tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from m3.drawing import written
from m3.errors import M3Error, nearest
from m3.plugins import Crop, File, Modality, Signal, Strict
from m3.value_tokens import Bins, read_json, short

LINE = 28
"""Letters of a line in a picture."""


class Entry(Strict):
    """A field of the metadata.

    Attributes:
        name: its key in a sample.
        kind: `number` or `choice`.
        low: smallest number; smaller ones count as it (so does 4M).
        high: largest number; larger ones count as it.
        bins: equal parts that the range is divided into.
        choices: all values of a `choice`.
    """

    name: str
    kind: Literal["number", "choice"] = "number"
    low: float = 0.0
    high: float = 1.0
    bins: PositiveInt = 50
    choices: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _no_contradiction(self) -> Entry:
        if (self.kind == "choice") != bool(self.choices):
            raise ValueError(f"field `{self.name}`: a `choice` lists its `choices`, a `number` has none")
        if len(set(self.choices)) != len(self.choices):
            raise ValueError(f"field `{self.name}`: its `choices` must all be different")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"field `{self.name}`: `low` must be smaller than `high`, both finite")
        return self


class Metadata(Modality):
    """Raw: float32 (n, 2), number of the field and its value. Normalised: int64 (B, L), -1 behind the last field.

    Ids 0 ... F - 1 are the fields; the values of each have ids of their own behind them. Fields come in the order
    of their declaration (4M shuffles them).
    """

    class Spec(Strict):
        """Settings of `type: metadata`.

        Attributes:
            fields: those that the model reads; all others of a sample are left alone.
        """

        fields: tuple[Entry, ...] = Field(min_length=1)

        @model_validator(mode="after")
        def _all_different(self) -> Metadata.Spec:
            names = [entry.name for entry in self.fields]
            if len(set(names)) != len(names):
                raise ValueError(f"`fields` must have different names, got {', '.join(names)}")
            return self

    extensions = (".json",)
    measure = "accuracy of values"
    higher_is_better = True
    padding = float("nan")

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.fields, first = [], len(spec.fields)
        for entry in spec.fields:
            count = len(entry.choices) or entry.bins
            low, high = (0.0, float(count)) if entry.choices else (entry.low, entry.high)
            self.fields.append(Bins(low, high, count, first))
            first += count
        self.classes = first

    @property
    def signal(self) -> Signal:
        """Ids (B, L)."""
        return Signal("classes", 1, (2 * len(self.fields),), self.classes, has_gaps=True)

    def blank(self, count: int) -> Tensor:
        """Return the first field again and again, float32 (B, F, 2)."""
        return torch.zeros(count, len(self.fields), 2)

    def example_samples(self) -> list[dict[str, Any]]:
        """Return samples with values all over the ranges, one of them without the last field."""
        samples = []
        for share in (0.1, 0.4, 0.6, 0.9):
            values = {
                entry.name: entry.choices[int(share * len(entry.choices))]
                if entry.choices
                else entry.low + share * (entry.high - entry.low)
                for entry in self.spec.fields
            }
            samples.append(values)
        if len(self.fields) > 1:
            del samples[1][self.spec.fields[-1].name]
        return samples

    def load(self, file: File) -> dict[str, Any]:
        """Read a JSON object {field: value}."""
        return read_json(file)

    def to_raw(self, sample: Any) -> Tensor:
        """Read a dict field -> value into float32 (n, 2); fields that are lacking or null are left out."""
        if not isinstance(sample, dict):
            raise M3Error(f"metadata must be a dict of fields and their values, got {short(sample)}.")
        rows = [
            [float(i), _number(entry, sample[entry.name])]
            for i, entry in enumerate(self.spec.fields)
            if sample.get(entry.name) is not None
        ]
        if not rows:
            names = ", ".join(entry.name for entry in self.spec.fields)
            raise M3Error(f"metadata has none of the fields {names}, got {short(sample)}; leave the sample out.")
        return torch.tensor(rows, dtype=torch.float32)

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Keep it as it is, whatever part of the picture is seen (so does 4M)."""
        return raw

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn (B, n, 2) into ids (B, L)."""
        own = raw[..., 0]
        table = torch.tensor([[b.low, b.high, b.count, b.first] for b in self.fields], device=raw.device)
        bins = Bins(*table[own.nan_to_num(0.0).long()].unbind(-1))
        return torch.stack([own.nan_to_num(-1.0).long(), bins.ids(raw[..., 1])], dim=-1).flatten(1)

    def groups(self, signal: Tensor) -> Tensor:
        """Number the pairs of (B, L) ids -> int64 (B, L)."""
        return (torch.arange(signal.shape[1], device=signal.device) // 2).expand(signal.shape)

    def decode(self, ids: Tensor) -> dict[str, Any]:
        """Turn ids (L,) into a dict; numbers are the middle of their bin.

        Pairs whose value is none of their field's are left out.
        """
        found = {}
        for field, value in ids.cpu().unflatten(0, (-1, 2)).tolist():
            if 0 <= field < len(self.fields) and self._field_of(value) == field:
                found[self.spec.fields[field].name] = self._value(value)
        return found

    def _field_of(self, value: int) -> int | None:
        """Return the field whose value an id is; None for all other ids."""
        return next((i for i, b in enumerate(self.fields) if b.first <= value < b.first + b.count), None)

    def _value(self, value: int) -> str | float:
        field = self._field_of(value)
        assert field is not None, f"{value} is no value's id"
        choices, bins = self.spec.fields[field].choices, self.fields[field]
        return choices[value - bins.first] if choices else float(bins.values(torch.tensor(value)))

    def _word(self, i: int) -> str:
        """Write one id."""
        if i < len(self.fields):
            return self.spec.fields[i].name
        value = self._value(i)
        return value if isinstance(value, str) else f"{value:.4g}"

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Write (L,) ids as a table with a line for each field; hidden tokens are dots."""
        known = [True] * len(signal) if is_known is None else is_known.cpu().tolist()
        ids = signal.cpu().tolist()
        words = [self._word(i) if k else "..." for i, k in zip(ids, known, strict=True) if i >= 0]
        lines = [f"{field} = {value}" for field, value in zip(words[::2], words[1::2], strict=False)]
        return written(lines, LINE, len(self.fields))

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Count right values and values -> (2,)."""
        counts = weight.bool() & (truth >= len(self.fields))
        return torch.stack([((predicted == truth) & counts).sum(), counts.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Share of values that are in the right bin, in [0, 1]."""
        return float(sums[0] / sums[1])


def _number(entry: Entry, value: Any) -> float:
    """Return a value as a number: itself, or the place of a choice in its list."""
    if entry.choices:
        if str(value) not in entry.choices:
            raise M3Error(f"metadata: {short(value)} is no `{entry.name}`.{nearest(str(value), entry.choices)}")
        return float(entry.choices.index(str(value)))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise M3Error(f"metadata: `{entry.name}` must be a finite number, got {short(value)}.")
    return min(max(float(value), entry.low), entry.high)
