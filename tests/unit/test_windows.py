"""Attention within windows: against loops over windows written from the description, and against timm's block."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3 import M3Config, M3Model, masking
from m3.errors import M3Error
from m3.types import Batch
from m3.windows import WindowAttention, WindowBlock, cut_windows

CPU = torch.device("cpu")
HEADS, WIDTH = 2, 8


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
            parameter.copy_(noise * 0.4 + ("norm" in name and name.endswith("weight")))
    return module.double()


def tokens_of(count: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def window_of(place: int, length: int, shift: int, extent: int) -> int:
    """Which window a place of an axis is in: borders lie at shift, shift + length, ...; one window holds short axes."""
    return (place - shift) // length if extent > length else place // length


def slow_attention(attention: WindowAttention, x: Tensor, counts, window, shift, is_valid: Tensor) -> Tensor:
    """Every token looks at each token of its window, one by one."""
    p, each = dict(attention.named_parameters()), WIDTH // HEADS
    result = torch.zeros_like(x)
    cells = [(r, c) for r in range(counts[0]) for c in range(counts[1])]
    home = [tuple(window_of(cell[a], window[a], shift[a], counts[a]) for a in (0, 1)) for cell in cells]
    for b in range(len(x)):
        parts = [p["qkv.weight"] @ row + p["qkv.bias"] for row in x[b]]
        for i, (row, column) in enumerate(cells):
            # A window without any token that exists means nothing.
            near = [j for j in range(len(cells)) if home[j] == home[i] and is_valid[b, j]]
            joined = []
            for head in range(HEADS):
                own = slice(head * each, (head + 1) * each)
                query = parts[i][own]
                scores = []
                for j in near:
                    key = parts[j][WIDTH:][own]
                    cosine = (query * key).sum() / (query.square().sum().sqrt() * key.square().sum().sqrt())
                    steps = [math.copysign(math.log(1 + abs(d)), d) for d in (row - cells[j][0], column - cells[j][1])]
                    apart = torch.tensor(steps, dtype=torch.float64)
                    hidden = (p["bias.0.weight"] @ apart + p["bias.0.bias"]).clamp(min=0)
                    bias = p["bias.2.weight"][head] @ hidden
                    scores.append(cosine / max(1 + p["temperature"][head].item(), 0.01) + bias)
                if near:
                    weights = torch.stack(scores).exp()
                    values = torch.stack([parts[j][2 * WIDTH :][own] for j in near])
                    joined.append((weights / weights.sum()) @ values)
            if near:
                result[b, i] = p["projection.weight"] @ torch.cat(joined) + p["projection.bias"]
    return result


CASES = [
    ((4, 4), (4, 4), (2, 2)),  # one window
    ((8, 4), (4, 4), (2, 0)),
    ((7, 5), (4, 3), (2, 1)),  # no multiples
    ((5, 3), (2, 4), (1, 3)),  # longer than an axis
    ((6, 1), (3, 2), (0, 0)),
]


@pytest.mark.parametrize(("counts", "window", "shift"), CASES)
def test_attention_is_that_of_a_loop_over_all_pairs_of_a_window(counts, window, shift):
    attention = randomised(WindowAttention(WIDTH, HEADS, window))
    x, total = tokens_of(math.prod(counts)), math.prod(counts)
    is_valid = torch.ones(2, total, dtype=torch.bool)
    is_valid[1, total - total // 4 :] = False
    found = attention(x, cut_windows(counts, window, shift, is_valid, CPU))
    expected = slow_attention(attention, x, counts, window, shift, is_valid)
    assert found.isfinite().all()
    torch.testing.assert_close(found[is_valid], expected[is_valid], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("counts", "window", "shift"), CASES)
def test_gradients_are_those_of_the_loop(counts, window, shift):
    attention = randomised(WindowAttention(WIDTH, HEADS, window))
    x, is_valid = tokens_of(math.prod(counts), 1), torch.ones(1, math.prod(counts), dtype=torch.bool)
    grads = []
    for result in (
        attention(x, cut_windows(counts, window, shift, None, CPU)),
        slow_attention(attention, x, counts, window, shift, is_valid),
    ):
        weight = torch.arange(result.numel(), dtype=result.dtype).view_as(result).sin()
        names = [name for name, _ in attention.named_parameters() if name != "temperature"]
        grads.append(torch.autograd.grad((result * weight).sum(), [attention.get_parameter(n) for n in names]))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_the_temperature_gets_the_gradient_of_its_quotient():
    """Two tokens: the weight of the second is 1 / (1 + exp((c1 - c2) / t))."""
    attention = WindowAttention(2, 1, (1, 2)).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.qkv.weight.copy_(torch.eye(2).repeat(3, 1))
        attention.projection.weight.copy_(torch.eye(2))
        attention.temperature.fill_(-0.5)
    x = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]], dtype=torch.float64)  # cosines of the first: 1 and 0.6
    found = attention(x, cut_windows((1, 2), (1, 2), (0, 0), None, CPU))
    second = 1 / (1 + math.exp((1 - 0.6) / 0.5))
    assert found[0, 0].tolist() == pytest.approx([1 + 2 * second, 4 * second])
    (grad,) = torch.autograd.grad(found[0, 0, 1], attention.temperature)
    assert grad.item() == pytest.approx(4 * second * (1 - second) * 0.4 / 0.5**2)


def test_a_temperature_stays_above_a_hundredth():
    attention = randomised(WindowAttention(WIDTH, HEADS, (2, 2)))
    windows = cut_windows((2, 2), (2, 2), (0, 0), None, CPU)
    results = []
    for temperature in (-0.99, -5.0):
        with torch.no_grad():
            attention.temperature.fill_(temperature)
        results.append(attention(tokens_of(4), windows))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(("counts", "window", "shift"), CASES)
def test_every_token_has_one_place_and_windows_partition_the_grid(counts, window, shift):
    windows = cut_windows(counts, window, shift, None, CPU)
    total = math.prod(counts)
    inside = windows.tokens[windows.tokens < total]
    assert sorted(inside.tolist()) == list(range(total))
    assert torch.equal(windows.tokens.flatten()[windows.places], torch.arange(total))
    assert torch.equal(windows.mask[0], windows.tokens < total)


def test_windows_by_hand():
    """Seven rows of one: borders at 2 and 6."""
    windows = cut_windows((7, 1), (4, 1), (2, 0), None, CPU)
    assert windows.tokens.tolist() == [[7, 7, 0, 1], [2, 3, 4, 5], [6, 7, 7, 7]]


@pytest.mark.parametrize("shift", [0, 2])
def test_a_block_is_timms(shift):
    """timm's block shifts both axes alike; AudioMAE's decoder is made of an older version of it."""
    from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock

    counts, window = (12, 8), (4, 4)
    theirs = SwinTransformerV2CrBlock(WIDTH, HEADS, counts, window, (shift, shift), init_values=None).double().eval()
    ours = randomised(WindowBlock(WIDTH, HEADS, window, 4.0, 1e-5))
    state = {}
    for kind in ("weight", "bias"):
        state[f"attn.qkv.{kind}"] = getattr(ours.attention.qkv, kind)
        state[f"attn.proj.{kind}"] = getattr(ours.attention.projection, kind)
        state[f"attn.meta_mlp.fc1.{kind}"] = getattr(ours.attention.bias[0], kind)
        for layer in ("norm1", "norm2"):
            state[f"{layer}.{kind}"] = getattr(getattr(ours, layer), kind)
        for layer in ("fc1", "fc2"):
            state[f"mlp.{layer}.{kind}"] = getattr(getattr(ours.mlp, layer), kind)
    state["attn.meta_mlp.fc2.weight"] = ours.attention.bias[2].weight
    state["attn.meta_mlp.fc2.bias"] = torch.ones(HEADS)  # the same for all keys, so without effect
    state["attn.logit_scale"] = -torch.log(1 + ours.attention.temperature)
    theirs.load_state_dict(state)
    x = tokens_of(96)
    expected = theirs(x.view(2, 12, 8, WIDTH)).reshape(2, 96, WIDTH)
    found = ours(x, cut_windows(counts, window, (shift, shift), None, CPU))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_heads_must_divide_the_width():
    with pytest.raises(M3Error, match="width 8 is not divisible by heads 3"):
        WindowAttention(8, 3, (2, 2))


def test_queries_and_keys_of_any_length_give_the_same_result():
    """Cosines: what x is multiplied by in front of queries and keys doesn't matter."""
    attention = randomised(WindowAttention(WIDTH, HEADS, (3, 3)))
    windows, x = cut_windows((6, 3), (3, 3), (0, 0), None, CPU), tokens_of(18)
    before = attention(x, windows)
    with torch.no_grad():
        attention.qkv.weight[: 2 * WIDTH] *= 7
        attention.qkv.bias[: 2 * WIDTH] *= 7
    torch.testing.assert_close(attention(x, windows), before)
    assert F.cosine_similarity(before.flatten(), attention(2 * x, windows).flatten(), dim=0) < 0.999


