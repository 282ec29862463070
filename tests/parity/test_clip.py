"""CLIP with the weights of an open_clip model says the same; SigLIP's pooling with those of timm's; the same losses.

Letters: B samples, E width of the shared space.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3 import M3Config, M3Model, M3Processor
from m3.backbone import BackboneSpec
from m3.plugins import Pool
from m3.pooling import AttentionPool

open_clip = pytest.importorskip("open_clip", reason="needs open_clip")
timm_layers = pytest.importorskip("timm.layers", reason="needs timm")

SIZE, PATCH, LENGTH, E = 32, 8, 12, 24
SENTENCES = ["a red cube", "Two large blue spheres behind a cone.", "x " * 40]


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter random, so that no bias or scale can be forgotten."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim else 0.1
            is_norm = ("ln_" in name or "norm" in name) and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale + is_norm)
    return module


def theirs() -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=PATCH, image_size=SIZE)
    text = CLIPTextCfg(context_length=LENGTH, width=16, heads=2, layers=3)
    return randomised(CLIP(E, vision, text, quick_gelu=True)).eval().double()


def ours() -> M3Model:
    grid = {"positions": {"type": "learned"}}
    image = {"type": "image", "size": SIZE, "tokenizer": {"type": "patch", "size": PATCH}, **grid}
    image |= {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    text = {"type": "text", "vocabulary": "open_clip:", "length": LENGTH, "tokenizer": {"type": "embedding"}, **grid}
    text |= {"start": "<start_of_text>", "end": "<end_of_text>"}
    style = {"mlp": "quick_gelu", "norm_eps": 1e-5}
    photo = {"modalities": ["image"], "width": 32, "depth": 2, "heads": 4, "input_norm": True, **style}
    words = {"modalities": ["text"], "width": 16, "depth": 3, "heads": 2, "class_tokens": 0, "causal": True, **style}
    sides = {"image": {"pool": "class"}, "text": {"pool": "last"}}
    config = M3Config(
        modalities={"image": image, "text": text},
        towers={"photo": photo, "words": words},
        objectives={"contrast": {"type": "contrast", "width": E, "sides": sides}},
    )
    return M3Model(config).eval().double()


def take_weights(model: M3Model, clip: nn.Module) -> None:
    """Copy open_clip's weights; whatever is left over on either side fails."""
    state = clip.state_dict()
    state.pop("attn_mask", None)

    def blocks(tower: str, prefix: str) -> dict[str, Tensor]:
        names = {"ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        names |= {"attn.in_proj_": "attention.qkv.", "attn.out_proj": "attention.projection"}
        found = {}
        for key in [key for key in state if key.startswith(prefix)]:
            own = key.removeprefix(prefix)
            for old, new in names.items():
                own = own.replace(old, new)
            found[f"towers.{tower}.blocks.{own}"] = state.pop(key)
        return found

    places = state.pop("visual.positional_embedding")
    words = state.pop("token_embedding.weight")
    new = {
        "towers.photo.prefix": (state.pop("visual.class_embedding") + places[0]).unsqueeze(0),
        "positions.image.table": places[1:].T.reshape(32, SIZE // PATCH, SIZE // PATCH),
        "positions.text.table": state.pop("positional_embedding").T,
        "tokenizers.image.projection.weight": state.pop("visual.conv1.weight").flatten(1),
        "tokenizers.image.projection.bias": torch.zeros(32),
        "tokenizers.text.table.weight": torch.cat([words, torch.zeros(1, 16)]),
        "objectives.contrast.projections.image.weight": state.pop("visual.proj").T,
        "objectives.contrast.projections.text.weight": state.pop("text_projection").T,
        "objectives.contrast.logit_scale": state.pop("logit_scale"),
        **blocks("photo", "visual.transformer.resblocks."),
        **blocks("words", "transformer.resblocks."),
    }
    for part in ("weight", "bias"):
        new[f"towers.photo.input_norm.{part}"] = state.pop(f"visual.ln_pre.{part}")
        new[f"towers.photo.norm.{part}"] = state.pop(f"visual.ln_post.{part}")
        new[f"towers.words.norm.{part}"] = state.pop(f"ln_final.{part}")
    assert state == {}, "a weight of open_clip's has no place in ours"
    model.load_state_dict(new)


def test_embeddings_and_loss_are_those_of_open_clip():
    clip, model = theirs(), ours()
    take_weights(model, clip)
    pixels = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batch = M3Processor(model.config.modalities)(image=list(pixels.numpy()), text=SENTENCES)
    found = model.embed(batch)
    normalised = model.modalities["image"].normalise(batch.signals["image"]).double()
    ids = open_clip.tokenizer.SimpleTokenizer(context_length=LENGTH)(SENTENCES)
    with torch.no_grad():
        image, text = clip.encode_image(normalised, normalize=True), clip.encode_text(ids, normalize=True)
    torch.testing.assert_close(found["image"], image, rtol=0, atol=1e-6)  # our tokens are float32 before the model
    torch.testing.assert_close(found["text"], text, rtol=0, atol=1e-6)
    loss = open_clip.loss.ClipLoss()(image, text, clip.logit_scale.exp())
    assert model(batch).loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_the_sigmoid_loss_is_open_clips():
    sides = {"image": {}, "text": {}}
    contrast = {"type": "contrast", "width": 8, "loss": "sigmoid", "temperature": 0.1, "sides": sides}
    image = {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 8}}
    text = {"type": "text", "vocabulary": "words:a b", "tokenizer": {"type": "embedding"}}
    small = {"width": 16, "depth": 1, "heads": 2}
    model = M3Model(M3Config(modalities={"image": image, "text": text}, backbone=small, objectives={"c": contrast}))
    part = model.objectives["c"]
    generator = torch.Generator().manual_seed(3)
    a, b = (F.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    there = torch.ones(5, dtype=torch.bool)
    own = {"image": a, "text": b, "image is there": there, "text is there": there}
    found = part._part("image", "text", own, Pool(own, 0))
    expected = open_clip.loss.SigLipLoss()(a, b, torch.tensor(10.0), torch.tensor(-10.0))
    assert (found.sum / found.count).item() == pytest.approx(expected.item(), rel=1e-5)


def test_attention_pooling_is_timms():
    torch.manual_seed(2)
    pool = randomised(AttentionPool(BackboneSpec(width=24, heads=4))).double()
    peer = timm_layers.AttentionPoolLatent(24, num_heads=4, norm_layer=partial(nn.LayerNorm, eps=1e-6)).double()
    names = {"latent": "query", "proj.": "attention.projection.", "q.": "attention.q.", "kv.": "attention.kv."}
    state = pool.state_dict()
    for key in peer.state_dict():
        own = next((key.replace(old, new, 1) for old, new in names.items() if key.startswith(old)), key)
        peer.state_dict()[key].copy_(state.pop(own).reshape(peer.state_dict()[key].shape))
    assert state == {}
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(pool(x, None), peer(x), rtol=1e-10, atol=1e-10)
    is_valid = torch.arange(7) < torch.tensor([[7], [2], [5]])
    torch.testing.assert_close(pool(x, is_valid)[1:2], peer(x[1:2, :2]), rtol=1e-10, atol=1e-10)
