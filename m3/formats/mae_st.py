"""MAE-ST (facebookresearch/mae_st): MAE over space and time, whole or the encoder alone.

    cls_token, pos_embed_class, pos_embed_spatial, pos_embed_temporal, patch_embed.proj,
    blocks.N.(norm1, attn.q, attn.k, attn.v, attn.proj, norm2, mlp.fc1, mlp.fc2), norm,
    mask_token, decoder_cls_token, decoder_pos_embed_(class, spatial, temporal), decoder_embed, decoder_blocks.N.(as
    blocks), decoder_norm, decoder_pred

The released files were written by other code (PySlowFast): their decoder is called `pred_head`, and its positions are
one table of all tubes, which ours has not; of them the encoder is read. Letters: D width, T, H, W tubes along the axes.
"""

from __future__ import annotations

from typing import Any

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, backbone_of, get, heads_of, ratio_of, square
from m3.foreign.rows import Left, Row, permuted, same, shaped
from m3.heads import SelfDecoder
from m3.parts import build_spec

DECODER = "objectives.reconstruct.decoders.video"


class MaeSt(Format):
    """MAE-ST's own code."""

    title = "MAE-ST"
    left = (
        Left(r"head\..*", "a classifier of the task it was tuned for"),
        Left(r"norm\..*", "the norm of a tuned model, which stands behind the mean of the tokens"),
    )

    def fits(self, foreign: Foreign) -> bool:
        """Know it by its positions, those of time apart from those of space."""
        return {"pos_embed_spatial", "pos_embed_temporal", "blocks.0.attn.q.weight"} <= foreign.shapes.keys()

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes; heads, mean and deviation are the code's, masks and targets the paper's."""
        shapes = foreign.shapes
        width, channels, frames, height, across = shapes["patch_embed.proj.weight"]
        steps, side = shapes["pos_embed_temporal"][1], square(shapes["pos_embed_spatial"][1], "pos_embed_spatial")
        video: dict[str, Any] = {"type": "video", "size": (side * height, side * across), "frames": steps * frames}
        video |= {"channels": channels, "mean": (0.45,) * channels, "std": (0.225,) * channels}
        video |= {"tokenizer": {"type": "tube", "size": (height, across), "frames": frames}}
        video |= {"positions": {"type": "separable"}}
        backbone = {
            "width": width,
            "depth": foreign.count(r"blocks\.(\d+)\."),
            "heads": heads_of(width, get(given, "backbone.heads"), "backbone.heads"),
            "mlp_ratio": ratio_of(shapes["blocks.0.mlp.fc1.weight"][0], width),
            "class_tokens": int("cls_token" in shapes),
            "class_positions": "cls_token" in shapes,
            "final_norm": "head.weight" not in shapes,
        }
        sections = {"modalities": {"video": video}, "backbone": backbone, "objectives": {}}
        if "decoder_embed.weight" not in shapes or _is_released(foreign):
            return sections
        values = channels * frames * height * across
        step = {} if shapes["decoder_pred.weight"][0] == values else {"step": 0}
        normalise = get(given, "objectives.reconstruct.targets.video.target.normalise", True)
        target = {"type": "values", "normalise": normalise, **step}
        decoder = {"width": shapes["decoder_embed.weight"][0], "depth": foreign.count(r"decoder_blocks\.(\d+)\.")}
        decoder |= {"heads": get(given, "objectives.reconstruct.decoder.heads", 16), "own_class": True}
        reconstruct = {"type": "reconstruct", "average": "token", "decoder": {"type": "self_decoder", **decoder}}
        reconstruct["masking"] = {"type": "fixed", "visible": max(1, int(steps * side**2 * (1 - 0.9)))}
        reconstruct["targets"] = {"video": {"target": target, "loss": "mse"}}
        return sections | {"objectives": {"reconstruct": reconstruct}}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder, and of the decoder where there is one."""
        title = self.title
        given = config.backbone or {}
        has_class = given.get("class_tokens", 1) > 0
        spec = backbone_of(config, title, class_tokens=int(has_class), class_positions=has_class)
        cut = vision.cut_of(config, "video", "tube")
        if list(config.modalities or {}) != ["video"] or cut.positions != "separable":
            raise M3Error(f"{title} reads the modality `video` alone, with positions of type `separable`.")
        kernel, width = (cut.channels, *cut.patch), spec.width
        rows = [
            *vision.patches("patch_embed.proj", "tokenizers.video.projection", width, kernel),
            *_positions("", "positions.video", cut.tokens),
            *_blocks("blocks.{}", "backbone.blocks.{}", spec.depth),
            *(same("norm", "backbone.norm") if spec.final_norm else []),
        ]
        if has_class:
            rows += _class("", ("backbone.prefix", "backbone.prefix_positions"), width)
        if not config.objectives:
            return rows
        decoder = _decoder(config, title)
        width = decoder.width
        frames = 1 if get(config.objectives, "reconstruct.targets.video.target.step") is not None else cut.patch[0]
        order = vision.values_order((frames, *cut.patch[1:]), cut.channels)
        if has_class:
            rows += _class("decoder_", (f"{DECODER}.class_tokens", f"{DECODER}.class_positions"), width)
        return [
            *rows,
            shaped("mask_token", f"{DECODER}.mask_token", (1, 1, width), (1, width)),
            *same("decoder_embed", f"{DECODER}.embed"),
            *_positions("decoder_", f"{DECODER}.positions", cut.tokens),
            *_blocks("decoder_blocks.{}", f"{DECODER}.blocks.{{}}", decoder.depth),
            *same("decoder_norm", f"{DECODER}.norm"),
            *(permuted(f"decoder_pred.{part}", f"{DECODER}.output.{part}", order) for part in ("weight", "bias")),
        ]

    def left_out(self, foreign: Foreign, config: M3Config) -> list[Left]:
        """Name the decoder of a released file, too."""
        reason = "the decoder of PySlowFast, with positions that ours has not"
        return [*self.left, *([Left(r"(pred_head\.|decoder_|mask_token).*", reason)] if _is_released(foreign) else [])]

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        heads = (config.backbone or {})["heads"]
        return [
            f"backbone.heads={heads}, 16 heads in the decoder and pixels of mean 0.45 and deviation 0.225 are the "
            f"code's own; change them if the model was made otherwise."
        ]


