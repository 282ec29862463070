"""VideoMAE's own code (MCG-NJU/VideoMAE and VideoMAEv2): pre-training with its decoder, or the encoder alone.

    mask_token, encoder_to_decoder.weight,
    encoder.(patch_embed.proj, blocks.N.(norm1, attn.q_bias, attn.v_bias, attn.qkv.weight, attn.proj, norm2, mlp.fc1,
    mlp.fc2), norm), decoder.(blocks.N.(as above), norm, head)

Keys have no bias, positions are computed. An encoder alone, as tuned models hold it, has its names without `encoder.`.
Letters: D width, C channels.
"""

from __future__ import annotations

from typing import Any

from m3.backbone import BackboneSpec
from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, backbone_of, get, heads_of, ratio_of
from m3.foreign.rows import Left, Row, one, permuted, same, shaped
from m3.heads import SelfDecoder
from m3.parts import build_spec

DECODER = "objectives.reconstruct.decoders.video"
TARGET = "objectives.reconstruct.targets.video.target"
STD = (0.229, 0.224, 0.225)


class Videomae(Format):
    """VideoMAE's own code."""

    title = "VideoMAE (MCG-NJU)"
    left = (Left(r"(head|fc_norm)\..*", "a classifier of the task it was tuned for"),)

    def tidy(self, foreign: Foreign) -> Foreign:
        """Take the beginning off the names of an encoder that stands alone."""
        return foreign if "encoder_to_decoder.weight" in foreign.shapes else foreign.renamed(
            (r"^(encoder|backbone)\.", "")
        )  # fmt: skip

    def fits(self, foreign: Foreign) -> bool:
        """Know it by a kernel over three axes and keys without a bias."""
        for prefix in ("", "encoder."):
            kernel = foreign.shapes.get(f"{prefix}patch_embed.proj.weight", ())
            if len(kernel) == 5 and f"{prefix}blocks.0.attn.q_bias" in foreign.shapes:
                return True
        return False

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read what shapes tell; clips of 16 frames of 224 x 224 and the heads are the released models'."""
        shapes = foreign.shapes
        prefix = "encoder." if "encoder_to_decoder.weight" in shapes else ""
        width, channels, frames, height, across = shapes[f"{prefix}patch_embed.proj.weight"]
        video = {"size": get(given, "modalities.video.size", 224), "channels": channels}
        video["frames"] = get(given, "modalities.video.frames", 16)
        backbone = {
            "width": width,
            "depth": foreign.count(rf"{prefix}blocks\.(\d+)\."),
            "heads": heads_of(width, get(given, "backbone.heads"), "backbone.heads"),
            "mlp_ratio": ratio_of(shapes[f"{prefix}blocks.0.mlp.fc1.weight"][0], width),
            "final_norm": f"{prefix}norm.weight" in shapes,
        }
        video["tokenizer"] = {"type": "tube", "size": (height, across), "frames": frames}
        if not prefix:
            return video_config(video, backbone)
        width = shapes["encoder_to_decoder.weight"][0]
        where = "objectives.reconstruct.decoder.heads"
        decoder = {"width": width, "depth": foreign.count(r"decoder\.blocks\.(\d+)\.")}
        return video_config(video, backbone, decoder | {"heads": heads_of(width, get(given, where), where)})

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder, and of the decoder where there is one."""
        spec, cut, decoder = parts_of(config, self.title)
        prefix = "encoder." if decoder else ""
        rows = [
            *vision.patches(
                f"{prefix}patch_embed.proj", "tokenizers.video.projection", spec.width, (cut.channels, *cut.patch)
            ),
            *_blocks(f"{prefix}blocks.{{}}", "backbone.blocks.{}", spec.depth),
            *(same(f"{prefix}norm", "backbone.norm") if spec.final_norm else []),
        ]
        if not decoder:
            return rows
        order = vision.values_order(cut.patch, cut.channels)
        return [
            *rows,
            shaped("mask_token", f"{DECODER}.mask_token", (1, 1, decoder.width), (1, decoder.width)),
            one("encoder_to_decoder.weight", f"{DECODER}.embed.weight"),
            *_blocks("decoder.blocks.{}", f"{DECODER}.blocks.{{}}", decoder.depth),
            *same("decoder.norm", f"{DECODER}.norm"),
            *(permuted(f"decoder.head.{part}", f"{DECODER}.output.{part}", order) for part in ("weight", "bias")),
        ]

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        video, backbone = (config.modalities or {})["video"], config.backbone or {}
        size = " x ".join(str(n) for n in vision.cut_of(config, "video", "tube").size[1:])
        return [
            f"clips of modalities.video.frames={video['frames']} frames of {size} pixels are the usual ones, as are "
            f"backbone.heads={backbone['heads']} and backbone.norm_eps=1e-6; change them if the model is another one."
        ]


def video_config(
    video: dict[str, Any], backbone: dict[str, Any], decoder: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the config of a VideoMAE; its masks and targets are those of the paper."""
    video = {"type": "video", **video, "positions": {"type": "flat_sincos"}}
    sections = {"modalities": {"video": video}, "backbone": {**backbone, "class_tokens": 0}, "objectives": {}}
    if decoder is None:
        return sections
    channels, std = video["channels"], video.get("std") or (STD if video["channels"] == 3 else None)
    # Theirs adds 1e-6 to deviations of pixels in [0, 1], except of what has not three channels.
    eps = tuple(1e-6 / each for each in std) if std and channels == 3 else 1e-6
    target = {"type": "values", "normalise": "channel", "eps_on": "deviation", "eps": eps}
    tube = video["tokenizer"]
    height, width = ((n, n) if isinstance(n, int) else n for n in (video["size"], tube["size"]))
    places = height[0] // width[0] * (height[1] // width[1])
    visible = video["frames"] // tube["frames"] * max(1, places - int(0.9 * places))
    reconstruct = {"type": "reconstruct", "average": "token", "targets": {"video": {"target": target, "loss": "mse"}}}
    reconstruct["masking"] = {"type": "fixed", "visible": visible, "scorer": {"type": "tube"}}
    reconstruct["decoder"] = {"type": "self_decoder", "embed_bias": False, **decoder}
    return sections | {"objectives": {"reconstruct": reconstruct}}


