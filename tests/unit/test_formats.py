"""Every format knows its own checkpoints and no others."""

from __future__ import annotations

import pytest

from m3 import convert
from m3.foreign.checkpoint import Foreign

BLOCK = ["blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"]
NAMES = {
    "beit": ["cls_token", "patch_embed.proj.weight", "blocks.0.attn.q_bias", "pos_embed", *BLOCK],
    "bert": ["embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"],
    "clip": ["vision_model.pre_layrnorm.weight", "text_model.final_layer_norm.weight", "logit_scale"],
    "dinov2": ["embeddings.mask_token", "embeddings.cls_token", "encoder.layer.0.layer_scale1.lambda1"],
    "hf_beit": ["embeddings.cls_token", "encoder.layer.0.layernorm_before.weight", "encoder.layer.0.lambda_1"],
    "hf_data2vec_vision": ["embeddings.cls_token", "encoder.layer.0.layernorm_before.weight", "layernorm.weight"],
    "hf_vit": ["embeddings.cls_token", "encoder.layer.0.layernorm_before.weight", "layernorm.weight"],
    "open_clip_siglip": ["visual.trunk.attn_pool.latent", "text.token_embedding.weight", "logit_bias"],
    "siglip": ["vision_model.head.probe", "text_model.head.weight", "logit_bias"],
    "mae": [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "decoder_embed.weight",
        "mask_token",
        "decoder_blocks.0.attn.qkv.weight",
        *BLOCK,
    ],
    "simmim": [
        "encoder.cls_token",
        "encoder.mask_token",
        "encoder.patch_embed.proj.weight",
        "decoder.0.weight",
        "encoder.blocks.0.attn.q_bias",
    ],
    "uniter": ["uniter.embeddings.word_embeddings.weight", "uniter.img_embeddings.img_linear.weight"],
    "open_clip": ["visual.class_embedding", "visual.conv1.weight", "token_embedding.weight", "text_projection"],
    "vit": ["cls_token", "pos_embed", "patch_embed.proj.weight", *BLOCK],
    "vit_mae": [
        "vit.embeddings.cls_token",
        "vit.encoder.layer.0.layernorm_before.weight",
        "decoder.decoder_embed.weight",
    ],
}
"""Format -> a few of its names, enough to be known by."""

SETTINGS: dict[str, dict] = {"hf_data2vec_vision": {"model_type": "data2vec-vision"}}
"""Format -> the library's settings, where it is known by them."""

SHAPES = {"pos_embed": (1, 5, 8), "patch_embed.proj.weight": (8, 3, 4, 4)}
"""Name -> shape, where a format looks at it."""


def sample(name: str) -> Foreign:
    """A checkpoint of a format, as far as it is looked at to know it."""
    names = NAMES.get(name, [])
    shapes = {name: SHAPES.get(name, (1,)) for name in names}
    return Foreign(name, {}, shapes, SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", sorted(NAMES.keys() | SETTINGS.keys()))
def test_a_checkpoint_is_known_by_its_own_format_alone(name: str) -> None:
    known = [other for other in convert.names() if _fits(other, sample(name))]
    assert known == [name]


def _fits(name: str, foreign: Foreign) -> bool:
    form = convert._format(name)
    return form.fits(form.tidy(foreign))
