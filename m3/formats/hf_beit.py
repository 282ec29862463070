"""transformers' BEiT, `BeitModel`, `BeitForMaskedImageModeling` and the encoder of its classifiers.

Version 4's names are written, which both versions load; version 5's names in memory are read too:

    beit.embeddings.(cls_token, mask_token, position_embeddings, patch_embeddings.projection), beit.encoder.layer.N.(as
    ViT, lambda_1, lambda_2, attention.attention.relative_position_bias.relative_position_bias_table),
    beit.encoder.relative_position_bias.relative_position_bias_table, beit.layernorm, layernorm, lm_head
"""

from __future__ import annotations

from typing import Any, ClassVar

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import hugging, pairs, vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, get
from m3.foreign.rows import Left, Row, same, shaped
from m3.formats import beit
from m3.formats.vit_mae import LAYERS, OLD, QKV
from m3.tokenizer_model import describe

TABLE = "relative_position_bias.relative_position_bias_table"


class HfBeit(Format):
    """transformers' BEiT.

    Attributes:
        kind: `model_type` of its config.
        prefix: of the encoder's names where a head stands beside it.
        model: class of the encoder.
    """

    title = "transformers' BEiT"
    kind: ClassVar[str] = "beit"
    prefix: ClassVar[str] = "beit"
    model: ClassVar[str] = "BeitModel"
    left = (
        beit.INDEX,
        Left(r"(classifier|beit\.pooler)\..*", "a layer of the task it was tuned for"),
        Left(r"lm_head\..*", f"the head for the codes of a tokenizer, which was not given ({beit.TOKENIZER})"),
        Left(r"(layernorm|beit\.layernorm)\..*", "the last norm, which has two names here and is read by the other"),
        Left(r"beit\.embeddings\.mask_token", "a mask token of its pretraining, which the encoder does not use"),
    )

    def tidy(self, foreign: Foreign) -> Foreign:
        """Bring the layouts of all versions, with and without a head, to one."""
        own = self.prefix
        if not any(name.startswith(f"{own}.") for name in foreign.shapes):
            foreign = foreign.renamed((r"^", f"{own}."))
        foreign = foreign.renamed(
            (rf"^{own}\.layers\.", f"{own}.encoder.layer."),
            (rf"^{own}\.shared_position_bias\.", f"{own}.encoder.relative_position_bias."),
            (r"(\.layer\.\d+)\.relative_position_bias\.", r"\1.attention.attention.relative_position_bias."),
            *OLD[3:],
        )
        last = {f"{own}.layernorm.{part}": f"layernorm.{part}" for part in ("weight", "bias")}
        if "lm_head.weight" in foreign.shapes and not last.keys() & foreign.shapes.keys():
            return foreign.with_aliases(last)
        return foreign

    def fits(self, foreign: Foreign) -> bool:
        """Know it by its config, or by LayerScale in a ViT's names."""
        first = f"{self.prefix}.encoder.layer.0"
        names = {f"{self.prefix}.embeddings.cls_token", f"{first}.layernorm_before.weight"}
        told = foreign.settings.get("model_type")
        is_said = told == self.kind or (told is None and self.kind == "beit" and f"{first}.lambda_1" in foreign.shapes)
        return names <= foreign.shapes.keys() and is_said

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Translate its config; with a tokenizer for the codes also the pretraining."""
        theirs = hugging.settings_of(foreign)
        shared, own = theirs["use_shared_relative_position_bias"], theirs["use_relative_position_bias"]
        has_places, has_head = theirs["use_absolute_position_embeddings"], "lm_head.weight" in foreign.shapes
        if (shared and own) or not (shared or own or has_places):
            raise M3Error("it needs either one relative bias for all blocks, or one for each, or absolute positions.")
        if has_head and not theirs["use_mean_pooling"]:
            raise M3Error("it has two norms behind its blocks, one after the other, which ours has not.")
        image = hugging.image_of(foreign, theirs, beit.HALF, beit.HALF)
        image["positions"] = {"type": "learned" if has_places else "relative"}
        backbone = hugging.tower_of(theirs) | {"class_tokens": 1, "class_positions": has_places}
        backbone |= {"relative_bias": "shared" if shared else "per_block" if own else None}
        backbone["final_norm"] = has_head or not theirs["use_mean_pooling"]
        if theirs["layer_scale_init_value"] > 0:
            backbone["layer_scale"] = vision.NO_SCALE
        tokenizer = get(given, beit.TOKENIZER)
        objectives = beit.pretraining(tokenizer, image) if tokenizer and has_head else {}
        return {"modalities": {"image": image}, "backbone": backbone, "objectives": objectives}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder, and of mask token and head where codes are predicted."""
        image, spec = beit.spec_of(config, self.title)
        width, depth, tokens = spec.width, spec.depth, pairs.tokens_of(image)
        embeddings, block, own = f"{self.prefix}.embeddings", f"{self.prefix}.encoder.layer.{{}}", "backbone.blocks.{}"
        qkv = tuple(f"{block}.attention.attention.{name}" for name in QKV)
        tables = {None: [], "shared": [f"{self.prefix}.encoder.{TABLE}"]}.get(
            spec.relative_bias, [f"{block.format(n)}.attention.attention.{TABLE}" for n in range(depth)]
        )
        projection = f"{embeddings}.patch_embeddings.projection"
        rows = [
            *vision.patches(projection, "tokenizers.image.projection", width, pairs.kernel_of(image)),
            shaped(f"{embeddings}.cls_token", "backbone.prefix", (1, 1, width), (1, width)),
            *vision.blocks(block, own, depth, LAYERS),
            *vision.split(qkv, own, depth, ("weight",)),
            *vision.unbiased_keys(f"{qkv[0]}.bias", f"{qkv[2]}.bias", own, depth),
            *beit.bias_rows(tables, tokens),
        ]
        if spec.class_positions:
            places = f"{embeddings}.position_embeddings"
            rows.append(vision.learned(places, "positions.image.table", tokens, "backbone.prefix_positions"))
        if spec.layer_scale:
            rows += vision.scales((f"{block}.lambda_1", f"{block}.lambda_2"), own, depth, spec.layer_scale)
        if config.objectives:
            rows += beit.head_rows(config, self.title, f"{embeddings}.mask_token", "lm_head")
        if spec.final_norm:
            rows += same("layernorm" if config.objectives else f"{self.prefix}.layernorm", "backbone.norm")
        return rows

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what `AutoModel` opens."""
        image, spec = beit.spec_of(config, self.title)
        tokenizer = get(config.objectives or {}, beit.TOKENIZER.removeprefix("objectives."))
        has_head = tokenizer is not None
        return {
            "model_type": self.kind,
            "architectures": ["BeitForMaskedImageModeling" if has_head else self.model],
            **hugging.tower_settings(spec.model_dump()),
            **hugging.image_settings(image, is_square_only=True),
            **({"vocab_size": describe(tokenizer).codes} if has_head else {}),
            "use_mask_token": has_head,
            "use_absolute_position_embeddings": spec.class_positions,
            "use_shared_relative_position_bias": spec.relative_bias == "shared",
            "use_relative_position_bias": spec.relative_bias == "per_block",
            "use_mean_pooling": has_head or not spec.final_norm,
            "layer_scale_init_value": 0.0 if spec.layer_scale is None else max(spec.layer_scale, 1e-5),
        }
