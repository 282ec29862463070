"""`m3 check`: the smallest run of a recipe that still goes through every stage."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from m3.checkpoint import newest
from m3.config import M3Config
from m3.data.world.scene import SHAPES
from m3.errors import M3Error
from m3.model import M3Model
from m3.parts import find
from m3.progress import no_progress_bars
from m3.recipe import Recipe, recipe_from
from m3.train import train

STEPS = 3
WIDTH = 32
SAMPLES = 4


NEED_ROOT = ("folder", "shards")
"""Sources that a recipe may leave without `data.root`, for its user to give."""


LARGEST = 16
"""Classes of a semantic map that a recipe keeps; the world has six."""


def shrink(recipe: Recipe, out: Path, steps: int = STEPS) -> Recipe:
    """Return the recipe with the same parts but a small network, a small batch, `steps` steps and few samples.

    Token counts, masks, targets and losses stay those of the recipe, and so does its source; scenes of the world
    stand in for a folder that it leaves open, an untrained tokenizer for a target's that is not there, semantic maps
    for codes of one that is not there, and small untrained models for teachers that are not of our own and there.
    """
    settings = recipe.model_dump(mode="json", exclude_none=True)
    settings["out"] = str(out)
    for tower in (settings["backbone"], *settings["towers"].values()):
        tower |= {"width": WIDTH, "depth": 2, "heads": 2}
    settings.pop("init", None)
    for objective in settings["objectives"].values():
        if "sides" in objective:  # a side without projection has the width of its tower
            objective["width"] = 32
        for part in [objective, *objective.get("targets", {}).values()]:
            if "decoder" in part:
                part["decoder"] = _small_decoder(part["decoder"])
        for part in (objective.get("teacher", {}), objective.get("masking", {}).get("scorer", {})):
            if "model" in part:
                _small_teacher(part, settings["modalities"], objective.get("of"), out)
        if "layers" in objective:
            objective["layers"] = min(objective["layers"], 2)
        _small_target(objective.get("target", {}), settings["modalities"], objective.get("of", ""), out)
        for name, part in objective.get("targets", {}).items():
            _small_target(part.get("target", {}), settings["modalities"], part.get("of") or name, out)
        if "swap" in objective:
            objective["swap"]["group"] = 2
    if recipe.data.root is None and recipe.data.source in NEED_ROOT:
        kinds = {entry["type"] for entry in settings["modalities"].values()}
        settings["data"] = {"source": "world", "options": {"text": "question"} if "answers" in kinds else {}}
        settings["modalities"] = {n: _of_the_world(entry) for n, entry in settings["modalities"].items()}
    settings["data"] |= {"samples": 4 * SAMPLES, "held_out": SAMPLES, "workers": 0}
    settings["train"].pop("epochs", None)
    settings["train"] |= {"steps": steps, "batch_size": SAMPLES, "micro_batch": SAMPLES // 2, "warmup": 1}
    settings["train"] |= {"log_every": 1, "save_every": 2, "trackers": [], "precision": "fp32", "compile": False}
    settings["evaluate"] |= {"samples": SAMPLES, "fit_samples": SAMPLES, "preview_rows": 2}
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
        train(small, is_shown=False)
        with no_progress_bars():
            loaded = M3Model.from_pretrained(small.folder / "model").state_dict()
        last = newest(small.folder)
        saved = load_file(last / "model.safetensors") if last else {}
        if loaded.keys() != saved.keys() or not all(torch.equal(loaded[key], saved[key]) for key in saved):
            raise M3Error(f"{recipe.name}: the saved model does not load as it was; please report this.")
    data = small.data.root or f"source `{small.data.source}`"
    console.print(
        f"[green]{recipe.name} is fine[/]: built tiny, {STEPS} steps on {data}, saved, loaded, predicted.",
        soft_wrap=True,
    )


def _small_target(target: dict[str, Any], modalities: dict[str, Any], name: str, out: Path) -> None:
    """Put a small random network in the place of a teacher, and a tokenizer where there is none."""
    if target.get("type") == "teacher":
        _small_teacher(target, modalities, name, out)
    if target.get("type") == "codes" and not (Path(target["tokenizer"]) / "config.json").is_file():
        target["tokenizer"] = _stand_in(modalities, name, out / "tokenizer")


def _small_teacher(part: dict[str, Any], modalities: dict[str, Any], name: str | None, out: Path) -> None:
    """Put an untrained model that makes as many tokens in the place of a teacher, unless this is one of ours, there."""
    kind, _, folder = part["model"].partition(":")
    pictures = [key for key, entry in modalities.items() if entry["type"] == "image"]
    if not pictures or (kind == "m3" and (Path(folder).expanduser() / "config.json").is_file()):
        return
    entry = modalities[name if name in pictures else pictures[0]]
    own = {key: entry[key] for key in ("type", "size", "tokenizer") if key in entry}
    part.update(model=f"m3:{_untrained({'image': own}, {}, out / 'teacher')}", weights=None, size=None)


def _stand_in(modalities: dict[str, Any], name: str, folder: Path) -> str:
    """Write an untrained tokenizer of a modality of a recipe, with a code for each of its tokens."""
    quantiser = {"type": "fsq", "levels": [4, 4]}
    objective = {"type": "autoencode", "of": name, "coder": {"type": "vit", "depth": 1}, "quantiser": quantiser}
    own = {
        key: value for key, value in modalities[name].items() if key != "positions"
    }  # of the model's, not of its own
    return _untrained({name: own}, {"autoencode": objective}, folder)


def _untrained(modalities: dict[str, Any], objectives: dict[str, Any], folder: Path) -> str:
    """Write a small untrained model, and return the folder."""
    backbone = {"width": WIDTH, "depth": 2, "heads": 2}
    with no_progress_bars():
        M3Model(M3Config(modalities=modalities, backbone=backbone, objectives=objectives)).save_pretrained(folder)
    return str(folder)


def _small_decoder(decoder: dict[str, Any]) -> dict[str, Any]:
    if "same_as" in decoder:
        return decoder
    known = find("decoders", decoder["type"]).Spec.model_fields  # type: ignore[attr-defined]  # every part has one
    if decoder["type"] == "head":  # as wide as the network, which its weights may be tied to
        return {**decoder, "hidden": WIDTH} if decoder.get("hidden") else decoder
    if decoder["type"] == "dpt":  # reads four blocks of as many as there are
        return {**decoder, "layers": [0, 0, 1, 1], "widths": [8, 8, 8, 8], "width": 16}
    return decoder | {key: value for key, value in {"width": 16, "depth": 1, "heads": 2}.items() if key in known}


def _of_the_world(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a modality so that scenes of the world can be read with them."""
    if entry["type"] == "label":
        return {**entry, "of": "shape", "several": False}
    if entry["type"] == "semantic_map" and entry.get("classes", 0) > LARGEST:  # big maps of them take gigabytes
        return {**entry, "classes": LARGEST}
    if entry["type"] == "boxes":
        return {**entry, "labels": list(SHAPES)}
    if entry["type"] == "codes" and not Path(entry["path"]).is_dir():
        return {"type": "semantic_map", "size": 8, "classes": 6, "tokenizer": entry["tokenizer"]}
    return entry
