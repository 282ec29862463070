"""MultiMAE, with and without words, against the same written token by token: losses and gradients."""

import math

import pytest
import torch
from torch import Tensor

from m3 import masking
from m3.modalities.depth import truncated_standardise
from m3.model import M3Model
from m3.network import Prepared
from m3.types import Batch, MaskPlan, Tokens
from tests.parity import slow_multimae
from tests.parity.slow_multimae import CLASSES, TOKENS, UNLABELLED, SlowMultiMAE, Token, build_model

MAPS, WITH_WORDS = "multimae_vit_b", "multimae_text_vit_b"


def make_batch(
    has_gaps: bool = False, is_present: dict[str, Tensor] | None = None, lengths: tuple[int, ...] = ()
) -> Batch:
    """Three samples of noise; `lengths` of their texts."""
    generator = torch.Generator().manual_seed(13)
    image = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8, generator=generator)
    depth = 1 + 9 * torch.rand(3, 8, 12, generator=generator)
    semantic = torch.randint(0, CLASSES, (3, 4, 6), dtype=torch.uint8, generator=generator)
    if has_gaps:
        depth[torch.rand(depth.shape, generator=generator) < 0.3] = torch.nan
        depth[0, :4, :4] = torch.nan  # a whole patch
        semantic[torch.rand(semantic.shape, generator=generator) < 0.3] = UNLABELLED
        semantic[1, 2:, 4:] = UNLABELLED
    signals = {"image": image, "depth": depth, "semantic": semantic}
    if lengths:
        text = torch.randint(0, 6, (3, max(lengths)), dtype=torch.int32, generator=generator)
        signals["text"] = text.where(torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1), -1)
    return Batch(signals, torch.arange(3) + 70, is_present or {})


def in_double(tokens: dict[str, Tokens]) -> dict[str, Tokens]:
    return {
        name: Tokens(p.values.double() if p.values.is_floating_point() else p.values, p.positions, p.is_valid)
        for name, p in tokens.items()
    }


def check(model: M3Model, batch: Batch, prepared: Prepared, visible: list[list[Token]]) -> dict[str, int]:
    """Compare parts, total and gradients; all that is there and not visible is hidden. Return the counts."""
    output = model(Prepared(in_double(prepared.tokens), prepared.plans))
    means, counts = SlowMultiMAE(model, batch).loss(visible)
    assert [f"reconstruct/{name}" for name in means] == list(output.parts.parts)
    for name, mean in means.items():
        part = output.parts.parts[f"reconstruct/{name}"]
        assert part.count == counts[name]
        torch.testing.assert_close((part.sum / part.count).double(), mean, rtol=3e-6, atol=0)
    expected = sum(means.values())
    torch.testing.assert_close(output.loss.double(), expected, rtol=3e-6, atol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found, wanted = torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected, parameters)
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        assert theirs.abs().max() > 1e-6, f"{name} gets no gradient"
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-5, f"{name}: {error}"
    return counts


def read(plan: MaskPlan) -> list[list[Token]]:
    """Per sample the visible tokens of a plan, without its filling."""
    names, index, modality = list(plan.visible), plan.packed_index(), plan.packed_modality()
    is_there = torch.ones_like(index, dtype=torch.bool) if plan.is_valid is None else plan.is_valid
    return [
        [(names[m], i) for m, i, there in zip(*rows, strict=True) if there]
        for rows in zip(modality.tolist(), index.tolist(), is_there.tolist(), strict=True)
    ]


def explicit(model: M3Model, batch: Batch, visible: list[list[Token]]) -> Prepared:
    tokens = model.tokenise(batch)
    masks = {
        name: torch.tensor([[(name, number) in seen for number in range(part.count)] for seen in visible])
        for name, part in tokens.items()
    }
    return Prepared(tokens, dict.fromkeys(model.views, masking.explicit(tokens, masks)))


