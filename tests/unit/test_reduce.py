"""Losses as sums and counts: literals by hand, unknown values, and batches cut into pieces of any size."""

import math

import pytest
import torch

from m3 import masking
from m3.config import M3Config
from m3.errors import M3Error
from m3.model import M3Model
from m3.network import Prepared
from m3.objectives.reconstruct import reduce
from m3.types import Batch, Loss, Part, Tokens

LOSSES = torch.arange(12, dtype=torch.float32).reshape(2, 2, 3)


def boolean(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


@pytest.mark.parametrize(
    ("weights", "average", "total", "count"),
    [
        (None, "token", 66, 12),
        (None, "sample", 2.5 + 8.5, 2),
        (boolean([[1], [0]], [[1], [1]]), "token", 0 + 1 + 2 + 51, 9),
        (boolean([[1], [0]], [[1], [1]]), "sample", 1 + 8.5, 2),
        (boolean([[0], [0]], [[0], [1]]), "token", 9 + 10 + 11, 3),
        (boolean([[0], [0]], [[0], [1]]), "sample", 10, 1),
        (boolean([[0, 1, 0], [0, 1, 1]], [[1, 0, 0], [0, 0, 0]]), "token", 1 + 4 + 5 + 6, 4),
        (boolean([[0, 1, 0], [0, 1, 1]], [[1, 0, 0], [0, 0, 0]]), "sample", 10 / 3 + 6, 2),
        (boolean([[0], [0]], [[0], [0]]), "token", 0, 0),
        (boolean([[0], [0]], [[0], [0]]), "sample", 0, 0),
    ],
)
def test_reduce_literals(weights, average, total, count):
    found = reduce(LOSSES, weights, average)
    assert found[0].item() == pytest.approx(total, rel=1e-6)
    assert found[1].item() == count
    assert found[0].shape == found[1].shape == ()


def test_all_true_weights_equal_no_weights():
    for average in ("token", "sample"):
        weighted = reduce(LOSSES, torch.ones(2, 2, 1, dtype=torch.bool), average)
        assert [x.item() for x in weighted] == [x.item() for x in reduce(LOSSES, None, average)]


def test_gradient_of_reduce_is_one_over_the_samples_own_count():
    losses = LOSSES.clone().requires_grad_()
    total, count = reduce(losses, boolean([[1, 0, 1], [0, 0, 0]], [[1, 1, 1], [0, 1, 0]]), "sample")
    (total / count).backward()
    assert losses.grad is not None
    expected = [[[1 / 4, 0, 1 / 4], [0, 0, 0]], [[1 / 8, 1 / 8, 1 / 8], [0, 1 / 8, 0]]]
    torch.testing.assert_close(losses.grad, torch.tensor(expected))


def test_total_literals():
    loss = Loss(
        {"a": Part(torch.tensor(6.0), torch.tensor(3.0)), "b": Part(torch.tensor(10.0), torch.tensor(4.0), 0.5)}
    )
    assert loss.total().item() == 6 / 3 + 0.5 * 10 / 4
    assert loss.total({"a": torch.tensor(12.0), "b": torch.tensor(5.0)}).item() == 6 / 12 + 0.5 * 10 / 5


def test_a_part_that_counts_nothing_adds_zero():
    loss = Loss({"a": Part(torch.tensor(6.0), torch.tensor(3.0)), "b": Part(torch.tensor(0.0), torch.tensor(0.0))})
    assert loss.total().item() == 2


# -- a model of three modalities with gaps and missing ones ----------------------------------------------------


def build_model(average: str = "sample", balance: str = "none", **targets: dict) -> M3Model:
    """A small MultiMAE in float64, so that sums in another order stay equal."""
    torch.manual_seed(2)
    modalities = {
        "image": {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 4}},
        "depth": {"type": "depth", "size": 16, "missing": 0, "tokenizer": {"type": "patch", "size": 4}},
        "semantic": {
            "type": "semantic_map",
            "size": 8,
            "classes": 5,
            "ignore": 255,
            "tokenizer": {"type": "class_patch", "size": 2, "class_width": 4},
        },
    }
    reconstruct = {
        "type": "reconstruct",
        "masking": {"type": "dirichlet", "visible": 16, "alpha": 0.4},
        "decoder": {"type": "cross_decoder", "width": 16, "depth": 1, "heads": 2},
        "average": average,
        "balance": balance,
        "targets": targets
        or {"image": {"loss": "mse"}, "depth": {"loss": "l1"}, "semantic": {"loss": "cross_entropy", "weight": 0.5}},
    }
    backbone = {"width": 24, "depth": 1, "heads": 2}
    config = M3Config(modalities=modalities, backbone=backbone, objectives={"reconstruct": reconstruct})
    return M3Model(config).double()


