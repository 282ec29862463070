"""Attention that is worked out again: it is what the blocks computed with, whatever they are made of; pictures of it.

Letters: B samples, H heads, N tokens, L tokens of the encoder.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m3 import M3Config, M3Model
from m3.evaluate.attention_maps import attention, attention_figures, look, token_at
from m3.types import Batch

IMAGE = {"type": "image", "size": 8, "tokenizer": {"type": "patch", "size": 4}}
TEXT = {"type": "text", "vocabulary": "words:a b c", "length": 5, "tokenizer": {"type": "embedding"}}
VIDEO = {"type": "video", "size": 8, "frames": 4, "tokenizer": {"type": "tube", "size": 4, "frames": 2}}
MODALITIES = {"image": IMAGE, "text": TEXT, "video": VIDEO}
BACKBONE = {"width": 16, "depth": 2, "heads": 2, "class_tokens": 1}


def build(names: str, towers: dict | None = None, positions: dict | None = None, **backbone) -> M3Model:
    torch.manual_seed(3)
    modalities = {name: {**MODALITIES[name], **(positions or {})} for name in names.split()}
    objectives = {"contrast": {"type": "contrast", "width": 8, "sides": {n: {"modalities": [n]} for n in modalities}}}
    model = M3Model(
        M3Config(
            modalities=modalities, backbone=BACKBONE | backbone, towers=towers, objectives=objectives if towers else {}
        )
    ).eval()
    for parameter in model.parameters():  # what starts at 0 would hide that it is left out
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def batch_of(names: str, count: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(1)
    text = torch.tensor([[1, 2, -1, -1, -1], [0, 1, 2, 2, -1]], dtype=torch.int32)[:count]
    signals = {
        "image": torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8),
        "text": text,
        "video": torch.randint(0, 256, (count, 3, 4, 8, 8), generator=generator, dtype=torch.uint8),
    }
    return Batch({name: signals[name] for name in names.split()}, torch.arange(count))


@pytest.mark.parametrize("block", [0, -1])
@pytest.mark.parametrize(
    ("names", "settings"),
    [
        ("image", {}),
        ("image text", {}),
        ("image text", {"qk_norm": True, "class_tokens": 2, "norm": "post", "final_norm": False}),
        ("text", {"causal": True, "class_tokens": 0}),
        ("image", {"relative_bias": "per_block", "positions": {"positions": {"type": "relative"}}}),
        ("image", {"positions": {"positions": {"type": "rotary"}}}),
        ("image", {"positions_every_block": True, "layer_scale": 0.1}),
    ],
)
def test_the_product_with_the_values_is_what_the_block_computed(names, settings, block):
    model, batch = build(names, **settings), batch_of(names)
    part = model.backbone.blocks[block].attention
    seen: list[Tensor] = []
    handles = [
        part.qkv.register_forward_hook(lambda *given: seen.append(given[2])),
        part.projection.register_forward_pre_hook(lambda _, given: seen.append(given[0])),
    ]
    model.encode(batch)
    for handle in handles:
        handle.remove()
    qkv, joined = seen
    values = qkv[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)  # (B, H, L, E)
    weights, encoded = attention(model, "", batch, block)
    assert weights.shape == (2, 2, joined.shape[1], joined.shape[1])
    assert torch.allclose((weights @ values).transpose(1, 2).flatten(2), joined, atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-5)
    assert torch.equal(encoded.sequence, model.encode(batch).sequence)
    assert not part._forward_pre_hooks, "nothing is left in the model"


def test_padding_takes_no_part_neither_looked_at_nor_looking():
    model = build("image text")
    batch = batch_of("image text")
    weights, encoded = attention(model, "", batch)
    assert encoded.is_valid is not None
    shut = ~encoded.is_valid[:, None, None].expand_as(weights)
    assert shut.any()
    assert (weights[shut] == 0).all()
    groups = ("class token", "image", "text")
    one = Batch({name: x[:1] for name, x in batch.signals.items()}, batch.keys[:1])
    found = look(model, "", one, groups)
    assert found.counts.tolist() == [1, 4, 2]
    assert torch.allclose(found.paid.sum(1), found.counts)
    # by hand: rows of the two words, columns of the four patches; class token, patches and words are in this order
    mean = weights[0].mean(0)
    assert found.paid[2, 1] == pytest.approx(float(mean[5:7, 1:5].sum()), rel=1e-5)
    assert found.paid[0, 2] == pytest.approx(float(mean[0, 5:7].sum()), rel=1e-5)
    picture, over = found.pictures["image"]
    assert picture.shape == (8, 8, 3)
    assert over.shape == (2, 8, 8)
    assert over[1, 5, 2] == pytest.approx(float(weights[0, 1, 0, 3]) * 6, rel=1e-5), "patch 2, of 6 tokens"


def test_without_a_class_token_it_is_the_mean_over_tokens_that_exist():
    model = build("image text", class_tokens=0)
    batch = batch_of("image text", 1)
    weights, _ = attention(model, "", batch)
    over = look(model, "", batch, ("image", "text")).pictures["image"][1]
    assert over[0, 0, 7] == pytest.approx(float(weights[0, 0, :6, 1].mean()) * 6, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "place", "token"), [("image", (8, 8), (3, 4), 1), ("video", (4, 8, 8), (2, 7, 0), 6)]
)
def test_places_know_their_tokens(name, size, place, token):
    model, batch = build(name), batch_of(name)
    tokens = model.tokenise(Batch({name: batch.signals[name][:1]}, batch.keys[:1]))[name]
    found = token_at(model, name, tokens, size)
    assert found.shape == size
    assert found.unique().tolist() == list(range(tokens.count))
    assert found[place] == token


def test_a_modality_that_is_missing_is_left_out_of_the_matrix():
    model, batch = build("image text"), batch_of("image text", 1)
    batch.is_present["text"] = torch.tensor([False])
    found = look(model, "", batch, ("class token", "image", "text"))
    assert found.counts.tolist() == [1, 4, 0]
    assert found.paid[:, 2].tolist() == [0, 0, 0]


def test_every_transformer_is_drawn_with_what_it_reads():
    towers = {"eye": {"modalities": ["image"], **BACKBONE}, "ear": {"modalities": ["text"], **BACKBONE}}
    figures = attention_figures(build("image text", towers), [batch_of("image text", 1)] * 2)
    assert list(figures) == ["Where the class token looks (last block of eye)"]
    titles = [axis.get_title() for axis in next(iter(figures.values())).axes]
    assert titles[:4] == ["seen", "mean of heads", "head 1", "head 2"]
