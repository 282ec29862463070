"""A plain ViT in timm's names: timm itself, MAE's encoder, DeiT, DINOv2 with registers, and what follows them.

    cls_token, reg_token, pos_embed, patch_embed.proj, norm_pre, blocks.N.(norm1, attn.qkv, attn.proj, ls1.gamma, norm2,
    mlp.fc1, mlp.fc2, ls2.gamma), norm; of fine-tuned ones also head, and fc_norm instead of norm

Letters: D width, R prefix tokens (class and registers), N patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import SHOWN, Format, backbone_of, get, heads_of, square
from m3.foreign.rows import Left, Row, computed, same, shaped
from m3.foreign.vision import pair


class Vit(Format):
    """timm's VisionTransformer."""

    title = "ViT in timm's names (timm, MAE's encoder)"
    left = (
        Left(r"(head|fc_norm)\.(weight|bias)", "a part of a classifier that is not whole"),
        Left(r"mask_token", "a mask token of its pretraining, which the encoder does not use"),
    )

    def fits(self, foreign: Foreign) -> bool:
        """Know it by the names of the first block, and that nothing is there beside the encoder."""
        needed = {"pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"}
        strangers = ("decoder", "encoder", "attn_pool", "visual", "text")
        is_alone = needed <= foreign.shapes.keys() and not any(name.startswith(strangers) for name in foreign.shapes)
        is_beit = "blocks.0.attn.q_bias" in foreign.shapes
        return is_alone and not is_beit and not vision.is_sound(foreign)

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes; mean, deviation and eps are timm's defaults where no config says more."""
        image, backbone = encoder_of(foreign, given)
        found = {"modalities": {"image": image}, "backbone": backbone, "objectives": {}}
        if has_head(foreign):
            sections = vision.classifier_sections(foreign.shapes["head.weight"][0], pool_of(foreign, backbone, given))
            found["modalities"] |= sections["modalities"]
            found["objectives"] |= sections["objectives"]
        return found

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder, and of the classifier where there is one."""
        found, rows = vision.classifier_of(config, "a ViT"), encoder_rows(config)
        if found is None:
            return rows
        if not (config.backbone or {}).get("final_norm", True):
            rows += same("fc_norm", f"objectives.{found.name}.norm")
        return [*rows, *same("head", f"objectives.{found.name}.head")]

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what timm's models say of their classifier."""
        found = vision.classifier_of(config, "a ViT")
        pool = {"mean": "avg", "class": "token"}
        return {} if found is None else {"num_classes": found.classes, "global_pool": pool[found.pool]}

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        backbone: Any = config.backbone
        said = f"backbone.heads={backbone['heads']} and backbone.norm_eps={backbone['norm_eps']:g} are the usual ones"
        notes = [said + "; change them if the model was made otherwise."]
        if config.objectives and "global_pool" not in foreign.settings:
            pool = config.objectives["classify"]["pool"]
            notes.append(
                f"objectives.classify.pool={pool} is the usual one for these names; change it to mean or class."
            )
        return notes


def has_head(foreign: Foreign) -> bool:
    """Return True where a classifier is whole: a linear layer behind one norm, before or after the pooling."""
    shapes = foreign.shapes
    norms = sum(f"{name}.weight" in shapes for name in ("norm", "fc_norm"))
    return (
        len(shapes.get("head.weight", ())) == 2 and "head.bias" in shapes and norms == 1 and _pool(foreign) is not None
    )


def pool_of(foreign: Foreign, backbone: dict[str, Any], given: dict[str, Any]) -> str:
    """Return what a classifier's vector is made of: as the user or timm's config says, else by the norm's name."""
    said = get(given, "objectives.classify.pool") or _pool(foreign)
    usual = "mean" if "fc_norm.weight" in foreign.shapes or not backbone["class_tokens"] else "class"
    return said or usual


def _pool(foreign: Foreign) -> str | None:
    """Return our word for timm's `global_pool`; empty where it is not said, None where we have not its kind."""
    return {"avg": "mean", "token": "class", "": ""}.get(foreign.settings.get("global_pool", ""))