@pytest.mark.parametrize("has_gaps", [False, True], ids=["complete", "with gaps"])
def test_dirichlet_masks_give_the_loss_and_gradients_of_multimae(has_gaps):
    model, batch = build_model(MAPS, has_gaps), make_batch(has_gaps)
    prepared = model.prepare(batch)
    (plan,) = prepared.plans.values()
    visible = read(plan)
    assert [len(set(seen)) for seen in visible] == [6, 6, 6]
    assert len({tuple(sum(n == name for n, _ in seen) for name in batch.signals) for seen in visible}) > 1
    check(model, batch, prepared, visible)


UNEVEN = [
    # all of depth is seen: no depth target in this sample
    [("image", 1), ("image", 4), *(("depth", i) for i in range(TOKENS))],
    [("depth", 5), ("semantic", 0), ("semantic", 3)],
    # no semantic token is hidden, nothing of the depth is seen
    [("image", 0), *(("semantic", i) for i in range(TOKENS))],
]


@pytest.mark.parametrize("has_gaps", [False, True], ids=["complete", "with gaps"])
def test_samples_without_a_hidden_token_do_not_count(has_gaps):
    model, batch = build_model(MAPS, has_gaps), make_batch(has_gaps)
    counts = check(model, batch, explicit(model, batch, UNEVEN), UNEVEN)
    assert counts == {"image": 3, "image_normalised": 3, "depth": 2, "semantic": 2}


def test_a_sample_whose_hidden_values_are_all_unknown_does_not_count():
    model, batch = build_model(MAPS, has_gaps=True), make_batch(has_gaps=True)
    seen = [("image", 2), *(("depth", i) for i in range(1, TOKENS)), ("semantic", 1)]  # hidden depth: patch 0, a hole
    visible = [seen, *UNEVEN[1:]]
    counts = check(model, batch, explicit(model, batch, visible), visible)
    assert counts == {"image": 3, "image_normalised": 3, "depth": 2, "semantic": 2}


def test_a_missing_modality_is_neither_seen_nor_asked_for():
    is_present = {"depth": torch.tensor([True, False, True]), "semantic": torch.tensor([False, True, True])}
    model, batch = build_model(MAPS), make_batch(False, is_present)
    visible = [
        [("image", 1), ("image", 4), ("depth", 2), ("depth", 3)],
        [("image", 5), ("semantic", 0), ("semantic", 3)],
        [("image", 0), ("depth", 4), ("semantic", 5)],
    ]
    counts = check(model, batch, explicit(model, batch, visible), visible)
    assert counts == {"image": 3, "image_normalised": 3, "depth": 2, "semantic": 2}


# -- words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "lengths"), [(WITH_WORDS, (5, 2, 4)), ("multimae_text_tiny", (7, 1, 6))])
def test_words_share_the_budget_and_their_padding_is_never_seen_or_asked_for(recipe, lengths):
    model, batch = build_model(recipe), make_batch(lengths=lengths)
    prepared = model.prepare(batch)
    (plan,) = prepared.plans.values()
    visible = read(plan)
    assert [len(set(seen)) for seen in visible] == [6, 6, 6]
    words = [[number for name, number in seen if name == "text"] for seen in visible]
    assert any(words), "some sample sees words"
    assert all(number < length for seen, length in zip(words, lengths, strict=True) for number in seen)
    hidden = [i for i, seen in enumerate(words) if len(seen) < lengths[i]]
    assert check(model, batch, prepared, visible)["text"] == len(hidden)


def test_every_sample_sees_as_many_tokens_that_exist_however_short_its_text_is():
    few, lengths = make_batch(lengths=(1, 7, 2)), [1, 7, 2] * 32
    many = {name: signal.repeat(32, *[1] * (signal.ndim - 1)) for name, signal in few.signals.items()}
    (plan,) = build_model(WITH_WORDS).prepare(Batch(many, torch.arange(96))).plans.values()
    visible = read(plan)
    assert {len(set(seen)) for seen in visible} == {6}
    assert all(i < length for seen, length in zip(visible, lengths, strict=True) for name, i in seen if name == "text")
    words = [sum(name == "text" for name, _ in seen) for seen in visible]
    assert (max(words[::3]), max(words[2::3])) == (1, 2), "short texts are now and then seen whole"
    assert sum(words[1::3]) / 32 == pytest.approx(6 / 4, abs=0.5), "a quarter of what is seen, on average"


