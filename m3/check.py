"""`m3 check`: the smallest run of a recipe that still goes through every stage."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from m3.checkpoint import newest
from m3.data.world import WorldSource
from m3.errors import M3Error
from m3.model import M3Model
from m3.recipe import Recipe, recipe_from
from m3.train import train

STEPS = 3
SAMPLES = 4


def shrink(recipe: Recipe, out: Path, steps: int = STEPS) -> Recipe:
    """Return the recipe with the same parts but a small network, a small batch, `steps` steps and scenes of the world.

    Where the world makes no such signals the recipe's own data are used. Token counts, masks, targets and losses
    stay those of the recipe.
    """
    settings = recipe.model_dump(mode="json", exclude_none=True)
    settings["out"] = str(out)
    settings["backbone"] |= {"width": 32, "depth": 2, "heads": 2}
    for objective in settings["objectives"].values():
        for part in [objective, *objective.get("targets", {}).values()]:
            if "decoder" in part:
                part["decoder"] = _small_decoder(part["decoder"])
    if {entry.get("type") for entry in settings["modalities"].values()} <= set(WorldSource.SIGNALS):
        settings["data"] = {"source": "world"}
    settings["data"] |= {"samples": 4 * SAMPLES, "held_out": SAMPLES, "workers": 0}
    settings["train"].pop("epochs", None)
    settings["train"] |= {"steps": steps, "batch_size": SAMPLES, "micro_batch": SAMPLES // 2, "warmup": 1}
    settings["train"] |= {"log_every": 1, "save_every": 2, "trackers": [], "precision": "fp32", "compile": False}
    settings["evaluate"] |= {"samples": SAMPLES, "preview_rows": 2}
    settings["evaluate"].pop("every", None)
    return recipe_from(settings, recipe.name)


def check(recipe: Recipe) -> None:
    """Train the shrunk recipe three steps, save it, load it, and compare; print what was done.

    Raises:
        M3Error: what went wrong in the recipe, or a loaded model that differs from the saved one.
    """
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        small = shrink(recipe, Path(folder) / "run")
        train(small)
        model = M3Model.from_pretrained(small.folder / "model")
        again = M3Model.from_pretrained(small.folder / "model")
        pairs = zip(model.parameters(), again.parameters(), strict=True)
        if newest(small.folder) is None or not all(torch.equal(a, b) for a, b in pairs):
            raise M3Error(f"{recipe.name}: the saved model does not load as it was; please report this.")
    console.print(f"[green]{recipe.name} is fine[/]: built tiny, {STEPS} steps, saved, loaded, predicted.")


def _small_decoder(decoder: dict[str, Any]) -> dict[str, Any]:
    return {**decoder, "width": 16, "depth": 1, "heads": 2}