def make_batch(count: int = 8, with_missing: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(3)
    depth = 1 + 9 * torch.rand(count, 16, 16, generator=generator)
    depth[torch.rand(depth.shape, generator=generator) < 0.3] = torch.nan
    semantic = torch.randint(0, 5, (count, 8, 8), dtype=torch.uint8, generator=generator)
    semantic[torch.rand(semantic.shape, generator=generator) < 0.3] = 255
    image = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    is_present = {"depth": torch.arange(count) % 3 != 1, "semantic": torch.arange(count) % 4 != 1}
    return Batch(
        {"image": image, "depth": depth, "semantic": semantic},
        keys=torch.arange(count) + 900,
        is_present=is_present if with_missing else {},
    )


def rows(batch: Batch, part: slice) -> Batch:
    return Batch(
        {name: x[part] for name, x in batch.signals.items()},
        batch.keys[part],
        {name: x[part] for name, x in batch.is_present.items()},
    )


def prepare(model: M3Model, batch: Batch) -> Prepared:
    prepared = model.prepare(batch)
    tokens = {
        name: Tokens(p.values.double() if p.values.is_floating_point() else p.values, p.positions, p.is_valid)
        for name, p in prepared.tokens.items()
    }
    return Prepared(tokens, prepared.plans)


def loss_and_gradients(model: M3Model, batch: Batch, size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """One step over micro-batches of `size`: counts first, then a backward pass for each."""
    prepared = [prepare(model, rows(batch, slice(i, i + size))) for i in range(0, len(batch), size)]
    counted = [model.counts(p) for p in prepared]
    counts = {name: torch.stack([c[name] for c in counted]).sum() for name in model.part_names}
    model.zero_grad()
    total = 0.0
    for p in prepared:
        parts = model(p).parts
        assert parts is not None
        loss = parts.total(counts)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("with_missing", [False, True], ids=["all present", "some missing"])
@pytest.mark.parametrize("balance", ["none", "uncertainty"])
@pytest.mark.parametrize("average", ["token", "sample"])
def test_micro_batches_of_any_size_give_the_same_loss_and_gradients(average, balance, with_missing):
    model, batch = build_model(average, balance), make_batch(with_missing=with_missing)
    if balance == "uncertainty":
        with torch.no_grad():
            model.objectives["reconstruct"].log_variance.copy_(torch.tensor([0.3, -0.2, 0.1]))
    loss, gradients = loss_and_gradients(model, batch, 8)
    assert loss == pytest.approx(model(prepare(model, batch)).loss.item(), rel=1e-6)
    for size in (4, 2, 1):
        other_loss, other = loss_and_gradients(model, batch, size)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            assert (other[name] - gradient).abs().max() < 1e-6 * gradient.abs().max().clamp(min=1), name


def test_the_mean_of_micro_batch_losses_would_be_another_number():
    """Counts differ between these micro-batches: dividing each by its own count is not the same."""
    model, batch = build_model("token"), make_batch()
    whole = model(prepare(model, batch)).loss.item()
    singles = [model(prepare(model, rows(batch, slice(i, i + 1)))).loss.item() for i in range(8)]
    assert abs(sum(singles) / 8 - whole) > 1e-3


@pytest.mark.parametrize("with_missing", [False, True], ids=["all present", "some missing"])
@pytest.mark.parametrize("balance", ["none", "uncertainty"])
@pytest.mark.parametrize("average", ["token", "sample"])
def test_counts_equal_those_of_the_parts(average, balance, with_missing):
    model = build_model(average, balance)
    for size in (8, 1):
        batch = make_batch(with_missing=with_missing)
        prepared = prepare(model, rows(batch, slice(0, size)))
        parts, counts = model(prepared).parts.parts, model.counts(prepared)
        assert list(counts) == list(parts) == model.part_names
        for name, part in parts.items():
            assert torch.equal(counts[name], part.count)
            assert not part.count.requires_grad


def test_counts_are_the_known_values_of_hidden_tokens():
    model, batch = build_model("token"), make_batch()
    prepared = prepare(model, batch)
    (plan,) = prepared.plans.values()
    counts = model.counts(prepared)
    for name, width in (("image", 48), ("depth", 16), ("semantic", 4)):
        values, expected = prepared.tokens[name].values, 0
        for sample in range(8):
            for number, is_target in zip(plan.target[name][sample], plan.is_target[name][sample], strict=True):
                row = values[sample, number]
                assert row.shape == (width,)
                known = ~row.isnan() if row.is_floating_point() else row >= 0
                expected += int(known.sum()) if is_target else 0
        assert counts[f"reconstruct/{name}"] == expected


@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1"])
@pytest.mark.parametrize("average", ["token", "sample"])
def test_unknown_values_are_not_counted_and_give_no_nan(average, loss):
    targets = {"depth": {"loss": loss}, "semantic": {"loss": "cross_entropy"}}
    model, batch = build_model(average, **targets), make_batch(with_missing=False)
    batch.signals["depth"][0] = torch.nan  # a map of nothing but holes
    batch.signals["semantic"][1] = 255
    prepared = prepare(model, batch)
    output = model(prepared)
    output.loss.backward()
    assert output.loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if average == "sample":
        hidden = next(plan.is_target for plan in prepared.plans.values())
        assert hidden["depth"].any(1).all()
        assert output.parts.parts["reconstruct/depth"].count == 7
        assert output.parts.parts["reconstruct/semantic"].count == hidden["semantic"].any(1).sum() - 1


@pytest.mark.parametrize("average", ["token", "sample"])
def test_a_hole_in_a_target_changes_nothing_but_its_own_summand(average):
    """Hidden values only: with the deviation fixed, punching a hole removes one term from the mean."""
    model = build_model(average, depth={"loss": "l1"})
    batch = make_batch(1, with_missing=False)
    tokens = prepare(model, batch).tokens
    seen = {name: torch.zeros(1, 16, dtype=torch.bool) for name in tokens} | {"image": torch.arange(16)[None] < 5}
    plans = dict.fromkeys(model.views, masking.explicit(tokens, seen))
    before = model(Prepared(tokens, plans)).parts.parts["reconstruct/depth"]
    values = tokens["depth"].values.clone()
    sample, token, place = (int(x[0]) for x in (~values.isnan()).nonzero(as_tuple=True))
    encoded = {view: model.encode_tokens(tokens, plan) for view, plan in plans.items()}
    index = torch.tensor([[token]])
    predicted = model.objectives["reconstruct"].predict("depth", next(iter(encoded.values())), tokens, index)
    term = (predicted[0, 0, place] - values[sample, token, place]).abs().item()
    values[sample, token, place] = torch.nan
    punched = {**tokens, "depth": Tokens(values, tokens["depth"].positions)}
    after = model(Prepared(punched, plans)).parts.parts["reconstruct/depth"]
    known = int((~tokens["depth"].values.isnan()).sum())
    if average == "token":
        assert (before.count.item(), after.count.item()) == (known, known - 1)
        assert before.sum.item() - after.sum.item() == pytest.approx(term, rel=1e-4)
    else:
        assert (before.count.item(), after.count.item()) == (1, 1)
        assert before.sum.item() * known - after.sum.item() * (known - 1) == pytest.approx(term, rel=1e-4)


def test_uncertainty_weighs_each_part_and_adds_its_log_variance():
    plain, weighted = build_model(), build_model(balance="uncertainty")
    weighted.load_state_dict(plain.state_dict(), strict=False)
    s = [0.7, -0.4, 0.2]
    with torch.no_grad():
        weighted.objectives["reconstruct"].log_variance.copy_(torch.tensor(s))
    batch = make_batch()
    parts = plain(prepare(plain, batch)).parts.parts.values()
    own = [p.weight * (p.sum / p.count).item() for p in parts]
    expected = sum(math.exp(-v) * part + v for v, part in zip(s, own, strict=True))
    assert weighted(prepare(weighted, batch)).loss.item() == pytest.approx(expected, rel=1e-6)


def test_every_parameter_stays_in_the_graph_where_nothing_counts():
    model, batch = build_model(), make_batch()
    only_image = rows(batch, slice(1, 2))
    assert not only_image.is_present["depth"].any()
    assert not only_image.is_present["semantic"].any()
    output = model(prepare(model, only_image))
    output.loss.backward()
    assert output.parts.parts["reconstruct/depth"].count == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("call", ["forward", "counts"])
def test_a_target_that_the_batch_does_not_hold_is_named(call):
    model, batch = build_model(), make_batch(with_missing=False)
    del batch.signals["depth"]
    prepared = prepare(model, batch)
    with pytest.raises(M3Error, match="the batch has no `depth`, which target `depth` needs"):
        model(prepared) if call == "forward" else model.counts(prepared)


@pytest.mark.parametrize("filling", [7.5, math.nan], ids=["noise", "NaN"])
def test_what_a_missing_modality_holds_changes_nothing(filling):
    """A missing modality is a state of its own: whatever stands in its raw tensor is never read."""
    settings = build_model().config
    depth = {key: value for key, value in settings.modalities["depth"].items() if key != "missing"}  # no holes
    modalities = {**settings.modalities, "depth": depth}
    config = M3Config(modalities=modalities, backbone=settings.backbone, objectives=settings.objectives)
    torch.manual_seed(4)
    model, batch = M3Model(config), make_batch(4)
    batch.signals["depth"] = 1 + torch.arange(4 * 256).reshape(4, 16, 16).remainder(37) / 5
    expected = model(batch).loss.item()
    for values in (torch.arange(256.0).reshape(16, 16) % 11 * filling, torch.full((16, 16), filling)):
        batch.signals["depth"][~batch.is_present["depth"]] = values
        assert model(batch).loss.item() == pytest.approx(expected, rel=1e-6)
