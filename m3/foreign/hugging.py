"""What the tables of transformers' models share: the names of layers, and the words of `config.json`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import SHOWN, backbone_of, ratio_of
from m3.foreign.rows import Row
from m3.foreign.vision import pair

CLIP_LAYERS = {
    "layer_norm1": "norm1",
    "self_attn.out_proj": "attention.projection",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Layers of a block of CLIP and SigLIP -> ours."""

MLP = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
"""Their `hidden_act` -> our `mlp`."""

ACTIVATION = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Our `mlp` -> their `hidden_act`."""


def settings_of(foreign: Foreign) -> dict[str, Any]:
    """Return `config.json` with all that it leaves to defaults.

    Raises:
        M3Error: there is none, or transformers does not take it.
    """
    if "model_type" not in foreign.settings:
        raise M3Error("its `config.json` is needed too; give the folder that holds both.")
    told = {key: value for key, value in foreign.settings.items() if key != "preprocessor"}
    try:
        return AutoConfig.for_model(**told).to_dict()
    except Exception as error:  # every check of transformers raises a kind of its own
        said = " ".join(str(error).split())
        raise M3Error(f"transformers does not take its `config.json` ({said}); fetch it again.") from error


def colours_of(foreign: Foreign) -> dict[str, Any]:
    """Return the `mean` and `std` that the preprocessor states, for the modality; nothing where it states none."""
    told = foreign.settings.get("preprocessor", {})
    return {name: tuple(told[f"image_{name}"]) for name in ("mean", "std") if told.get(f"image_{name}")}


def tower_of(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return our settings of a transformer.

    Raises:
        M3Error: its activation is another than ours.
    """
    if theirs["hidden_act"] not in MLP:
        raise M3Error(f"its hidden_act is `{theirs['hidden_act']}`, but only {', '.join(MLP)} can be read.")
    return {
        "width": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "mlp_ratio": ratio_of(theirs["intermediate_size"], theirs["hidden_size"]),
        "mlp": MLP[theirs["hidden_act"]],
        "norm_eps": theirs["layer_norm_eps"],
    }


def tower_settings(tower: dict[str, Any]) -> dict[str, Any]:
    """Undo `tower_of`."""
    if tower["mlp"] not in ACTIVATION:
        raise M3Error(f"transformers has no `{tower['mlp']}` here; only {', '.join(ACTIVATION)} can be written.")
    return {
        "hidden_size": tower["width"],
        "num_hidden_layers": tower["depth"],
        "num_attention_heads": tower["heads"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "hidden_act": ACTIVATION[tower["mlp"]],
        "layer_norm_eps": tower["norm_eps"],
    }


def image_of(foreign: Foreign, theirs: dict[str, Any], mean: Any, std: Any) -> dict[str, Any]:
    """Return our settings of the modality `image` with learned positions.

    Mean and deviation are those of the preprocessor; else the usual ones that are given, or 0.5 for other than colours.
    """
    size, channels = theirs["image_size"], theirs["num_channels"]
    if channels != 3:
        mean = std = (0.5,) * channels
    return {
        "type": "image",
        "size": size if isinstance(size, int) else tuple(size),
        "channels": channels,
        **{"mean": tuple(mean), "std": tuple(std)} | colours_of(foreign),
        "tokenizer": {"type": "patch", "size": theirs["patch_size"]},
        "positions": {"type": "learned"},
    }


def image_settings(image: dict[str, Any], is_square_only: bool = False) -> dict[str, Any]:
    """Undo `image_of`.

    Raises:
        M3Error: the picture is no square, and they have squares only.
    """
    size, patch = pair(image["size"]), pair(image["tokenizer"]["size"])
    if is_square_only and (size[0] != size[1] or patch[0] != patch[1]):
        raise M3Error(f"transformers has square pictures only here, but this model reads {size[0]} x {size[1]}.")
    return {
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_channels": image.get("channels", 3),
    }


def clip_rows(theirs: str, ours: str, depth: int) -> list[Row]:
    """Rows of the blocks of CLIP and SigLIP; `{}` is the block's number."""
    qkv = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
    return [*vision.blocks(theirs, ours, depth, CLIP_LAYERS), *vision.split(qkv, ours, depth)]


def only_image(config: M3Config, title: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the modality `image` and the backbone of a model that only encodes images.

    Raises:
        M3Error: it is another.
    """
    if config.objectives or config.towers or list(config.modalities or {}) != ["image"]:
        raise M3Error(f"{title} is one encoder of images without objectives; choose a format that holds more.")
    return (config.modalities or {})["image"], backbone_of(config, title, free=(*SHOWN, "mlp")).model_dump()
