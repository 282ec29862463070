"""AudioMAE written a second time from its description: patch by patch, windows as lists of neighbours."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from m3 import M3Config, M3Model
from m3.network import Prepared
from m3.types import Batch

STEPS, BANDS, PATCH = 6, 3, 4
WIDTH, HEADS, DEPTH = 12, 2, 2
DECODER_WIDTH, DECODER_HEADS, DECODER_DEPTH, WINDOW, SHIFT = 8, 2, 3, (4, 2), (2, 0)
MEAN, STD = -3.0, 2.5
LENGTHS = (STEPS, 4)
"""Steps of the two recordings; the second is shorter."""


def build() -> M3Model:
    decoder = {"type": "window_decoder", "width": DECODER_WIDTH, "depth": DECODER_DEPTH, "heads": DECODER_HEADS}
    model = M3Model(
        M3Config(
            modalities={
                "sound": {
                    "type": "audio",
                    "frames": STEPS * PATCH,
                    "bands": BANDS * PATCH,
                    "mean": MEAN,
                    "std": STD,
                    "tokenizer": {"type": "spectrogram", "size": PATCH},
                }
            },
            backbone={"width": WIDTH, "depth": DEPTH, "heads": HEADS},
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "masking": {"type": "fixed", "visible": 0.4},
                    "decoder": {**decoder, "window": WINDOW, "shift": SHIFT},
                    "targets": {"sound": {"target": {"type": "values", "normalise": True}}},
                }
            },
        )
    ).double()
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            is_norm = "norm" in name and name.endswith("weight")
            small = 0.3 if name.endswith("temperature") else 1.0
            parameter.copy_(small * noise * parameter.shape[-1] ** -0.5 + is_norm)
    return model


def sounds() -> Tensor:
    x = torch.randn(2, STEPS * PATCH, 1, BANDS * PATCH, generator=torch.Generator().manual_seed(5)) * 4 - 2
    x[1, LENGTHS[1] * PATCH :] = torch.nan
    return x


class Slow:
    def __init__(self, model: M3Model) -> None:
        self.p = dict(model.named_parameters())

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.p[f"{name}.weight"] @ x + self.p[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean = x.sum() / len(x)
        variance = ((x - mean) ** 2).sum() / len(x)
        return (x - mean) / (variance + 1e-6).sqrt() * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.fc1", x)
        return self.linear(f"{name}.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    def mix(self, name: str, own: Tensor, others: list[Tensor], heads: int, score) -> Tensor:
        """What a token takes from others, all given as [query | key | value]."""
        width = len(own) // 3
        each, joined = width // heads, []
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            scores = [score(own[:width][part], x[width : 2 * width][part], head, j) for j, x in enumerate(others)]
            weights = torch.stack(scores).exp()
            joined.append((weights / weights.sum()) @ torch.stack([x[2 * width :][part] for x in others]))
        return self.linear(f"{name}.projection", torch.cat(joined))

    def encoder_block(self, name: str, sequence: list[Tensor]) -> list[Tensor]:
        def score(query: Tensor, key: Tensor, head: int, j: int) -> Tensor:
            return query @ key / math.sqrt(len(query))

        parts = [self.linear(f"{name}.attention.qkv", self.norm(f"{name}.norm1", x)) for x in sequence]
        taken = [self.mix(f"{name}.attention", own, parts, HEADS, score) for own in parts]
        sequence = [x + a for x, a in zip(sequence, taken, strict=True)]
        return [x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x)) for x in sequence]

    def decoder_block(self, name: str, sequence: dict, shift: tuple[int, int]) -> dict:
        """Sequence: (step, band) -> state. Norms come after the branches; windows begin at `shift` and multiples."""
        parts = {at: self.linear(f"{name}.attention.qkv", x) for at, x in sequence.items()}
        result = {}
        for at, x in sequence.items():
            near = [other for other in sequence if self.window(other, shift) == self.window(at, shift)]

            def score(query: Tensor, key: Tensor, head: int, j: int, at=at, near=near) -> Tensor:
                cosine = query @ key / (query @ query).sqrt() / (key @ key).sqrt()
                apart = [a - b for a, b in zip(at, near[j], strict=True)]
                apart = [math.copysign(math.log(1 + abs(d)), d) for d in apart]
                hidden = self.linear(f"{name}.attention.bias.0", torch.tensor(apart, dtype=torch.float64)).clamp(min=0)
                bias = self.p[f"{name}.attention.bias.2.weight"][head] @ hidden
                return cosine / (1 + self.p[f"{name}.attention.temperature"][head]) + bias

            taken = self.mix(f"{name}.attention", parts[at], [parts[other] for other in near], DECODER_HEADS, score)
            x = x + self.norm(f"{name}.norm1", taken)
            result[at] = x + self.norm(f"{name}.norm2", self.mlp(f"{name}.mlp", x))
        return result

    def window(self, at: tuple[int, int], shift: tuple[int, int]) -> tuple[int, int]:
        return (at[0] - shift[0]) // WINDOW[0], (at[1] - shift[1]) // WINDOW[1]

    def position(self, at: tuple[int, int], width: int) -> Tensor:
        """MAE's: the band in the first half of the channels, the step in the second."""
        frequencies = [10000 ** (-i / (width // 4)) for i in range(width // 4)]
        band, step = [at[1] * f for f in frequencies], [at[0] * f for f in frequencies]
        channels = [*map(math.sin, band), *map(math.cos, band), *map(math.sin, step), *map(math.cos, step)]
        return torch.tensor(channels, dtype=torch.float64)

    def patch(self, sound: Tensor, at: tuple[int, int]) -> Tensor:
        rows = range(at[0] * PATCH, (at[0] + 1) * PATCH)
        columns = range(at[1] * PATCH, (at[1] + 1) * PATCH)
        values = [(sound[row, 0, column].item() - MEAN) / (2 * STD) for row in rows for column in columns]
        return torch.tensor(values, dtype=torch.float64)

    def predict(self, sound: Tensor, length: int, visible: list[tuple[int, int]]) -> dict:
        sequence = [self.p["backbone.prefix"][0]]
        for at in visible:
            x = self.linear("tokenizers.sound.projection", self.patch(sound, at))
            sequence.append(x + self.position(at, WIDTH))
        for depth in range(DEPTH):
            sequence = self.encoder_block(f"backbone.blocks.{depth}", sequence)
        decoder = "objectives.reconstruct.decoders.sound"
        states = [self.linear(f"{decoder}.embed", self.norm("backbone.norm", x)) for x in sequence]
        full = {}
        for at in ((step, band) for step in range(length) for band in range(BANDS)):
            x = states[1 + visible.index(at)] if at in visible else self.p[f"{decoder}.mask_token"][0]
            full[at] = x + self.position(at, DECODER_WIDTH)
        for depth in range(DECODER_DEPTH):
            full = self.decoder_block(f"{decoder}.blocks.{depth}", full, SHIFT if depth % 2 else (0, 0))
        return {at: self.linear(f"{decoder}.output", self.norm(f"{decoder}.norm", x)) for at, x in full.items()}

    def loss(self, batch: Tensor, visible: list[list[tuple[int, int]]]) -> Tensor:
        losses = []
        for sound, length, seen in zip(batch, LENGTHS, visible, strict=True):
            for at, output in self.predict(sound, length, seen).items():
                if at not in seen:
                    values = self.patch(sound, at)
                    mean = values.sum() / len(values)
                    variance = ((values - mean) ** 2).sum() / (len(values) - 1)
                    losses.append((((values - mean) / (variance + 1e-6).sqrt() - output) ** 2).sum() / len(values))
        return torch.stack(losses).sum() / len(losses)


def test_loss_and_gradients_equal_audiomae_written_with_loops():
    model, batch = build(), sounds()
    prepared = model.prepare(Batch({"sound": batch}, keys=torch.arange(2) + 40))
    part = prepared.tokens["sound"]
    assert part.counts == (STEPS, BANDS)
    exact = Prepared({"sound": replace(part, values=part.values.double())}, prepared.plans)
    (plan,) = prepared.plans.values()
    index, is_seen = plan.packed_index(), plan.is_valid
    visible = [[divmod(i, BANDS) for i in row[flags].tolist()] for row, flags in zip(index, is_seen, strict=True)]
    assert [len(row) for row in visible] == [7, 4]  # floor(0.4 * 18) and floor(0.4 * 12)
    assert all(step < LENGTHS[1] for step, _ in visible[1])
    found, expected = model(exact).loss, Slow(model).loss(batch, visible)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = [torch.autograd.grad(loss, parameters) for loss in (found, expected)]
    for name, own, wanted in zip(names, *grads, strict=True):
        assert wanted.abs().max() > 1e-6, f"{name} gets no gradient"
        error = (own - wanted).abs().max() / wanted.abs().max()
        assert error < 3e-6, f"{name}: {error}"


def test_the_released_mask_sees_102_of_512():
    assert int(512 * (1 - 0.8)) == 102
