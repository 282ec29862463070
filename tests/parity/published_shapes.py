"""The published checkpoints' names and shapes at their published sizes, for code that can't be installed.

The tables are written by hand from the papers and the descriptions of the published files, and share nothing with the
converters. What a description does not give is not guessed: VideoMAE v2's decoders (their depth) are not here, nor
the names inside AudioMAE's Swin decoder, which is left out as a whole. Names of MAE-ST's own code, Point-MAE and the
prefix of SimMIM's are those of their second derivations, with the papers' sizes. UNITER's sizes are in
`test_convert_uniter.py`.

Letters: D width, d width of a decoder, n depth, p side of a patch, N tokens, V entries of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


# -- parts that formats share -----------------------------------------------------------------------------------------


def layer(name: str, *shape: int) -> Shapes:
    """A layer with a bias, or a norm."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def mlp(name: str, width: int, hidden: int) -> Shapes:
    return layer(f"{name}.fc1", hidden, width) | layer(f"{name}.fc2", width, hidden)


def blocks(name: str, depth: int, width: int, qkv: str = "full", hidden: int | None = None) -> Shapes:
    """timm's names, MLPs four times as wide; `qkv` packed with a full bias, one without the keys' ("qv"), or none."""
    found: Shapes = {}
    for n in range(depth):
        own = f"{name}.{n}"
        found |= layer(f"{own}.norm1", width) | layer(f"{own}.norm2", width) | layer(f"{own}.attn.proj", width, width)
        found |= mlp(f"{own}.mlp", width, hidden or 4 * width)
        if qkv == "apart":
            for part in "qkv":
                found |= layer(f"{own}.attn.{part}", width, width)
            continue
        found |= {f"{own}.attn.qkv.weight": (3 * width, width)}
        found |= {f"{own}.attn.qkv.bias": (3 * width,)} if qkv == "full" else {}
        found |= {f"{own}.attn.{part}_bias": (width,) for part in ("q", "v")} if qkv == "qv" else {}
    return found


def waves(count: int, width: int) -> Tensor:
    """(places, width): sines, then cosines."""
    omega = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = torch.arange(count, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def plane(rows: int, columns: int, width: int, first: str) -> Tensor:
    """(1, N, D), row by row; `first` is what the first half of the channels tells, "row" or "column"."""
    row = waves(rows, width // 2)[:, None].expand(-1, columns, -1)
    column = waves(columns, width // 2)[None].expand(rows, -1, -1)
    return torch.cat([row, column] if first == "row" else [column, row], dim=-1).flatten(0, 1)[None]


def behind_class(table: Tensor) -> Tensor:
    """Zeros for a class token before the others."""
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)


@dataclass(frozen=True)
class Case:
    """One published file.

    Attributes:
        format: as which it must be recognised.
        shapes: the whole file.
        tables: fixed positions by name, whose values are looked at.
        left: beginnings of the names that may be left out.
        overrides: what the user gives.
    """

    format: str
    shapes: Shapes
    tables: dict[str, Tensor] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


# -- MAE, MAE-ST, AudioMAE --------------------------------------------------------------------------------------------


def vit(depth: int, width: int, p: int, count: int, channels: int = 3) -> Shapes:
    found: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, count + 1, width)}
    found |= layer("patch_embed.proj", width, channels, p, p) | layer("norm", width)
    return found | blocks("blocks", depth, width)


def mae_decoder(width: int, p: int, count: int) -> Shapes:
    """512 wide and 8 deep for all sizes."""
    found: Shapes = {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, count + 1, 512)}
    found |= layer("decoder_embed", 512, width) | layer("decoder_norm", 512)
    return found | layer("decoder_pred", p * p * 3, 512) | blocks("decoder_blocks", 8, 512)


MAE = {"B": (12, 768, 16), "L": (24, 1024, 16), "H": (32, 1280, 14)}


def mae(size: str, kind: str) -> Case:
    """`kind`: "full" with the decoder, the "encoder", or "tuned" to ImageNet's 1000 classes."""
    depth, width, p = MAE[size]
    side = 224 // p
    shapes = vit(depth, width, p, side**2)
    tables = {"pos_embed": behind_class(plane(side, side, width, "column"))}
    if kind == "full":
        tables["decoder_pos_embed"] = behind_class(plane(side, side, 512, "column"))
        return Case("mae", shapes | mae_decoder(width, p, side**2), tables)
    if kind == "tuned":
        shapes = {name: x for name, x in shapes.items() if not name.startswith("norm.")}
        shapes |= layer("fc_norm", width) | layer("head", 1000, width)
    return Case("vit", shapes, tables)


