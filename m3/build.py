"""From a recipe to the config of its model, and to the model without memory for its weights."""

from __future__ import annotations

import torch

from m3.config import M3Config
from m3.model import M3Model
from m3.network import resolved
from m3.recipe import Recipe


def model_config(recipe: Recipe) -> M3Config:
    """Return the part of a recipe that describes the model."""
    return M3Config(
        modalities={name: resolved(entry, f"modalities.{name}") for name, entry in recipe.modalities.items()},
        backbone=recipe.backbone.model_dump(),
        towers={name: tower.model_dump(mode="json") for name, tower in recipe.towers.items()},
        objectives=recipe.objectives,
        seed=recipe.seed,
    )


def meta_model(recipe: Recipe) -> M3Model:
    """Build the recipe's model without memory for its weights."""
    with torch.device("meta"):
        return M3Model(model_config(recipe))
