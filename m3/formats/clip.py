"""transformers' CLIP, `CLIPModel`, and its images alone, `CLIPVisionModel`.

    vision_model.(embeddings.(class_embedding, patch_embedding, position_embedding), pre_layrnorm,
    encoder.layers.N.(layer_norm1, self_attn.(q, k, v, out)_proj, layer_norm2, mlp.fc1, mlp.fc2), post_layernorm),
    text_model.(embeddings.(token_embedding, position_embedding), encoder.layers.N.(the same), final_layer_norm),
    visual_projection, text_projection, logit_scale

`pre_layrnorm` is spelled so there. Version 5 saves the images alone without `vision_model.`; it reads both.
"""

from __future__ import annotations

import math
from typing import Any

from m3.config import M3Config
from m3.foreign import hugging, pairs
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, get
from m3.foreign.rows import Left, Row, same, shaped

TITLE = "transformers' CLIP"


class Clip(Format):
    """transformers' CLIP."""

    title = TITLE
    left = (
        Left(r".*\.position_ids", "numbers of places, which are computed"),
        Left(r"visual_projection\.weight", "a projection to a space with text, whose tower is not here"),
    )

    def tidy(self, foreign: Foreign) -> Foreign:
        """Bring the images alone to version 4's names."""
        if "pre_layrnorm.weight" not in foreign.shapes:
            return foreign
        return foreign.renamed((r"^(embeddings|pre_layrnorm|encoder|post_layernorm)\.", r"vision_model.\1."))

    def fits(self, foreign: Foreign) -> bool:
        """Know it by the name that nothing else has."""
        return "vision_model.pre_layrnorm.weight" in foreign.shapes

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Translate its config."""
        theirs = hugging.settings_of(foreign)
        their_photo = theirs.get("vision_config", theirs)
        image = hugging.image_of(foreign, their_photo, pairs.CLIP_MEAN, pairs.CLIP_STD)
        photo = hugging.tower_of(their_photo) | {"class_positions": True, "input_norm": True}
        if "text_projection.weight" not in foreign.shapes:
            return {"modalities": {"image": image}, "backbone": photo, "objectives": {}}
        count, _ = foreign.shapes["text_model.embeddings.token_embedding.weight"]
        length = theirs["text_config"]["max_position_embeddings"]
        text = pairs.clip_text(count, length, get(given, "modalities.text.vocabulary"))
        words = hugging.tower_of(theirs["text_config"]) | {"class_tokens": 0, "causal": True}
        sides = {"image": {"pool": "class"}, "text": {"pool": "last"}}
        shared = {"width": theirs["projection_dim"], "loss": "softmax", "sides": sides}
        return pairs.sections(image, text, photo, words, shared)

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of both towers and of the shared space, or of the images alone."""
        if not config.objectives:
            image, photo = hugging.only_image(config, TITLE)
            return _photo(image, photo, "backbone")
        modalities, towers, contrast = pairs.clip_parts(config, TITLE)
        return [
            *_photo(modalities["image"], towers["photo"], "towers.photo"),
            *pairs.word_rows(
                "text_model.embeddings.token_embedding.weight",
                "text_model.embeddings.position_embedding.weight",
                modalities["text"],
            ),
            *hugging.clip_rows("text_model.encoder.layers.{}", "towers.words.blocks.{}", towers["words"]["depth"]),
            *same("text_model.final_layer_norm", "towers.words.norm"),
            *same("visual_projection", f"{pairs.CONTRAST}.projections.image", ["weight"]),
            *same("text_projection", f"{pairs.CONTRAST}.projections.text", ["weight"]),
            *pairs.scale_rows(contrast),
        ]

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what `AutoModel` opens."""
        if not config.objectives:
            image, photo = hugging.only_image(config, TITLE)
            found = hugging.image_settings(image, is_square_only=True) | hugging.tower_settings(photo)
            return {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], **found}
        modalities, towers, contrast = pairs.clip_parts(config, TITLE)
        text, width = modalities["text"], contrast["width"]
        photo = hugging.image_settings(modalities["image"], is_square_only=True)
        words = hugging.tower_settings(towers["words"]) | {
            "vocab_size": pairs.vocabulary_size(text),
            "max_position_embeddings": text["length"],
            "projection_dim": width,
            **pairs.mark_ids(text, bos_token_id="start", eos_token_id="end"),
        }
        return {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "projection_dim": width,
            "vision_config": photo | hugging.tower_settings(towers["photo"]) | {"projection_dim": width},
            "text_config": words,
        }


def _photo(image: dict[str, Any], photo: dict[str, Any], ours: str) -> list[Row]:
    """Rows of the tower of images."""
    width, kernel, theirs = photo["width"], pairs.kernel_of(image), "vision_model.embeddings"
    weight = "tokenizers.image.projection.weight"
    return [
        shaped(f"{theirs}.patch_embedding.weight", weight, (width, *kernel), (width, math.prod(kernel))),
        pairs.place_row(f"{theirs}.position_embedding.weight", ours, image, photo),
        pairs.class_token(f"{theirs}.class_embedding", ours, width),
        *same("vision_model.pre_layrnorm", f"{ours}.input_norm"),
        *hugging.clip_rows("vision_model.encoder.layers.{}", f"{ours}.blocks.{{}}", photo["depth"]),
        *same("vision_model.post_layernorm", f"{ours}.norm"),
    ]