def mae_st() -> Case:
    """ViT-L: 16 frames of 224 x 224 in tubes of 2 x 16 x 16, one frame of each predicted.

    These are the files that its code writes, decoder 512 x 4.
    """
    depth, width, inner = 24, 1024, 512
    shapes = blocks("blocks", depth, width, "apart") | blocks("decoder_blocks", 4, inner, "apart")
    for name, own in (("", width), ("decoder_", inner)):
        shapes |= {f"{name}cls_token": (1, 1, own), f"{name}pos_embed_class": (1, 1, own)}
        shapes |= {f"{name}pos_embed_temporal": (1, 8, own), f"{name}pos_embed_spatial": (1, 196, own)}
        shapes |= layer(f"{name}norm", own)
    shapes |= layer("patch_embed.proj", width, 3, 2, 16, 16) | layer("decoder_embed", inner, width)
    return Case("mae_st", shapes | {"mask_token": (1, 1, inner)} | layer("decoder_pred", 16 * 16 * 3, inner))


def mae_st_released() -> Case:
    """The released file is of another code (facebookresearch/mae_st, issue 17): its decoder is called `pred_head`."""
    encoder = {n: x for n, x in mae_st().shapes.items() if not n.startswith(("decoder_", "mask_token"))}
    shapes = blocks("pred_head.transforms.0", 4, 512, "apart") | layer("pred_head.transforms.0.4", 512)
    shapes |= layer("pred_head.projections.0", 16 * 16 * 3, 512) | layer("decoder_embed", 512, 1024)
    shapes |= {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, 8 * 196 + 1, 512)}
    return Case("mae_st", encoder | shapes, left=tuple(shapes))


def audiomae() -> Case:
    """ViT-B over 1024 x 128, which are 64 x 8 patches; with a decoder 512 wide."""
    shapes = vit(12, 768, 16, 512, channels=1) | layer("decoder_embed", 512, 768) | layer("decoder_norm", 512)
    shapes |= layer("decoder_pred", 256, 512) | {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, 513, 512)}
    tables = {"pos_embed": behind_class(plane(64, 8, 768, "column"))}
    return Case("audiomae", shapes, tables, left=("decoder_", "mask_token"))


# -- VideoMAE ---------------------------------------------------------------------------------------------------------

VIDEOMAE = {"S": (12, 384, 4, 192), "B": (12, 768, 4, 384), "L": (24, 1024, 12, 512), "H": (32, 1280, 12, 640)}
"""Depth and width of the encoder, then of the decoder. Positions are not saved."""


def videomae(size: str) -> Case:
    depth, width, inner_depth, inner = VIDEOMAE[size]
    shapes: Shapes = {"mask_token": (1, 1, inner), "encoder_to_decoder.weight": (inner, width)}
    shapes |= layer("encoder.patch_embed.proj", width, 3, 2, 16, 16) | layer("encoder.norm", width)
    shapes |= blocks("encoder.blocks", depth, width, "qv") | blocks("decoder.blocks", inner_depth, inner, "qv")
    return Case("videomae", shapes | layer("decoder.norm", inner) | layer("decoder.head", 1536, inner))


def videomae_tuned(depth: int, width: int, p: int, hidden: int) -> Case:
    """An encoder alone with a classifier of Kinetics' 400 classes on the mean of the tokens."""
    shapes = layer("patch_embed.proj", width, 3, 2, p, p) | blocks("blocks", depth, width, "qv", hidden)
    shapes |= layer("fc_norm", width) | layer("head", 400, width)
    return Case("videomae", shapes, left=("fc_norm.", "head."))


# -- MultiMAE ---------------------------------------------------------------------------------------------------------


