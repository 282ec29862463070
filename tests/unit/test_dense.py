"""Dense decoders against slow re-derivations with torch's own layers, the reverse Huber loss, depth in metres.

Letters: B batch, D width, C channels or classes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.evaluate.task import build_tasks
from m3.evaluate.tasks.depth_in_metres import errors
from m3.model import M3Model
from m3.objectives.reconstruct import berhu
from m3.types import Batch, Encoded

IMAGE: dict[str, Any] = {"type": "image", "size": [16, 24], "tokenizer": {"type": "patch", "size": 8}}
DEPTH: dict[str, Any] = {
    "type": "depth",
    "size": [16, 24],
    "normalise": "fixed",
    "mean": 5.0,
    "std": 2.0,
    "missing": 0,
    "tokenizer": {"type": "patch", "size": 8},
}
CLASSES: dict[str, Any] = {
    "type": "semantic_map",
    "size": [32, 48],
    "classes": 3,
    "tokenizer": {"type": "class_patch", "size": [8, 16]},
}
ALL = {"image": IMAGE, "depth": DEPTH, "semantic": CLASSES}
DPT = {"type": "dpt", "layers": [0, 1, 1, 2], "widths": [3, 4, 5, 6], "width": 8}


def built(target: str, decoder: dict[str, Any], inputs: tuple[str, ...] = ("image",), **more: Any) -> M3Model:
    torch.manual_seed(0)
    loss = {"semantic": "cross_entropy", "depth": "berhu"}.get(target, "mse")
    objective = {
        "type": "reconstruct",
        "inputs": list(inputs),
        "masking": {"type": "fixed", "visible": 1.0},
        "decoder": decoder,
        "targets": {target: {"loss": loss}},
    }
    backbone = {"width": 16, "depth": 3, "heads": 2}
    config = M3Config(modalities=ALL | more, backbone=backbone, objectives={"reconstruct": objective})
    return M3Model(config).eval()


def batch(count: int = 2) -> Batch:
    pixels = (torch.arange(count * 3 * 16 * 24) * 41 % 253).view(count, 3, 16, 24).to(torch.uint8)
    metres = (torch.arange(count * 16 * 24) * 29 % 83 / 10 + 0.5).view(count, 16, 24)
    ids = (torch.arange(count * 32 * 48) * 7 % 3).view(count, 32, 48).to(torch.uint8)
    return Batch({"image": pixels, "depth": metres, "semantic": ids}, torch.arange(count))


def grids(model: M3Model, layers: tuple[int, ...]) -> list[Tensor]:
    """States of the image's 2 x 3 patches as (B, D, 2, 3), of blocks or of the encoder's result."""
    found: Encoded = model.encode(Batch({"image": batch().signals["image"]}, torch.arange(2)), layers)
    states = [found.layers[number] for number in layers] or [found.sequence]
    return [x[:, 1:].reshape(2, 2, 3, 16).permute(0, 3, 1, 2) for x in states]


def predicted(model: M3Model, target: str) -> Tensor:
    """Return the map (B, C, H, W) that the model predicts, put together token by token."""
    output = model.reconstruct(batch()).output[target]
    tokenizer: Any
    tokenizer, channels = model.tokenizers[target], 3 if target == "semantic" else 1
    height, width = tokenizer.patch
    rows, columns = tokenizer.reference
    whole = torch.full((2, channels, rows * height, columns * width), torch.nan)
    for token in range(rows * columns):
        top, left = token // columns * height, token % columns * width
        own = output[:, token]
        if target == "semantic":  # (position, class)
            patch = own.view(2, height, width, channels).permute(0, 3, 1, 2)
        else:
            patch = own.view(2, channels, height, width)
        whole[:, :, top : top + height, left : left + width] = patch
    return whole


def decoder(model: M3Model, target: str) -> Any:
    return model.objectives["reconstruct"].decoders[target]  # type: ignore[union-attr]


@torch.no_grad()
def test_a_linear_head_is_a_layer_per_patch_resized_bilinearly() -> None:
    model = built("semantic", {"type": "linear_dense"})
    layer = decoder(model, "semantic").output.linear
    scores = F.conv2d(grids(model, ())[0], layer.weight[:, :, None, None], layer.bias)
    wanted = F.interpolate(scores, size=(32, 48), mode="bilinear", align_corners=False)
    assert wanted.std() > 0.01
    torch.testing.assert_close(predicted(model, "semantic"), wanted)


@torch.no_grad()
def test_the_convnext_head_is_that_of_torchs_layers() -> None:
    model = built("semantic", {"type": "convnext_dense", "width": 6, "per_patch": 2, "depth": 2})
    head = decoder(model, "semantic")
    grid = grids(model, ())[0]
    finer = torch.empty(2, 6, 4, 6)
    numbers = grid.permute(0, 2, 3, 1) @ head.spread.linear.weight.T + head.spread.linear.bias
    for row in range(4):  # 4 times 6 numbers of a patch: its 2 x 2 places, row by row
        for column in range(6):
            place = row % 2 * 2 + column % 2
            finer[:, :, row, column] = numbers[:, row // 2, column // 2, place * 6 : (place + 1) * 6]
    for block in head.blocks:
        y = F.conv2d(finer, block.depthwise.weight, block.depthwise.bias, padding=3, groups=6)
        mean, variance = y.mean(1, keepdim=True), y.var(1, keepdim=True, unbiased=False)
        y = (y - mean) / (variance + 1e-6).sqrt()
        y = y * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]
        first, second = (m for m in block.mlp.modules() if isinstance(m, torch.nn.Linear))
        y = F.gelu(F.conv2d(y, first.weight[:, :, None, None], first.bias))
        finer = finer + F.conv2d(y, second.weight[:, :, None, None], second.bias)
    wanted = F.interpolate(head.output(finer), size=(32, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(predicted(model, "semantic"), wanted)


def slow_dpt(head: Any, layers: list[Tensor]) -> Tensor:
    """Return path 1 of DPT: (B, width, 8 h, 8 w)."""

    def unit(part: Any, x: Tensor) -> Tensor:
        y = F.conv2d(F.relu(x), part.first.weight, part.first.bias, padding=1)
        return x + F.conv2d(F.relu(y), part.second.weight, part.second.bias, padding=1)

    scaled = []
    for number, x in enumerate(layers):
        project, scale, join = head.scaled[number]
        x = F.conv2d(x, project.weight, project.bias)
        if number < 2:
            x = F.conv_transpose2d(x, scale.weight, scale.bias, stride=4 if number == 0 else 2)
        elif number == 3:
            x = F.conv2d(x, scale.weight, scale.bias, stride=2, padding=1)
        scaled.append(F.conv2d(x, join.weight, padding=1))
    path = None
    for number, size in ((3, (2, 3)), (2, (4, 6)), (1, (8, 12)), (0, (16, 24))):
        fusion = head.fusions[number]
        path = scaled[number] if path is None else path + unit(fusion.own, scaled[number])
        path = F.interpolate(unit(fusion.both, path), size=size, mode="bilinear", align_corners=True)
        path = F.conv2d(path, fusion.output.weight, fusion.output.bias)
    assert path is not None
    return path


@torch.no_grad()
def test_dpt_joins_four_layers_as_torchs_own_convolutions_do_also_on_odd_grids() -> None:
    model = built("depth", DPT)
    head = decoder(model, "depth")
    path = slow_dpt(head, grids(model, (0, 1, 1, 2)))
    x = F.conv2d(path, head.first.weight, head.first.bias, padding=1)
    x = F.interpolate(x, size=(16, 24), mode="bilinear", align_corners=True)
    x = F.relu(F.conv2d(x, head.second.weight, head.second.bias, padding=1))
    wanted = F.conv2d(x, head.output.weight, head.output.bias)
    assert wanted.std() > 1e-4
    torch.testing.assert_close(predicted(model, "depth"), wanted)


@torch.no_grad()
def test_dpt_has_another_head_for_classes() -> None:
    model = built("semantic", DPT)
    head = decoder(model, "semantic")
    x = F.relu(F.conv2d(slow_dpt(head, grids(model, (0, 1, 1, 2))), head.first.weight, padding=1))
    wanted = F.conv2d(x, head.output.weight, head.output.bias)
    wanted = F.interpolate(wanted, scale_factor=2.0, mode="bilinear", align_corners=True)  # of patches of 8 to 16
    torch.testing.assert_close(predicted(model, "semantic"), wanted)


@pytest.mark.parametrize("kind", ["linear_dense", "convnext_dense", "dpt"])
def test_every_weight_learns_and_several_inputs_are_read(kind: str) -> None:
    settings = DPT if kind == "dpt" else {"type": kind}
    model = built("semantic", settings, inputs=("image", "depth")).train()
    loss = model(batch()).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, grad in grads.items() if grad is None] == []
    idle = [name for name, grad in grads.items() if grad is not None and not grad.any() and "bias" not in name]
    assert idle == (["backbone.norm.weight"] if kind == "dpt" else [])  # DPT reads the blocks
    one, two = model.prepare(batch()), model.reconstruct(batch())
    assert one.plans[model.objectives["reconstruct"].view].target["image"].shape[1] == 0  # type: ignore[union-attr, index]
    other = batch()
    other.signals["depth"] = other.signals["depth"] * 2
    assert not torch.allclose(model.reconstruct(other).output["semantic"], two.output["semantic"])


@torch.no_grad()
def test_an_absent_input_is_nothing_on_the_grid() -> None:
    model = built("semantic", {"type": "linear_dense", "reads": ["depth"]}, inputs=("image", "depth"))
    layer = decoder(model, "semantic").output.linear
    layer.bias.copy_(torch.arange(3.0))
    there = Batch(batch().signals, torch.arange(2), is_present={"depth": torch.tensor([True, False])})
    output = model.reconstruct(there).output["semantic"]
    assert output[1].view(-1, 3).unique(dim=0).tolist() == [[0.0, 1.0, 2.0]]
    assert len(output[0].view(-1, 3).unique(dim=0)) > 1


def test_mistakes_of_dense_decoders_are_sentences() -> None:
    with pytest.raises(M3Error, match="`semantic` is no input of the objective; name some of image"):
        built("depth", {"type": "linear_dense", "reads": ["semantic"]})
    with pytest.raises(M3Error, match="there is no block 5; the last of 3 is number 2"):
        built("depth", {**DPT, "layers": [0, 1, 2, 5]})
    text = {"type": "text", "length": 4, "vocabulary": ["a", "b"], "tokenizer": {"type": "embedding"}}
    with pytest.raises(M3Error, match="makes maps, but `words` is none"):
        built("depth", {"type": "linear_dense"}, inputs=("words",), words=text)
    other = {**IMAGE, "tokenizer": {"type": "patch", "size": 4}}
    with pytest.raises(M3Error, match="image, second lie on different grids"):
        built("depth", {"type": "linear_dense"}, inputs=("image", "second"), second=other)


def test_the_reverse_huber_loss_by_hand() -> None:
    predicted = torch.tensor([[[1.0, 2.0, 10.0]], [[0.5, -1.0, 0.0]]], requires_grad=True)
    truth = torch.tensor([[[0.0, 2.0, 0.0]], [[0.0, 0.0, 50.0]]])
    weights = torch.tensor([[[True, True, True]], [[True, True, False]]])
    losses = berhu(predicted, truth, weights)  # c is 2, then 0.2
    wanted = [[1.0, 0.0, (100 + 4) / 4], [(0.25 + 0.04) / 0.4, (1 + 0.04) / 0.4]]
    torch.testing.assert_close(losses[0, 0], torch.tensor(wanted[0]))
    torch.testing.assert_close(losses[1, 0, :2], torch.tensor(wanted[1]))
    losses[weights].sum().backward()
    assert predicted.grad is not None
    torch.testing.assert_close(predicted.grad[0, 0], torch.tensor([1.0, 0.0, 5.0]))
    torch.testing.assert_close(predicted.grad[1, 0], torch.tensor([2.5, -5.0, 0.0]))


def test_errors_of_depth_by_hand() -> None:
    found = errors(torch.tensor([1.2, 5.0, -1.0, 4.0]), torch.tensor([1.0, 4.0, 2.0, 8.0]))
    # close: 1.2 of 1; 5 / 4 is 1.25, not less. Errors: 0.2, 1, -3, -4.
    torch.testing.assert_close(found, torch.tensor([1.0, 0.04 + 1 + 9 + 16, 8.2, 4.0], dtype=torch.float64))


def test_depth_is_measured_in_metres_where_it_is_known() -> None:
    model = built("depth", {"type": "linear_dense"})
    layer = decoder(model, "depth").output.linear
    with torch.no_grad():  # 6 metres everywhere: (6 - 5) / 2
        layer.weight.zero_()
        layer.bias.fill_(0.5)
    (task,) = build_tasks({"depth": {"type": "depth_in_metres"}}, model, 0)
    metres = torch.full((1, 16, 24), 4.0)
    metres[0, :8], metres[0, 8:, :12] = 5.0, torch.nan
    task.fit(Batch({"image": batch(1).signals["image"], "depth": torch.full((1, 16, 24), 7.0)}, torch.arange(1)))
    task.add(Batch({"image": batch(1).signals["image"], "depth": metres}, torch.arange(1)))
    close, square, absolute = task.rows()  # 192 places of 5 m, 96 of 4 m
    assert (close.task, close.measure, close.baseline_name) == ("depth (delta1)", "delta1", "median")
    assert (close.model, close.baseline, close.higher_is_better) == (pytest.approx(2 / 3), 0.0, True)
    assert square.model == pytest.approx(((2 * 1 + 4) / 3) ** 0.5)
    assert square.baseline == pytest.approx(((2 * 4 + 9) / 3) ** 0.5)
    assert (absolute.model, absolute.baseline) == (pytest.approx(4 / 3), pytest.approx(7 / 3))
    assert not absolute.higher_is_better


def test_depth_without_a_scale_or_seen_by_the_encoder_is_refused() -> None:
    relative = built("depth", {"type": "linear_dense"}, depth={**DEPTH, "normalise": "truncated"})
    with pytest.raises(M3Error, match="map by map has no scale; set `normalise: fixed`"):
        build_tasks({"depth": {"type": "depth_in_metres"}}, relative, 0)
    seen = built("depth", {"type": "linear_dense"}, inputs=("image", "depth"))
    with pytest.raises(M3Error, match="the encoder sees `depth` itself"):
        build_tasks({"depth": {"type": "depth_in_metres"}}, seen, 0)
    classes = built("semantic", {"type": "linear_dense"})
    with pytest.raises(M3Error, match="`semantic` is no depth"):
        build_tasks({"depth": {"type": "depth_in_metres", "target": "semantic"}}, classes, 0)
