"""transformers' DINOv2, `Dinov2Model` and `Dinov2WithRegistersModel`: a ViT with LayerScale.

    embeddings.(cls_token, register_tokens, mask_token, position_embeddings, patch_embeddings.projection),
    encoder.layer.N.(norm1, attention.attention.(query, key, value), attention.output.dense, layer_scale1.lambda1,
    norm2, mlp.(fc1, fc2) or mlp.(weights_in, weights_out), layer_scale2.lambda1), layernorm

Letters: D width, R class and register tokens, N patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import hugging, pairs, vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format
from m3.foreign.rows import Left, Row, computed, joined, same
from m3.formats.vit_mae import QKV

TITLE = "transformers' DINOv2"
LAYERS = {"norm1": "norm1", "attention.output.dense": "attention.projection", "norm2": "norm2"}
PLAIN = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
OLD = (
    *((rf"\.attention\.{name[0]}_proj\.", f".attention.attention.{name}.") for name in QKV),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"^(dinov2|dinov2_with_registers)\.", ""),
)
"""Version 5's names in memory, and those of a whole classifier -> version 4's names of the encoder."""


class Dinov2(Format):
    """transformers' DINOv2."""

    title = TITLE
    left = (Left(r"classifier\..*", "a layer of the task it was tuned for"),)

    def tidy(self, foreign: Foreign) -> Foreign:
        """Bring the layouts of all versions to one."""
        return foreign.renamed(*OLD)

    def fits(self, foreign: Foreign) -> bool:
        """Know it by its LayerScale."""
        return {"embeddings.mask_token", "encoder.layer.0.layer_scale1.lambda1"} <= foreign.shapes.keys()

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Translate its config."""
        theirs = hugging.settings_of(foreign)
        width = theirs["hidden_size"]
        if not theirs["qkv_bias"]:
            raise M3Error("its queries, keys and values have no bias, which is not read.")
        image = hugging.image_of(foreign, theirs, pairs.IMAGENET_MEAN, pairs.IMAGENET_STD)
        backbone = hugging.tower_of(theirs | {"intermediate_size": int(width * theirs["mlp_ratio"])})
        backbone |= {"class_tokens": 1 + theirs.get("num_register_tokens", 0), "class_positions": True}
        backbone["layer_scale"] = vision.NO_SCALE
        if theirs["use_swiglu_ffn"]:
            backbone["mlp"] = "swiglu"
        return {"modalities": {"image": image}, "backbone": backbone, "objectives": {}}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder."""
        image, backbone = hugging.only_image(config, TITLE)
        width, depth, kernel = backbone["width"], backbone["depth"], pairs.kernel_of(image)
        block, own = "encoder.layer.{}", "backbone.blocks.{}"
        projection = "embeddings.patch_embeddings.projection"
        scales = f"{block}.layer_scale1.lambda1", f"{block}.layer_scale2.lambda1"
        return [
            *vision.patches(projection, "tokenizers.image.projection", width, kernel),
            _places(pairs.tokens_of(image), width, backbone["class_tokens"]),
            computed("embeddings.mask_token", torch.zeros(1, width)),
            *vision.blocks(block, own, depth, LAYERS),
            *vision.split(tuple(f"{block}.attention.attention.{name}" for name in QKV), own, depth),
            *vision.scales(scales, own, depth, backbone["layer_scale"]),
            *(_gated(block, own, depth) if backbone["mlp"] == "swiglu" else vision.blocks(block, own, depth, PLAIN)),
            *same("layernorm", "backbone.norm"),
        ]

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what `AutoModel` opens."""
        image, backbone = hugging.only_image(config, TITLE)
        registers, is_gated = backbone["class_tokens"] - 1, backbone["mlp"] == "swiglu"
        found = hugging.tower_settings(backbone | ({"mlp": "gelu"} if is_gated else {}))
        del found["intermediate_size"]
        if backbone["mlp_ratio"] != int(backbone["mlp_ratio"]):
            raise M3Error(f"its mlp_ratio is a whole number, not {backbone['mlp_ratio']}.")
        found |= hugging.image_settings(image, is_square_only=True) | {
            "mlp_ratio": int(backbone["mlp_ratio"]),
            "use_swiglu_ffn": is_gated,
        }
        if not registers:
            return {"model_type": "dinov2", "architectures": ["Dinov2Model"], **found}
        name = {"model_type": "dinov2_with_registers", "architectures": ["Dinov2WithRegistersModel"]}
        return {**name, "num_register_tokens": registers, **found}

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what is not kept."""
        return ["its mask token is left out, since the encoder does not use it; it is written as zeros."]


def _places(tokens: tuple[int, int], width: int, prefix: int) -> Row:
    """Row of class token, registers and positions; registers have none, so ours are added to them."""
    theirs = ("embeddings.cls_token", "embeddings.position_embeddings", "embeddings.register_tokens")
    ours = ("backbone.prefix", "backbone.prefix_positions", "positions.image.table")

    def read(x: list[Tensor]) -> list[Tensor]:
        places = torch.cat([x[1][0, :1], x[1].new_zeros(prefix - 1, width)])
        table = x[1][0, 1:].t().reshape(width, *tokens)
        return [torch.cat([x[0][0], *(part[0] for part in x[2:])]), places, table]

    def write(x: list[Tensor]) -> list[Tensor]:
        table = torch.cat([x[1][:1], x[2].flatten(1).t()])
        registers = [(x[0] + x[1])[1:].unsqueeze(0)] if prefix > 1 else []
        return [x[0][:1].unsqueeze(0), table.unsqueeze(0), *registers]

    return Row(theirs if prefix > 1 else theirs[:2], ours, read, write)


def _gated(theirs: str, ours: str, depth: int) -> list[Row]:
    """Rows of gated MLPs, whose two halves are one matrix."""
    rows = vision.blocks(theirs, ours, depth, {"mlp.weights_out": "mlp.fc2"})
    for n in range(depth):
        for part in ("weight", "bias"):
            halves = tuple(f"{ours.format(n)}.mlp.{name}.{part}" for name in ("fc1", "fc3"))
            row = joined(halves, f"{theirs.format(n)}.mlp.weights_in.{part}")
            rows.append(Row(row.ours, row.theirs, row.write, row.read))
    return rows
