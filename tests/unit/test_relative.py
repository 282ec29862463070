"""Relative biases of attention: BEiT's table, read where tokens are, also where some are dropped or lie between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from m3.attention import attend
from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign.adapt import adapt
from m3.model import M3Model
from m3.positions import grid
from m3.relative import RelativeBias
from m3.types import Batch

CPU = torch.device("cpu")
IMAGE = {
    "type": "image",
    "size": (16, 24),
    "tokenizer": {"type": "patch", "size": 8},
    "positions": {"type": "relative"},
}
DEPTH = {"type": "depth", "size": (16, 24), "tokenizer": {"type": "patch", "size": 8}}


def bias_of(rows: int, columns: int, heads: int = 2, prefix: int = 1) -> RelativeBias:
    bias = RelativeBias((rows, columns), heads, prefix)
    with torch.no_grad():
        for number, parameter in enumerate(bias.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + 1000 * number)
    return bias


def model_with(image: dict[str, Any] = IMAGE, masking: dict[str, Any] | None = None, **backbone: Any) -> M3Model:
    torch.manual_seed(0)
    objective = {"type": "reconstruct", "masking": {"type": "fixed", "visible": 4, **(masking or {})}}
    objective |= {"decoder": {"type": "self_decoder", "width": 16, "depth": 1, "heads": 2}}
    objective |= {"targets": {"image": {"loss": "mse"}}}
    settings = {"width": 16, "depth": 3, "heads": 2, "relative_bias": "shared"} | backbone
    config = M3Config(modalities={"image": image}, backbone=settings, objectives={"reconstruct": objective})
    model = M3Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_biases" in name:
                parameter.normal_()
    return model


def batch_of(rows: int = 16, columns: int = 24, count: int = 2) -> Batch:
    pixels = torch.randint(0, 256, (count, 3, rows, columns), dtype=torch.uint8)
    return Batch({"image": pixels}, keys=torch.arange(count))


# -- the table ----------------------------------------------------------------------------------------------------


def test_each_pair_reads_the_entry_of_its_distance() -> None:
    """Bao et al. 2021: query minus key, rows first; the three entries behind are for the class token."""
    found = bias_of(2, 3)(grid((2, 3), (2, 3), CPU))
    assert found.shape == (1, 2, 7, 7)
    for head in range(2):
        for query in range(6):
            for key in range(6):
                down, right = query // 3 - key // 3, query % 3 - key % 3
                assert found[0, head, 1 + query, 1 + key] == head * 15 + (down + 1) * 5 + right + 2
        assert found[0, head, 0, 1:].tolist() == [1000 + 3 * head] * 6  # what the class token looks at
        assert found[0, head, 1:, 0].tolist() == [1001 + 3 * head] * 6  # what looks at the class token
        assert found[0, head, 0, 0] == 1002 + 3 * head


def test_dropped_tokens_leave_the_others_biases_as_they_are() -> None:
    bias, at, kept = bias_of(2, 3, prefix=2), grid((2, 3), (2, 3), CPU), torch.tensor([[0, 2, 5], [1, 3, 4]])
    whole, found = bias(at)[0], bias(at[0][kept])
    for sample in range(2):
        rows = torch.cat([torch.arange(2), kept[sample] + 2])
        assert torch.equal(found[sample], whole[:, rows][:, :, rows])


def test_without_prefix_tokens_there_is_nothing_but_the_table() -> None:
    bias = bias_of(2, 3, prefix=0)
    assert [name for name, _ in bias.named_parameters()] == ["table"]
    assert bias(grid((2, 3), (2, 3), CPU)).shape == (1, 2, 6, 6)


def test_distances_between_and_beyond_those_of_the_grid_have_a_bias() -> None:
    bias = bias_of(2, 3, heads=1, prefix=0)  # entries 0 ... 4 for 1 up, 5 ... 9, 10 ... 14 for 1 down
    found = bias(torch.tensor([[[0.0, 0.0], [0.5, 0.25], [7.0, 9.0]]]))[0, 0]
    assert found[1, 0] == 7 + 0.5 * 5 + 0.25
    assert found[0, 1] == 7 - 0.5 * 5 - 0.25
    assert (found[2, 0], found[0, 2]) == (14, 0)


# -- attention with numbers that are added ------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_what_is_added_to_the_scores_counts_and_learns(dtype: torch.dtype, near: float) -> None:
    """Against the formula; bfloat16 takes the matrix products with their own backward pass."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, 5, 4).to(dtype).requires_grad_() for _ in range(3))
    added = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    added[..., 4] = -torch.inf
    added.requires_grad_()
    weight = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    grads = torch.autograd.grad((attend(q, k, v, added) * weight).sum(), (q, k, v, added))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, added)]
    scores = exact[0] @ exact[1].transpose(-1, -2) / 2 + exact[3]
    expected = torch.autograd.grad(((scores.softmax(-1) @ exact[2]) * weight).sum(), exact)
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=near, atol=near)
    assert not grads[3][..., 4].any()


# -- in the model -------------------------------------------------------------------------------------------------


def bias_in(model: M3Model, number: int = 0) -> RelativeBias:
    found: Any = model.backbone
    return found.relative_biases[number]


def encoded(model: M3Model, batch: Batch) -> Tensor:
    return model.encode(batch).sequence


