"""Point-MAE (Pang-Yatian/Point-MAE), its pre-training with the decoder.

    MAE_encoder.(encoder.(first_conv, second_conv), pos_embed, blocks.blocks.N.(as timm's), norm), mask_token,
    decoder_pos_embed, MAE_decoder.(blocks.N, norm), increase_dim

Queries, keys and values have no bias; the groups' PointNet has BatchNorm. Letters: D width, k points of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, backbone_of, get, heads_of, ratio_of
from m3.foreign.rows import Row, one, same, shaped, zeros
from m3.heads import SelfDecoder
from m3.parts import build_spec

OURS, DECODER = "tokenizers.points", "objectives.reconstruct.decoders.points"
NET = "MAE_encoder.encoder"
STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Pointmae(Format):
    """Point-MAE's own code."""

    title = "Point-MAE"

    def fits(self, foreign: Foreign) -> bool:
        """Know it by its PointNet."""
        return f"{NET}.first_conv.0.weight" in foreign.shapes

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes; 64 groups of 1024 points and the heads are the paper's."""
        shapes = foreign.shapes
        width = shapes["mask_token"][2]
        first, channels, _ = shapes[f"{NET}.first_conv.0.weight"]
        third, doubled, _ = shapes[f"{NET}.second_conv.0.weight"]
        groups = get(given, "modalities.points.tokenizer.groups", 64)
        tokenizer = {"type": "point_group", "groups": groups, "embed_width": (first, doubled // 2, third)}
        tokenizer |= {"neighbours": shapes["increase_dim.0.weight"][0] // channels, "norm": "frozen_batch"}
        points = {"type": "points", "count": 1024, "normalise": "unit_sphere_first", "tokenizer": tokenizer}
        points["positions"] = {"type": "coordinates", "hidden": shapes["MAE_encoder.pos_embed.0.weight"][0]}
        block = "MAE_encoder.blocks.blocks.0"
        heads = heads_of(width, get(given, "backbone.heads"), "backbone.heads")
        backbone = {
            "width": width,
            "depth": foreign.count(r"MAE_encoder\.blocks\.blocks\.(\d+)\."),
            "heads": heads,
            "mlp_ratio": ratio_of(shapes[f"{block}.mlp.fc1.weight"][0], width),
            "class_tokens": 0,
            "norm_eps": 1e-5,
            "positions_every_block": True,
            "drop_path": 0.1,
        }
        decoder = {"type": "self_decoder", "width": width, "depth": foreign.count(r"MAE_decoder\.blocks\.(\d+)\.")}
        decoder |= {"heads": get(given, "objectives.reconstruct.decoder.heads", heads), "embed": False}
        visible = int(groups) - int(0.6 * int(groups))
        reconstruct = {"type": "reconstruct", "masking": {"type": "fixed", "visible": visible}, "decoder": decoder}
        reconstruct["targets"] = {"points": {"loss": "chamfer"}}
        return {"modalities": {"points": points}, "backbone": backbone, "objectives": {"reconstruct": reconstruct}}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of PointNet, encoder and decoder."""
        spec = backbone_of(config, self.title, class_tokens=0, positions_every_block=True)
        decoder = self._decoder(config)
        points = (config.modalities or {})["points"]
        tokenizer: Any = build_spec("tokenizers", points["tokenizer"], "modalities.points.tokenizer")[1]
        if tokenizer.norm != "frozen_batch" or points.get("positions", {}).get("type") != "coordinates":
            raise M3Error(f"{self.title} has `norm: frozen_batch` in its groups and positions of type `coordinates`.")
        first, second, third = tokenizer.embed_width
        channels, width = 3 + points.get("attributes", 0), spec.width
        values = channels * tokenizer.neighbours
        return [
            *_convolution(f"{NET}.first_conv.0", f"{OURS}.point.0", (first, channels)),
            *same(f"{NET}.first_conv.1", f"{OURS}.point.1", STATISTICS),
            *_convolution(f"{NET}.first_conv.3", f"{OURS}.point.3", (second, first)),
            _halves(f"{NET}.second_conv.0.weight", f"{OURS}.shared.weight", f"{OURS}.own.weight"),
            one(f"{NET}.second_conv.0.bias", f"{OURS}.own.bias"),
            *same(f"{NET}.second_conv.1", f"{OURS}.norm", STATISTICS),
            *_convolution(f"{NET}.second_conv.3", f"{OURS}.projection", (width, third)),
            *_positions("MAE_encoder.pos_embed", "positions.points"),
            *_blocks("MAE_encoder.blocks.blocks.{}", "backbone.blocks.{}", spec.depth, width),
            *same("MAE_encoder.norm", "backbone.norm"),
            shaped("mask_token", f"{DECODER}.mask_token", (1, 1, width), (1, width)),
            *_positions("decoder_pos_embed", f"{DECODER}.positions"),
            *_blocks("MAE_decoder.blocks.{}", f"{DECODER}.blocks.{{}}", decoder.depth, width),
            *same("MAE_decoder.norm", f"{DECODER}.norm"),
            *_convolution("increase_dim.0", f"{DECODER}.output", (values, width)),
        ]

    def _decoder(self, config: M3Config) -> SelfDecoder.Spec:
        """Return the settings of the decoder.

        Raises:
            M3Error: the objective is not Point-MAE's.
        """
        objectives = config.objectives or {}
        decoder, targets = get(objectives, "reconstruct.decoder", {}), get(objectives, "reconstruct.targets", {})
        is_theirs = list(objectives) == ["reconstruct"] and list(targets) == ["points"]
        if not is_theirs or decoder.get("type") != "self_decoder" or decoder.get("embed", True):
            raise M3Error(
                f"{self.title} is one objective `reconstruct` of the target `points` with a `self_decoder` and "
                f"`embed: false`."
            )
        return build_spec("decoders", decoder, "objectives.reconstruct.decoder")[1]  # type: ignore[return-value]

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells, and what the weights are read into."""
        groups = get(config.modalities or {}, "points.tokenizer.groups")
        return [
            f"modalities.points.tokenizer.groups={groups} and backbone.heads={(config.backbone or {})['heads']} are "
            f"the usual ones; change them if the model was made otherwise.",
            "the statistics of its BatchNorm stay as they are, in training too; groups begin at the point farthest "
            "from the middle, where the original takes the first of the list.",
        ]


def _convolution(theirs: str, ours: str, shape: tuple[int, int]) -> list[Row]:
    """Rows of a convolution of width 1, which is a linear layer."""
    return [shaped(f"{theirs}.weight", f"{ours}.weight", (*shape, 1), shape), one(f"{theirs}.bias", f"{ours}.bias")]


def _halves(theirs: str, shared: str, own: str) -> Row:
    """Row of the layer that reads [maximum of the group, own features], which are two of ours."""

    def read(x: list[Tensor]) -> list[Tensor]:
        return list(x[0].squeeze(2).chunk(2, dim=1))

    return Row((theirs,), (shared, own), read, lambda x: [torch.cat(x, dim=1).unsqueeze(2)])


def _positions(theirs: str, ours: str) -> list[Row]:
    return [row for n in (0, 2) for row in same(f"{theirs}.{n}", f"{ours}.layers.{n}")]


def _blocks(theirs: str, ours: str, depth: int, width: int) -> list[Row]:
    rows = vision.blocks(theirs, ours, depth, vision.TIMM)
    for n in range(depth):
        rows.append(one(f"{theirs.format(n)}.attn.qkv.weight", f"{ours.format(n)}.attention.qkv.weight"))
        rows.append(zeros(f"{ours.format(n)}.attention.qkv.bias", (3 * width,)))
    return rows