def encoder_of(foreign: Foreign, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return our settings of the modality `image` and of the backbone.

    Raises:
        M3Error: the grid is no square, or a part is not one that a plain ViT has.
    """
    shapes = foreign.shapes
    width, channels, height, across = shapes["patch_embed.proj.weight"]
    prefix = sum(shapes[name][1] for name in ("cls_token", "reg_token") if name in shapes)
    length = shapes["pos_embed"][1]
    own = prefix if length != square_or_none(length) else 0  # `no_embed_class`: prefix tokens have no position
    side = square(length - own, "pos_embed")
    hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    if shapes["blocks.0.mlp.fc2.weight"][1] != hidden:
        raise M3Error("the MLP is a gated one, whose halves this layout packs into one matrix; it can't be read.")
    backbone = {
        "width": width,
        "depth": foreign.count(r"blocks\.(\d+)\."),
        "heads": heads_of(width, get(given, "backbone.heads"), "backbone.heads"),
        "mlp_ratio": hidden / width,
        "class_tokens": prefix,
        "final_norm": "norm.weight" in shapes,
        "input_norm": "norm_pre.weight" in shapes,
        "norm_eps": get(given, "backbone.norm_eps", 1e-6),
        "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
    }
    if "blocks.0.ls1.gamma" in shapes:
        backbone["layer_scale"] = vision.NO_SCALE
    patch = height if height == across else (height, across)
    image: dict[str, Any] = {"type": "image", "size": (side * height, side * across), "channels": channels}
    image |= {name: tuple(get(foreign.settings, f"pretrained_cfg.{name}")) for name in ("mean", "std")
              if get(foreign.settings, f"pretrained_cfg.{name}")}  # fmt: skip
    image["tokenizer"] = {"type": "patch", "size": patch}
    table = foreign.tensors["pos_embed"]
    order = next((order for order in ("xy", "yx") if is_fixed(table, (side, side), own, order)), None)
    if order is None:
        image["positions"] = {"type": "learned"}
        backbone["class_positions"] = bool(own)
    elif order == "yx":  # MultiMAE's, written as a ViT
        backbone["axis_order"] = order
    return image, backbone


def encoder_rows(config: M3Config, theirs: str = "") -> list[Row]:
    """Return the rows of an encoder of images; `theirs` stands before every name of theirs."""
    image = (config.modalities or {})["image"]
    backbone = backbone_of(config, "a ViT in timm's names", free=SHOWN).model_dump()
    width, depth, prefix = backbone["width"], backbone["depth"], backbone["class_tokens"]
    patch, size = pair(image["tokenizer"]["size"]), pair(image["size"])
    tokens = (size[0] // patch[0], size[1] // patch[1])
    block, own = theirs + "blocks.{}", "backbone.blocks.{}"
    kernel = (image.get("channels", 3), *patch)
    has_bias = not backbone.get("input_norm")  # timm leaves it to the norm before the first block
    rows = vision.patches(f"{theirs}patch_embed.proj", "tokenizers.image.projection", width, kernel, has_bias)
    if image.get("positions", {}).get("type", "sincos") == "learned":
        place = "backbone.prefix_positions" if backbone.get("class_positions") else None
        rows.append(vision.learned(f"{theirs}pos_embed", "positions.image.table", tokens, place))
    else:
        rows.append(computed(f"{theirs}pos_embed", vision.table_of(backbone, tokens, width, prefix)))
    if prefix == 1:
        rows.append(shaped(f"{theirs}cls_token", "backbone.prefix", (1, 1, width), (1, width)))
    elif prefix:
        rows.append(_class_and_registers(theirs, prefix))
    rows += vision.blocks(block, own, depth, vision.TIMM) + vision.fused(f"{block}.attn.qkv", own, depth)
    if backbone.get("layer_scale"):
        rows += vision.scales((f"{block}.ls1.gamma", f"{block}.ls2.gamma"), own, depth, backbone["layer_scale"])
    if backbone.get("qk_norm"):
        names = {"attn.q_norm": "attention.q_norm", "attn.k_norm": "attention.k_norm"}
        rows += vision.blocks(block, own, depth, names)
    if backbone.get("input_norm"):
        rows += same(f"{theirs}norm_pre", "backbone.input_norm")
    if backbone.get("final_norm", True):
        rows += same(f"{theirs}norm", "backbone.norm")
    return rows


def is_fixed(table: Tensor, tokens: tuple[int, int], prefix: int, order: str = "xy") -> bool:
    """Return True where a table (1, R + N, D) is MAE's fixed one, or with order `yx` MultiMAE's."""
    width = table.shape[-1]
    if width % 4:
        return False
    found = vision.table_of({"axis_order": order}, tokens, width, prefix)
    return table.shape == found.shape and torch.allclose(table.float(), found, rtol=0, atol=1e-6)


def square_or_none(count: int) -> int | None:
    """Return the count if it is a square number."""
    return count if round(count**0.5) ** 2 == count else None


def _class_and_registers(theirs: str, count: int) -> Row:
    def read(x: list[Tensor]) -> list[Tensor]:
        return [torch.cat(x, dim=1)[0]]

    def write(x: list[Tensor]) -> list[Tensor]:
        return [x[0][:1].unsqueeze(0), x[0][1:].unsqueeze(0)]

    return Row((f"{theirs}cls_token", f"{theirs}reg_token"), ("backbone.prefix",), read, write)
