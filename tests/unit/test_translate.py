"""One decoder for all modalities: who sees whom, what is predicted, how parts are averaged, what is refused.

Letters: B samples, T tokens of the decoder, N tokens of a modality, K classes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from m3 import M3Config, M3Model
from m3.errors import M3Error
from m3.objectives.translate import attention_mask
from m3.types import Batch, Loss, Part

TEXT = {
    "type": "text",
    "vocabulary": "words:a b c d e",
    "length": 6,
    "sentinels": 4,
    "tokenizer": {"type": "embedding"},
}
IMAGE = {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 8}}
CODES = {"type": "semantic_map", "size": 4, "classes": 5, "tokenizer": {"type": "class_patch", "size": 1}}
FIRST = 6
"""The first sentinel: five words and the unknown one come before."""
MASKING = {"type": "budget", "visible": [1, 12], "targets": [4, 16], "mixture": [{"targets": {"text": 1, "codes": 1}}]}


def build(modalities: dict | None = None, backbone: dict | None = None, **changes) -> M3Model:
    torch.manual_seed(2)
    objective = {"type": "translate", "masking": MASKING} | changes
    model = M3Model(
        M3Config(
            modalities=modalities or {"image": IMAGE, "codes": CODES, "text": TEXT},
            backbone={"width": 16, "depth": 1, "heads": 2, "class_tokens": 0, "modality_embedding": True}
            | (backbone or {}),
            objectives={"translate": objective},
        )
    )
    return model.double()


def batch_of(count: int = 8, is_present: dict[str, list[bool]] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(6)
    lengths = torch.arange(count) % 5 + 2
    text = torch.randint(1, FIRST, (count, 6), generator=generator, dtype=torch.int32)
    signals = {
        "image": torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8),
        "codes": torch.randint(0, 5, (count, 4, 4), generator=generator).to(torch.uint8),
        "text": text.masked_fill(torch.arange(6) >= lengths.unsqueeze(1), -1),
    }
    return Batch(signals, torch.arange(count), {n: torch.tensor(flags) for n, flags in (is_present or {}).items()})


def rows(batch: Batch, part: slice) -> Batch:
    return Batch(
        {name: x[part] for name, x in batch.signals.items()},
        batch.keys[part],
        {name: x[part] for name, x in batch.is_present.items()},
    )


def picture(mask: Tensor) -> list[str]:
    return ["".join("#" if flag else "." for flag in row) for row in mask[0, 0].tolist()]


def test_who_sees_whom_in_the_decoder():
    number = torch.tensor([[0, 0, 1, 1, 1, 2, 0]])
    is_asked = torch.tensor([[True] * 6 + [False]])
    free_ordered_free = [False, True, False]
    assert picture(attention_mask(number, is_asked, free_ordered_free, apart=True)) == [
        "##.....",
        "##.....",
        "..#....",
        "..##...",
        "..###..",
        ".....#.",
        "##....#",  # filling sees itself, so that its softmax has something; nobody sees it
    ]
    assert picture(attention_mask(number, is_asked, free_ordered_free, apart=False)) == [
        "##.....",
        "##.....",
        "###....",
        "####...",
        "#####..",
        "######.",
        "##....#",
    ]


@pytest.mark.parametrize("kind", ["parts", "elements", "own"])
def test_parts_are_averaged_by_hand(kind):
    def part(total: float, count: float, weight: float = 1.0) -> Part:
        return Part(torch.tensor(total), torch.tensor(count), weight, kind)

    loss = Loss({"a/x": part(6.0, 3.0), "a/y": part(10.0, 2.0, 0.5), "a/z": part(0.0, 0.0), "b/x": part(8.0, 2.0)})
    # Means 2 and 5 (half weight) of the first objective, 4 of the second.
    expected = {"parts": (2 + 2.5) / 2 + 4, "elements": (6 + 5) / 5 + 4, "own": 2 + 2.5 + 4}
    assert loss.total().item() == pytest.approx(expected[kind])
    whole = {"a/x": 6, "a/y": 2, "a/z": 5, "b/x": 4}
    # The same as a share of a step in which other micro-batches have more: z has targets elsewhere.
    expected = {"parts": (1 + 2.5) / 3 + 2, "elements": (6 + 5) / 13 + 2, "own": 1 + 2.5 + 2}
    counts = {name: torch.tensor(float(count)) for name, count in whole.items()}
    assert loss.total(counts).item() == pytest.approx(expected[kind])


@pytest.mark.parametrize("average", ["modality", "token"])
@pytest.mark.parametrize("size", [4, 2, 1])
def test_micro_batches_add_up_to_the_whole_batch_also_where_one_lacks_a_modality(average, size):
    model = build(average=average, weights={"text": 0.3})
    batch = batch_of(is_present={"text": [False, False, True, True, False, True, False, False]})
    whole = model(batch)
    expected = torch.autograd.grad(whole.loss, list(model.parameters()))
    micros = [model.prepare(rows(batch, slice(i, i + size))) for i in range(0, 8, size)]
    each = [model.counts(micro) for micro in micros]
    counts = {name: torch.stack([c[name] for c in each]).sum() for name in each[0]}
    assert any(c["translate/text"] == 0 for c in each) == (size < 4)
    losses = [model(micro).parts.total(counts) for micro in micros]
    assert sum(losses).item() == pytest.approx(whole.loss.item(), rel=1e-6)
    found = torch.autograd.grad(sum(losses), list(model.parameters()))
    for (name, _), own, other in zip(model.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_the_gradient_does_not_shrink_with_modalities_that_are_absent():
    """The original divides by all modalities of the model, so a batch of captions alone would learn slower."""
    model = build()
    batch = batch_of(is_present={"codes": [False] * 8})
    output = model(batch)
    text = output.parts.parts["translate/text"]
    assert output.parts.parts["translate/codes"].count == 0
    assert output.loss.item() == pytest.approx((text.sum / text.count).item(), rel=1e-6)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_nothing_seen_and_nothing_asked_stay_finite():
    model = build(masking=MASKING | {"visible": [0, 1]})
    absent = {"image": [False] * 8, "text": [False] * 8, "codes": [True] + [False] * 7}
    output = model(batch_of(is_present=absent))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_tied_embeddings_are_one_tensor_and_survive_saving(tmp_path: Path):
    model = build().float()
    translate = model.objectives["translate"]
    assert list(translate.heads) == ["codes"], "a tied modality has no matrix of its own"
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "text" in name and "heads" in name]
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(names)
    loaded = M3Model.from_pretrained(tmp_path)
    for (name, own), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(own, other), name
    batch = batch_of()
    assert torch.equal(loaded(batch).loss, model(batch).loss)
    with torch.no_grad():
        before = loaded.objectives["translate"]._scores("text", torch.ones(1, 16))
        loaded.objectives["translate"].words["text"].weight.mul_(2)
        after = loaded.objectives["translate"]._scores("text", torch.ones(1, 16))
    assert torch.equal(after, 2 * before), "the head is the embedding"
    assert list(build(tied=False).objectives["translate"].heads) == ["codes", "text"]


def test_the_encoders_modality_embedding_is_the_decoders():
    model = build()
    assert model.objectives["translate"].marks.modalities is model.modality_embeddings
    assert not [name for name, _ in model.objectives.named_parameters() if "modality_embeddings" in name]


def rigged(model: M3Model, script: list[int]) -> M3Model:
    """Make the model say these words, whatever it sees."""
    translate = model.objectives["translate"]

    def scores(name: str, x: Tensor) -> Tensor:
        if name != "text":
            return original(name, x)
        word = script[turn["next"]] if turn["next"] < len(script) else FIRST
        turn["next"] += 1
        return torch.nn.functional.one_hot(torch.full(x.shape[:-1], word), 10).to(x.dtype)

    original, turn = translate._scores, {"next": 0}
    translate._scores = scores
    return model


def text_of(script: list[int], visible: list[int], words: list[int]) -> list[int]:
    model = rigged(build(), script)
    batch = Batch({"text": torch.tensor([words], dtype=torch.int32)}, torch.zeros(1, dtype=torch.long))
    seen = torch.zeros(1, len(words), dtype=torch.bool)
    seen[0, visible] = True
    batch = replace(batch, signals={**batch.signals, "codes": torch.zeros(1, 4, 4, dtype=torch.uint8)})
    return model.reconstruct(batch, {"text": seen}).predicted["text"][0].tolist()


def test_words_are_said_run_by_run_and_put_into_their_places():
    # "a . . d . f": the model says 4 5, sentinel 1, 3, sentinel 2.
    assert text_of([4, 5, FIRST + 1, 3, FIRST + 2], [0, 3, 5], [1, 2, 2, 4, 2, 5])[1:3] == [4, 5]
    assert text_of([4, 5, FIRST + 1, 3, FIRST + 2], [0, 3, 5], [1, 2, 2, 4, 2, 5])[4] == 3
    # Fewer words than places: nothing is there. More: they are dropped.
    assert text_of([4, FIRST + 1, 3, 1, FIRST + 2], [0, 3, 5], [1, 2, 2, 4, 2, 5]) == [1, 4, -1, 4, 3, 5]
    # The whole sentence, which ends early.
    assert text_of([3, 2, FIRST + 1], [], [1, 1, 1, 1, 1, 1]) == [3, 2, -1, -1, -1, -1]


def test_words_that_come_later_do_not_change_what_is_said_before():
    model = build()
    prepared = model.prepare(batch_of())
    view, plan = next(iter(prepared.plans.items()))
    translate = model.objectives["translate"]
    context = torch.randn(8, 3, 16, dtype=torch.float64)
    said = translate.asked("text", plan, prepared.tokens)[0]
    changed = said.clone()
    changed[:, 3:] = 1
    causal = torch.ones(said.shape[1], said.shape[1], dtype=torch.bool).tril()[None, None]
    found = [translate.decoder(translate._words("text", x), context, causal, None) for x in (said, changed)]
    assert torch.equal(found[0][:, :3], found[1][:, :3])
    assert not torch.equal(found[0][:, 3:], found[1][:, 3:])
    assert view == translate.view


def test_absent_modalities_are_predicted_whole():
    model = build()
    batch = batch_of()
    result = model.reconstruct(Batch({"image": batch.signals["image"]}, batch.keys), {"image": 1.0})
    assert result.predicted["codes"].shape == (8, 4, 4)
    assert result.predicted["text"].shape == (8, 6)
    assert result.predicted["text"].max() < FIRST, "a sentinel is no word"


def test_what_is_seen_says_nothing_of_what_is_predicted():
    """Hidden tokens don't reach the prediction of any modality."""
    model = build()
    batch = batch_of()
    seen = torch.zeros(8, 16, dtype=torch.bool)
    seen[:, ::2] = True
    visible = {"image": 1.0, "codes": seen}
    changed = {**batch.signals, "codes": batch.signals["codes"].clone(), "text": batch.signals["text"].clone()}
    changed["codes"].view(8, 16)[~seen] = 4
    changed["text"][changed["text"] >= 0] = 2
    first, second = (model.reconstruct(replace(batch, signals=s), visible) for s in (batch.signals, changed))
    for name in ("codes", "text"):
        hidden = torch.ones(8, 6, dtype=torch.bool) if name == "text" else ~seen
        assert torch.equal(first.output[name][hidden], second.output[name][hidden])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": ["codes", "image"]}, "outputs names `image`, whose tokens hold no single class id"),
        ({"outputs": ["code"]}, r"outputs names `code`.* Did you mean `codes`"),
        ({"weights": {"image": 1.0}}, "weights names `image`, which is not in `outputs`"),
        ({"backbone": {"norm": "post", "final_norm": False}}, "set backbone.norm=pre"),
        ({"backbone": {"modality_embedding": False}}, "set backbone.modality_embedding=true"),
        (
            {"modalities": {"image": {**IMAGE, "positions": {"type": "rotary"}}, "codes": CODES}},
            "`image` can't have rotary ones",
        ),
        ({"modalities": {"image": IMAGE}}, "no modality holds class ids"),
        ({"average": "sample"}, "average"),
    ],
)
def test_contradictions_are_refused_when_the_model_is_built(changes, message):
    with pytest.raises(M3Error, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masking": {"type": "fixed", "visible": 0.5}}, "only the masking `budget` writes down"),
        ({"outputs": ["text"]}, "targets in `codes`, which is not in `outputs`"),
        ({"masking": MASKING | {"hidden": "replace"}}, "`replace` can't show runs of text; use `drop`"),
    ],
)
def test_maskings_that_do_not_suit_are_refused(changes, message):
    model = build(**changes)
    with pytest.raises(M3Error, match=message):
        model.counts(model.prepare(batch_of()))