def _is_released(foreign: Foreign) -> bool:
    """True where PySlowFast wrote the file, with its decoder."""
    return any(name.startswith("pred_head.") for name in foreign.shapes)


def _decoder(config: M3Config, title: str) -> SelfDecoder.Spec:
    """Return the settings of the decoder.

    Raises:
        M3Error: the objective is not MAE-ST's.
    """
    objectives = config.objectives or {}
    targets = get(objectives, "reconstruct.targets", {})
    decoder = get(objectives, "reconstruct.decoder", {})
    is_theirs = list(objectives) == ["reconstruct"] and list(targets) == ["video"]
    if not is_theirs or decoder.get("type") != "self_decoder" or not decoder.get("own_class"):
        raise M3Error(
            f"{title} is one objective `reconstruct` of the target `video` with a `self_decoder` and `own_class: true`."
        )
    return build_spec("decoders", decoder, "objectives.reconstruct.decoder")[1]  # type: ignore[return-value]


def _class(theirs: str, ours: tuple[str, str], width: int) -> list[Row]:
    names = (f"{theirs}cls_token", f"{theirs}pos_embed_class")
    return [shaped(name, own, (1, 1, width), (1, width)) for name, own in zip(names, ours, strict=True)]


def _positions(theirs: str, ours: str, tokens: tuple[int, ...]) -> list[Row]:
    """Rows of the tables (1, T, D) and (1, H W, D)."""
    return [
        vision.learned(f"{theirs}pos_embed_temporal", f"{ours}.first", tokens[:1]),
        vision.learned(f"{theirs}pos_embed_spatial", f"{ours}.others", tokens[1:]),
    ]


def _blocks(theirs: str, ours: str, depth: int) -> list[Row]:
    names = tuple(f"{theirs}.attn.{name}" for name in "qkv")
    return [*vision.blocks(theirs, ours, depth, vision.TIMM), *vision.split(names, ours, depth)]
