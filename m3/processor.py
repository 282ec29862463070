"""M3Processor: from photographs, files and arrays to a `Batch`, and back to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers.processing_utils import ProcessorMixin

from m3.data.loader import Loaded, collate, fit_together
from m3.errors import M3Error, nearest
from m3.model import Reconstruction
from m3.network import build_modalities
from m3.plugins import Crop
from m3.types import Batch


class M3Processor(ProcessorMixin):
    """Prepares any subset of a model's modalities.

    Args:
        modalities: the `modalities` section of the model's config.
    """

    def __init__(self, modalities: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.modalities = modalities or {}
        self.parts = build_modalities(self.modalities)

    def __call__(self, *, seed: int = 0, **inputs: Any) -> Batch:  # type: ignore[override]  # any modality's name
        """Make a batch, e.g. `processor(image=photo, depth="depth.png")`.

        Args:
            seed: of the samples' keys, from which masks are drawn.
            inputs: modality -> one sample or a list of samples, each a path, PIL image, array or tensor;
                None in a list means that this sample lacks the modality. All lists have the same length.

        Raises:
            M3Error: unknown modality, lists of different lengths, or a sample that can't be read.
        """
        columns = {}
        for name, value in inputs.items():
            if name not in self.parts:
                raise M3Error(f"the model has no modality `{name}`.{nearest(name, self.parts)}")
            columns[name] = list(value) if isinstance(value, list | tuple) else [value]
        if not any(sample is not None for column in columns.values() for sample in column):
            raise M3Error("nothing was given to prepare; give at least one modality, e.g. processor(image=photo).")
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise M3Error(f"every modality needs the same number of samples, at least one, got {lengths}.")
        samples = []
        for row in range(next(iter(lengths.values()))):
            samples.append(
                self._load({n: column[row] for n, column in columns.items()}, seed * 1_000_003 + row, str(row))
            )
        return collate(samples, self.parts)

    def show(self, result: Reconstruction) -> dict[str, list[np.ndarray]]:
        """Draw what `M3Model.reconstruct` predicted: target -> one uint8 (H, W, 3) picture per sample."""
        parts = {name: self.parts[modality] for name, modality in result.modality_of.items()}
        return {name: [parts[name].show(x) for x in value] for name, value in result.predicted.items()}

    def _load(self, given: dict[str, Any], key: int, name: str) -> Loaded:
        parts = {n: self._read(n, sample) for n, sample in given.items() if sample is not None}
        raw = {n: self.parts[n].to_raw(part) for n, part in parts.items()}
        signals = fit_together(raw, self.parts, Crop())
        known = {n: self.parts[n].times(part) for n, part in parts.items()}
        return Loaded(signals, key, name, {n: times for n, times in known.items() if times is not None})

    def _read(self, name: str, sample: Any) -> Any:
        part = self.parts[name]
        if isinstance(sample, Path) or (isinstance(sample, str) and not part.is_inline):
            path = Path(sample)
            if not path.is_file():
                raise M3Error(f"there is no file {path} for `{name}`; check the path.")
            try:
                return part.cut(part.load(path), 0.5)
            except Exception as error:
                raise M3Error(f"{path} can't be read as `{name}`: {str(error).rstrip('.')}.") from error
        return part.cut(sample, 0.5)
