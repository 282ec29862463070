"""M3Processor: from photographs, files and arrays to a `Batch`, and back to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.processing_utils import ProcessorMixin

from m3.data.loader import Loaded, collate
from m3.errors import M3Error, nearest
from m3.model import Reconstruction, build_modalities
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
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise M3Error(f"every modality needs the same number of samples, at least one, got {lengths}.")
        samples = []
        for row in range(next(iter(lengths.values()))):
            given = {n: self._read(n, column[row]) for n, column in columns.items() if column[row] is not None}
            samples.append(Loaded(given, seed * 1_000_003 + row, str(row), {}, ()))
        return collate(samples)

    def show(self, result: Reconstruction, targets: dict[str, str] | None = None) -> dict[str, list[np.ndarray]]:
        """Draw predictions: target -> one uint8 (H, W, 3) picture per sample.

        Args:
            result: what `M3Model.reconstruct` returned.
            targets: target -> modality, for targets that are not named after theirs.
        """
        parts = {name: self.parts[(targets or {}).get(name, name)] for name in result.predicted}
        return {name: [parts[name].show(x) for x in value] for name, value in result.predicted.items()}

    def _read(self, name: str, sample: Any) -> torch.Tensor:
        part = self.parts[name]
        if isinstance(sample, str | Path):
            path = Path(sample)
            if not path.is_file():
                raise M3Error(f"there is no file {path} for `{name}`; check the path.")
            try:
                sample = part.load(path)
            except Exception as error:
                raise M3Error(f"{path} can't be read as `{name}`: {error}.") from error
        return part.fit(part.to_raw(sample), Crop())
