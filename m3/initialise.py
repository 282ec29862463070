"""Start a model from the weights of another one, ours or published ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
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


@torch.no_grad()
def load_weights(model: M3Model, source: str) -> str:
    """Copy all weights of a trained model that `model` has under the same name.

    Positions and patches of another size, and other numbers of channels, are adapted, see `m3.foreign.adapt`.

    Args:
        model: is changed.
        source: folder or Hub id of a model of ours, or a published checkpoint that `m3 convert` reads.

    Returns:
        Sentences that say what was taken, changed and left: in the model fresh, in the source unused.

    Raises:
        M3Error: the source can't be read, has nothing in common with the model, or a weight can't be adapted.
    """
    title, theirs, modalities = _opened(source)
    own = model.state_dict()
    shared = {name: x for name, x in theirs.items() if name in own}
    if not shared:
        raise M3Error(f"init: {title} has no weight in common with this model; choose a model of the same parts.")
    with within(f"init: {title}"):
        config: Any = model.config
        said = _without_other_classes(shared, model)
        said += adapt(shared, modalities, config.modalities, {name: x.shape for name, x in own.items()})
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


def _opened(source: str) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Return what the source is, its weights under our names, and its `modalities`."""
    if not _is_ours(source):
        found = convert(source)
        return f"{source} ({found.title})", found.model.state_dict(), _modalities(found.model)
    try:
        model = M3Model.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise M3Error(f"init: {source} can't be read as a model ({str(error).splitlines()[0]}); check it.") from error
    return source, model.state_dict(), _modalities(model)


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
