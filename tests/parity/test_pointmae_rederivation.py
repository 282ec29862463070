"""Point-MAE written a second time from the paper's description: group by group, block by block, pair by pair."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m3 import M3Config, M3Model
from m3.backbone import path_factors
from m3.network import Prepared
from m3.random import Draws
from m3.types import Batch

GROUPS, NEIGHBOURS, SEEN = 8, 5, 3
WIDTH, HEADS, DEPTH, DECODER_DEPTH = 12, 2, 3, 2
EPS = 1e-5


def build(drop_path: float = 0.0) -> M3Model:
    tokenizer = {"type": "point_group", "groups": GROUPS, "neighbours": NEIGHBOURS, "embed_width": [6, 8, 10]}
    model = M3Model(
        M3Config(
            modalities={
                "cloud": {
                    "type": "points",
                    "count": 40,
                    "tokenizer": tokenizer,
                    "positions": {"type": "coordinates", "hidden": 7},
                }
            },
            backbone={
                "width": WIDTH,
                "depth": DEPTH,
                "heads": HEADS,
                "class_tokens": 0,
                "norm_eps": EPS,
                "positions_every_block": True,
                "drop_path": drop_path,
            },
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "masking": {"type": "fixed", "visible": SEEN},
                    "decoder": {"type": "self_decoder", "width": 8, "depth": DECODER_DEPTH, "heads": 2},
                    "targets": {"cloud": {"loss": "chamfer"}},
                }
            },
            seed=4,
        )
    ).double()
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 + is_norm)
    return model


def prepare(model: M3Model, count: int = 2) -> Prepared:
    clouds = torch.randn(count, 40, 3, generator=torch.Generator().manual_seed(3))
    prepared = model.prepare(Batch({"cloud": clouds}, keys=torch.arange(count) + 9))
    part = prepared.tokens["cloud"]
    exact = replace(part, values=part.values.double(), positions=part.positions.double())
    return replace(prepared, tokens={"cloud": exact})


class Slow:
    def __init__(self, model: M3Model) -> None:
        self.p = dict(model.named_parameters())

    def linear(self, name: str, x: Tensor) -> Tensor:
        result = self.p[f"{name}.weight"] @ x
        return result + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else result

    def norm(self, name: str, x: Tensor, eps: float = EPS) -> Tensor:
        mean = x.sum() / len(x)
        variance = ((x - mean) ** 2).sum() / len(x)
        return (x - mean) / (variance + eps).sqrt() * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def group(self, points: Tensor) -> Tensor:
        """The small PointNet: points by themselves, the group's maximum beside each, again, and the maximum."""
        name, features = "tokenizers.cloud", []
        for point in points:
            hidden = self.norm(f"{name}.point.1", self.linear(f"{name}.point.0", point)).clamp(min=0)
            features.append(self.linear(f"{name}.point.3", hidden))
        most = torch.stack(features).max(0).values
        joined = []
        weight = torch.cat([self.p[f"{name}.shared.weight"], self.p[f"{name}.own.weight"]], 1)
        for own in features:
            hidden = weight @ torch.cat([most, own]) + self.p[f"{name}.own.bias"]
            joined.append(self.linear(f"{name}.projection", self.norm(f"{name}.norm", hidden).clamp(min=0)))
        return torch.stack(joined).max(0).values

    def place(self, name: str, centre: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.layers.0", centre)
        return self.linear(f"{name}.layers.2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    def attention(self, name: str, sequence: list[Tensor], heads: int) -> list[Tensor]:
        width = len(sequence[0])
        each, result = width // heads, []
        projected = [self.linear(f"{name}.qkv", x) for x in sequence]
        for own in projected:
            joined = []
            for head in range(heads):
                part = slice(head * each, (head + 1) * each)
                scores = [own[:width][part] @ x[width : 2 * width][part] / math.sqrt(each) for x in projected]
                weights = torch.stack(scores).exp()
                joined.append((weights / weights.sum()) @ torch.stack([x[2 * width :][part] for x in projected]))
            result.append(self.linear(f"{name}.projection", torch.cat(joined)))
        return result

    def blocks(self, name: str, sequence: list[Tensor], places: list[Tensor], factors: list, heads: int = 2):
        """The positions are added in front of every block; a branch counts as often as its factor says."""
        for number, (first, second) in enumerate(factors):
            own = f"{name}.blocks.{number}"
            sequence = [x + place for x, place in zip(sequence, places, strict=True)]
            attended = self.attention(f"{own}.attention", [self.norm(f"{own}.norm1", x) for x in sequence], heads)
            sequence = [x + first * a for x, a in zip(sequence, attended, strict=True)]
            changed = []
            for x in sequence:
                hidden = self.linear(f"{own}.mlp.fc1", self.norm(f"{own}.norm2", x))
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
                changed.append(x + second * self.linear(f"{own}.mlp.fc2", hidden))
            sequence = changed
        return sequence

    def loss(self, prepared: Prepared, factors: list | None = None) -> Tensor:
        part, losses = prepared.tokens["cloud"], []
        (plan,) = prepared.plans.values()
        decoder = "objectives.reconstruct.decoders.cloud"
        for row in range(len(part.values)):
            own = factors[row] if factors else ([(1, 1)] * DEPTH, [(1, 1)] * DECODER_DEPTH)
            groups = part.values[row].view(GROUPS, NEIGHBOURS, 3)
            seen = plan.visible["cloud"][row].tolist()
            places = [self.place("positions.cloud", part.positions[row, i]) for i in seen]
            states = self.blocks("backbone", [self.group(groups[i]) for i in seen], places, own[0])
            states = [self.linear(f"{decoder}.embed", self.norm("backbone.norm", x)) for x in states]
            hidden = [i for i in range(GROUPS) if i not in seen]
            sequence = states + [self.p[f"{decoder}.mask_token"][0]] * len(hidden)
            places = [self.place(f"{decoder}.positions", part.positions[row, i]) for i in seen + hidden]
            sequence = self.blocks(decoder, sequence, places, own[1])
            for number, state in zip(hidden, sequence[len(seen) :], strict=True):
                output = self.linear(f"{decoder}.output", self.norm(f"{decoder}.norm", state))
                losses.append(chamfer(output.view(NEIGHBOURS, 3), groups[number]))
        return torch.stack(losses).sum() / len(losses)


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    there = sum(min(((p - q) ** 2).sum() for q in b) for p in a) / len(a)
    back = sum(min(((p - q) ** 2).sum() for q in a) for p in b) / len(b)
    return there + back


def check(model: M3Model, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = [torch.autograd.grad(loss, parameters) for loss in (found, expected)]
    for name, own, wanted in zip(names, *grads, strict=True):
        assert wanted.abs().max() > 1e-7, f"{name} gets no gradient"
        error = (own - wanted).abs().max() / wanted.abs().max()
        assert error < 5e-6, f"{name}: {error}"


def test_loss_and_gradients_equal_pointmae_written_with_loops():
    model = build()
    prepared = prepare(model)
    (plan,) = prepared.plans.values()
    assert plan.visible["cloud"].shape == (2, SEEN)
    assert plan.is_target["cloud"].sum(1).tolist() == [GROUPS - SEEN] * 2
    check(model, model(prepared).loss, Slow(model).loss(prepared))


def test_the_released_mask_hides_38_of_64():
    assert int(0.6 * 64) == 64 - 26


def test_with_dropped_paths_it_is_the_same_with_factors():
    model = build(drop_path=0.4).train()
    prepared = prepare(model, count=4)
    keys = Draws(torch.arange(4) + 9, 4).numbers("network")
    encoder = torch.stack(path_factors(keys, 0.4, DEPTH, "backbone/paths"), 1)
    decoder = torch.stack(path_factors(keys, 0.4, DECODER_DEPTH, "decoder/cloud/paths"), 1)
    assert {0.0} < set(encoder.flatten().tolist()) | set(decoder.flatten().tolist())
    factors = list(zip(encoder.tolist(), decoder.tolist(), strict=True))
    check(model, model(prepared).loss, Slow(model).loss(prepared, factors))


# -- dropped paths ---------------------------------------------------------------------------------------


def test_paths_are_dropped_more_often_in_later_blocks_and_keep_their_mean():
    factors = torch.stack(path_factors(torch.arange(20000), 0.3, 4, "x"), 1)
    assert factors.shape == (20000, 4, 2)
    is_dropped = (factors == 0).float().mean(0)
    torch.testing.assert_close(
        is_dropped, torch.tensor([0.0, 0.1, 0.2, 0.3]).unsqueeze(1).expand(4, 2), atol=0.01, rtol=0
    )
    torch.testing.assert_close(factors.mean(0), torch.ones(4, 2), atol=0.02, rtol=0)
    assert factors[:, 3].unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert torch.corrcoef(factors[:, 3].T)[0, 1].abs() < 0.03


def test_nothing_is_dropped_without_keys_or_rate():
    assert path_factors(None, 0.5, 3, "x") == [None] * 3
    assert path_factors(torch.arange(2), 0.0, 3, "x") == [None] * 3


def test_paths_are_dropped_in_training_only_and_alike_in_every_cut_of_a_batch():
    model = build(drop_path=0.6)
    prepared = prepare(model, count=4)
    clean = build()
    assert model.eval()(prepared).loss.item() == pytest.approx(clean(prepared).loss.item(), rel=1e-6)
    whole = model.train()(prepared).loss.item()
    assert whole == model(prepared).loss.item()
    assert whole != pytest.approx(clean(prepared).loss.item(), rel=1e-3)
    part, ((view, plan),) = prepared.tokens["cloud"], prepared.plans.items()
    halves = []
    for rows in (slice(0, 1), slice(1, 4)):
        tokens = replace(part, values=part.values[rows], positions=part.positions[rows], is_valid=part.is_valid[rows])
        cut = {k: {"cloud": getattr(plan, k)["cloud"][rows]} for k in ("visible", "target", "is_target")}
        cut |= {"order": plan.order[rows], "is_valid": plan.is_valid[rows]}
        draws = Draws(torch.arange(4)[rows] + 9, 4)
        halves.append(model(Prepared({"cloud": tokens}, {view: replace(plan, **cut)}, draws)).loss.item())
    assert (halves[0] + 3 * halves[1]) / 4 == pytest.approx(whole, rel=1e-6)
