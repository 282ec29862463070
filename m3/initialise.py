"""Start a model from the weights of another one, ours or published ones."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from m3.convert import convert
from m3.errors import M3Error, within
from m3.foreign.adapt import adapt
from m3.model import M3Model
from m3.objectives.classify import Classify

UNTOLD = ("heads", "mlp", "norm", "norm_eps", "causal")
"""Settings of a transformer that the same tensors may have been trained with in another way."""


@torch.no_grad()
def load_weights(model: M3Model, source: str) -> str:
    """Copy all weights of a trained model that `model` has under the same name.

    Positions and patches of another size, and other numbers of channels, are adapted, see `m3.foreign.adapt`.

    Args:
        model: is changed.
        source: folder or Hub id of a model of ours, or a published checkpoint that `m3 convert` reads.

    Returns:
        Sentences that say what was taken, changed and left: in the model fresh, in the source unused, and which
        settings differ that no tensor tells.

    Raises:
        M3Error: the source can't be read, has nothing in common with the model, or a weight can't be adapted.
    """
    title, other = _opened(source)
    theirs, modalities, own = other.state_dict(), _modalities(other), model.state_dict()
    shared = {name: x for name, x in theirs.items() if name in own}
    if not shared:
        raise M3Error(f"init: {title} has no weight in common with this model; choose a model of the same parts.")
    with within(f"init: {title}"):
        config: Any = model.config
        said = _without_other_classes(shared, model)
        said += adapt(shared, modalities, config.modalities, {name: x.shape for name, x in own.items()})
    said += _differences(model, other)
    for name, x in shared.items():
        own[name].copy_(x)
    sentences = [f"init: {len(shared)} of {len(own)} tensors come from {title}", *said]
    for what, names in {
        "fresh": (name for name in own if name not in shared),
        "unused": (name for name in theirs if name not in own),
    }.items():
        parts = _parts(names)
        if parts:
            sentences.append(f"{what}: {', '.join(parts)}")
    return "; ".join(sentences)


def _without_other_classes(shared: dict[str, Tensor], model: M3Model) -> list[str]:
    """Take out the heads of other classes than the model's, which start anew; return a sentence for each."""
    own, said = model.state_dict(), []
    for objective in (name for name, part in model.objectives.items() if isinstance(part, Classify)):
        head = f"objectives.{objective}.head"
        weight = shared.get(f"{head}.weight")
        if weight is not None and len(weight) != len(own[f"{head}.weight"]):
            said.append(f"{objective}: the head of {len(weight)} classes is left")
            for part in ("weight", "bias"):
                del shared[f"{head}.{part}"]
    return said


def _differences(model: M3Model, other: M3Model) -> Iterator[str]:
    """Say which settings that no tensor tells are others in a model whose weights are taken."""
    here, there = _untold(model), _untold(other)
    for name, value in here.items():
        if name in there and there[name] != value:
            is_short = len(f"{value}{there[name]}") < 200
            yield f"{name} is {value} and seems to be {there[name]} there" if is_short else f"{name} is another there"


def _untold(model: M3Model) -> dict[str, Any]:
    transformers = {f"towers.{name}": tower for name, tower in model.towers.items()}
    transformers |= {"backbone": model.backbone} if model.backbone else {}
    found = {f"{name}.{key}": getattr(part.spec, key) for name, part in transformers.items() for key in UNTOLD}
    for name, modality in model.modalities.items():
        for key in ("mean", "std", "vocabulary"):
            value = getattr(modality, key, getattr(modality.spec, key, None))
            found |= {} if value is None else {f"modalities.{name}.{key}": value}
    return found


def _opened(source: str) -> tuple[str, M3Model]:
    """Return what the source is, and the model."""
    if not _is_ours(source):
        try:
            found = convert(source)
        except M3Error as error:
            if not re.search(r"give [\w.]+=", str(error)):
                raise
            asked = f"{str(error).rstrip('.')} to `m3 convert {source} FOLDER`, and start from FOLDER."
            raise M3Error(f"init: {asked}") from error
        return f"{source} ({found.title})", found.model
    try:
        return source, M3Model.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise M3Error(f"init: {source} can't be read as a model ({str(error).splitlines()[0]}); check it.") from error


def _is_ours(source: str) -> bool:
    """Return whether a folder, file or repository of the Hub holds a model of ours."""
    path = Path(source)
    if path.exists():
        settings = path / "config.json"
        return settings.is_file() and json.loads(settings.read_text()).get("model_type") == "m3"
    try:
        settings = Path(hf_hub_download(source, "config.json"))
    except (OSError, HFValidationError):  # whoever opens it says better what is wrong
        return True
    return json.loads(settings.read_text()).get("model_type") == "m3"


def _modalities(model: M3Model) -> dict[str, Any]:
    config: Any = model.config
    return config.modalities


def _parts(names: Iterable[str]) -> list[str]:
    return list(Counter(".".join(name.split(".")[:2]) for name in names))
