"""Every format knows its own checkpoints by a few names and shapes, and no others."""

from __future__ import annotations

import pytest

from m3 import convert
from m3.build import model_config
from m3.config import M3Config
from m3.foreign.checkpoint import Foreign
from m3.foreign.vision import table_of
from m3.recipe import load_recipe

BLOCK = {"blocks.0.attn.qkv.weight": (24, 8), "blocks.0.mlp.fc1.weight": (32, 8)}
NAMES = {
    "beit": ["cls_token", "patch_embed.proj.weight", "blocks.0.attn.q_bias", "pos_embed", *BLOCK],
    "bert": ["embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"],
    "clip": ["vision_model.pre_layrnorm.weight", "text_model.final_layer_norm.weight", "logit_scale"],
    "dinov2": ["embeddings.mask_token", "embeddings.cls_token", "encoder.layer.0.layer_scale1.lambda1"],
    "fourm": ["mask_token", "encoder_norm.weight", "decoder_proj_context.weight", "decoder_embeddings.caption.mod_emb"],
    "fourm_tokenizer": ["quant_proj.weight", "quantize._codebook.embed", "encoder.pos_emb"],
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

SHAPES = {"pos_embed": (1, 5, 8), "patch_embed.proj.weight": (8, 3, 4, 4)}
"""Name -> shape, where a format looks at it."""

SIGNS: dict[str, dict[str, tuple[int, ...]]] = {
    "audiomae": BLOCK | {"patch_embed.proj.weight": (8, 1, 4, 4), "pos_embed": (1, 17, 8)},
    "fourm": {"decoder_proj_context.weight": (8, 8), "encoder_norm.weight": (8,), "mask_token": (1, 1, 8)},
    "mae": BLOCK
    | {"patch_embed.proj.weight": (8, 3, 4, 4), "pos_embed": (1, 17, 8)}
    | {"decoder_embed.weight": (4, 8), "decoder_blocks.0.attn.qkv.weight": (12, 4)},
    "mae_st": {"pos_embed_spatial": (1, 4, 8), "pos_embed_temporal": (1, 2, 8), "blocks.0.attn.q.weight": (8, 8)}
    | {"patch_embed.proj.weight": (8, 3, 2, 4, 4), "decoder_embed.weight": (4, 8)},
    "multimae": {"global_tokens": (1, 1, 8), "encoder.0.attn.qkv.weight": (24, 8)}
    | {"input_adapters.rgb.proj.weight": (8, 3, 4, 4), "input_adapters.rgb.pos_emb": (1, 8, 2, 2)},
    "pointmae": {"MAE_encoder.encoder.first_conv.0.weight": (4, 3, 1), "mask_token": (1, 1, 8)},
    "video_mae": {"videomae.encoder.layer.0.attention.attention.q_bias": (8,), "mask_token": (1, 1, 4)}
    | {"encoder_to_decoder.weight": (4, 8)},
    "videomae": {"encoder.patch_embed.proj.weight": (8, 3, 2, 4, 4), "encoder.blocks.0.attn.q_bias": (8,)}
    | {"encoder_to_decoder.weight": (4, 8), "mask_token": (1, 1, 4)},
    "vit": BLOCK | {"patch_embed.proj.weight": (8, 1, 4, 4), "pos_embed": (1, 17, 8)},
    "vit_mae": {"decoder.decoder_embed.weight": (4, 8), "vit.embeddings.cls_token": (1, 1, 8)},
}
"""Format -> names with the shapes that it is known by."""

CASES = [(name, {key: SHAPES.get(key, (1,)) for key in keys}) for name, keys in NAMES.items()]
CASES += list(SIGNS.items())


def sample(name: str, shapes: dict[str, tuple[int, ...]]) -> Foreign:
    """A checkpoint of a format, as far as it is looked at; a sound and a grey picture differ in positions alone."""
    tensors = {"pos_embed": table_of({}, (2, 8) if name == "audiomae" else (4, 4), 8, 1)}
    settings = {"model_type": "data2vec-vision"} if name == "hf_data2vec_vision" else {}
    return Foreign(name, tensors if shapes.get("pos_embed") == (1, 17, 8) else {}, shapes, settings)


def test_every_format_is_among_the_samples() -> None:
    assert {name for name, _ in CASES} == set(convert.names())


@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_a_checkpoint_is_known_by_its_own_format_alone(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    forms = {other: convert._format(other) for other in convert.names()}
    assert [other for other, form in forms.items() if form.fits(form.tidy(sample(name, shapes)))] == [name]


@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone."])
def test_videomaes_encoder_alone_is_known_under_all_its_prefixes(prefix: str) -> None:
    names = {f"{prefix}patch_embed.proj.weight": (8, 3, 2, 4, 4), f"{prefix}blocks.0.attn.q_bias": (8,)}
    foreign = Foreign("tuned", {}, dict(names))
    forms = {other: convert._format(other) for other in convert.names()}
    assert [other for other, form in forms.items() if form.fits(form.tidy(foreign))] == ["videomae"]


PUBLISHED = [
    ("multimae_vit_b", [], "multimae", 351),
    ("videomae_vit_b", ["objectives.reconstruct.decoder.norm_eps=1.0e-5"], "video_mae", 250),
]


@pytest.mark.parametrize(("recipe", "changes", "name", "count"), PUBLISHED)
def test_the_models_of_our_recipes_are_written_with_as_many_tensors_as_the_published_ones(
    recipe: str, changes: list[str], name: str, count: int
) -> None:
    rows = convert._format(name).rows(model_config(load_recipe(recipe, changes)))
    assert sum(len(row.theirs) for row in rows) == count


def test_4m_b_with_seven_modalities_has_as_many_tensors_as_published_but_for_its_two_sequences() -> None:
    """359, of which each sequence has three in the encoder and four in the decoder."""
    codes = {"type": "semantic_map", "size": 14, "classes": 8192, "tokenizer": {"type": "embedding"}}
    maps = {f"tok_{name}@224": codes for name in ("rgb", "depth", "normal", "semseg", "clip")}
    image = {"type": "image", "size": 224, "tokenizer": {"type": "patch", "size": 16}}
    backbone = {"width": 768, "depth": 12, "heads": 12, "class_tokens": 0, "axis_order": "yx", "mlp": "swiglu"}
    translate = {"type": "translate", "outputs": list(maps), "masking": {"type": "budget", "visible": 1, "targets": 1}}
    config = M3Config(
        modalities={"rgb@224": image, **maps},
        backbone=backbone | {"bias": False, "modality_embedding": True},
        objectives={"translate": translate},
    )
    assert sum(len(row.theirs) for row in convert._format("fourm").rows(config)) == 359 - 14
