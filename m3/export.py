"""`m3 export`: the model of a checkpoint as `from_pretrained` reads it, whether the checkpoint is whole or cut up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from m3 import checkpoint, sharded
from m3.config import M3Config
from m3.errors import M3Error
from m3.model import M3Model
from m3.processor import M3Processor
from m3.progress import no_progress_bars
from m3.saving import EMA, MODEL, own_weights


def export(source: Path, out: Path, is_average: bool = False) -> None:
    """Write the model of a checkpoint, in one process; nothing is changed where it comes from.

    Args:
        source: folder of a run, whose newest undamaged checkpoint is taken, or of one checkpoint.
        out: folder for config, weights (safetensors), card and recipe; new or empty.
        is_average: the weights are those that `train.ema` averages (`model_ema` of a finished run), not the trained.

    Raises:
        M3Error: there is no undamaged checkpoint, it holds no averaged weights, or `out` holds something.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise M3Error(f"{out} exists already; name a new folder.")
    found = _find(source)
    state = checkpoint.read_state(found)
    model = M3Model(M3Config(**state["model"], seed=state["order"]["seed"]))
    _load(found, model, is_average)
    model.config.about = {"recipe": state["recipe"], "steps": state["step"]}
    with no_progress_bars():
        model.save_pretrained(out)
    M3Processor(model.config.modalities).save_pretrained(out)
    recipe = found.parent.parent / "recipe.yaml"
    if recipe.is_file():
        shutil.copyfile(recipe, out / recipe.name)
    print(f"{out}: the {'averaged' if is_average else 'trained'} weights of {found}")


def _find(source: Path) -> Path:
    """Return the newest checkpoint that is as it was written; damaged ones are told, and stay where they are."""
    found = [source] if (source / checkpoint.STATE).is_file() else checkpoint.whole_ones(source)
    if not found:
        raise M3Error(f"{source} is neither a run with a checkpoint nor a checkpoint (runs/NAME/checkpoints/step-...).")
    for path in found:
        reason = checkpoint.damage(path)
        if reason is None:
            return path
        print(f"damaged checkpoint {path}: {reason}")
    raise M3Error(f"{source} holds no undamaged checkpoint; bring the folder back from a copy.")


def _load(found: Path, model: M3Model, is_average: bool) -> None:
    """Fill a model with the weights of a checkpoint."""
    own = own_weights(model)
    averaged = {str(number): p.detach() for number, p in enumerate(model.parameters())} if is_average else {}
    folder = found / sharded.FOLDER
    if folder.is_dir():
        _check_average(found, is_average, "ema.0" in sharded.shapes(folder))
        sharded.read(folder, _named("model", own))
        sharded.read(folder, _named("ema", averaged))
        return
    _check_average(found, is_average, (found / EMA).is_file())
    _copy(load_file(found / MODEL), own)
    _copy(load_file(found / EMA) if is_average else {}, averaged)


def _check_average(found: Path, is_wanted: bool, is_there: bool) -> None:
    if is_wanted and not is_there:
        raise M3Error(f"{found} holds no averaged weights, since train.ema was not set; leave out --ema.")


def _named(kind: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {f"{kind}.{name}": tensor for name, tensor in tensors.items()}


@torch.no_grad()
def _copy(weights: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        own[name].copy_(weight)
