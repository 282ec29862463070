"""open_clip's SigLIP: timm's ViT with pooling by attention, and open_clip's text.

visual.trunk.(patch_embed.proj, pos_embed, blocks.N.(timm's), norm, attn_pool.(latent, q, kv, proj, norm, mlp)),
text.(token_embedding, positional_embedding, transformer.resblocks.N.(open_clip's), ln_final, text_projection),
logit_scale, logit_bias
"""

from __future__ import annotations

import re
from typing import Any

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import pairs, vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, get, heads_of, ratio_of, square
from m3.foreign.rows import Row, same, shaped
from m3.formats.open_clip import tower_rows
from m3.formats.siglip import HALF, NOTE, POOL

TITLE = "SigLIP in open_clip's names"
TRUNK, BLOCK = "visual.trunk", "visual.trunk.blocks.{}"
POOLING = {"proj": "attention.projection", "q": "attention.q", "kv": "attention.kv", "norm": "norm"}
POOLING |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
TANH = r"vit_(base_patch32_siglip_256|large_patch16_siglip_512|so400m_patch16_siglip_\d+|giantopt_patch16_siglip_\d+)"
"""timm's models whose GELU is the one by tanh; the others have the exact one."""
SIZES = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}
"""Width -> timm's name of the size."""


class OpenClipSiglip(Format):
    """open_clip's `CustomTextCLIP` with timm's SigLIP trunk."""

    title = TITLE
    files = ("open_clip_model.safetensors", "open_clip_config.json")

    def fits(self, foreign: Foreign) -> bool:
        """Know it by the pooling of images and the place of its text."""
        return {f"{TRUNK}.attn_pool.latent", "text.token_embedding.weight"} <= foreign.shapes.keys()

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes, the rest off `open_clip_config.json` where there is one."""
        shapes, theirs = foreign.shapes, foreign.settings.get("model_cfg", {})
        if get(theirs, "text_cfg.pool_type", "last") != "last" or not get(theirs, "text_cfg.no_causal_mask", True):
            raise M3Error("its text is not read at the last token of a sentence that sees both ways, as SigLIP's is.")
        width, channels, patch, _ = shapes[f"{TRUNK}.patch_embed.proj.weight"]
        side = square(shapes[f"{TRUNK}.pos_embed"][1], f"{TRUNK}.pos_embed")
        told = foreign.settings.get("preprocess_cfg", {})
        image = pairs.image_of(side * patch, patch, told.get("mean", HALF), told.get("std", HALF), channels)
        count, word_width = shapes["text.token_embedding.weight"]
        length, vocabulary = shapes["text.positional_embedding"][0], get(given, "modalities.text.vocabulary")
        text = pairs.siglip_text(count, length, vocabulary, foreign.where)
        is_tanh = bool(re.fullmatch(TANH, get(theirs, "vision_cfg.timm_model_name", "")))
        photo = {
            "width": width,
            "depth": foreign.count(r"visual\.trunk\.blocks\.(\d+)\."),
            "heads": heads_of(width, get(given, "towers.photo.heads"), "towers.photo.heads"),
            "mlp_ratio": ratio_of(shapes[f"{TRUNK}.blocks.0.mlp.fc1.weight"][0], width),
            "mlp": "gelu_tanh" if is_tanh else "gelu",
            "norm_eps": 1e-6,
        }
        heads = get(given, "towers.words.heads", get(theirs, "text_cfg.heads"))
        is_tanh = get(theirs, "text_cfg.act_kwargs.approximate") == "tanh"
        words = {
            "width": word_width,
            "depth": foreign.count(r"text\.transformer\.resblocks\.(\d+)\."),
            "heads": heads_of(word_width, heads, "towers.words.heads"),
            "mlp_ratio": ratio_of(shapes["text.transformer.resblocks.0.mlp.c_fc.weight"][0], word_width),
            "mlp": "gelu_tanh" if is_tanh else "gelu",
            "norm_eps": get(theirs, "text_cfg.norm_kwargs.eps", 1e-6 if not theirs else 1e-5),
        }
        return pairs.siglip_sections(image, text, photo, words)

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of both towers and of the shared space."""
        modalities, towers, contrast = pairs.siglip_parts(config, TITLE)
        image, photo, words = modalities["image"], towers["photo"], towers["words"]
        width, depth, ours = photo["width"], photo["depth"], "towers.photo.blocks.{}"
        kernel = pairs.kernel_of(image)
        return [
            *vision.patches(f"{TRUNK}.patch_embed.proj", "tokenizers.image.projection", width, kernel),
            vision.learned(f"{TRUNK}.pos_embed", "positions.image.table", pairs.tokens_of(image)),
            *vision.blocks(BLOCK, ours, depth, vision.TIMM),
            *vision.fused(f"{BLOCK}.attn.qkv", ours, depth),
            *same(f"{TRUNK}.norm", "towers.photo.norm"),
            shaped(f"{TRUNK}.attn_pool.latent", f"{POOL}.query", (1, 1, width), (1, width)),
            *vision.blocks(f"{TRUNK}.attn_pool", POOL, 1, POOLING),
            *pairs.word_rows("text.token_embedding.weight", "text.positional_embedding", modalities["text"]),
            *tower_rows("text.transformer.resblocks.{}", "towers.words.blocks.{}", words["depth"]),
            *same("text.ln_final", "towers.words.norm"),
            *same("text.text_projection", f"{pairs.CONTRAST}.projections.text"),
            *pairs.scale_rows(contrast),
        ]

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what open_clip builds the model from; nothing for sizes of which timm has no SigLIP."""
        modalities, towers, contrast = pairs.siglip_parts(config, TITLE)
        image, text, photo, words = modalities["image"], modalities["text"], towers["photo"], towers["words"]
        if photo["width"] not in SIZES:
            return {}
        size, patch = vision.pair(image["size"])[0], vision.pair(image["tokenizer"]["size"])[0]
        vision_cfg = {
            "image_size": size,
            "timm_model_name": f"vit_{SIZES[photo['width']]}_patch{patch}_siglip_{size}",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        }
        text_cfg = {
            "context_length": text["length"],
            "vocab_size": pairs.vocabulary_size(text),
            "width": words["width"],
            "heads": words["heads"],
            "layers": words["depth"],
            "mlp_ratio": words["mlp_ratio"],
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": words["norm_eps"]},
        }
        if words["mlp"] == "gelu_tanh":
            text_cfg["act_kwargs"] = {"approximate": "tanh"}
        model_cfg = {"embed_dim": contrast["width"], "init_logit_bias": contrast["bias"], "custom_text": True}
        model_cfg |= {"vision_cfg": vision_cfg, "text_cfg": text_cfg}
        return {"model_cfg": model_cfg, "preprocess_cfg": {"mean": list(image["mean"]), "std": list(image["std"])}}

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        towers = config.towers or {}
        told = [towers[name]["mlp"] for name in ("photo", "words")]
        guess = f"the activations are taken to be {told[0]} and {told[1]}; change them by towers.photo.mlp=gelu_tanh."
        return [NOTE] if "model_cfg" in foreign.settings else [NOTE, guess]
