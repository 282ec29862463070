"""Matching pairs: counts, hard negatives, probabilities, tasks; tied heads, post-norm blocks, what is never hidden.

Letters: B samples, D width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from m3 import M3Config, M3Model
from m3.backbone import Block, Style
from m3.errors import M3Error
from m3.evaluate.task import build_tasks
from m3.schedule import Plan, learning_rate
from m3.types import Batch

IMAGE = {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 8}}
TEXT = {"type": "text", "vocabulary": "words:a b c d e f g h", "length": 6, "tokenizer": {"type": "embedding"}}
SMALL = {"width": 16, "depth": 1, "heads": 2}
MATCH = {"type": "match", "modalities": ["text", "image"], "swap": {"of": "image", "group": 4}}
WORDS = {
    "type": "reconstruct",
    "masking": {"type": "fixed", "visible": {"text": 0.85, "image": 1.0}, "hidden": "mix"},
    "decoder": {"type": "head", "hidden": 16, "tied": True},
    "targets": {"text": {"loss": "cross_entropy"}},
}
SIDES = {"image": {}, "text": {}}
CONTRAST = {"type": "contrast", "width": 8, "sides": SIDES}


def make(backbone: dict | None = None, **objectives) -> M3Model:
    torch.manual_seed(2)
    return M3Model(
        M3Config(
            modalities={"text": TEXT, "image": IMAGE}, backbone={**SMALL, **(backbone or {})}, objectives=objectives
        )
    )


def batch_of(count: int = 8, is_present: dict[str, list[bool]] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(0, 9, (count, 6), generator=generator, dtype=torch.int32)
    text[1, 4:] = text[2, 2:] = -1
    raw = {"text": text, "image": torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)}
    there = {name: torch.tensor(flags) for name, flags in (is_present or {}).items()}
    return Batch(raw, torch.arange(count) + 3, there)


def test_only_pairs_count() -> None:
    model = make(match={**MATCH, "alignment": 0.1})
    batch = batch_of(is_present={"image": [True] * 7 + [False], "text": [False] + [True] * 7})
    prepared = model.prepare(batch)
    (plan,) = prepared.plans.values()
    assert plan.partners is not None
    kept = ~plan.partners.is_swapped
    expected = sum(
        i != 0 and (i != 7 if bool(kept[i]) else int(plan.partners.index[i]) not in (i, 7)) for i in range(8)
    )
    counts = {name: int(count) for name, count in model.counts(prepared).items()}
    assert counts == {"match/match": expected, "match/alignment": expected}
    assert 0 < expected < 8


def test_a_model_that_knows_nothing_loses_log_two() -> None:
    model = make(match=MATCH)
    torch.nn.init.zeros_(model.objectives["match"].output.weight)
    parts = model(batch_of()).parts.parts
    assert (parts["match/match"].sum / parts["match/match"].count).item() == pytest.approx(math.log(2))


def test_a_batch_without_pairs_gives_zero_gradients() -> None:
    model = make(match={**MATCH, "alignment": 0.1})
    loss = model(batch_of(is_present={"image": [False] * 8})).loss
    loss.backward()
    assert loss == 0
    used = [p.grad for p in model.parameters() if p.grad is not None]
    assert all((grad == 0).all() for grad in used)


@pytest.mark.parametrize("active", [None, ("match",)])
def test_hard_negatives_come_from_a_contrast_that_need_not_take_part(active: tuple[str, ...] | None) -> None:
    hard = {**MATCH, "swap": {"of": "image", "group": 4, "share": 1.0, "by": "contrast"}}
    model = make(match=hard, contrast={**CONTRAST, "temperature": 0.01})
    prepared = model.prepare(batch_of(), active=active)
    loss = model(prepared).loss
    loss.backward()
    contrast = [p.grad for n, p in model.named_parameters() if n.startswith("objectives.contrast")]
    assert all((grad is None) == (active is not None) for grad in contrast)
    assert model(prepared).loss == loss
    soft = make(match={**MATCH, "swap": {"of": "image", "group": 4, "share": 1.0}}, contrast=CONTRAST)
    soft.load_state_dict(model.state_dict())
    name = "match/match"
    assert model(prepared).parts.parts[name].sum != soft(soft.prepare(batch_of())).parts.parts[name].sum


@pytest.mark.parametrize(
    ("changes", "backbone", "message"),
    [
        ({"swap": {"of": "image", "by": "words"}}, {}, "swap.by: `words` is no objective of type `contrast`"),
        ({"swap": {"of": "depth"}}, {}, "`depth` can't be swapped in a view of text, image"),
        ({"modalities": ["text", "imgae"]}, {}, "`imgae`, which is no modality.*`image`"),
        ({}, {"class_tokens": 0}, "`match` reads the class token; set class_tokens: 1"),
    ],
)
def test_mistakes_are_named(changes: dict, backbone: dict, message: str) -> None:
    with pytest.raises(M3Error, match=message):
        make(backbone, match=MATCH | changes, words=WORDS)


def test_match_returns_a_probability_for_each_pair() -> None:
    model = make(words=WORDS, match=MATCH).eval()
    batch = batch_of(4, {"image": [True, True, True, False]})
    found = model.match(batch)
    assert found.shape == (4,)
    assert ((found[:3] > 0) & (found[:3] < 1)).all()
    assert found[3].isnan()
    tokens = model.tokenise(batch)
    part = model.matcher("match")
    from m3 import masking

    encoded = model.encode_tokens(tokens, masking.everything(tokens))
    logits = part.output(torch.tanh(part.pooler(encoded.prefix[:, 0])))
    torch.testing.assert_close(found[:3], (logits.exp() / logits.exp().sum(1, keepdim=True))[:3, 1].detach())
    with pytest.raises(M3Error, match="the batch has no `image`"):
        model.match(Batch({"text": batch.signals["text"]}, batch.keys))
    with pytest.raises(M3Error, match=r"no objective `mtach` of type `match`.*`match`"):
        model.match(batch, "mtach")
    with pytest.raises(M3Error, match="the model has no objective of type `match`"):
        make(words=WORDS).match(batch)


class Oracle:
    """Says 0.9 where the image is that of the text, else 0.1: both hold the sample's number."""

    def __call__(self, tokens, part):
        same = tokens["text"].values[:, 0, 0] == tokens["image"].values[:, 0, 0].long()
        return torch.where(same, 0.9, 0.1)


