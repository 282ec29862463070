"""MAE with its decoder (facebookresearch/mae: `*_full`, `mae_visualize_*`): a ViT in timm's names, and

    mask_token, decoder_pos_embed, decoder_embed, decoder_blocks.N.(as blocks), decoder_norm, decoder_pred

Letters: D width of the encoder, E of the decoder, h, w patch, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, get
from m3.foreign.rows import Row, computed, permuted, same, shaped
from m3.foreign.vision import pair
from m3.formats.vit import encoder_of, encoder_rows, is_fixed

DECODER = "objectives.reconstruct.decoders.image"


class Mae(Format):
    """MAE's own code."""

    title = "MAE with its decoder"

    def fits(self, foreign: Foreign) -> bool:
        """Know it by the decoder's names."""
        needed = {"decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "pos_embed"}
        return needed <= foreign.shapes.keys() and not vision.is_sound(foreign)

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes; 16 heads in the decoder and normalised targets are the paper's."""
        image, backbone = encoder_of(foreign, given)
        heads = get(given, "objectives.reconstruct.decoder.heads", 16)
        normalise = get(given, "objectives.reconstruct.targets.image.target.normalise", True)
        return with_decoder(foreign, image, backbone, heads, normalise)

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of encoder and decoder."""
        block, own, depth = (
            "decoder_blocks.{}",
            f"{DECODER}.blocks.{{}}",
            get(config.objectives or {}, "reconstruct.decoder.depth"),
        )
        return [
            *encoder_rows(config),
            *decoder_rows(config),
            *vision.blocks(block, own, depth, vision.TIMM),
            *vision.fused(f"{block}.attn.qkv", own, depth),
        ]

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        return [
            "targets are taken to be normalised patches (the `_full` files); for `mae_visualize` files give "
            "objectives.reconstruct.targets.image.target.normalise=false."
        ]


def with_decoder(
    foreign: Foreign, image: dict[str, Any], backbone: dict[str, Any], heads: int, normalise: bool, theirs: str = ""
) -> dict[str, Any]:
    """Return the config of an MAE with the decoder that the shapes describe; `theirs` begins every name of it.

    Raises:
        M3Error: the decoder has learned positions, which ours has not.
    """
    width, depth = (
        foreign.shapes[f"{theirs}decoder_embed.weight"][0],
        foreign.count(r".*decoder_(?:blocks|layers)\.(\d+)\."),
    )
    size, patch = pair(image["size"]), pair(image["tokenizer"]["size"])
    tokens = (size[0] // patch[0], size[1] // patch[1])
    if not is_fixed(foreign.tensors[f"{theirs}decoder_pos_embed"], tokens, backbone["class_tokens"]):
        raise M3Error(
            f"`{theirs}decoder_pos_embed` is not the fixed sin-cos table of {tokens[0]} x {tokens[1]} patches that "
            f"ours has (transformers fills it in where it loads weights, not where it makes a model); give the encoder "
            f"alone, without the decoder's tensors."
        )
    decoder = {"type": "self_decoder", "width": width, "depth": depth, "heads": heads}
    target = {"target": {"type": "values", "normalise": normalise}, "loss": "mse"}
    reconstruct = {"type": "reconstruct", "masking": {"type": "fixed", "visible": 0.25}, "decoder": decoder}
    reconstruct |= {"average": "token", "targets": {"image": target}}
    return {"modalities": {"image": image}, "backbone": backbone, "objectives": {"reconstruct": reconstruct}}


def decoder_rows(config: M3Config, theirs: str = "") -> list[Row]:
    """Return the rows of the decoder but for its blocks.

    Raises:
        M3Error: the model has not MAE's objective, and nothing else.
    """
    objectives, backbone = config.objectives or {}, config.backbone or {}
    decoder = get(objectives, "reconstruct.decoder", {})
    targets = get(objectives, "reconstruct.targets", {})
    if list(objectives) != ["reconstruct"] or decoder.get("type") != "self_decoder" or list(targets) != ["image"]:
        raise M3Error("MAE is one objective `reconstruct` of the target `image` with a `self_decoder`.")
    image = (config.modalities or {})["image"]
    size, patch, channels = pair(image["size"]), pair(image["tokenizer"]["size"]), image.get("channels", 3)
    tokens, width = (size[0] // patch[0], size[1] // patch[1]), decoder["width"]
    table = vision.table_of(backbone, tokens, width, backbone["class_tokens"])
    order = pixel_order(patch, channels)
    return [
        computed(f"{theirs}decoder_pos_embed", table),
        shaped(f"{theirs}mask_token", f"{DECODER}.mask_token", (1, 1, width), (1, width)),
        *same(f"{theirs}decoder_embed", f"{DECODER}.embed"),
        *same(f"{theirs}decoder_norm", f"{DECODER}.norm"),
        *(permuted(f"{theirs}decoder_pred.{part}", f"{DECODER}.output.{part}", order) for part in ("weight", "bias")),
    ]


def pixel_order(patch: tuple[int, int], channels: int) -> Tensor:
    """Return where in (row, column, channel) each value of our (channel, row, column) stands."""
    count = patch[0] * patch[1] * channels
    return torch.arange(count).reshape(*patch, channels).permute(2, 0, 1).flatten()
