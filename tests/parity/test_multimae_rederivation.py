"""MultiMAE written a second time, token by token from the paper's description: the same losses and gradients."""

import math

import pytest
import torch

from m3 import masking
from m3.config import M3Config
from m3.modalities.depth import truncated_standardise
from m3.model import M3Model
from m3.network import Prepared
from m3.types import Batch, Tokens

ROWS, COLUMNS = 2, 3
TOKENS = ROWS * COLUMNS
PATCHES = {"image": 4, "depth": 4, "semantic": 2}
CLASSES, CLASS_WIDTH, UNLABELLED = 5, 6, 255
WIDTH, HEADS, DEPTH = 16, 2, 2
DECODER_WIDTH, DECODER_HEADS, DECODER_DEPTH = 8, 2, 1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_model(has_gaps: bool) -> M3Model:
    """A small MultiMAE in float64; every parameter random, so that no bias or scale can be forgotten."""

    def size(name: str) -> tuple[int, int]:
        return ROWS * PATCHES[name], COLUMNS * PATCHES[name]

    semantic = {"type": "semantic_map", "size": size("semantic"), "classes": CLASSES}
    depth = {"type": "depth", "size": size("depth")}
    if has_gaps:
        semantic["ignore"], depth["missing"] = UNLABELLED, 0
    model = M3Model(
        M3Config(
            modalities={
                "image": {"type": "image", "size": size("image"), "tokenizer": {"type": "patch", "size": 4}},
                "depth": {**depth, "tokenizer": {"type": "patch", "size": 4}},
                "semantic": {**semantic, "tokenizer": {"type": "class_patch", "size": 2, "class_width": CLASS_WIDTH}},
            },
            backbone={"width": WIDTH, "depth": DEPTH, "heads": HEADS, "final_norm": False, "axis_order": "yx"},
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "masking": {"type": "dirichlet", "visible": 6, "alpha": 1.0},
                    "decoder": {
                        "type": "cross_decoder",
                        "width": DECODER_WIDTH,
                        "depth": DECODER_DEPTH,
                        "heads": DECODER_HEADS,
                    },
                    "average": "sample",
                    "targets": {
                        "image": {"loss": "mse"},
                        "depth": {"loss": "l1"},
                        "semantic": {"loss": "cross_entropy"},
                    },
                }
            },
        )
    ).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale + is_norm)
    return model


def make_batch(has_gaps: bool, is_present: dict[str, torch.Tensor] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(13)
    image = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8, generator=generator)
    depth = 1 + 9 * torch.rand(3, 8, 12, generator=generator)
    semantic = torch.randint(0, CLASSES, (3, 4, 6), dtype=torch.uint8, generator=generator)
    if has_gaps:
        depth[torch.rand(depth.shape, generator=generator) < 0.3] = torch.nan
        depth[0, :4, :4] = torch.nan  # a whole patch
        semantic[torch.rand(semantic.shape, generator=generator) < 0.3] = UNLABELLED
        semantic[1, 2:, 4:] = UNLABELLED
    return Batch({"image": image, "depth": depth, "semantic": semantic}, torch.arange(3) + 70, is_present or {})


def in_double(tokens: dict[str, Tokens]) -> dict[str, Tokens]:
    return {
        name: Tokens(p.values.double() if p.values.is_floating_point() else p.values, p.positions, p.is_valid)
        for name, p in tokens.items()
    }