def numbered(model: M3Model, monkeypatch: pytest.MonkeyPatch, count: int) -> Batch:
    """A batch whose tokens hold the sample's number, and a model that looks at it."""
    batch = batch_of(count)
    plain = model.tokenise(batch)
    number = torch.arange(count).view(-1, 1, 1)
    tokens = {n: replace(t, values=number.expand_as(t.values).to(t.values.dtype)) for n, t in plain.items()}
    monkeypatch.setattr(model, "tokenise", lambda _: tokens)
    monkeypatch.setattr(model, "match_tokens", Oracle())
    return batch


def test_an_oracle_wins_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(match=MATCH)
    settings = {"pairs": {"type": "match_accuracy"}, "find": {"type": "match_retrieval", "candidates": 4}}
    tasks = build_tasks(settings, model, 0)
    batch = numbered(model, monkeypatch, 6)
    for task in tasks:
        task.add(batch)
    rows = [row for task in tasks for row in task.rows()]
    assert [row.task for row in rows] == ["pairs", "find, image of text", "find, text of image"]
    assert [row.model for row in rows] == [1.0, 1.0, 1.0]
    # Groups of 4 and 2 samples: 4 times 1/4 and 2 times 1/2.
    assert [row.baseline for row in rows] == [0.5, pytest.approx(2 / 6), pytest.approx(2 / 6)]
    assert all(task.rows() == [] for task in tasks), "rows begin anew"


