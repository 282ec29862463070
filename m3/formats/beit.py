"""BEiT and BEiT v2 (microsoft/unilm), pre-trained or fine-tuned, and timm's `beit_*`, which have the same names:

    cls_token, mask_token, pos_embed, patch_embed.proj, rel_pos_bias.relative_position_bias_table, blocks.N.(norm1,
    attn.(q_bias, v_bias, qkv.weight, proj, relative_position_bias_table), gamma_1, norm2, mlp.fc1, mlp.fc2, gamma_2),
    norm, lm_head

Keys have no bias. The table is shared in pre-training, and there is one in each block after fine-tuning.
Letters: D width, H heads, h, w tokens of the grid, K codes.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from m3.backbone import BackboneSpec
from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import pairs, vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, backbone_of, get, ratio_of, square
from m3.foreign.rows import Left, Row, one, same, shaped

HALF = (0.5, 0.5, 0.5)
TOKENIZER = "objectives.reconstruct.targets.codes.target.tokenizer"
HEAD = "objectives.reconstruct.decoders.codes.output"
INDEX = Left(r".*relative_position_index", "a buffer that follows from the size of the grid")


class Beit(Format):
    """BEiT's own code, and timm's."""

    title = "BEiT in its own names (unilm, timm)"
    left = (
        INDEX,
        Left(
            r"(head|fc_norm)\..*", "a classifier of the task it was tuned for, with the norm of the mean that it reads"
        ),
        Left(r"lm_head\..*", f"the head for the codes of a tokenizer, which was not given ({TOKENIZER})"),
        Left(r"mask_token", "a mask token of its pretraining, which the encoder does not use"),
        Left(
            r"cls_pt_(layers|norm|fc_norm|lm_head)\..*", "BEiT v2's second head, which is there in its pretraining only"
        ),
    )

    def fits(self, foreign: Foreign) -> bool:
        """Know it by the biases of queries without those of keys, a class token and flat patches."""
        needed = {"cls_token", "blocks.0.attn.q_bias", "blocks.0.mlp.fc1.weight"}
        return needed <= foreign.shapes.keys() and len(foreign.shapes.get("patch_embed.proj.weight", ())) == 4

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes; with a tokenizer for the codes also the pretraining."""
        image, backbone = encoder_of(foreign, given)
        sections = {"modalities": {"image": image}, "backbone": backbone, "objectives": {}}
        tokenizer = get(given, TOKENIZER)
        if tokenizer and "lm_head.weight" in foreign.shapes:
            sections["objectives"] = pretraining(tokenizer, image)
        return sections

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder, and of mask token and head where codes are predicted."""
        rows = encoder_rows(config, self.title)
        return [*rows, *head_rows(config, self.title, "mask_token", "lm_head")] if config.objectives else rows

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        eps, image = (config.backbone or {})["norm_eps"], (config.modalities or {})["image"]
        return [
            f"backbone.norm_eps={eps:g} is the usual one, and so are modalities.image.mean={list(image['mean'])} and "
            f"std={list(image['std'])} (BEiT: 0.5, BEiT v2: ImageNet's); change them if the model was made otherwise."
        ]


def encoder_of(foreign: Foreign, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return our settings of the modality `image` and of the backbone.

    Raises:
        M3Error: the grid is no square, or nothing tells where tokens are.
    """
    shapes = foreign.shapes
    width, channels, height, across = shapes["patch_embed.proj.weight"]
    tables = {
        "shared": shapes.get("rel_pos_bias.relative_position_bias_table"),
        "per_block": shapes.get("blocks.0.attn.relative_position_bias_table"),
    }
    found = {kind: shape for kind, shape in tables.items() if shape}
    if len(found) == 2 or not (found or "pos_embed" in shapes):
        raise M3Error("it needs either one relative bias for all blocks, or one for each, or `pos_embed`.")
    kind, heads = next(((kind, shape[1]) for kind, shape in found.items()), (None, None))
    if kind:
        side = (square(found[kind][0] - 3, "relative_position_bias_table") + 1) // 2
    else:
        side, heads = square(shapes["pos_embed"][1] - 1, "pos_embed"), get(given, "backbone.heads", max(1, width // 64))
    backbone = {
        "width": width,
        "depth": foreign.count(r"blocks\.(\d+)\."),
        "heads": heads,
        "mlp_ratio": ratio_of(shapes["blocks.0.mlp.fc1.weight"][0], width),
        "class_tokens": 1,
        "class_positions": "pos_embed" in shapes,
        "final_norm": "norm.weight" in shapes,
        "norm_eps": get(given, "backbone.norm_eps", 1e-6),
        "relative_bias": kind,
    }
    if "blocks.0.gamma_1" in shapes:
        backbone["layer_scale"] = vision.NO_SCALE
    is_second = foreign.count(r"(cls_pt_layers)\.") == 1
    usual = {"mean": pairs.IMAGENET_MEAN, "std": pairs.IMAGENET_STD} if is_second else {"mean": HALF, "std": HALF}
    image = {"type": "image", "size": (side * height, side * across), "channels": channels}
    for name, value in usual.items():
        image[name] = tuple(
            get(foreign.settings, f"pretrained_cfg.{name}") or (value if channels == 3 else (0.5,) * channels)
        )
    image["tokenizer"] = {"type": "patch", "size": height if height == across else (height, across)}
    image["positions"] = {"type": "learned" if "pos_embed" in shapes else "relative"}
    return image, backbone


def spec_of(config: M3Config, title: str) -> tuple[dict[str, Any], BackboneSpec]:
    """Return the modality `image` and the backbone of a model with BEiT's encoder.

    Raises:
        M3Error: the model has another.
    """
    free = ("layer_scale", "class_positions", "relative_bias")
    spec = backbone_of(config, title, free=free, class_tokens=1)
    modalities, kind = config.modalities or {}, vision.cut_of(config, "image").positions
    is_known = list(modalities) == ["image"] and kind in ("relative", "learned")
    if not is_known or (kind == "learned") != spec.class_positions:
        raise M3Error(
            f"{title} reads the modality `image` alone, with positions of type `relative`, or `learned` ones that the "
            f"class token has too."
        )
    return modalities["image"], spec


def encoder_rows(config: M3Config, title: str, theirs: str = "") -> list[Row]:
    """Return the rows of the encoder; `theirs` stands before every name of theirs."""
    image, spec = spec_of(config, title)
    width, depth, tokens = spec.width, spec.depth, pairs.tokens_of(image)
    block, own = f"{theirs}blocks.{{}}", "backbone.blocks.{}"
    table = "relative_position_bias_table"
    tables = {None: [], "shared": [f"{theirs}rel_pos_bias.{table}"]}.get(
        spec.relative_bias, [f"{block.format(n)}.attn.{table}" for n in range(depth)]
    )
    rows = [
        *vision.patches(f"{theirs}patch_embed.proj", "tokenizers.image.projection", width, pairs.kernel_of(image)),
        shaped(f"{theirs}cls_token", "backbone.prefix", (1, 1, width), (1, width)),
        *vision.blocks(block, own, depth, vision.TIMM),
        *(one(f"{block.format(n)}.attn.qkv.weight", f"{own.format(n)}.attention.qkv.weight") for n in range(depth)),
        *vision.unbiased_keys(f"{block}.attn.q_bias", f"{block}.attn.v_bias", own, depth),
        *bias_rows(tables, tokens),
    ]
    if spec.class_positions:
        rows.append(vision.learned(f"{theirs}pos_embed", "positions.image.table", tokens, "backbone.prefix_positions"))
    if spec.layer_scale:
        rows += vision.scales((f"{block}.gamma_1", f"{block}.gamma_2"), own, depth, spec.layer_scale)
    return rows + (same(f"{theirs}norm", "backbone.norm") if spec.final_norm else [])


def bias_rows(theirs: list[str], tokens: tuple[int, int]) -> list[Row]:
    """Rows of tables ((2 h - 1) (2 w - 1) + 3, H) that are our (H, 2 h - 1, 2 w - 1) and (H, 3)."""
    extents = tuple(2 * extent - 1 for extent in tokens)

    def read(x: list[Tensor]) -> list[Tensor]:
        return [x[0][:-3].t().unflatten(1, extents), x[0][-3:].t()]

    def write(x: list[Tensor]) -> list[Tensor]:
        return [torch.cat([x[0].flatten(1), x[1]], dim=1).t()]

    ours = "backbone.relative_biases.{}.{}"
    return [
        Row((name,), (ours.format(n, "table"), ours.format(n, "prefix")), read, write) for n, name in enumerate(theirs)
    ]


def pretraining(tokenizer: str, image: dict[str, Any]) -> dict[str, Any]:
    """Return our objectives of BEiT's pretraining: the codes of the hidden patches, of 196 of them 75."""
    visible = round(prod(pairs.tokens_of(image)) * 121 / 196)
    masking = {"type": "fixed", "visible": visible, "hidden": "replace", "scorer": {"type": "blocks"}}
    codes = {"of": "image", "target": {"type": "codes", "tokenizer": tokenizer}, "loss": "cross_entropy"}
    reconstruct = {"type": "reconstruct", "masking": masking, "decoder": {"type": "head"}, "targets": {"codes": codes}}
    return {"reconstruct": reconstruct}


def head_rows(config: M3Config, title: str, mask: str, head: str) -> list[Row]:
    """Return the rows of the mask token and of the layer (K, D) that predicts codes.

    Raises:
        M3Error: the model does not predict codes as BEiT does, or nothing else.
    """
    reconstruct = get(config.objectives or {}, "reconstruct", {})
    decoder, targets = reconstruct.get("decoder", {}), reconstruct.get("targets", {})
    is_head = decoder.get("type") == "head" and not (decoder.get("hidden") or decoder.get("tied"))
    is_known = list(config.objectives or {}) == ["reconstruct"] and list(targets) == ["codes"] and is_head
    if not is_known or get(targets, "codes.target.type") != "codes":
        raise M3Error(f"{title} is one objective `reconstruct` of the target `codes` with a plain `head`.")
    width = (config.backbone or {})["width"]
    return [shaped(mask, "mask_tokens.image", (1, 1, width), (1, width)), *same(head, HEAD)]