def test_other_maskings_do_for_tokens_without_order():
    model = build({"image": IMAGE, "codes": CODES}, masking={"type": "fixed", "visible": {"image": 1.0, "codes": 0.25}})
    batch = batch_of()
    batch = Batch({name: batch.signals[name] for name in ("image", "codes")}, batch.keys)
    assert model.counts(model.prepare(batch))["translate/codes"] == 8 * 12
    assert model(batch).parts.parts["translate/codes"].count == 8 * 12


def test_reconstruct_does_not_read_sentinels():
    model = M3Model(
        M3Config(
            modalities={"text": TEXT},
            backbone={"width": 16, "depth": 1, "heads": 2},
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "masking": {"type": "budget", "visible": 4, "targets": 4},
                    "decoder": {"type": "cross_decoder", "width": 8, "depth": 1, "heads": 2},
                    "targets": {"text": {"loss": "cross_entropy"}},
                }
            },
        )
    )
    batch = Batch({"text": batch_of().signals["text"]}, torch.arange(8))
    with pytest.raises(M3Error, match="asks for `text` as a sequence with sentinels"):
        model.counts(model.prepare(batch))


def test_it_does_not_matter_where_in_the_vocabulary_the_sentinels_are():
    """The same model with other numbers: a to e are 5 to 9 and the sentinels 1 to 4."""
    theirs = TEXT | {"vocabulary": "words:s t u v a b c d e", "first_sentinel": 1}
    one, two = build(), build({"image": IMAGE, "codes": CODES, "text": theirs})
    number = torch.tensor([0, 5, 6, 7, 8, 9, 1, 2, 3, 4])
    state = {name: x.clone() for name, x in one.state_dict().items()}
    for name in ("tokenizers.text.table.weight", "objectives.translate.words.text.weight"):
        state[name][number] = one.state_dict()[name][:10]
    two.load_state_dict(state)
    batch = batch_of()
    text = batch.signals["text"].long()
    other = replace(batch, signals=batch.signals | {"text": torch.where(text >= 0, number[text], -1).int()})
    losses = [model(x).parts.parts["translate/text"].sum for model, x in ((one, batch), (two, other))]
    assert losses[0] > 0
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    shown = {"text": torch.arange(6).expand(8, -1) % 3 == 0, "image": 1.0}
    said, own = (model.reconstruct(x, shown) for model, x in ((one, batch), (two, other)))
    assert torch.allclose(said.output["text"], own.output["text"][..., number])
    words = said.predicted["text"]
    assert torch.equal(torch.where(words >= 0, number[words], -1), own.predicted["text"])