def test_a_model_that_always_says_the_same_reaches_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(match=MATCH)
    tasks = build_tasks({"a": {"type": "match_accuracy"}, "b": {"type": "match_retrieval"}}, model, 0)
    batch = numbered(model, monkeypatch, 8)
    monkeypatch.setattr(model, "match_tokens", lambda tokens, part: torch.full((8,), 0.7))
    for task in tasks:
        task.add(batch)
        assert all(row.model == pytest.approx(row.baseline) for row in task.rows())


def test_what_is_never_hidden_has_no_mask_token_and_is_dropped_on_demand() -> None:
    model = make(words=WORDS).eval()
    assert set(model.mask_tokens) == {"text"}
    batch = batch_of()
    other = replace(batch, signals={**batch.signals, "image": batch.signals["image"].flip(0)})
    hidden = [model.reconstruct(b, {"text": 0.5}).output["text"] for b in (batch, other)]
    seen = [model.reconstruct(b, {"text": 0.5, "image": 1.0}).output["text"] for b in (batch, other)]
    assert torch.equal(*hidden)
    assert not torch.equal(*seen)
    alone = Batch({"text": batch.signals["text"]}, batch.keys)
    torch.testing.assert_close(model.reconstruct(alone, {"text": 0.5}).output["text"], hidden[0])
    assert not model.reconstruct(batch, {"text": 0.5}).is_visible["image"].any()


def test_a_share_is_one_of_the_words_that_exist() -> None:
    """0.85 of 6, 4 and 2 words are seen, rounded down: one hidden word in every sentence, however it is padded."""
    model = make(words=WORDS).eval()
    result = model.reconstruct(batch_of(), {"text": 0.85, "image": 1.0})
    assert result.is_visible["text"].sum(1).tolist() == [5, 3, 1, 5, 5, 5, 5, 5]


def test_the_baseline_without_a_modality_is_the_same_model_without_it() -> None:
    model = make(words=WORDS).eval()
    visible = {"text": 0.5, "image": 1.0}
    settings = {"words": {"target": "text", "visible": visible, "baseline": "without", "without": ["image"]}}
    (task,) = build_tasks(settings, model, 0)
    batch = batch_of()
    task.add(batch)
    (row,) = task.rows()
    alone = Batch({"text": batch.signals["text"]}, batch.keys)
    for found, given, shown in ((row.model, batch, visible), (row.baseline, alone, {"text": 0.5})):
        result = model.reconstruct(given, shown, 0)
        asked = ~result.is_visible["text"] & (batch.signals["text"] >= 0)
        right = (result.predicted["text"] == batch.signals["text"]) & asked
        assert found == pytest.approx(float(right.sum() / asked.sum()))
    assert row.baseline_name == "without"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "without"}, "`baseline: without` and a list `without` belong together"),
        ({"without": ["image"]}, "`baseline: without` and a list `without` belong together"),
        ({"baseline": "without", "without": ["text"]}, "without: `text` is no other input"),
        ({"baseline": "without", "without": ["speech"]}, "without: `speech` is no other input"),
    ],
)
def test_mistakes_in_the_baseline_are_named(changes: dict, message: str) -> None:
    with pytest.raises(M3Error, match=message):
        build_tasks({"words": {"target": "text", **changes}}, make(words=WORDS), 0)


def test_a_tied_head_shares_the_table_and_has_its_own_bias(tmp_path) -> None:
    model = make(words=WORDS)
    own = {name: p.shape for name, p in model.objectives["words"].decoders["text"].named_parameters()}
    assert list(own) == ["hidden.0.weight", "hidden.0.bias", "hidden.2.weight", "hidden.2.bias", "output.bias"]
    assert own["output.bias"] == (9,)
    model(batch_of()).loss.backward()
    table = model.tokenizers["text"].table.weight
    assert table.shape == (10, 16), "eight words, one for all others, and padding"
    assert table.grad[:9].abs().sum(1).min() > 0, "every real id is a candidate, also one that is in no sentence"
    model.save_pretrained(tmp_path)
    again = M3Model.from_pretrained(tmp_path)
    with torch.no_grad():
        again.tokenizers["text"].table.weight.add_(1.0)
    states = torch.randn(2, 3, 16)
    output = again.objectives["words"].decoders["text"].output
    torch.testing.assert_close(output(states), states @ again.tokenizers["text"].table.weight[:9].T + output.bias)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"hidden": 12}, r"can't be tied: the embedding of text is \(9, 16\), but the output needs \(9, 12\)"),
        ({"hidden": None}, None),
    ],
)
def test_a_tied_head_is_as_wide_as_the_tower(decoder: dict, message: str | None) -> None:
    words = {**WORDS, "decoder": {**WORDS["decoder"], **decoder}}
    if message is None:
        make(words=words)(batch_of()).loss.backward()
    else:
        with pytest.raises(M3Error, match=message):
            make(words=words)


