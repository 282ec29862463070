"""Start a model from the weights of another one."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from m3.errors import M3Error
from m3.model import M3Model


@torch.no_grad()
def load_weights(model: nn.Module, source: str) -> str:
    """Copy all weights of a trained model that `model` has under the same name and of the same shape.

    Args:
        model: is changed.
        source: folder or Hub id of the trained model.

    Returns:
        A sentence that says what was taken and what was left fresh.

    Raises:
        M3Error: the source can't be read, has nothing in common with the model, or differs in the shape of a weight.
    """
    try:
        theirs = M3Model.from_pretrained(source).state_dict()
    except (OSError, ValueError) as error:
        raise M3Error(f"init: {source} can't be read as a model ({str(error).splitlines()[0]}); check it.") from error
    own = model.state_dict()
    shared = [name for name in own if name in theirs]
    if not shared:
        raise M3Error(f"init: {source} has no weight in common with this model; choose a model of the same parts.")
    for name in shared:
        if own[name].shape != theirs[name].shape:
            raise M3Error(
                f"init: `{name}` has shape {tuple(theirs[name].shape)} in {source}, but {tuple(own[name].shape)} "
                f"here; make the recipes alike."
            )
        own[name].copy_(theirs[name])
    sentence = f"init: {len(shared)} of {len(own)} tensors come from {source}"
    fresh = Counter(".".join(name.split(".")[:2]) for name in own if name not in theirs)
    return sentence + (f"; fresh: {', '.join(fresh)}" if fresh else "")
