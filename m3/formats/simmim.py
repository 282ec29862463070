"""SimMIM's ViT with its head (microsoft/SimMIM, pre-training): BEiT's names behind `encoder.`, and

    encoder.mask_token, decoder.0, a 1 x 1 convolution to the pixels of a patch, whose shuffle has our order

Fine-tuned ones are BEiT's. Letters: D width, C channels, p pixels along a patch.
"""

from __future__ import annotations

from typing import Any

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import pairs
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, get
from m3.foreign.rows import Row, one, shaped
from m3.formats import beit

OUTPUT = "objectives.reconstruct.decoders.image.output"


class Simmim(Format):
    """SimMIM's own code."""

    title = "SimMIM's ViT with its head"
    left = (beit.INDEX,)

    def fits(self, foreign: Foreign) -> bool:
        """Know it by its head and by the biases of a ViT's queries; its Swin has none."""
        return {"decoder.0.weight", "encoder.mask_token", "encoder.blocks.0.attn.q_bias"} <= foreign.shapes.keys()

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes; units of 2 x 2 patches, 60 % hidden, and L1 are the paper's."""
        image, backbone = beit.encoder_of(foreign.without_prefix("encoder."), given)
        image |= {"mean": pairs.IMAGENET_MEAN, "std": pairs.IMAGENET_STD} if image["channels"] == 3 else {}
        rows, columns = pairs.tokens_of(image)
        scorer = {"type": "cells", "unit": 1 if rows % 2 or columns % 2 else 2}
        masking = {"type": "fixed", "visible": round(rows * columns * 76 / 196), "hidden": "replace", "scorer": scorer}
        targets = {"image": {"target": {"type": "values", "normalise": False}, "loss": "l1"}}
        reconstruct = {"type": "reconstruct", "masking": masking, "decoder": {"type": "head"}, "targets": targets}
        return {"modalities": {"image": image}, "backbone": backbone, "objectives": {"reconstruct": reconstruct}}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of encoder and head."""
        rows = beit.encoder_rows(config, self.title, "encoder.")
        objectives, image = config.objectives or {}, (config.modalities or {})["image"]
        decoder, targets = get(objectives, "reconstruct.decoder", {}), get(objectives, "reconstruct.targets", {})
        is_head = decoder.get("type") == "head" and not (decoder.get("hidden") or decoder.get("tied"))
        is_known = list(objectives) == ["reconstruct"] and list(targets) == ["image"] and is_head
        channels, height, across = pairs.kernel_of(image)
        if not is_known or get(targets, "image.target.type", "values") != "values" or height != across:
            raise M3Error(
                f"{self.title} is one objective `reconstruct` of the target `image`, its pixels, with a plain `head`, "
                f"and square patches."
            )
        width, values = (config.backbone or {})["width"], channels * height * across
        return [
            *rows,
            shaped("encoder.mask_token", "mask_tokens.image", (1, 1, width), (1, width)),
            shaped("decoder.0.weight", f"{OUTPUT}.weight", (values, width, 1, 1), (values, width)),
            one("decoder.0.bias", f"{OUTPUT}.bias"),
        ]

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        eps: Any = (config.backbone or {})["norm_eps"]
        return [
            f"backbone.norm_eps={eps:g} and the mean and deviation of ImageNet's pixels are the usual ones; change "
            f"them if the model was made otherwise."
        ]
