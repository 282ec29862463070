"""Every format knows its own checkpoints and no others."""

from __future__ import annotations

import pytest
import torch

from m3 import convert
from m3.foreign.checkpoint import Foreign

NAMES = {
    "bert": ["embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"],
    "clip": ["vision_model.pre_layrnorm.weight", "text_model.final_layer_norm.weight", "logit_scale"],
    "dinov2": ["embeddings.mask_token", "embeddings.cls_token", "encoder.layer.0.layer_scale1.lambda1"],
    "fourm": ["mask_token", "encoder_norm.weight", "decoder_proj_context.weight", "decoder_embeddings.caption.mod_emb"],
    "fourm_tokenizer": ["quant_proj.weight", "quantize._codebook.embed", "encoder.pos_emb"],
    "hf_vit": ["embeddings.cls_token", "encoder.layer.0.layernorm_before.weight", "layernorm.weight"],
    "open_clip_siglip": ["visual.trunk.attn_pool.latent", "text.token_embedding.weight", "logit_bias"],
    "siglip": ["vision_model.head.probe", "text_model.head.weight", "logit_bias"],
    "uniter": ["uniter.embeddings.word_embeddings.weight", "uniter.img_embeddings.img_linear.weight"],
    "open_clip": ["visual.class_embedding", "visual.conv1.weight", "token_embedding.weight", "text_projection"],
}
"""Format -> a few of its names, enough to be known by."""

SETTINGS: dict[str, dict] = {}
"""Format -> the library's settings, where it is known by them."""


def sample(name: str) -> Foreign:
    """A checkpoint of a format, as far as it is looked at to know it."""
    names = NAMES.get(name, [])
    return Foreign(name, {}, dict.fromkeys(names, tuple(torch.Size([1]))), SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", sorted(NAMES.keys() | SETTINGS.keys()))
def test_a_checkpoint_is_known_by_its_own_format_alone(name: str) -> None:
    known = [other for other in convert.names() if _fits(other, sample(name))]
    assert known == [name]


def _fits(name: str, foreign: Foreign) -> bool:
    form = convert._format(name)
    return form.fits(form.tidy(foreign))
