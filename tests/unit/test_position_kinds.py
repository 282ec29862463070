"""Kinds of positions: learned tables, an MLP on coordinates, rotary angles; alone, mixed, at sizes never trained on."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3 import masking
from m3.attention import SelfAttention, rotate
from m3.backbone import BackboneSpec
from m3.config import M3Config
from m3.errors import M3Error
from m3.model import M3Model
from m3.plugins import Signal
from m3.positions import Coordinates, Learned, Rotary, Sincos, build_positions, grid
from m3.tokenizers.embedding import Embedding
from m3.tokenizers.patch import Patch
from m3.types import Batch

EXAMPLE = {
    "image": {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 4}},
    "video": {"type": "video", "size": 8, "frames": 4, "tokenizer": {"type": "tube", "size": 4, "frames": 2}},
    "text": {"type": "text", "vocabulary": ["a", "b", "c"], "length": 6, "tokenizer": {"type": "embedding"}},
    "audio": {"type": "audio", "frames": 32, "bands": 8, "tokenizer": {"type": "spectrogram", "size": 8}},
}


def model_with(kinds: dict[str, dict], **backbone) -> M3Model:
    torch.manual_seed(1)
    return M3Model(
        M3Config(
            modalities={name: {**EXAMPLE[name], "positions": kind} for name, kind in kinds.items()},
            backbone={"width": 48, "depth": 2, "heads": 4, **backbone},
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "masking": {"type": "fixed", "visible": 0.5},
                    "decoder": {"type": "cross_decoder", "width": 48, "depth": 1, "heads": 4},
                    "targets": {name: {"loss": "cross_entropy" if name == "text" else "mse"} for name in kinds},
                }
            },
            seed=0,
        )
    ).eval()


def batch_of(names, count: int = 3, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(5)
    make = {
        "image": lambda: torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator),
        "video": lambda: torch.randint(0, 256, (count, 3, 4, 8, 8), dtype=torch.uint8, generator=generator),
        "text": lambda: torch.randint(0, 4, (count, 6), dtype=torch.int32, generator=generator),
        "audio": lambda: torch.randn(count, 32, 1, 8, generator=generator) * 4 - 4,
    }
    return Batch({name: make[name]() for name in names}, torch.arange(count))


# -- learned --------------------------------------------------------------------------------------------


def learned(size: tuple[int, int] = (12, 20), width: int = 3) -> Learned:
    torch.manual_seed(0)
    part = Learned(Learned.Spec(), Patch(Patch.Spec(size=4), Signal("values", 3, size), 8), width, "yx")
    torch.nn.init.normal_(part.table)
    return part


def test_on_the_grid_learned_positions_are_the_table() -> None:
    part = learned()
    assert part.table.shape == (3, 3, 5)
    found = part(grid((3, 5), (3, 5), torch.device("cpu")))
    assert found.shape == (1, 15, 3)
    assert torch.equal(found[0], part.table.flatten(1).t())


def test_off_the_grid_learned_positions_are_bilinear_and_end_at_the_edge() -> None:
    part = learned()
    points = [(0.25, 1.5), (1.75, 3.0), (2.0, 4.0), (0.5, 0.125), (-3.0, 1.0), (9.0, 9.0), (1.0, -0.2), (1.99, 3.99)]
    found = part(torch.tensor([points]))
    for number, (y, x) in enumerate(points):
        y, x = min(max(y, 0.0), 2.0), min(max(x, 0.0), 4.0)
        expected = torch.zeros(3)
        for row, column in itertools.product(range(3), range(5)):
            expected += part.table[:, row, column].detach() * max(0.0, 1 - abs(row - y)) * max(0.0, 1 - abs(column - x))
        torch.testing.assert_close(found[0, number].detach(), expected)


def test_a_finer_grid_interpolates_as_torch_does() -> None:
    part = learned()
    fine = part(grid((6, 10), (3, 5), torch.device("cpu")))[0].t().view(1, 3, 6, 10)
    expected = torch.nn.functional.interpolate(part.table[None], (6, 10), mode="bilinear", align_corners=False)
    torch.testing.assert_close(fine, expected)


def test_learned_positions_have_one_to_three_axes_and_single_rows_work() -> None:
    flat = Learned(Learned.Spec(), Embedding(Embedding.Spec(), Signal("classes", 1, (4,), 9), 8), 2, "xy")
    torch.nn.init.normal_(flat.table)
    at = torch.tensor([[[0.0], [1.5], [3.0]]])
    torch.testing.assert_close(flat(at)[0, 1], (flat.table[:, 1] + flat.table[:, 2]) / 2)
    row = learned((4, 20))
    assert torch.equal(row(torch.tensor([[[0.0, 2.0], [5.0, 2.0]]]))[0, 0], row.table[:, 0, 2])
    pointless = Patch(Patch.Spec(size=4), Signal("values", 3, (8, 8)), 8)
    pointless.reference = ()
    with pytest.raises(
        M3Error, match=r"^learned positions need a grid of one to three axes; use `sincos` or `coordinates` "
    ):
        Learned(Learned.Spec(), pointless, 8, "xy")


# -- coordinates ----------------------------------------------------------------------------------------


def test_coordinates_pass_a_small_mlp() -> None:
    part = Coordinates(Coordinates.Spec(hidden=7), Patch(Patch.Spec(size=4), Signal("values", 3, (8, 8)), 8), 5, "xy")
    torch.manual_seed(0)
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    at = torch.randn(2, 6, 2)
    weights = dict(part.named_parameters())
    inner = at @ weights["layers.0.weight"].T + weights["layers.0.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(part(at), inner @ weights["layers.2.weight"].T + weights["layers.2.bias"])


# -- rotary ---------------------------------------------------------------------------------------------


def rotary(temperature: float = 100.0, axes: int = 2) -> Rotary:
    tokenizer = Patch(Patch.Spec(size=4), Signal("values", 3, (8, 8)), 8)
    tokenizer.axes = axes
    return Rotary(Rotary.Spec(temperature=temperature), tokenizer, 8, "xy")


def test_rotary_angles_by_hand() -> None:
    """Heads of 14: 7 pairs, 3 for each of 2 axes, one left over; frequencies 1, 64^(-1/3), 64^(-2/3)."""
    found = rotary(64.0).angles(torch.tensor([[[2.0, 10.0]]]), 14)[0, 0]
    assert found.tolist() == pytest.approx([2, 0.5, 0.125, 10, 2.5, 0.625, 0])
    with pytest.raises(M3Error, match=r"^heads of width 2 are too narrow for rotary positions over 2 axes.$"):
        rotary().angles(torch.zeros(1, 1, 2), 2)


def test_scores_depend_on_differences_of_positions_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 9, 16, dtype=torch.float64), torch.randn(1, 1, 9, 16, dtype=torch.float64)
    at = torch.rand(1, 9, 2) * 6

    def scores(shift: list[float]) -> torch.Tensor:
        angles = rotary().angles(at + torch.tensor(shift), 16).unsqueeze(1).double()
        turn = (angles.cos(), angles.sin())
        return rotate(q, turn) @ rotate(k, turn).transpose(-1, -2)

    torch.testing.assert_close(scores([0.0, 0.0]), scores([3.0, -7.5]), atol=1e-4, rtol=1e-4)
    assert (scores([0.0, 0.0]) - q @ k.transpose(-1, -2)).abs().max() > 0.5
    still = rotate(q, (torch.ones(1, 1, 9, 8), torch.zeros(1, 1, 9, 8)))
    assert torch.equal(still, q)
    turned = rotate(q, (torch.rand(1, 1, 9, 8).cos(), torch.rand(1, 1, 9, 8).sin()))
    assert turned.shape == q.shape


def test_a_shifted_picture_has_the_same_states_under_rotary_positions() -> None:
    """With rotary positions alone, moving all positions by the same amount changes nothing in the encoder."""
    model = model_with({"image": {"type": "rotary"}}, class_tokens=0)
    batch = batch_of(["image"])
    tokens = model.tokenise(batch)
    plan = masking.everything(tokens)
    here = model.encode_tokens(tokens, plan).states
    moved = {"image": replace(tokens["image"], positions=tokens["image"].positions + torch.tensor([5.0, -3.0]))}
    torch.testing.assert_close(model.encode_tokens(moved, plan).states, here, atol=1e-4, rtol=1e-4)
    stretched = {"image": replace(tokens["image"], positions=tokens["image"].positions * 2)}
    assert (model.encode_tokens(stretched, plan).states - here).abs().max() > 1e-3


def test_heads_of_odd_width_are_refused_with_rotary_positions() -> None:
    model = model_with({"image": {"type": "rotary"}}, width=36, heads=4)
    with pytest.raises(M3Error, match=r"^heads of width 9 can't be turned by rotary positions; choose an even width.$"):
        model.encode(batch_of(["image"]))


def test_self_attention_turns_queries_and_keys_but_not_values() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(8, 2)
    x = torch.randn(1, 5, 8)
    angles = torch.rand(1, 1, 5, 2)
    found = attention(x, turn=(angles.cos(), angles.sin()))
    q, k, v = attention.qkv(x).chunk(3, -1)
    heads = []
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        turned = []
        for part in (q, k):
            rows = []
            for token in range(5):
                pair = torch.complex(part[0, token, own][:2], part[0, token, own][2:])
                pair = pair * torch.polar(torch.ones(2), angles[0, 0, token])
                rows.append(torch.cat([pair.real, pair.imag]))
            turned.append(torch.stack(rows))
        heads.append((turned[0] @ turned[1].T / 2).softmax(-1) @ v[0, :, own])
    torch.testing.assert_close(found[0], attention.projection(torch.cat(heads, -1)))


# -- in a model -----------------------------------------------------------------------------------------

MIXTURES = [
    {"image": {"type": "rotary"}, "text": {"type": "sincos"}},
    {
        "image": {"type": "learned"},
        "video": {"type": "learned"},
        "text": {"type": "learned"},
        "audio": {"type": "learned"},
    },
    {"image": {"type": "coordinates", "hidden": 16}, "audio": {"type": "rotary", "temperature": 50.0}},
    {"image": {"type": "rotary"}, "video": {"type": "rotary"}, "text": {"type": "rotary"}, "audio": {"type": "sincos"}},
]


@pytest.mark.parametrize("kinds", MIXTURES, ids=lambda k: "-".join(v["type"] for v in k.values()))
def test_any_mixture_trains_every_parameter_saves_and_reloads(kinds: dict, tmp_path: Path) -> None:
    model = model_with(kinds).train()
    batch = batch_of(kinds)
    loss = model(batch).loss
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    model.eval().save_pretrained(tmp_path)
    again = M3Model.from_pretrained(tmp_path)
    assert {n: type(p).__name__.lower() for n, p in again.positions.items()} == {n: k["type"] for n, k in kinds.items()}
    assert torch.equal(again.encode(batch).sequence, model.encode(batch).sequence)
    assert again(batch).loss.item() == model(batch).loss.item()


@pytest.mark.parametrize("kind", [Sincos, Learned, Coordinates, Rotary])
def test_pictures_of_sizes_never_trained_on_are_read(kind: type) -> None:
    model = model_with({"image": {"type": kind.__name__.lower()}})
    for size in (8, 16, 32):
        states = model.encode(batch_of(["image"], size=size)).states
        assert states.shape == (3, (size // 4) ** 2, 48)
        assert states.isfinite().all()


def test_the_position_matters_and_the_order_does_not() -> None:
    """Shuffled tokens that keep their positions have shuffled states; without their positions they have others."""
    for kind in ("sincos", "learned", "coordinates", "rotary"):
        model = model_with({"image": {"type": kind}}, class_tokens=0)
        if kind == "learned":
            torch.nn.init.normal_(model.positions["image"].table)  # type: ignore[union-attr, arg-type]
        tokens = model.tokenise(batch_of(["image"]))
        plan = masking.everything(tokens)
        shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        own = tokens["image"]
        states = model.encode_tokens(tokens, plan).states
        moved = {"image": replace(own, values=own.values[:, shuffle], positions=own.positions[:, shuffle])}
        torch.testing.assert_close(model.encode_tokens(moved, plan).states, states[:, shuffle], atol=1e-4, rtol=1e-4)
        lost = {"image": replace(own, values=own.values[:, shuffle])}
        assert (model.encode_tokens(lost, plan).states - states[:, shuffle]).abs().max() > 1e-3, kind


def test_each_sample_may_have_positions_of_its_own() -> None:
    for kind in ("sincos", "learned", "coordinates", "rotary"):
        model = model_with({"image": {"type": kind}})
        tokens = model.tokenise(batch_of(["image"]))
        plan = masking.everything(tokens)
        own = tokens["image"]
        spread = {"image": replace(own, positions=own.positions.repeat(3, 1, 1))}
        both = (model.encode_tokens(x, plan).sequence for x in (tokens, spread))
        torch.testing.assert_close(*both)


def test_modalities_without_rotary_positions_stay_unturned() -> None:
    """In a mixture the text's angles are all 0: with text alone, the model works as if without them."""
    mixed = model_with({"image": {"type": "rotary"}, "text": {"type": "sincos"}})
    plain = model_with({"image": {"type": "sincos"}, "text": {"type": "sincos"}})
    plain.load_state_dict(mixed.state_dict())
    batch = batch_of(["text"])
    assert torch.equal(mixed.encode(batch).sequence, plain.encode(batch).sequence)
    both = batch_of(["image", "text"])
    assert (mixed.encode(both).sequence - plain.encode(both).sequence).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"type": "rotery"}, r"^positions.type: `rotery` in `positions` is not known: .* Did you mean `rotary`\?$"),
        ({"type": "sincos", "temprature": 1}, r"^positions.temprature: unknown key. Did you mean `temperature`\?$"),
        ({"type": "coordinates", "hidden": 0}, "^positions.hidden: input should be greater than 0, got 0.$"),
        ({"type": "learned", "hidden": 3}, "^positions.hidden: unknown key.$"),
    ],
)
def test_wrong_settings_are_one_sentence(settings: dict, sentence: str) -> None:
    tokenizer = Patch(Patch.Spec(size=4), Signal("values", 3, (8, 8)), BackboneSpec().width)
    tokenizer.positions = settings
    with pytest.raises(M3Error, match=sentence):
        build_positions(tokenizer, 32, "xy")
