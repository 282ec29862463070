"""MAE-ST and OmniMAE written a second time from their papers: the same losses and gradients.

Feichtenhofer et al. 2022; Girdhar et al. 2022. Letters: N tubes, V seen ones, D width, R class tokens.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m3.model import M3Model
from m3.types import Batch
from tests.parity.slow_vit import MEAN, STD, Slow, check, in_double, recipe_model

T, H, W, FRAMES, PATCH = 3, 2, 3, 2, 4
PLACES, COUNT = H * W, T * H * W
WIDTH, HEADS, DEPTH = 24, 3, 2
DECODER = {"width": 12, "heads": 2, "depth": 2}
SIZE = f"[{H * PATCH},{W * PATCH}]"
VIDEO = [f"modalities.video.{name}" for name in (f"size={SIZE}", f"frames={T * FRAMES}", f"tokenizer.size={PATCH}")]
BACKBONE = [f"backbone.{name}={value}" for name, value in (("width", WIDTH), ("heads", HEADS), ("depth", DEPTH))]


def build(name: str, objective: str, *others: str) -> M3Model:
    """A published recipe at a small size, float64, with random weights."""
    decoder = [f"objectives.{objective}.decoder.{key}={value}" for key, value in DECODER.items()]
    return recipe_model(name, [*VIDEO, *BACKBONE, *decoder, *others])


def noise(*shape: int, seed: int) -> Tensor:
    """Noise (B, 3, ...) whose contrast differs from row to row, so that it shows what is divided by."""
    generator = torch.Generator().manual_seed(seed)
    contrast = 0.1 + 0.9 * torch.rand(shape[0], 1, *shape[2:-1], 1, generator=generator) ** 3
    return (torch.rand(shape, generator=generator) * contrast * 255).to(torch.uint8)


CLIPS = noise(2, 3, T * FRAMES, H * PATCH, W * PATCH, seed=11)
STILLS = noise(2, 3, H * PATCH, W * PATCH, seed=12)


# -- written a second time, sample by sample ----------------------------------------------------------------------


class SlowVideo(Slow):
    """An encoder of seen tubes and a decoder of all, from a model without class tokens or with their positions."""

    def __init__(self, model: M3Model) -> None:
        super().__init__(dict(model.named_parameters()))
        prefix = self.p.get("backbone.prefix", torch.zeros(0, WIDTH, dtype=torch.float64))
        self.p["backbone.prefix"] = prefix + self.p.get("backbone.prefix_positions", 0)

    def decode(self, name: str, first: Tensor, states: Tensor, seen: list[int], places: Tensor) -> Tensor:
        """Predict all N tubes from what stands in front (R, D) and the states of the seen ones (V, D)."""
        by_number = dict(zip(seen, self.linear(f"{name}.embed", states), strict=True))
        rows = [by_number.get(n, self.p[f"{name}.mask_token"][0]) + place for n, place in enumerate(places)]
        x = torch.cat([first, torch.stack(rows)])
        for number in range(DECODER["depth"]):
            x = self.block(f"{name}.blocks.{number}", x, DECODER["heads"])
        return self.linear(f"{name}.output", self.norm(f"{name}.norm", x[len(first) :]))


def tube(clip: Tensor, number: int) -> Tensor:
    """(3, frames, rows, columns) of a uint8 clip (3, T', H', W'), in [0, 1]."""
    t, y, x = number // PLACES * FRAMES, number // W % H * PATCH, number % W * PATCH
    return clip[:, t : t + FRAMES, y : y + PATCH, x : x + PATCH].double() / 255


def standard(values: Tensor, eps: float) -> Tensor:
    """Values less their mean, over the root of their unbiased variance."""
    mean = values.sum() / values.numel()
    variance = ((values - mean) ** 2).sum() / (values.numel() - 1)
    return (values - mean) / (variance + eps).sqrt()


# -- MAE-ST -------------------------------------------------------------------------------------------------------


def mae_st(model: M3Model, clip: Tensor, seen: list[int]) -> list[Tensor]:
    """Squared errors of the first frame of each hidden tube."""
    slow, decoder = SlowVideo(model), "objectives.reconstruct.decoders.video"

    def places(name: str) -> Tensor:
        times, spaces = slow.p[f"{name}.first"], slow.p[f"{name}.others"]
        return torch.stack([times[:, n // PLACES] + spaces[:, n // W % H, n % W] for n in range(COUNT)])

    tubes = [(tube(clip, n) - 0.45) / 0.225 for n in range(COUNT)]
    x = slow.linear("tokenizers.video.projection", torch.stack([tubes[n].flatten() for n in seen]))
    _, states = slow.encode(x + places("positions.video")[seen], HEADS, DEPTH)
    first = slow.p[f"{decoder}.class_tokens"] + slow.p[f"{decoder}.class_positions"]
    guesses = slow.decode(decoder, first, states[1:], seen, places(f"{decoder}.positions"))
    hidden = [n for n in range(COUNT) if n not in seen]
    return [((guesses[n] - standard(tubes[n][:, 0].flatten(), 1e-6)) ** 2).mean() for n in hidden]


def test_loss_and_gradients_equal_mae_st_written_from_the_paper() -> None:
    model = build("mae_st_vit_l", "reconstruct", "objectives.reconstruct.masking.visible=5")
    prepared = model.prepare(Batch({"video": CLIPS}, torch.arange(2) + 40))
    (plan,) = prepared.plans.values()
    visible = plan.visible["video"].tolist()
    assert [len(set(row)) for row in visible] == [5, 5]
    times = [{n // PLACES for n in row if n % PLACES == place} for row in visible for place in range(PLACES)]
    assert any(0 < len(own) < T for own in times), "hidden over time too"
    found = model(replace(prepared, tokens=in_double(prepared.tokens))).loss
    losses = [loss for clip, seen in zip(CLIPS, visible, strict=True) for loss in mae_st(model, clip, seen)]
    assert len(losses) == 2 * (COUNT - 5)
    check(model, found, torch.stack(losses).mean(), near=1e-5)


# -- OmniMAE ------------------------------------------------------------------------------------------------------


def numbered(count: int, width: int) -> Tensor:
    """Sines and cosines in turn of the numbers of tubes."""
    angles = [[n / 10000 ** (2 * (j // 2) / width) for j in range(width)] for n in range(count)]
    rows = [[math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(row)] for row in angles]
    return torch.tensor(rows, dtype=torch.float64)


def omnimae(model: M3Model, clip: Tensor, seen: list[int]) -> list[Tensor]:
    """Squared errors of each hidden tube, whose channels are normalised by themselves."""
    slow, decoder = SlowVideo(model), "objectives.clips.decoders.video"
    count = len(clip[0]) // FRAMES * PLACES
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1, 1) for v in (MEAN, STD))
    tubes = [tube(clip, n) for n in range(count)]
    x = slow.linear("tokenizers.video.projection", torch.stack([((tubes[n] - mean) / std).flatten() for n in seen]))
    _, states = slow.encode(x + numbered(count, WIDTH)[seen], HEADS, DEPTH)
    width = DECODER["width"]
    first = torch.zeros(0, width, dtype=torch.float64)
    guesses = slow.decode(decoder, first, states, seen, numbered(count, width))
    hidden = [n for n in range(count) if n not in seen]
    truth = {n: torch.cat([standard(channel.flatten(), 1e-6) for channel in tubes[n]]) for n in hidden}
    return [((guesses[n] - truth[n]) ** 2).mean() for n in hidden]


@pytest.mark.parametrize("active", [None, ("clips",), ("stills",)], ids=["both", "clips", "stills"])
def test_loss_and_gradients_equal_omnimae_written_from_the_paper(active: tuple[str, ...] | None) -> None:
    """One encoder and one decoder of both; an image is a tube of two equal frames."""
    seen = ["objectives.clips.masking.visible=4", "objectives.stills.masking.visible=2"]
    model = build("omnimae_vit_b", "clips", f"modalities.image.size={SIZE}", *seen)
    prepared = model.prepare(Batch({"video": CLIPS, "image": STILLS}, torch.arange(2) + 40), active=active)
    found = model(replace(prepared, tokens=in_double(prepared.tokens))).loss
    clips = {"clips": ("video", CLIPS), "stills": ("image", torch.stack([STILLS] * FRAMES, dim=2))}
    expected = torch.zeros((), dtype=torch.float64)
    for name in active or tuple(clips):
        modality, signal = clips[name]
        visible = prepared.plans[model.objectives[name].view].visible[modality].tolist()
        assert visible[0] != visible[1]
        losses = [loss for clip, seen in zip(signal, visible, strict=True) for loss in omnimae(model, clip, seen)]
        assert len(losses) == {"clips": 2 * (COUNT - 4), "stills": 2 * (PLACES - 2)}[name]
        expected = expected + torch.stack(losses).mean()
    check(model, found, expected, near=1e-5)