def slow_truncated_standardise(values: torch.Tensor) -> torch.Tensor:
    """One map, any shape: by mean and unbiased variance of its known values without the lowest and highest tenth."""
    known = sorted(x for x in values.double().flatten().tolist() if not math.isnan(x))
    middle = known[len(known) // 10 : len(known) * 9 // 10]
    mean = sum(middle) / len(middle)
    variance = sum((x - mean) ** 2 for x in middle) / (len(middle) - 1)
    return (values.double() - mean) / math.sqrt(variance + 1e-6)


# -- MultiMAE again: a sequence is a list of vectors ----------------------------------------------------------


class Slow:
    def __init__(self, model: M3Model, batch: Batch) -> None:
        self.p = dict(model.named_parameters())
        self.image, self.semantic = batch.signals["image"], batch.signals["semantic"]
        self.depth = [slow_truncated_standardise(x) for x in batch.signals["depth"]]

    # parts of a transformer

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.p[f"{name}.weight"] @ x + self.p[f"{name}.bias"]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean = x.sum() / len(x)
        variance = ((x - mean) ** 2).sum() / len(x)
        return (x - mean) / (variance + 1e-6).sqrt() * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(f"{name}.fc1", x)
        return self.linear(f"{name}.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    def attend(self, name: str, queries: list, keys: list, values: list, heads: int) -> list[torch.Tensor]:
        each, all_keys, all_values = len(queries[0]) // heads, torch.stack(keys), torch.stack(values)
        result = []
        for query in queries:
            joined = []
            for head in range(heads):
                part = slice(head * each, (head + 1) * each)
                weights = torch.exp(all_keys[:, part] @ query[part] / math.sqrt(each))
                joined.append(weights @ all_values[:, part] / weights.sum())
            result.append(self.linear(f"{name}.projection", torch.cat(joined)))
        return result

    def block(self, name: str, sequence: list[torch.Tensor], heads: int) -> list[torch.Tensor]:
        projected = [self.linear(f"{name}.attention.qkv", self.norm(f"{name}.norm1", x)).chunk(3) for x in sequence]
        attended = self.attend(f"{name}.attention", *map(list, zip(*projected, strict=True)), heads)
        sequence = [x + a for x, a in zip(sequence, attended, strict=True)]
        return [x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x)) for x in sequence]

    def position(self, number: int, width: int) -> torch.Tensor:
        """The row in the first half of the channels, the column in the second."""
        row, column = divmod(number, COLUMNS)
        frequencies = [10000 ** (-i / (width // 4)) for i in range(width // 4)]
        y, x = [row * f for f in frequencies], [column * f for f in frequencies]
        channels = [*map(math.sin, y), *map(math.cos, y), *map(math.sin, x), *map(math.cos, x)]
        return torch.tensor(channels, dtype=torch.float64)

    # signals

    def values(self, sample: int, name: str, number: int) -> list[float]:
        """What one token holds: pixels (channel, row, column), depths, or class ids (-1 unknown)."""
        row, column = divmod(number, COLUMNS)
        size, values = PATCHES[name], []
        for channel in range(3 if name == "image" else 1):
            for i in range(row * size, (row + 1) * size):
                for j in range(column * size, (column + 1) * size):
                    if name == "image":
                        pixel = int(self.image[sample, channel, i, j])
                        values.append((pixel / 255 - MEAN[channel]) / STD[channel])
                    elif name == "depth":
                        values.append(float(self.depth[sample][i, j]))
                    else:
                        value = int(self.semantic[sample, i, j])
                        values.append(-1 if value == UNLABELLED else value)
        return values

    def embed(self, sample: int, name: str, number: int) -> torch.Tensor:
        values = self.values(sample, name, number)
        if name == "semantic":
            table = self.p["tokenizers.semantic.class_embedding.weight"]
            x = torch.cat([table[CLASSES if value < 0 else int(value)] for value in values])
        else:
            x = torch.tensor([0.0 if math.isnan(v) else v for v in values], dtype=torch.float64)
        return self.linear(f"tokenizers.{name}.projection", x) + self.position(number, WIDTH)

    # the model

    def encode(self, sample: int, visible: list[tuple[str, int]]) -> list[torch.Tensor]:
        """The global token first, then the visible tokens in the given order; no final norm."""
        sequence = [self.p["backbone.prefix"][0], *(self.embed(sample, *token) for token in visible)]
        for depth in range(DEPTH):
            sequence = self.block(f"backbone.blocks.{depth}", sequence, HEADS)
        return sequence

    def decode(self, name: str, encoded: list[torch.Tensor], visible: list[tuple[str, int]]) -> list[torch.Tensor]:
        """All tokens of one modality."""
        d = f"objectives.reconstruct.decoders.{name}"
        states = [self.linear(f"{d}.context", x) for x in encoded]

        def mark(modality: str, number: int) -> torch.Tensor:
            return self.position(number, DECODER_WIDTH) + self.p[f"{d}.modality_embeddings.{modality}"][0]

        context = [states[0]] + [x + mark(*token) for x, token in zip(states[1:], visible, strict=True)]
        queries = []
        for number in range(TOKENS):
            is_seen = (name, number) in visible
            x = states[1 + visible.index((name, number))] if is_seen else self.p[f"{d}.mask_token"][0]
            queries.append(x + mark(name, number))
        q = [self.linear(f"{d}.attention.q", self.norm(f"{d}.query_norm", x)) for x in queries]
        kv = [self.linear(f"{d}.attention.kv", self.norm(f"{d}.context_norm", x)).chunk(2) for x in context]
        keys, values = [k for k, _ in kv], [v for _, v in kv]
        sequence = self.attend(f"{d}.attention", q, keys, values, DECODER_HEADS)  # no residual
        sequence = [x + self.mlp(f"{d}.mlp", self.norm(f"{d}.norm", x)) for x in sequence]
        for depth in range(DECODER_DEPTH):
            sequence = self.block(f"{d}.blocks.{depth}", sequence, DECODER_HEADS)
        return [self.linear(f"{d}.output", x) for x in sequence]

    def token_losses(self, name: str, predicted: torch.Tensor, values: list[float]) -> list[torch.Tensor]:
        """Losses of the known values of one token."""
        losses = []
        for place, value in enumerate(values):
            if math.isnan(value) or (name == "semantic" and value < 0):
                continue
            if name == "image":
                losses.append((predicted[place] - value) ** 2)
            elif name == "depth":
                losses.append((predicted[place] - value).abs())
            else:
                scores = predicted[place * CLASSES : (place + 1) * CLASSES]
                losses.append(torch.exp(scores).sum().log() - scores[int(value)])
        return losses

    def loss(self, visible: list[list[tuple[str, int]]], hidden: list[list[tuple[str, int]]]):
        """Per modality: the mean within each sample, then over the samples that have any hidden known value."""
        encoded = [self.encode(sample, seen) for sample, seen in enumerate(visible)]
        means, counts = {}, {}
        for name in PATCHES:
            samples = []
            for sample, seen in enumerate(visible):
                wanted = [number for modality, number in hidden[sample] if modality == name]
                if not wanted:
                    continue
                predictions = self.decode(name, encoded[sample], seen)
                losses = []
                for number in wanted:
                    losses += self.token_losses(name, predictions[number], self.values(sample, name, number))
                if losses:
                    samples.append(sum(losses) / len(losses))
            means[name], counts[name] = sum(samples) / len(samples), len(samples)
        return means, counts


def check(model: M3Model, batch: Batch, prepared: Prepared, visible: list[list[tuple[str, int]]]) -> dict[str, int]:
    """Compare parts, total and gradients; all valid tokens that are not visible are hidden. Return the counts."""
    everything = [(name, number) for name in PATCHES for number in range(TOKENS)]
    hidden = [
        [t for t in everything if t not in seen and (t[0] not in batch.is_present or batch.is_present[t[0]][sample])]
        for sample, seen in enumerate(visible)
    ]
    output = model(Prepared(in_double(prepared.tokens), prepared.plans))
    means, counts = Slow(model, batch).loss(visible, hidden)
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


def read(plan) -> list[list[tuple[str, int]]]:
    """Per sample the visible tokens of a plan without filling."""
    names, index, modality = list(plan.visible), plan.packed_index().tolist(), plan.packed_modality().tolist()
    return [[(names[m], i) for m, i in zip(*rows, strict=True)] for rows in zip(modality, index, strict=True)]


def masks(visible: list[list[tuple[str, int]]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor([[(name, number) in seen for number in range(TOKENS)] for seen in visible])
        for name in PATCHES
    }


def explicit(model: M3Model, batch: Batch, visible: list[list[tuple[str, int]]]) -> Prepared:
    tokens = model.tokenise(batch)
    return Prepared(tokens, dict.fromkeys(model.views, masking.explicit(tokens, masks(visible))))


@pytest.mark.parametrize("has_gaps", [False, True], ids=["complete", "with gaps"])
def test_dirichlet_masks_give_the_loss_and_gradients_of_multimae(has_gaps):
    model, batch = build_model(has_gaps), make_batch(has_gaps)
    prepared = model.prepare(batch)
    (plan,) = prepared.plans.values()
    visible = read(plan)
    assert [len(set(seen)) for seen in visible] == [6, 6, 6]
    assert len({tuple(sum(n == name for n, _ in seen) for name in PATCHES) for seen in visible}) > 1
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
    model, batch = build_model(has_gaps), make_batch(has_gaps)
    counts = check(model, batch, explicit(model, batch, UNEVEN), UNEVEN)
    assert counts == {"image": 3, "depth": 2, "semantic": 2}


def test_a_sample_whose_hidden_values_are_all_unknown_does_not_count():
    model, batch = build_model(has_gaps=True), make_batch(has_gaps=True)
    seen = [("image", 2), *(("depth", i) for i in range(1, TOKENS)), ("semantic", 1)]  # hidden depth: patch 0, a hole
    visible = [seen, *UNEVEN[1:]]
    counts = check(model, batch, explicit(model, batch, visible), visible)
    assert counts == {"image": 3, "depth": 2, "semantic": 2}


def test_a_missing_modality_is_neither_seen_nor_asked_for():
    is_present = {"depth": torch.tensor([True, False, True]), "semantic": torch.tensor([False, True, True])}
    model, batch = build_model(has_gaps=False), make_batch(False, is_present)
    visible = [
        [("image", 1), ("image", 4), ("depth", 2), ("depth", 3)],
        [("image", 5), ("semantic", 0), ("semantic", 3)],
        [("image", 0), ("depth", 4), ("semantic", 5)],
    ]
    counts = check(model, batch, explicit(model, batch, visible), visible)
    assert counts == {"image": 3, "depth": 2, "semantic": 2}


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
        expected = slow_truncated_standardise(map_).float()
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
        expected = slow_truncated_standardise(map_).float()
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
