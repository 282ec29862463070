"""transformers' ViT, `ViTModel`, and the encoder of `ViTForImageClassification`: ViTMAE's names without a decoder."""

from __future__ import annotations

from typing import Any

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import hugging
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format
from m3.foreign.rows import Left, Row
from m3.formats.vit_mae import OLD, encoder_rows

TITLE = "transformers' ViT"
HALF = (0.5, 0.5, 0.5)


class HfVit(Format):
    """transformers' ViT."""

    title = TITLE
    left = (
        Left(r"(classifier|vit\.pooler|pooler)\..*", "a layer of the task it was tuned for"),
        Left(r"vit\.embeddings\.mask_token", "a mask token of its pretraining, which the encoder does not use"),
    )

    def tidy(self, foreign: Foreign) -> Foreign:
        """Bring the layouts of all versions to one."""
        return foreign.renamed(*OLD)

    def fits(self, foreign: Foreign) -> bool:
        """Know it by the names of the first block, and that no config says otherwise."""
        needed = {"vit.embeddings.cls_token", "vit.encoder.layer.0.layernorm_before.weight"}
        is_alone = not any(name.startswith("decoder.") or name.endswith(".lambda_1") for name in foreign.shapes)
        return needed <= foreign.shapes.keys() and is_alone and foreign.settings.get("model_type", "vit") == "vit"

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Translate its config."""
        theirs = hugging.settings_of(foreign)
        if not theirs["qkv_bias"]:
            raise M3Error("its queries, keys and values have no bias, which is not read.")
        image = hugging.image_of(foreign, theirs, HALF, HALF)
        backbone = hugging.tower_of(theirs) | {"class_tokens": 1, "class_positions": True}
        return {"modalities": {"image": image}, "backbone": backbone, "objectives": {}}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder."""
        return encoder_rows(*hugging.only_image(config, TITLE))

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what `AutoModel` opens."""
        image, backbone = hugging.only_image(config, TITLE)
        found = hugging.tower_settings(backbone) | hugging.image_settings(image)
        return {"model_type": "vit", "architectures": ["ViTModel"], "qkv_bias": True, **found}
