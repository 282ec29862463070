"""`m3 embed`: where files and sentences lie in the shared space of a contrastive model, and how alike they are.

Letters: B samples of a side, E width of the shared space.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from m3.errors import M3Error
from m3.inputs import columns_of, open_model


def embed_files(model_path: str, inputs: list[str], out: Path | None, objective: str | None = None) -> None:
    """Print how alike the samples of different modalities are; each modality may have a number of its own.

    Args:
        model_path: folder of a model or of the run that made it, or Hub id.
        inputs: `modality=file`, or `text=SENTENCE`.
        out: .npz file for the unit vectors, side -> (B, E) float32; None: none is written.
        objective: name of the contrastive objective; None: the first one.

    Raises:
        M3Error: no model there, one without a shared space, inputs that can't be read, or an `out` that is no .npz.
    """
    if out is not None and out.suffix != ".npz":
        raise M3Error(f"--out writes an .npz file, got {out}; end its name in .npz.")
    model, processor = open_model(model_path)
    columns = columns_of(inputs, model)
    vectors: dict[str, torch.Tensor] = {}
    names: dict[str, list[str]] = {}
    for modality, samples in columns.items():
        given: dict[str, Any] = {modality: samples}
        for side, found in model.embed(processor(**given), objective).items():
            if side in vectors:
                raise M3Error(f"`{modality}` is a part of side `{side}`, which can't be embedded in parts from here.")
            vectors[side], names[side] = found, samples
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(out, **{side: x.numpy() for side, x in vectors.items()})  # type: ignore[arg-type]
    _print(vectors, names, out)


def _print(vectors: dict[str, torch.Tensor], names: dict[str, list[str]], out: Path | None) -> None:
    console = Console()
    first, *others = vectors
    for side in others:
        table = Table(title=f"Similarity of {first} and {side}", title_justify="left")
        table.add_column(side)
        for name in names[first]:
            table.add_column(Path(name).name, justify="right")
        for name, row in zip(names[side], vectors[side] @ vectors[first].T, strict=True):
            table.add_row(name, *(f"{value:.3f}" for value in row.tolist()))
        console.print(table)
    shapes = ", ".join(f"{side} {x.shape[0]} x {x.shape[1]}" for side, x in vectors.items())
    console.print(f"Vectors: {shapes}" + (f" in {out}" if out else ""), highlight=False, soft_wrap=True)
