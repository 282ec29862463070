"""transformers' ViTMAE, `ViTMAEForPreTraining` and `ViTMAEModel`: MAE with queries, keys and values apart.

There are three layouts on disk: version 4's, version 5's names in memory, and what version 5 saves, in which the
decoder's layers are `decoder.decoder_encoder.layer`. All are read; version 4's is written, which both versions load.
"""

from __future__ import annotations

from typing import Any

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import hugging, vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import SHOWN, Format, backbone_of
from m3.foreign.rows import Row, computed, same, shaped
from m3.foreign.vision import pair
from m3.formats.mae import DECODER, decoder_rows, with_decoder
from m3.formats.vit import is_fixed

LAYERS = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attention.projection",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
QKV = ("query", "key", "value")
OLD = (
    (r"^(embeddings|encoder|layers|layernorm)\b", r"vit.\1"),
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    *((rf"\.attention\.{name[0]}_proj\.", f".attention.attention.{name}.") for name in QKV),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
"""Any of the three layouts -> version 4's names."""


class VitMae(Format):
    """transformers' ViTMAE."""

    title = "transformers' ViTMAE"

    def tidy(self, foreign: Foreign) -> Foreign:
        """Bring the three layouts to one."""
        return foreign.renamed(*OLD)

    def fits(self, foreign: Foreign) -> bool:
        """Know it by its config, or with a decoder by its names."""
        is_said = foreign.settings.get("model_type") == "vit_mae"
        return is_said or {"decoder.decoder_embed.weight", "vit.embeddings.cls_token"} <= foreign.shapes.keys()

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Translate its config.

        Raises:
            M3Error: there is none, or it asks for what ours has not.
        """
        theirs = hugging.settings_of(foreign)
        if theirs["hidden_act"] != "gelu" or not theirs["qkv_bias"]:
            raise M3Error("only GELU and biases in queries, keys and values are read.")
        width, patch, size = theirs["hidden_size"], theirs["patch_size"], theirs["image_size"]
        backbone: dict[str, Any] = {
            "width": width,
            "depth": theirs["num_hidden_layers"],
            "heads": theirs["num_attention_heads"],
            "mlp_ratio": theirs["intermediate_size"] / width,
            "class_tokens": 1,
            "norm_eps": theirs["layer_norm_eps"],
        }
        image: dict[str, Any] = {"type": "image", "size": size, "channels": theirs["num_channels"]}
        image |= {**hugging.colours_of(foreign), "tokenizer": {"type": "patch", "size": patch}}
        tokens = (pair(size)[0] // pair(patch)[0], pair(size)[1] // pair(patch)[1])
        if not is_fixed(foreign.tensors["vit.embeddings.position_embeddings"], tokens, 1):
            image["positions"], backbone["class_positions"] = {"type": "learned"}, True
        if "decoder.decoder_embed.weight" not in foreign.shapes:
            return {"modalities": {"image": image}, "backbone": backbone, "objectives": {}}
        heads, normalise = theirs["decoder_num_attention_heads"], theirs["norm_pix_loss"]
        return with_decoder(foreign, image, backbone, heads, normalise, "decoder.")

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder, and of the decoder where there is one."""
        backbone = backbone_of(config, self.title, free=SHOWN).model_dump()
        rows = encoder_rows((config.modalities or {})["image"], backbone)
        if not config.objectives:
            return rows
        block, own = "decoder.decoder_layers.{}", f"{DECODER}.blocks.{{}}"
        depth = config.objectives["reconstruct"]["decoder"]["depth"]
        return [
            *rows,
            *decoder_rows(config, "decoder."),
            *vision.blocks(block, own, depth, LAYERS),
            *vision.split(tuple(f"{block}.attention.attention.{name}" for name in QKV), own, depth),
        ]

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what `AutoModel` opens."""
        image, backbone = (config.modalities or {})["image"], config.backbone or {}
        found = {
            "model_type": "vit_mae",
            "architectures": ["ViTMAEForPreTraining" if config.objectives else "ViTMAEModel"],
            "hidden_size": backbone["width"],
            "num_hidden_layers": backbone["depth"],
            "num_attention_heads": backbone["heads"],
            "intermediate_size": int(backbone["width"] * backbone.get("mlp_ratio", 4.0)),
            "layer_norm_eps": backbone.get("norm_eps", 1e-6),
            "image_size": pair(image["size"])[0],
            "patch_size": pair(image["tokenizer"]["size"])[0],
            "num_channels": image.get("channels", 3),
            "qkv_bias": True,
            "hidden_act": "gelu",
        }
        if config.objectives:
            settings = config.objectives["reconstruct"]
            decoder, width = settings["decoder"], settings["decoder"]["width"]
            found |= {
                "decoder_hidden_size": width,
                "decoder_num_hidden_layers": decoder["depth"],
                "decoder_num_attention_heads": decoder["heads"],
                "decoder_intermediate_size": int(width * backbone.get("mlp_ratio", 4.0)),
                "norm_pix_loss": settings["targets"]["image"].get("target", {}).get("normalise", False),
                "mask_ratio": 1 - settings["masking"]["visible"],
            }
        return found


def encoder_rows(image: dict[str, Any], backbone: dict[str, Any]) -> list[Row]:
    """Return the rows of the encoder, which is a plain ViT's."""
    size, patch = pair(image["size"]), pair(image["tokenizer"]["size"])
    tokens = (size[0] // patch[0], size[1] // patch[1])
    width, depth = backbone["width"], backbone["depth"]
    block, own = "vit.encoder.layer.{}", "backbone.blocks.{}"
    places = "vit.embeddings.position_embeddings"
    if backbone.get("class_positions"):
        position = vision.learned(places, "positions.image.table", tokens, "backbone.prefix_positions")
    else:
        position = computed(places, vision.table_of(backbone, tokens, width, 1))
    kernel = (image.get("channels", 3), *patch)
    return [
        *vision.patches("vit.embeddings.patch_embeddings.projection", "tokenizers.image.projection", width, kernel),
        position,
        shaped("vit.embeddings.cls_token", "backbone.prefix", (1, 1, width), (1, width)),
        *vision.blocks(block, own, depth, LAYERS),
        *vision.split(tuple(f"{block}.attention.attention.{name}" for name in QKV), own, depth),
        *same("vit.layernorm", "backbone.norm"),
    ]
