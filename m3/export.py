"""`m3 export`: the model of a checkpoint as `from_pretrained` reads it, whether the checkpoint is whole or cut up."""

from __future__ import annotations

import shutil
from pathlib import Path

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
        M3Error: there is no undamaged checkpoint, another version wrote it, it holds no averaged weights, or `out`
            holds something.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise M3Error(f"{out} exists already; name a new folder.")
    found = _find(source)
    state = checkpoint.read_state(found)
    try:
        config = M3Config(**state["model"], seed=state["order"]["seed"])
        config.about = {"recipe": state["recipe"], "steps": state["step"]}
    except KeyError as error:
        raise checkpoint.another_version(found, f"its {checkpoint.STATE} has no {error}") from error
    model = M3Model(config)
    _load(found, model, is_average)
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


@torch.no_grad()
def _load(found: Path, model: M3Model, is_average: bool) -> None:
    """Fill a model with the weights of a checkpoint."""
    averaged = {str(number): p.detach() for number, p in enumerate(model.parameters())} if is_average else {}
    wanted = _named("model", own_weights(model)) | _named("ema", averaged)
    folder = found / sharded.FOLDER
    weights = {} if folder.is_dir() else _named("model", load_file(found / MODEL))
    if is_average and (found / EMA).is_file():
        weights |= _named("ema", load_file(found / EMA))
    written = sharded.shapes(folder) if folder.is_dir() else _shapes(weights)
    if is_average and "ema.0" not in written:
        raise M3Error(f"{found} holds no averaged weights, since train.ema was not set; leave out --ema.")
    kinds = ("model.", "ema.") if is_average else ("model.",)
    saved = {name: shape for name, shape in written.items() if name.startswith(kinds)}
    checkpoint.check_same_weights(saved, _shapes(wanted), found)
    for kind in kinds if folder.is_dir() else ():  # in turn, as the averaged weights take the place of the trained
        sharded.read(folder, {name: tensor for name, tensor in wanted.items() if name.startswith(kind)})
    for name, weight in weights.items():
        wanted[name].copy_(weight)


def _named(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": tensor for name, tensor in tensors.items()}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