def multimae() -> Case:
    """MultiMAE-B of pictures, depth and 133 classes, with all four decoders; positions of 14 x 14."""
    tasks, values = ("rgb", "depth", "semseg"), {"rgb": 768, "norm_rgb": 768, "depth": 256, "semseg": 133 * 4 * 4}
    kernels = {"rgb": (3, 16, 16), "depth": (1, 16, 16), "semseg": (64, 4, 4)}
    shapes: Shapes = {"global_tokens": (1, 1, 768), "input_adapters.semseg.class_emb.weight": (133, 64)}
    shapes |= blocks("encoder", 12, 768)
    for task in tasks:
        shapes |= {f"input_adapters.{task}.pos_emb": (1, 768, 14, 14)}
        shapes |= layer(f"input_adapters.{task}.proj", 768, *kernels[task])
    for name, count in values.items():
        own = f"output_adapters.{name}"
        shapes |= {f"{own}.mask_token": (1, 1, 256), f"{own}.pos_emb": (1, 256, 14, 14)}
        shapes |= {f"{own}.task_embeddings.{task}": (1, 1, 256) for task in tasks}
        shapes |= layer(f"{own}.proj_context", 256, 768) | layer(f"{own}.decoder.q", 256, 256)
        shapes |= layer(f"{own}.decoder.kv", 512, 256) | layer(f"{own}.decoder.proj", 256, 256)
        for norm in ("context_norm", "query_norm", "out_norm"):
            shapes |= layer(f"{own}.{norm}", 256)
        shapes |= mlp(f"{own}.mlp", 256, 1024) | blocks(f"{own}.decoder_transformer", 2, 256)
        shapes |= layer(f"{own}.out_proj", count, 256)
    places = {name: shape[1] for name, shape in shapes.items() if name.endswith("pos_emb")}
    tables = {n: plane(14, 14, width, "row").transpose(1, 2).unflatten(2, (14, 14)) for n, width in places.items()}
    return Case("multimae", shapes, tables)


# -- 4M ---------------------------------------------------------------------------------------------------------------

FOURM = {"Ti": (6, 384, 1024), "B": (12, 768, 2048), "L": (24, 1024, 2730)}
"""Depth of both sides, width, hidden width of the gated MLPs."""
SEVEN = {"tok_rgb@224": 16384, "tok_depth@224": 8192, "tok_normal@224": 8192, "tok_semseg@224": 4096}
SEVEN |= {"tok_clip@224": 8192, "caption": 30000, "det": 30000}
OTHERS = dict.fromkeys(("metadata", "human_poses", "color_palette", "sam_instance"), 30000)
FOURTEEN = ("tok_dinov2@224", "tok_imagebind@224")
"""Of patches of 14 pixels, 16 x 16 of them; all other maps are 14 x 14, and `_global` ones 16 codes."""
OTHERS |= dict.fromkeys(("tok_canny_edge@224", "tok_sam_edge@224", *FOURTEEN), 8192)
OTHERS |= dict.fromkeys(("tok_dinov2_global", "tok_imagebind_global"), 8192)
GLOBAL = ("tok_dinov2_global", "tok_imagebind_global")


def fourm_blocks(depth: int, width: int, hidden: int) -> Shapes:
    """Without biases, but norms keep one of zeros."""
    found: Shapes = {}
    inner = {"fc1": (hidden, width), "fc3": (hidden, width), "fc2": (width, hidden)}
    square, double, triple = ((k * width, width) for k in (1, 2, 3))
    cross = {"cross_attn.q": square, "cross_attn.kv": double, "cross_attn.proj": square}
    sides = {
        "encoder": (("norm1", "norm2"), {"attn.qkv": triple, "attn.proj": square}),
        "decoder": (
            ("norm1", "query_norm", "context_norm", "norm2"),
            {"self_attn.qkv": triple, "self_attn.proj": square, **cross},
        ),
    }
    for side, (norms, linear) in sides.items():
        for n in range(depth):
            for norm in norms:
                found |= layer(f"{side}.{n}.{norm}", width)
            found |= {f"{side}.{n}.{name}.weight": shape for name, shape in linear.items()}
            found |= {f"{side}.{n}.mlp.{name}.weight": shape for name, shape in inner.items()}
        found |= layer(f"{side}_norm", width)
    return found


def fourm(size: str, count: int) -> Case:
    """4M-7 or 4M-21; of the latter the embeddings of T5, for which M3 has no modality, are left out."""
    depth, width, hidden = FOURM[size]
    codes = SEVEN if count == 7 else SEVEN | OTHERS
    shapes = fourm_blocks(depth, width, hidden) | layer("decoder_proj_context", width, width)
    shapes |= {"mask_token": (1, 1, width), "encoder_embeddings.rgb@224.proj.weight": (width, 768)}
    inputs = ["rgb@224", *codes]
    if count == 21:
        inputs.append("t5_caption")
        shapes |= layer("encoder_embeddings.t5_caption.emb_proj", width, 4096)
    for name, entries in codes.items():
        shapes |= {f"{side}coder_embeddings.{name}.token_emb.weight": (entries, width) for side in ("en", "de")}
        shapes |= {f"decoder_embeddings.{name}.to_logits.weight": (entries, width)}
    tables = {}
    for own in [f"encoder_embeddings.{name}" for name in inputs] + [f"decoder_embeddings.{name}" for name in codes]:
        name, side = own.partition(".")[2], 16 if own.endswith(FOURTEEN) else 14
        is_map = "@" in name
        places = side**2 if is_map else 16 if name in GLOBAL else 512
        shapes |= {f"{own}.mod_emb": (1, 1, width), f"{own}.pos_emb": (1, places, width)}
        if name not in GLOBAL:
            tables[f"{own}.pos_emb"] = plane(side, side, width, "row") if is_map else waves(512, width)[None]
    if count == 7:
        return Case("fourm", shapes, tables)
    chosen = f"modalities={','.join(inputs[:-1])}"
    return Case("fourm", shapes, tables, ("encoder_embeddings.t5_caption.",), (chosen,))