def test_a_head_names_a_modality_that_the_batch_lacks() -> None:
    model = make(words=WORDS)
    with pytest.raises(M3Error, match="reads the encoder's states of text, which the batch lacks"):
        model.reconstruct(Batch({"image": batch_of().signals["image"]}, torch.arange(8)), {"image": 1.0})


def test_a_post_norm_block_is_berts() -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=64, hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    config._attn_implementation = "eager"
    theirs = BertLayer(config).eval()
    ours = Block(16, 2, 4.0, 1e-12, Style(norm="post"))
    attention = theirs.attention
    pairs = [
        (ours.attention.projection, attention.output.dense),
        (ours.norm1, attention.output.LayerNorm),
        (ours.mlp.fc1, theirs.intermediate.dense),
        (ours.mlp.fc2, theirs.output.dense),
        (ours.norm2, theirs.output.LayerNorm),
    ]
    parts = [attention.self.query, attention.self.key, attention.self.value]
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
        for own, their in pairs:
            own.load_state_dict(their.state_dict())
        ours.attention.qkv.weight.copy_(torch.cat([p.weight for p in parts]))
        ours.attention.qkv.bias.copy_(torch.cat([p.bias for p in parts]))
    x = torch.randn(3, 5, 16)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected[0] if isinstance(expected, tuple) else expected, atol=1e-5, rtol=1e-5)
    keep = torch.tensor([[4, 0]] * 3)
    torch.testing.assert_close(ours(x, keep=keep), ours(x)[:, [4, 0]])


def test_the_input_norm_reaches_prefix_and_tokens() -> None:
    model = make({"input_norm": True, "norm": "post", "final_norm": False, "depth": 1}, match=MATCH).double()
    seen = []
    model.backbone.blocks[0].register_forward_hook(lambda _, given, __: seen.append(given[0]))
    model(batch_of())
    (x,) = seen
    torch.testing.assert_close(x.mean(-1), torch.zeros(x.shape[:2], dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(x.square().mean(-1), torch.ones(x.shape[:2], dtype=torch.float64), atol=0.05, rtol=0)


def test_an_input_norm_of_each_modality_leaves_class_tokens_as_they_are() -> None:
    model: Any = make({"input_norm": "modality", "norm": "post", "final_norm": False, "depth": 1}, match=MATCH).double()
    names = list(model.inputs)
    assert list(model.input_norms) == names
    with torch.no_grad():
        model.input_norms[names[0]].bias.fill_(5.0)
    seen = []
    model.backbone.blocks[0].register_forward_hook(lambda _, given, __: seen.append(given[0]))
    model(batch_of())
    (x,) = seen
    assert torch.equal(x[:, 0], model.backbone.prefix.expand(len(x), -1))
    assert sorted({round(mean, 6) for mean in x[:, 1:].mean(-1).flatten().tolist()}) == [0.0, 5.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [1.0, 0.8, 0.6, 0.4, 0.2]), ("constant", [1.0] * 5)],
)
def test_other_schedules_of_the_learning_rate(schedule: str, expected: list[float]) -> None:
    plan = Plan(steps=25, warmup=5, micro_batch=1, accumulation=1, lr=1.0, min_lr=0.2, schedule=schedule)
    assert [learning_rate(step, plan) for step in range(5)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert [learning_rate(step, plan) for step in range(5, 26, 5)] == pytest.approx(expected)