# -- the decoder -----------------------------------------------------------------------------------------


def make(modalities: dict, decoder: dict | None = None, **objective) -> M3Model:
    torch.manual_seed(2)
    small = {"type": "window_decoder", "width": 8, "depth": 2, "heads": 2, "window": [2, 2], "shift": [1, 0]}
    settings = {"type": "reconstruct", "decoder": small | (decoder or {}), "targets": {"image": {}}}
    return M3Model(
        M3Config(
            modalities=modalities,
            backbone={"width": 12, "depth": 1, "heads": 2},
            objectives={"reconstruct": settings | objective},
        )
    ).double()


IMAGE = {"type": "image", "size": [12, 20], "tokenizer": {"type": "patch", "size": 4}}
TEXT = {"type": "text", "length": 4, "vocabulary": ["a", "b"], "tokenizer": {"type": "embedding"}}


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (8, 28)])
def test_asked_for_tokens_are_predicted_as_among_all_on_a_grid_of_any_size(size):
    """(20, 12) has as many patches as the model is built for, in other rows."""
    model = make({"image": IMAGE})
    pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tokens = model.tokenise(Batch({"image": pixels}, torch.arange(2)))
    part = replace(tokens["image"], values=tokens["image"].values.double())
    assert part.counts == (size[0] // 4, size[1] // 4)
    is_seen = torch.arange(2 * part.count).view(2, -1) % 3 == 1
    encoded = model.encode_tokens({"image": part}, masking.explicit({"image": part}, {"image": is_seen}))
    decoder = model.objectives["reconstruct"].decoders["image"]
    everything = torch.arange(part.count).expand(2, -1)
    whole = decoder(encoded, {"image": part}, everything)
    index = torch.tensor([[0, 3, 4], [2, 8, 11]])
    torch.testing.assert_close(
        decoder(encoded, {"image": part}, index), whole.gather(1, index[..., None].expand(-1, -1, 48))
    )
    # With one block, whose windows are not shifted, a token is told by those of its window alone.
    first, columns = make({"image": IMAGE}, {"depth": 1}), part.counts[1]
    decoder, corner = first.objectives["reconstruct"].decoders["image"], torch.zeros(2, 1, dtype=torch.long)
    plan = masking.everything({"image": part})
    states = torch.zeros(2, 1 + part.count, 12, dtype=torch.float64)
    blank = decoder(replace(encoded, sequence=states, plan=plan), {"image": part}, corner)
    for changed in (0, 1, 2, columns, columns + 1, 2 * columns):
        if changed < part.count:
            other = states.clone()
            other[:, 1 + changed] = torch.arange(12.0)
            found = decoder(replace(encoded, sequence=other, plan=plan), {"image": part}, corner)
            is_near = changed in (0, 1, columns, columns + 1)
            assert ((found - blank).abs().max() > 1e-6) == is_near


@pytest.mark.parametrize(
    ("modalities", "objective", "sentence"),
    [
        (
            {"image": IMAGE, "text": TEXT},
            {},
            "reads one modality, but the objective sees image, text and predicts image",
        ),
        (
            {"text": TEXT},
            {"targets": {"text": {"loss": "cross_entropy"}}},
            "reads tokens on a grid of two axes, but those of text have 1; use `self_decoder`",
        ),
    ],
)
def test_what_the_decoder_cannot_read_is_refused(modalities, objective, sentence):
    with pytest.raises(M3Error, match=sentence):
        make(modalities, **objective)


def test_tokens_that_do_not_say_their_grid_are_refused():
    model = make({"image": IMAGE})
    part = model.tokenise(Batch({"image": torch.zeros(1, 3, 12, 20, dtype=torch.uint8)}, torch.arange(1)))["image"]
    part = replace(part, values=part.values.double(), counts=None)
    encoded = model.encode_tokens({"image": part}, masking.everything({"image": part}))
    with pytest.raises(M3Error, match="needs tokens that fill a grid, and the tokenizer of image doesn't say"):
        model.objectives["reconstruct"].predict("image", encoded, {"image": part}, torch.zeros(1, 1, dtype=torch.long))
