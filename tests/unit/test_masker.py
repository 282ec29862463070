"""Hidden tokens that are replaced instead of dropped, mismatched pairs, towers, drawn objectives, initial weights.

Letters: B samples, N tokens of a modality, D width.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from m3 import M3Config, M3Model
from m3.errors import M3Error
from m3.initialise import load_weights
from m3.masker import Masker
from m3.partners import Swap, draw_partners, swapped
from m3.plugins import View
from m3.random import Draws
from m3.schedule import drawn
from m3.types import HIDDEN, OWN, Batch, Tokens

IMAGE = {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 4}}
DEPTH = {"type": "depth", "size": 16, "tokenizer": {"type": "patch", "size": 4}}
TEXT = {"type": "text", "vocabulary": "words:a b c d", "length": 5, "tokenizer": {"type": "embedding"}}
SMALL = {"width": 16, "depth": 1, "heads": 2}
FULL = {"type": "fixed", "visible": 1.0}


def config(**sections) -> M3Config:
    reconstruct = {"type": "reconstruct", "decoder": {"type": "cross_decoder", "width": 8, "depth": 1, "heads": 2}}
    reconstruct["masking"] = sections.pop("masking", {"type": "fixed", "visible": 0.5})
    reconstruct["targets"] = {"image": {"loss": "mse"}}
    plain = {"modalities": {"image": IMAGE}, "backbone": SMALL, "objectives": {"reconstruct": reconstruct}}
    return M3Config(**(plain | sections))


def tokens(batch: int, lengths: list[int] | None = None) -> dict[str, Tokens]:
    values = torch.arange(batch * 6).reshape(batch, 6, 1)
    is_valid = None if lengths is None else torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    return {"text": Tokens(values, torch.arange(6.0).reshape(1, 6, 1), is_valid)}


def masker(hidden: str, visible: float = 0.5, classes: int = 50) -> Masker:
    return Masker(
        View(("text",), json.dumps({"type": "fixed", "visible": visible, "hidden": hidden})), {"text": classes}
    )


def test_replaced_tokens_keep_their_place_and_are_the_targets_of_the_plan_that_drops_them():
    draws, given = Draws(torch.arange(50)), tokens(50)
    dropped, replaced = masker("drop")(given, draws), masker("replace")(given, draws)
    assert replaced.visible["text"].tolist() == [list(range(6))] * 50
    assert torch.equal(replaced.target["text"], dropped.target["text"])
    hidden = (replaced.shown["text"] == HIDDEN).nonzero()[:, 1].reshape(50, 3)
    assert torch.equal(hidden, dropped.target["text"])
    assert set(replaced.shown["text"].unique().tolist()) == {HIDDEN, OWN}
    assert torch.equal(replaced.packed_content().nonzero()[:, 1].reshape(50, 3), dropped.visible["text"])


def test_filling_is_neither_shown_nor_asked_for():
    plan = masker("replace")(tokens(3, [6, 2, 4]), Draws(torch.arange(3)))
    assert plan.is_valid.sum(1).tolist() == [6, 2, 4]
    hidden = (plan.shown["text"] == HIDDEN).sum(1).tolist()
    assert hidden == plan.is_target["text"].sum(1).tolist() == [3, 1, 2]


def test_mixed_as_bert_does_it():
    count = 4000
    plan = masker("mix", visible=0.5)(tokens(count), Draws(torch.arange(count)))
    shown = plan.shown["text"].gather(1, plan.target["text"])
    share = {name: (shown == code).float().mean().item() for name, code in (("mask", HIDDEN), ("own", OWN))}
    assert share["mask"] == pytest.approx(0.8, abs=0.02)
    assert share["own"] == pytest.approx(0.1, abs=0.015)
    others = Counter(shown[shown >= 0].tolist())
    assert set(others) == set(range(50))
    assert chisquare(list(others.values())).pvalue > 1e-4


def test_a_hidden_token_leaves_no_trace_of_its_content():
    head = {"type": "reconstruct", "decoder": {"type": "head", "hidden": 8}, "targets": {"image": {"loss": "mse"}}}
    head["masking"] = {"type": "fixed", "visible": 0.5, "hidden": "replace"}
    model = M3Model(config(objectives={"head": head})).eval()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    batch = Batch({"image": pixels}, torch.arange(2))
    prepared = model.prepare(batch)
    (plan,) = prepared.plans.values()
    own = prepared.tokens["image"]
    is_hidden = (plan.shown["image"] == HIDDEN).unsqueeze(-1)
    other = {"image": Tokens(torch.where(is_hidden, own.values + 3, own.values), own.positions)}
    states = [model.encode_tokens(t, plan).states for t in (prepared.tokens, other)]
    assert torch.equal(*states)
    assert states[0].shape == (2, 16, 16)
    seen = {"image": Tokens(torch.where(is_hidden, own.values, own.values + 3), own.positions)}
    assert not torch.equal(states[0], model.encode_tokens(seen, plan).states)
    model(prepared).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    result = model.reconstruct(batch, 0.25)
    assert result.is_visible["image"].sum(1).tolist() == [4, 4]


def test_a_head_needs_the_states_of_hidden_tokens():
    head = {"type": "reconstruct", "decoder": {"type": "head"}, "targets": {"image": {"loss": "mse"}}}
    model = M3Model(config(objectives={"head": head}))
    with pytest.raises(M3Error, match=r"decoder `head` reads the encoder's states of hidden tokens.*hidden: replace"):
        model(Batch({"image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, torch.arange(2)))


def test_an_unknown_way_to_hide_is_named():
    with pytest.raises(M3Error, match=r"masking.hidden: `repalce` is not known.*`replace`"):
        masker("repalce")


def test_partners_stay_within_their_group_and_are_never_oneself():
    given = {"image": tokens(400)["text"], **tokens(400)}
    found = draw_partners(Swap(of="image", group=4), given, Draws(torch.arange(400)))
    rows = torch.arange(400)
    assert torch.equal(found.index // 4, rows // 4)
    assert torch.equal(found.index != rows, found.is_swapped)
    assert found.is_swapped.float().mean() == pytest.approx(0.5, abs=0.08)
    steps = Counter(((found.index - rows) % 4)[found.is_swapped].tolist())
    assert set(steps) == {1, 2, 3}
    assert min(steps.values()) > 40
    borrowed = swapped(given, found)
    assert torch.equal(borrowed["image"].values, given["image"].values[found.index])
    assert torch.equal(borrowed["text"].values, given["text"].values)
    halves = [draw_partners(Swap(of="image", group=4), tokens_of(given, s), Draws(rows[s])) for s in (slice(0, 8),)]
    assert torch.equal(halves[0].index, found.index[:8])


def tokens_of(given: dict[str, Tokens], rows: slice) -> dict[str, Tokens]:
    return {name: Tokens(t.values[rows], t.positions) for name, t in given.items()}


def test_only_samples_that_have_it_lend_a_modality():
    given = {"image": tokens(8, [6, 0, 0, 6, 6, 0, 0, 0])["text"], "text": tokens(8, [6, 6, 6, 0, 6, 6, 6, 6])["text"]}
    found = draw_partners(Swap(of="image", group=4, share=1.0), given, Draws(torch.arange(8)))
    assert found.index.tolist() == [3, *found.index[1:3].tolist(), 0, *found.index[4:].tolist()]
    assert set(found.index[1:3].tolist()) <= {0, 3}
    assert found.is_pair.tolist() == [True, True, True, False, False, True, True, True]


def test_the_most_alike_sample_is_the_likeliest_partner():
    similarity = torch.zeros(64, 64)
    similarity[torch.arange(64), (torch.arange(64) // 4) * 4 + (torch.arange(64) + 1) % 4] = 50.0
    swap = Swap(of="text", group=4, share=1.0, by="contrast")
    found = draw_partners(swap, tokens(64), Draws(torch.arange(64)), similarity)
    assert torch.equal(found.index, (torch.arange(64) // 4) * 4 + (torch.arange(64) + 1) % 4)


def test_a_batch_that_can_not_be_cut_into_groups_is_refused():
    with pytest.raises(M3Error, match=r"6 samples can't be cut into groups of 4.*multiple of 4"):
        draw_partners(Swap(of="text", group=4), tokens(6), Draws(torch.arange(6)))


def test_towers_read_their_own_modalities_and_frozen_ones_do_not_learn():
    contrast = {"type": "contrast", "width": 8, "sides": {"image": {"masking": FULL}, "text": {"masking": FULL}}}
    towers = {"words": {"modalities": ["text"], "width": 12, "depth": 2, "heads": 3, "frozen": True}}
    model = M3Model(config(modalities={"image": IMAGE, "text": TEXT}, towers=towers, objectives={"c": contrast}))
    assert model.tokenizers["text"].table.weight.shape[1] == 12
    assert len(model.towers["words"].blocks) == 2
    raw = {"image": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), "text": torch.randint(0, 5, (4, 5)).int()}
    model(Batch(raw, torch.arange(4))).loss.backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("towers.words.", "tokenizers.text."))}
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    with pytest.raises(M3Error, match="image, text are read by different towers"):
        model.encode(Batch(raw, torch.arange(4)))
    assert model.encode(Batch({"text": raw["text"]}, torch.arange(4))).states.shape == (4, 5, 12)


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ({"t": {**SMALL, "modalities": ["speech"]}}, "towers.t.modalities: there is no modality `speech`"),
        ({"t": {**SMALL, "modalities": ["image"]}, "u": {**SMALL, "modalities": ["image"]}}, "in the towers t and u"),
        ({"t": {"width": 10, "heads": 3, "modalities": ["image"]}}, "towers.t: .*not divisible by heads 3"),
        (
            {"t": {**SMALL, "modalities": ["depth"]}},
            "image, depth can't be encoded together.*backbone, t.*put them into one tower",
        ),
    ],
)
def test_mistakes_in_towers_are_named(towers, message):
    with pytest.raises(M3Error, match=message):
        M3Model(config(modalities={"image": IMAGE, "depth": DEPTH}, towers=towers))


def test_objectives_of_a_mix_are_drawn_by_weight_and_the_others_always_take_part():
    mix, names = {"a": 3.0, "b": 1.0}, ["a", "always", "b"]
    found = Counter(drawn(mix, names, 0, step) for step in range(2000))
    assert set(found) == {("a", "always"), ("always", "b")}
    assert found["a", "always"] == pytest.approx(1500, abs=80)
    assert drawn(mix, names, 1, 5) == drawn(mix, names, 1, 5)
    assert drawn(None, names, 0, 0) is None


def test_weights_of_another_model_are_taken_where_the_names_agree(tmp_path):
    torch.manual_seed(0)
    first = M3Model(config())
    first.save_pretrained(tmp_path / "first")
    contrast = {"type": "contrast", "width": 8, "sides": {"image": {}, "depth": {}}}
    second = M3Model(config(modalities={"image": IMAGE, "depth": DEPTH}, objectives={"c": contrast}))
    fresh = second.tokenizers["depth"].projection.weight.clone()
    said = load_weights(second, str(tmp_path / "first"))
    assert torch.equal(second.backbone.blocks[0].mlp.fc1.weight, first.backbone.blocks[0].mlp.fc1.weight)
    assert torch.equal(second.tokenizers["depth"].projection.weight, fresh)
    assert said.startswith("init: ")
    assert "tensors come from" in said
    assert said.endswith("fresh: tokenizers.depth, objectives.c; unused: objectives.reconstruct")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    M3Model(config()).save_pretrained(tmp_path / "first")
    with pytest.raises(M3Error, match=r"init: .* of shape .* can't become"):
        load_weights(M3Model(config(backbone={**SMALL, "width": 32})), str(tmp_path / "first"))
    with pytest.raises(M3Error, match="can't be read as a model"):
        load_weights(M3Model(config()), str(tmp_path / "nothing"))


@pytest.mark.parametrize("style", [{"mlp": "swiglu", "bias": False}, {"qk_norm": True}, {"layer_scale": 0.1}])
def test_every_style_of_blocks_learns(style):
    model = M3Model(config(backbone=SMALL | style))
    model(Batch({"image": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}, torch.arange(2))).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    names = {name for name, _ in model.backbone.blocks.named_parameters()}
    if not style.get("bias", True):
        assert not any(name.endswith("bias") for name in names)
        assert model.backbone.blocks[0].mlp.fc1.weight.shape == (int(2 * 64 / 3), 16)
    if "layer_scale" in style:
        block = model.backbone.blocks[0]
        x = torch.randn(1, 3, 16)
        with torch.no_grad():
            attended = block.attention(block.norm1(x)) * 0.1 + x
            assert torch.allclose(block(x), attended + 0.1 * block.mlp(block.norm2(attended)), atol=1e-6)