def parts_of(config: M3Config, title: str) -> tuple[BackboneSpec, vision.Cut, SelfDecoder.Spec | None]:
    """Return backbone, cut and decoder of a VideoMAE of ours.

    Raises:
        M3Error: the model is none.
    """
    spec, cut = backbone_of(config, title, class_tokens=0), vision.cut_of(config, "video", "tube")
    if list(config.modalities or {}) != ["video"] or cut.positions != "flat_sincos":
        raise M3Error(f"{title} reads the modality `video` alone, with positions of type `flat_sincos`.")
    if not config.objectives:
        return spec, cut, None
    reconstruct = get(config.objectives, "reconstruct", {})
    decoder, targets = reconstruct.get("decoder", {}), reconstruct.get("targets", {})
    is_theirs = decoder.get("type") == "self_decoder" and not decoder.get("embed_bias", True)
    is_theirs = is_theirs and get(targets, "video.target.normalise") == "channel"
    if list(config.objectives) != ["reconstruct"] or list(targets) != ["video"] or not is_theirs:
        raise M3Error(
            f"{title} is one objective `reconstruct` of the target `video` with `normalise: channel` and a "
            f"`self_decoder` with `embed_bias: false`."
        )
    settings = build_spec("decoders", decoder, "objectives.reconstruct.decoder")[1]
    return spec, cut, settings  # type: ignore[return-value]  # the type above says which


def _blocks(theirs: str, ours: str, depth: int) -> list[Row]:
    return [
        *vision.blocks(theirs, ours, depth, vision.TIMM),
        *(one(f"{theirs}.attn.qkv.weight".format(n), f"{ours}.attention.qkv.weight".format(n)) for n in range(depth)),
        *vision.unbiased_keys(f"{theirs}.attn.q_bias", f"{theirs}.attn.v_bias", ours, depth),
    ]
