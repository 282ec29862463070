"""transformers' SigLIP, `SiglipModel`, which is SigLIP 2 at fixed sizes too.

    vision_model.(embeddings.(patch_embedding, position_embedding), encoder.layers.N.(as CLIP's), post_layernorm,
    head.(probe, attention.in_proj_*, attention.out_proj, layernorm, mlp)),
    text_model.(embeddings.(token_embedding, position_embedding), encoder.layers.N, final_layer_norm, head),
    logit_scale, logit_bias

Letters: D width.
"""

from __future__ import annotations

from typing import Any

import torch

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import hugging, pairs, vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, get
from m3.foreign.rows import Left, Row, same, shaped

TITLE = "transformers' SigLIP"
HALF = (0.5, 0.5, 0.5)
POOL = f"{pairs.CONTRAST}.pools.image.attention"
NOTE = "SigLIP's texts are lower-cased and have no punctuation before its vocabulary sees them; do that to yours."


class Siglip(Format):
    """transformers' SigLIP."""

    title = TITLE
    left = (Left(r".*\.position_ids", "numbers of places, which are computed"),)

    def fits(self, foreign: Foreign) -> bool:
        """Know it by the pooling of images and the head of texts."""
        return {"vision_model.head.probe", "text_model.head.weight"} <= foreign.shapes.keys()

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Translate its config."""
        theirs = hugging.settings_of(foreign)
        their_photo, their_words = theirs["vision_config"], theirs["text_config"]
        image = hugging.image_of(foreign, their_photo, HALF, HALF)
        count, length = their_words["vocab_size"], their_words["max_position_embeddings"]
        text = pairs.siglip_text(count, length, get(given, "modalities.text.vocabulary"), foreign.where)
        return pairs.siglip_sections(image, text, hugging.tower_of(their_photo), hugging.tower_of(their_words))

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of both towers and of the shared space."""
        modalities, towers, contrast = pairs.siglip_parts(config, TITLE)
        image, photo, words = modalities["image"], towers["photo"], towers["words"]
        width, theirs = photo["width"], "vision_model.embeddings"
        places = f"{theirs}.position_embedding.weight"
        return [
            *vision.patches(f"{theirs}.patch_embedding", "tokenizers.image.projection", width, pairs.kernel_of(image)),
            vision.learned(places, "positions.image.table", pairs.tokens_of(image), batch=()),
            *hugging.clip_rows("vision_model.encoder.layers.{}", "towers.photo.blocks.{}", photo["depth"]),
            *same("vision_model.post_layernorm", "towers.photo.norm"),
            *_pool(width),
            *pairs.word_rows(
                "text_model.embeddings.token_embedding.weight",
                "text_model.embeddings.position_embedding.weight",
                modalities["text"],
            ),
            *hugging.clip_rows("text_model.encoder.layers.{}", "towers.words.blocks.{}", words["depth"]),
            *same("text_model.final_layer_norm", "towers.words.norm"),
            *same("text_model.head", f"{pairs.CONTRAST}.projections.text"),
            *pairs.scale_rows(contrast, shape=(1,)),
        ]

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what `AutoModel` opens."""
        modalities, towers, contrast = pairs.siglip_parts(config, TITLE)
        text, words = modalities["text"], towers["words"]
        if towers["photo"]["width"] != contrast["width"]:
            raise M3Error("SigLIP's shared space is as wide as its images' tower.")
        return {
            "model_type": "siglip",
            "architectures": ["SiglipModel"],
            "vision_config": hugging.image_settings(modalities["image"], is_square_only=True)
            | hugging.tower_settings(towers["photo"]),
            "text_config": hugging.tower_settings(words)
            | {
                "vocab_size": pairs.vocabulary_size(text),
                "max_position_embeddings": text["length"],
                "projection_size": contrast["width"],
                **pairs.mark_ids(text, eos_token_id="end", pad_token_id="fill"),
            },
        }

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what is done before the model."""
        return [NOTE]


def _pool(width: int) -> list[Row]:
    """Rows of the pooling: their attention is torch's, ours has queries apart from keys and values."""
    theirs, sizes = "vision_model.head", [width, 2 * width]
    rows = [
        Row(
            (f"{theirs}.attention.in_proj_{part}",),
            (f"{POOL}.attention.q.{part}", f"{POOL}.attention.kv.{part}"),
            lambda x: list(x[0].split(sizes)),
            lambda x: [torch.cat(x)],
        )
        for part in ("weight", "bias")
    ]
    names = {
        "attention.out_proj": "attention.projection",
        "layernorm": "norm",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    probe = shaped(f"{theirs}.probe", f"{POOL}.query", (1, 1, width), (1, width))
    return [probe, *rows, *vision.blocks(theirs, POOL, 1, names)]