# -- Point-MAE, SimMIM, BEiT ------------------------------------------------------------------------------------------


def pointmae() -> Case:
    """64 groups of 32 points; queries, keys and values have no bias."""

    def batch_norm(name: str, width: int) -> Shapes:
        running = {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}
        return layer(name, width) | running | {f"{name}.num_batches_tracked": ()}

    net = "MAE_encoder.encoder"
    shapes = layer(f"{net}.first_conv.0", 128, 3, 1) | batch_norm(f"{net}.first_conv.1", 128)
    shapes |= layer(f"{net}.first_conv.3", 256, 128, 1) | layer(f"{net}.second_conv.0", 512, 512, 1)
    shapes |= batch_norm(f"{net}.second_conv.1", 512) | layer(f"{net}.second_conv.3", 384, 512, 1)
    for name in ("MAE_encoder.pos_embed", "decoder_pos_embed"):
        shapes |= layer(f"{name}.0", 128, 3) | layer(f"{name}.2", 384, 128)
    shapes |= blocks("MAE_encoder.blocks.blocks", 12, 384, "none") | blocks("MAE_decoder.blocks", 4, 384, "none")
    shapes |= layer("MAE_encoder.norm", 384) | layer("MAE_decoder.norm", 384) | layer("increase_dim.0", 96, 384, 1)
    return Case("pointmae", shapes | {"mask_token": (1, 1, 384)})


def beit(size: str, theirs: str = "") -> Shapes:
    """Pre-trained at 224: 14 x 14 patches, one table of (2 * 14 - 1)^2 + 3 = 732 relative biases for all blocks."""
    depth, width, p = MAE[size]
    shapes: Shapes = {f"{theirs}{name}_token": (1, 1, width) for name in ("cls", "mask")}
    shapes |= {f"{theirs}rel_pos_bias.relative_position_bias_table": (732, width // 64)}
    shapes |= {f"{theirs}blocks.{n}.gamma_{k}": (width,) for n in range(depth) for k in (1, 2)}
    shapes |= layer(f"{theirs}patch_embed.proj", width, 3, p, p) | layer(f"{theirs}norm", width)
    return shapes | blocks(f"{theirs}blocks", depth, width, "qv")


def beit_of(size: str) -> Case:
    """With the head for DALL-E's 8192 codes, which needs a tokenizer to be of use."""
    return Case("beit", beit(size) | layer("lm_head", 8192, MAE[size][1]), left=("lm_head.", "mask_token"))


def simmim() -> Case:
    """ViT-B/16; the head is a 1 x 1 convolution to the values of a patch."""
    return Case("simmim", beit("B", "encoder.") | layer("decoder.0", 16 * 16 * 3, 768, 1, 1))


CASES: dict[str, Callable[[], Case]] = {
    **{
        f"MAE {size}, {kind}": lambda s=size, k=kind: mae(s, k) for size in MAE for kind in ("full", "encoder", "tuned")
    },
    "MAE-ST L": mae_st,
    "MAE-ST L, released": mae_st_released,
    "AudioMAE B": audiomae,
    **{f"VideoMAE {size}": lambda s=size: videomae(s) for size in VIDEOMAE},
    "VideoMAE B, tuned": lambda: videomae_tuned(12, 768, 16, 3072),
    "VideoMAE v2 g, tuned": lambda: videomae_tuned(40, 1408, 14, 1408 * 48 // 11),
    "MultiMAE B": multimae,
    "4M-7 Ti": lambda: fourm("Ti", 7),
    "4M-7 B": lambda: fourm("B", 7),
    "4M-7 L": lambda: fourm("L", 7),
    "4M-21 B": lambda: fourm("B", 21),
    "Point-MAE": pointmae,
    "BEiT B": lambda: beit_of("B"),
    "BEiT L": lambda: beit_of("L"),
    "SimMIM B": simmim,
}
