"""`m3 reconstruct`: what a trained model makes of files."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from m3.errors import M3Error
from m3.inputs import columns_of, open_model
from m3.show import preview


def reconstruct_files(model_path: str, inputs: list[str], out: Path, visible: float | None, seed: int) -> None:
    """Draw seen, predicted and true signals of files, one row per sample.

    Args:
        model_path: folder of a model or of the run that made it, or Hub id.
        inputs: files, or `modality=file`; several files of one modality are several samples.
        out: PNG file to write.
        visible: share of visible tokens of what is given; None: the recipe's masking for a model of one
            modality, everything that is given for a model of several.
        seed: of the masks.

    Raises:
        M3Error: no model there, files that can't be read, or an `out` that is no .png.
    """
    if out.suffix.lower() != ".png":
        raise M3Error(f"--out writes a PNG file, got {out}; end its name in .png.")
    if visible is not None and not 0 < visible <= 1:
        raise M3Error(f"--visible must be a share in (0, 1], got {visible}.")
    model, processor = open_model(model_path)
    columns = columns_of(inputs, model)
    batch = processor(seed=seed, **columns)
    shown = None
    if visible is not None:
        shown = dict.fromkeys(columns, visible)
    elif len(model.modalities) > 1:
        shown = dict.fromkeys(columns, 1.0)
    preview(model, batch, {"": shown}, out, seed)
    Console().print(f"Picture: {out}")