def test_a_text_that_is_seen_whole_or_missing_does_not_count():
    is_present = {"text": torch.tensor([True, False, True])}
    model, batch = build_model(WITH_WORDS), make_batch(is_present=is_present, lengths=(2, 5, 4))
    visible = [
        [("image", 1), ("text", 0), ("text", 1)],
        [("image", 4), ("depth", 2), ("depth", 5), ("semantic", 3)],
        [("image", 3), ("depth", 4), ("semantic", 0), ("text", 3)],
    ]
    counts = check(model, batch, explicit(model, batch, visible), visible)
    assert counts == {"image": 3, "image_normalised": 3, "depth": 3, "semantic": 3, "text": 1}


def test_what_stands_behind_the_end_of_a_text_changes_nothing():
    """The same three texts in a batch that is padded further."""
    model = build_model(WITH_WORDS)
    short, long = make_batch(lengths=(5, 2, 4)), make_batch(lengths=(5, 2, 4))
    long.signals["text"] = torch.nn.functional.pad(long.signals["text"], (0, 2), value=-1)
    visible = [[("image", 1), ("text", 4)], [("depth", 4), ("text", 0)], [("semantic", 0), ("text", 3)]]
    losses = []
    for batch in (short, long):
        prepared = explicit(model, batch, visible)
        losses.append(model(Prepared(in_double(prepared.tokens), prepared.plans)).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


# -- depth ---------------------------------------------------------------------------------------------------


def test_truncated_standardise_equals_a_loop_over_maps():
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(6, 8, 12, generator=generator) * 20 + torch.arange(6).reshape(6, 1, 1)
    maps[1, 0, :7] = 1000.0  # far sky does not set the scale
    maps[2][torch.rand(8, 12, generator=generator) < 0.4] = torch.nan
    maps[3, :, 1:] = torch.nan
    found = truncated_standardise(maps)
    assert found.dtype == torch.float32
    for map_, result in zip(maps, found, strict=True):
        expected = slow_multimae.truncated_standardise(map_).float()
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert torch.equal(result.isnan(), map_.isnan())


def test_truncated_standardise_cuts_right_for_every_number_of_known_values():
    """The places of the cut are exact, also where a tenth of the number is whole."""
    counts = range(4, 260)
    maps = torch.full((len(counts), 1, 260), torch.nan)
    for row, count in enumerate(counts):
        maps[row, 0, :count] = torch.randperm(count, generator=torch.Generator().manual_seed(count)).float() ** 2
    found = truncated_standardise(maps)
    for map_, result in zip(maps, found, strict=True):
        expected = slow_multimae.truncated_standardise(map_).float()
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_truncated_standardise_literal():
    # 0 ... 9: the middle is 1 ... 8, mean 4.5, unbiased variance 6.
    found = truncated_standardise(torch.tensor([[[3.0, 0, 7, 2, 9, 1, 8, 4, 6, 5]]]))
    expected = (torch.tensor([3.0, 0, 7, 2, 9, 1, 8, 4, 6, 5]) - 4.5) / math.sqrt(6 + 1e-6)
    torch.testing.assert_close(found[0, 0], expected, rtol=1e-6, atol=1e-6)


def test_truncated_standardise_of_flat_and_empty_maps():
    maps = torch.stack([torch.full((4, 5), 2.5), torch.full((4, 5), torch.nan)])
    found = truncated_standardise(maps)
    assert (found[0] == 0).all()
    assert found[1].isnan().all()


@pytest.mark.parametrize("known", [[2.5], [1.0, 3.0]], ids=["one", "two"])
def test_truncated_standardise_of_one_or_two_known_values_stays_small(known):
    """Too few values for a variance: they must not become targets of a thousand deviations."""
    maps = torch.full((1, 4, 5), torch.nan)
    maps[0, 0, : len(known)] = torch.tensor(known)
    assert truncated_standardise(maps).nan_to_num(0.0).abs().max() < 10
