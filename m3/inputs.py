"""What the commands that use a trained model are given: a model by its folder, samples by files or as they stand."""

from __future__ import annotations

from pathlib import Path

from m3.errors import M3Error
from m3.model import M3Model
from m3.processor import M3Processor
from m3.progress import no_progress_bars


def open_model(path: str) -> tuple[M3Model, M3Processor]:
    """Load a model for use, with its processor.

    Args:
        path: folder of a model or of the run that made it, or Hub id.

    Raises:
        M3Error: there is none.
    """
    if not (Path(path) / "config.json").is_file() and (Path(path) / "model" / "config.json").is_file():
        path = str(Path(path) / "model")  # the folder of a run
    try:
        with no_progress_bars():
            model = M3Model.from_pretrained(path).eval()
    except OSError as error:
        raise M3Error(
            f"there is no model in `{path}`: neither a folder that `m3 train` wrote (runs/NAME/model) nor a Hub "
            f"id that can be reached ({str(error).splitlines()[0]})."
        ) from error
    return model, M3Processor.from_pretrained(path)


def columns_of(inputs: list[str], model: M3Model) -> dict[str, list[str]]:
    """Read `modality=file` entries, or files of the first modality: modality -> its samples, in their order."""
    columns: dict[str, list[str]] = {}
    for entry in inputs:
        name, sign, value = entry.partition("=")
        if not sign:
            name, value = next(iter(model.modalities)), entry
        columns.setdefault(name, []).append(value)
    return columns
