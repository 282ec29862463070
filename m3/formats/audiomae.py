"""AudioMAE's encoder (facebookresearch/AudioMAE): a ViT in timm's names over spectrograms of 128 bands.

Its decoder, Swin blocks of an old timm, stays behind. Letters: D width, N patches, time by time.
"""

from __future__ import annotations

from typing import Any

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, backbone_of, get, heads_of, ratio_of
from m3.foreign.rows import Left, Row, computed, same, shaped

BANDS = 8
"""Patches along frequency."""


class Audiomae(Format):
    """AudioMAE's own code."""

    title = "AudioMAE's encoder"
    left = (
        Left(r"(head|fc_norm)\..*", "a classifier of the task it was tuned for"),
        Left(r"mask_token|decoder_.*", "its decoder, whose attention within windows is written another way than ours"),
    )

    def fits(self, foreign: Foreign) -> bool:
        """Know it by its positions."""
        return "blocks.0.attn.qkv.weight" in foreign.shapes and vision.is_sound(foreign)

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes; mean and deviation are those of AudioSet."""
        shapes = foreign.shapes
        width, _, height, across = shapes["patch_embed.proj.weight"]
        audio: dict[str, Any] = {"type": "audio", "frames": (shapes["pos_embed"][1] // BANDS) * height}
        audio |= {"bands": BANDS * across, "tokenizer": {"type": "spectrogram", "size": (height, across)}}
        backbone = {
            "width": width,
            "depth": foreign.count(r"blocks\.(\d+)\."),
            "heads": heads_of(width, get(given, "backbone.heads"), "backbone.heads"),
            "mlp_ratio": ratio_of(shapes["blocks.0.mlp.fc1.weight"][0], width),
            "final_norm": "norm.weight" in shapes,
        }
        return {"modalities": {"audio": audio}, "backbone": backbone, "objectives": {}}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder."""
        spec = backbone_of(config, self.title, class_tokens=1, axis_order="xy")
        cut = vision.cut_of(config, "audio", "spectrogram")
        is_theirs = list(config.modalities or {}) == ["audio"] and cut.channels == 1 and cut.positions == "sincos"
        if config.objectives or not is_theirs or cut.tokens[1] != BANDS:
            raise M3Error(
                f"{self.title} reads the modality `audio` alone, one channel in {BANDS} patches of bands, with sin-cos "
                f"positions, and has no objectives."
            )
        theirs, ours = "blocks.{}", "backbone.blocks.{}"
        return [
            *vision.patches("patch_embed.proj", "tokenizers.audio.projection", spec.width, (1, *cut.patch)),
            computed("pos_embed", vision.table_of({}, cut.tokens, spec.width, 1)),
            shaped("cls_token", "backbone.prefix", (1, 1, spec.width), (1, spec.width)),
            *vision.blocks(theirs, ours, spec.depth, vision.TIMM),
            *vision.fused(f"{theirs}.attn.qkv", ours, spec.depth),
            *(same("norm", "backbone.norm") if spec.final_norm else []),
        ]

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        return [
            f"backbone.heads={(config.backbone or {})['heads']} and AudioSet's mean and deviation are the usual ones; "
            f"change modalities.audio.mean and .std for models of other sounds."
        ]
