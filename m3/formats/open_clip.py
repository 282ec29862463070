"""open_clip's CLIP with a ViT, which are OpenAI's names too.

    visual.(class_embedding, positional_embedding, conv1, ln_pre, transformer.resblocks.N.(ln_1, attn.in_proj_*,
    attn.out_proj, ln_2, mlp.c_fc, mlp.c_proj), ln_post, proj), token_embedding, positional_embedding,
    transformer.resblocks.N.(the same), ln_final, text_projection, logit_scale

Letters: D width of a tower, E of the shared space, L length of a sentence.
"""

from __future__ import annotations

import math
from typing import Any

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import pairs, vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, get, heads_of, ratio_of, square
from m3.foreign.rows import Left, Row, same, shaped, transposed

LAYERS = {
    "ln_1": "norm1",
    "attn.out_proj": "attention.projection",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class OpenClip(Format):
    """open_clip's `CLIP` with `VisionTransformer`, and OpenAI's state dicts."""

    title = "CLIP in open_clip's names (open_clip, OpenAI)"
    files = ("open_clip_model.safetensors", "open_clip_config.json")
    left = (
        Left(r"input_resolution|context_length|vocab_size", "a number that the shapes tell"),
        Left(r"attn_mask", "a mask that is computed"),
    )

    def fits(self, foreign: Foreign) -> bool:
        """Know it by both towers."""
        needed = {"visual.class_embedding", "visual.conv1.weight", "token_embedding.weight", "text_projection"}
        return needed <= foreign.shapes.keys()

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes, the rest off `open_clip_config.json` where there is one."""
        shapes, theirs = foreign.shapes, foreign.settings.get("model_cfg", {})
        _check(theirs)
        width, channels, patch, _ = shapes["visual.conv1.weight"]
        size = get(theirs, "vision_cfg.image_size")
        if size is None:
            size = square(shapes["visual.positional_embedding"][0] - 1, "visual.positional_embedding") * patch
        size = tuple(size) if isinstance(size, list) else size
        told = foreign.settings.get("preprocess_cfg", {})
        mean, std = told.get("mean", pairs.CLIP_MEAN), told.get("std", pairs.CLIP_STD)
        image = pairs.image_of(size, patch, mean, std, channels)
        length, word_width = shapes["positional_embedding"]
        vocabulary = get(given, "modalities.text.vocabulary")
        text = pairs.clip_text(shapes["token_embedding.weight"][0], length, vocabulary)
        heads = get(given, "towers.photo.heads")
        if heads is None and "vision_cfg" in theirs:
            heads = width // theirs["vision_cfg"].get("head_width", 64)
        photo = {
            "width": width,
            "heads": heads_of(width, heads, "towers.photo.heads"),
            "class_positions": True,
            "input_norm": "visual.ln_pre.weight" in shapes,
            **_blocks(foreign, given, "visual.transformer", "vision_cfg"),
        }
        words = {
            "width": word_width,
            "heads": get(theirs, "text_cfg.heads") or max(1, word_width // 64),
            "class_tokens": 0,
            "causal": True,
            **_blocks(foreign, given, "transformer", "text_cfg"),
        }
        sides = {"image": {"pool": "class"}, "text": {"pool": "last"}}
        loss = "sigmoid" if "logit_bias" in shapes else "softmax"
        shared = {"width": shapes["text_projection"][1], "loss": loss, "sides": sides}
        return pairs.sections(image, text, photo, words, shared)

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of both towers and of the shared space."""
        modalities, towers, contrast = pairs.clip_parts(config, "CLIP")
        image, photo = modalities["image"], towers["photo"]
        width, kernel = photo["width"], pairs.kernel_of(image)
        weight = "tokenizers.image.projection.weight"
        rows = [
            shaped("visual.conv1.weight", weight, (width, *kernel), (width, math.prod(kernel))),
            pairs.place_row("visual.positional_embedding", "towers.photo", image, photo),
            pairs.class_token("visual.class_embedding", "towers.photo", width),
            *same("visual.ln_post", "towers.photo.norm"),
            *pairs.word_rows("token_embedding.weight", "positional_embedding", modalities["text"]),
            *same("ln_final", "towers.words.norm"),
            transposed("visual.proj", f"{pairs.CONTRAST}.projections.image.weight"),
            transposed("text_projection", f"{pairs.CONTRAST}.projections.text.weight"),
            *pairs.scale_rows(contrast),
        ]
        if photo["input_norm"]:
            rows += same("visual.ln_pre", "towers.photo.input_norm")
        for tower, theirs in (("photo", "visual.transformer"), ("words", "transformer")):
            rows += tower_rows(f"{theirs}.resblocks.{{}}", f"towers.{tower}.blocks.{{}}", towers[tower]["depth"])
        return rows

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what open_clip builds the model from."""
        modalities, towers, contrast = pairs.clip_parts(config, "CLIP")
        image, photo, words = modalities["image"], towers["photo"], towers["words"]
        tall, wide = vision.pair(image["size"])
        vision_cfg = {
            "image_size": tall if tall == wide else [tall, wide],
            "patch_size": image["tokenizer"]["size"],
            "head_width": photo["width"] // photo["heads"],
            "no_ln_pre": not photo["input_norm"],
            **_cfg(photo),
        }
        text_cfg = {
            "context_length": modalities["text"]["length"],
            "vocab_size": pairs.vocabulary_size(modalities["text"]),
            "heads": words["heads"],
            **_cfg(words),
        }
        model_cfg: dict[str, Any] = {"embed_dim": contrast["width"], "quick_gelu": photo["mlp"] == "quick_gelu"}
        if contrast["loss"] == "sigmoid":
            model_cfg["init_logit_bias"] = contrast["bias"]
        model_cfg |= {"vision_cfg": vision_cfg, "text_cfg": text_cfg}
        return {"model_cfg": model_cfg, "preprocess_cfg": {"mean": list(image["mean"]), "std": list(image["std"])}}

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        if "model_cfg" in foreign.settings:
            return []
        photo, words = (config.towers or {})["photo"], (config.towers or {})["words"]
        return [
            f"the activation is taken to be {photo['mlp']}, the heads {photo['heads']} and {words['heads']}; "
            f"change them by towers.photo.mlp=quick_gelu, towers.photo.heads=N, towers.words.heads=N if the model "
            f"was made otherwise."
        ]


def tower_rows(theirs: str, ours: str, depth: int) -> list[Row]:
    """Rows of the blocks of a tower; `{}` is the block's number."""
    rows = vision.blocks(theirs, ours, depth, LAYERS)
    for n in range(depth):
        rows += pairs.packed(f"{theirs.format(n)}.attn", f"{ours.format(n)}.attention.qkv")
    return rows


def _check(theirs: dict[str, Any]) -> None:
    """Raise M3Error for what no tensor shows and ours has not."""
    for path, usual in (("vision_cfg.pool_type", ("tok",)), ("text_cfg.pool_type", ("argmax", "eos"))):
        if get(theirs, path, usual[0]) not in usual:
            raise M3Error(f"its {path} is `{get(theirs, path)}`, but only {' and '.join(usual)} can be read.")
    if get(theirs, "text_cfg.no_causal_mask"):
        raise M3Error("its text sees both ways, padding too, which can't be read.")


def _blocks(foreign: Foreign, given: dict[str, Any], prefix: str, section: str) -> dict[str, Any]:
    """Return what a tower's blocks are made of."""
    theirs = foreign.settings.get("model_cfg", {})
    is_quick = theirs.get("quick_gelu", False) if theirs else "input_resolution" in foreign.shapes
    is_tanh = get(theirs, f"{section}.act_kwargs.approximate") == "tanh"
    told = "gelu_tanh" if is_tanh else "quick_gelu" if is_quick else "gelu"
    hidden, width = foreign.shapes[f"{prefix}.resblocks.0.mlp.c_fc.weight"]
    return {
        "depth": foreign.count(rf"{prefix}\.resblocks\.(\d+)\."),
        "mlp_ratio": ratio_of(hidden, width),
        "mlp": get(given, "towers.photo.mlp", told),
        "norm_eps": get(theirs, f"{section}.norm_kwargs.eps", 1e-5),
    }


def _cfg(tower: dict[str, Any]) -> dict[str, Any]:
    """Return what both of open_clip's sections say of a tower."""
    found = {"width": tower["width"], "layers": tower["depth"], "mlp_ratio": tower["mlp_ratio"]}
    if tower["mlp"] == "gelu_tanh":
        found["act_kwargs"] = {"approximate": "tanh"}
    return found | {"norm_kwargs": {"eps": tower["norm_eps"]}}