@pytest.mark.parametrize(("kind", "count"), [("shared", 1), ("per_block", 3)])
def test_all_blocks_share_a_table_or_have_their_own(kind: str, count: int) -> None:
    model, batch = model_with(relative_bias=kind), batch_of()
    tables = [name for name in model.state_dict() if name.endswith("table")]
    assert tables == [f"backbone.relative_biases.{n}.table" for n in range(count)]
    every = (0, 1, 2)
    before = model.encode(batch, layers=every).layers
    with torch.no_grad():
        bias_in(model, -1).table.add_(torch.randn(2, 3, 5))
    after = model.encode(batch, layers=every).layers
    changed = [not torch.equal(before[n], after[n]) for n in every]
    assert changed == [kind == "shared", kind == "shared", True]


def test_tokens_know_where_they_are_by_the_bias_alone() -> None:
    """Swapping two patches swaps their states if nothing tells places, and does not with a bias."""
    model, batch = model_with(), batch_of(count=1)
    pixels = batch.signals["image"].clone()
    pixels[..., :8, :8], pixels[..., 8:, 16:] = pixels[..., 8:, 16:].clone(), pixels[..., :8, :8].clone()
    order = [0, 6, 2, 3, 4, 5, 1]
    swapped = Batch({"image": pixels}, keys=batch.keys)
    assert not torch.allclose(encoded(model, swapped)[:, order], encoded(model, batch), atol=1e-3)
    with torch.no_grad():
        bias_in(model).table.zero_()
    torch.testing.assert_close(encoded(model, swapped)[:, order], encoded(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", ["drop", "replace"])
def test_a_view_with_hidden_tokens_reads_the_same_biases(hidden: str) -> None:
    model, batch = model_with(masking={"hidden": hidden}), batch_of()
    seen: list[Tensor] = []
    bias_in(model).register_forward_hook(lambda *given: seen.append(given[-1]))
    prepared = model.prepare(batch)
    (plan,) = prepared.plans.values()
    model(prepared).loss.backward()
    whole = bias_in(model)(grid((2, 3), (2, 3), CPU))[0]
    assert len(seen[0]) == (1 if hidden == "replace" else 2)
    for sample, kept in enumerate(plan.visible["image"]):
        rows = torch.cat([torch.zeros(1, dtype=torch.long), kept + 1])
        assert torch.equal(seen[0].expand(2, -1, -1, -1)[sample], whole[:, rows][:, :, rows])
    gradients = [p.grad for name, p in model.named_parameters() if "relative_biases" in name]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients)


def test_a_sample_without_the_modality_does_not_matter_to_the_others() -> None:
    model, batch = model_with(), batch_of(count=3)
    there = torch.tensor([True, False, True])
    gaps = Batch(batch.signals, keys=batch.keys, is_present={"image": there})
    found, expected = encoded(model, gaps), encoded(model, batch)
    torch.testing.assert_close(found[there], expected[there], rtol=1e-5, atol=1e-5)
    assert found.isfinite().all()


def test_it_starts_at_zero_and_other_sizes_work() -> None:
    torch.manual_seed(0)
    fresh = M3Model(M3Config(modalities={"image": IMAGE}, backbone={"width": 16, "depth": 1, "heads": 2,
        "relative_bias": "shared"}, objectives={}))  # fmt: skip
    assert not any(x.any() for name, x in fresh.state_dict().items() if "relative_biases" in name)
    assert encoded(model_with(), batch_of(32, 48)).shape == (2, 1 + 24, 16)


# -- where it can't hold ------------------------------------------------------------------------------------------


def test_it_needs_one_modality_on_a_grid_of_two_axes() -> None:
    several = {"image": IMAGE, "depth": DEPTH}
    text = {"type": "text", "vocabulary": ["a", "b"], "length": 6, "tokenizer": {"type": "embedding"}}
    for modalities in (several, {"text": text}):
        backbone = {"width": 16, "depth": 1, "heads": 2, "relative_bias": "shared"}
        with pytest.raises(
            M3Error, match=r"^backbone: relative_bias is for a transformer of one modality on a grid of"
        ):
            M3Model(M3Config(modalities=modalities, backbone=backbone, objectives={}))


def test_relative_positions_need_a_relative_bias() -> None:
    with pytest.raises(M3Error, match=r"positions `relative` add nothing, .* set relative_bias of the backbone too"):
        model_with(relative_bias=None)


# -- another size -------------------------------------------------------------------------------------------------


def test_tables_are_stretched_to_another_grid() -> None:
    old, new = model_with(relative_bias="per_block"), model_with({**IMAGE, "size": (32, 40)}, relative_bias="per_block")
    tensors = dict(old.state_dict())
    shapes = {name: x.shape for name, x in new.state_dict().items()}
    said = adapt(tensors, {"image": IMAGE}, {"image": {**IMAGE, "size": (32, 40)}}, shapes)
    assert said == ["backbone: relative biases go from 3 x 5 to 7 x 9 (interpolated)"]
    for n in range(3):
        table = old.state_dict()[f"backbone.relative_biases.{n}.table"]
        expected = torch.nn.functional.interpolate(table[None], (7, 9), mode="bicubic", antialias=True)[0]
        found = tensors[f"backbone.relative_biases.{n}.table"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[:, 3, 4], table[:, 1, 2], rtol=1e-5, atol=1e-5)  # distance 0
        prefix = f"backbone.relative_biases.{n}.prefix"
        assert torch.equal(tensors[prefix], old.state_dict()[prefix])
