"""MAE written a second time, token by token from the paper's description, and transformers' ViTMAE: the same losses."""

import math

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from m3 import masking
from m3.config import M3Config
from m3.model import M3Model
from m3.network import Prepared
from m3.types import Batch, Tokens

ROWS, COLUMNS, PATCH = 3, 4, 4
WIDTH, HEADS, DEPTH = 24, 3, 2
DECODER_WIDTH, DECODER_HEADS, DECODER_DEPTH = 16, 4, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_model(normalise: bool) -> M3Model:
    """A small MAE in float64; every parameter random, so that no bias or scale can be forgotten."""
    model = M3Model(
        M3Config(
            modalities={
                "image": {
                    "type": "image",
                    "size": (ROWS * PATCH, COLUMNS * PATCH),
                    "tokenizer": {"type": "patch", "size": PATCH},
                }
            },
            backbone={"width": WIDTH, "depth": DEPTH, "heads": HEADS},
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "masking": {"type": "fixed", "visible": 0.25},
                    "decoder": {
                        "type": "self_decoder",
                        "width": DECODER_WIDTH,
                        "depth": DECODER_DEPTH,
                        "heads": DECODER_HEADS,
                    },
                    "targets": {"image": {"target": {"type": "values", "normalise": normalise}}},
                }
            },
        )
    ).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale + is_norm)
    return model


def make_batch(count: int) -> Batch:
    shape = (count, 3, ROWS * PATCH, COLUMNS * PATCH)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(11))
    return Batch({"image": pixels}, keys=torch.arange(count) + 40)


def in_double(tokens: dict[str, Tokens]) -> dict[str, Tokens]:
    return {name: Tokens(part.values.double(), part.positions, part.is_valid) for name, part in tokens.items()}


# -- MAE again: a sequence is a list of vectors ---------------------------------------------------------------


class Slow:
    def __init__(self, model: M3Model) -> None:
        self.p = dict(model.named_parameters())

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.p[f"{name}.weight"] @ x + self.p[f"{name}.bias"]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean = x.sum() / len(x)
        variance = ((x - mean) ** 2).sum() / len(x)
        return (x - mean) / (variance + 1e-6).sqrt() * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(f"{name}.fc1", x)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return self.linear(f"{name}.fc2", hidden)

    def attention(self, name: str, sequence: list[torch.Tensor], heads: int) -> list[torch.Tensor]:
        width = len(sequence[0])
        each = width // heads
        projected = [self.linear(f"{name}.qkv", x) for x in sequence]
        result = []
        for i in range(len(sequence)):
            joined = []
            for head in range(heads):
                part = slice(head * each, (head + 1) * each)
                query = projected[i][:width][part]
                scores = [query @ other[width : 2 * width][part] / math.sqrt(each) for other in projected]
                weights = [torch.exp(score) for score in scores]
                values = [w * other[2 * width :][part] for w, other in zip(weights, projected, strict=True)]
                joined.append(sum(values) / sum(weights))
            result.append(self.linear(f"{name}.projection", torch.cat(joined)))
        return result

    def block(self, name: str, sequence: list[torch.Tensor], heads: int) -> list[torch.Tensor]:
        normed = [self.norm(f"{name}.norm1", x) for x in sequence]
        attended = self.attention(f"{name}.attention", normed, heads)
        sequence = [x + a for x, a in zip(sequence, attended, strict=True)]
        return [x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x)) for x in sequence]

    def position(self, number: int, width: int) -> torch.Tensor:
        """MAE's: the column in the first half of the channels, the row in the second."""
        row, column = divmod(number, COLUMNS)
        frequencies = [10000 ** (-i / (width // 4)) for i in range(width // 4)]
        x, y = [column * f for f in frequencies], [row * f for f in frequencies]
        channels = [*map(math.sin, x), *map(math.cos, x), *map(math.sin, y), *map(math.cos, y)]
        return torch.tensor(channels, dtype=torch.float64)

    def patch(self, pixels: torch.Tensor, number: int) -> torch.Tensor:
        """One patch of a uint8 image (3, H, W), normalised with ImageNet's statistics."""
        row, column = divmod(number, COLUMNS)
        values = []
        for channel in range(3):
            for i in range(PATCH):
                for j in range(PATCH):
                    pixel = int(pixels[channel, row * PATCH + i, column * PATCH + j])
                    values.append((pixel / 255 - MEAN[channel]) / STD[channel])
        return torch.tensor(values, dtype=torch.float64)

    def target(self, pixels: torch.Tensor, number: int, normalise: bool) -> torch.Tensor:
        values = self.patch(pixels, number)
        if not normalise:
            return values
        mean = values.sum() / len(values)
        variance = ((values - mean) ** 2).sum() / (len(values) - 1)
        return (values - mean) / (variance + 1e-6).sqrt()

    def predict(self, pixels: torch.Tensor, visible: list[int]) -> list[torch.Tensor]:
        """Encode the visible patches, decode all of them."""
        sequence = [self.p["backbone.prefix"][0]]
        for number in visible:
            x = self.linear("tokenizers.image.projection", self.patch(pixels, number))
            sequence.append(x + self.position(number, WIDTH))
        for depth in range(DEPTH):
            sequence = self.block(f"backbone.blocks.{depth}", sequence, HEADS)
        sequence = [self.norm("backbone.norm", x) for x in sequence]
        decoder = "objectives.reconstruct.decoders.image"
        embedded = [self.linear(f"{decoder}.embed", x) for x in sequence]
        full = [embedded[0]]
        for number in range(ROWS * COLUMNS):
            is_seen = number in visible
            x = embedded[1 + visible.index(number)] if is_seen else self.p[f"{decoder}.mask_token"][0]
            full.append(x + self.position(number, DECODER_WIDTH))
        for depth in range(DECODER_DEPTH):
            full = self.block(f"{decoder}.blocks.{depth}", full, DECODER_HEADS)
        return [self.linear(f"{decoder}.output", self.norm(f"{decoder}.norm", x)) for x in full[1:]]

    def loss(self, images: torch.Tensor, visible: list[list[int]], normalise: bool) -> torch.Tensor:
        """Mean over pixels of a patch, then over the hidden patches of the whole batch."""
        losses = []
        for pixels, seen in zip(images, visible, strict=True):
            predictions = self.predict(pixels, seen)
            for number in range(ROWS * COLUMNS):
                if number not in seen:
                    error = predictions[number] - self.target(pixels, number, normalise)
                    losses.append((error**2).sum() / len(error))
        return sum(losses) / len(losses)


def gradients(model: M3Model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def check(model: M3Model, prepared: Prepared, batch: Batch, visible: list[list[int]], normalise: bool) -> None:
    output = model(prepared)
    expected = Slow(model).loss(batch.signals["image"], visible, normalise)
    assert output.loss is not None
    torch.testing.assert_close(output.loss.double(), expected, rtol=2e-6, atol=0)
    found, wanted = gradients(model, output.loss), gradients(model, expected)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-6, f"{name} gets no gradient"
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 2e-6, f"{name}: {error}"


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_and_gradients_equal_mae_written_with_loops(normalise):
    model, batch = build_model(normalise), make_batch(2)
    prepared = model.prepare(batch)
    (plan,) = prepared.plans.values()
    visible = plan.visible["image"].tolist()
    assert [len(set(row)) for row in visible] == [3, 3]
    assert visible[0] != visible[1]
    check(model, Prepared(in_double(prepared.tokens), prepared.plans), batch, visible, normalise)


def test_uneven_masks_average_over_all_hidden_patches_of_the_batch():
    model, batch = build_model(normalise=True), make_batch(3)
    visible = [[0, 5, 7, 8, 11], [2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    is_visible = torch.tensor([[i in row for i in range(ROWS * COLUMNS)] for row in visible])
    tokens = in_double(model.tokenise(batch))
    plan = masking.explicit(tokens, {"image": is_visible})
    check(model, Prepared(tokens, dict.fromkeys(model.views, plan)), batch, visible, normalise=True)


def test_whole_prediction_equals_the_loops():
    """Also at visible places, which no loss asks for."""
    model, batch = build_model(normalise=False), make_batch(2)
    tokens = in_double(model.tokenise(batch))
    is_visible = {"image": torch.arange(2 * ROWS * COLUMNS).reshape(2, -1) % 5 == 1}
    encoded = model.encode_tokens(tokens, masking.explicit(tokens, is_visible))
    index = torch.arange(ROWS * COLUMNS).expand(2, -1)
    found = model.objectives["reconstruct"].predict("image", encoded, tokens, index)
    for sample in range(2):
        seen = is_visible["image"][sample].nonzero().flatten().tolist()
        expected = torch.stack(Slow(model).predict(batch.signals["image"][sample], seen))
        torch.testing.assert_close(found[sample], expected, rtol=1e-6, atol=1e-6)


# -- transformers ---------------------------------------------------------------------------------------------


def build_theirs(normalise: bool) -> ViTMAEForPreTraining:
    config = ViTMAEConfig(
        image_size=4 * PATCH,
        patch_size=PATCH,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        decoder_hidden_size=DECODER_WIDTH,
        decoder_num_hidden_layers=DECODER_DEPTH,
        decoder_num_attention_heads=DECODER_HEADS,
        decoder_intermediate_size=4 * DECODER_WIDTH,
        layer_norm_eps=1e-6,
        mask_ratio=0.75,
        norm_pix_loss=normalise,
    )
    return ViTMAEForPreTraining(config).double().eval()


def copy_block(state: dict[str, torch.Tensor], theirs: torch.nn.Module, name: str) -> None:
    own = theirs.state_dict()
    for kind in ("weight", "bias"):
        q, k, v = (own[f"attention.{x}_proj.{kind}"] for x in "qkv")
        state[f"{name}.attention.qkv.{kind}"] = torch.cat([q, k, v])
        state[f"{name}.attention.projection.{kind}"] = own[f"attention.o_proj.{kind}"]
        state[f"{name}.norm1.{kind}"] = own[f"layernorm_before.{kind}"]
        state[f"{name}.norm2.{kind}"] = own[f"layernorm_after.{kind}"]
        state[f"{name}.mlp.fc1.{kind}"] = own[f"mlp.fc1.{kind}"]
        state[f"{name}.mlp.fc2.{kind}"] = own[f"mlp.fc2.{kind}"]


def copied_state(theirs: ViTMAEForPreTraining) -> dict[str, torch.Tensor]:
    vit, decoder, d = theirs.vit, theirs.decoder, "objectives.reconstruct.decoders.image"
    projection = vit.embeddings.patch_embeddings.projection
    # They predict (row, column, channel), M3 (channel, row, column).
    order = torch.arange(PATCH * PATCH * 3).reshape(PATCH, PATCH, 3).permute(2, 0, 1).flatten()
    state = {
        "tokenizers.image.projection.weight": projection.weight.flatten(1),
        "tokenizers.image.projection.bias": projection.bias,
        "backbone.prefix": vit.embeddings.cls_token[0],
        f"{d}.mask_token": decoder.mask_token[0],
        f"{d}.output.weight": decoder.decoder_pred.weight[order],
        f"{d}.output.bias": decoder.decoder_pred.bias[order],
    }
    for kind in ("weight", "bias"):
        state[f"backbone.norm.{kind}"] = getattr(vit.layernorm, kind)
        state[f"{d}.embed.{kind}"] = getattr(decoder.decoder_embed, kind)
        state[f"{d}.norm.{kind}"] = getattr(decoder.decoder_norm, kind)
    for number, block in enumerate(vit.layers):
        copy_block(state, block, f"backbone.blocks.{number}")
    for number, block in enumerate(decoder.decoder_layers):
        copy_block(state, block, f"{d}.blocks.{number}")
    return state


def mae_positions(model: M3Model, width: int) -> torch.Tensor:
    """(1, 1 + 16, D): a row of zeros for the class token, then a 4 x 4 grid."""
    slow = Slow(model)  # its grid has 4 columns, as here
    table = torch.stack([slow.position(number, width) for number in range(16)])
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).unsqueeze(0)


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_equals_that_of_transformers(normalise):
    theirs = build_theirs(normalise)
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(noise * p.shape[-1] ** -0.5 + is_scale)
    ours = build_model(normalise)
    with torch.no_grad():
        theirs.vit.embeddings.position_embeddings.copy_(mae_positions(ours, WIDTH))
        theirs.decoder.decoder_pos_embed.copy_(mae_positions(ours, DECODER_WIDTH))
    ours.tokenizers["image"].reference = (4, 4)  # built for 3 x 4 patches
    ours.load_state_dict(copied_state(theirs))
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)
    prepared = ours.prepare(Batch({"image": pixels}, keys=torch.arange(3) + 8))
    (plan,) = prepared.plans.values()
    noise = torch.arange(16, dtype=torch.float64).expand(3, -1) + 100
    noise = noise.scatter(1, plan.visible["image"], plan.visible["image"].double())
    signal = ours.modalities["image"].normalise(pixels).double()
    with torch.no_grad():
        expected = theirs(signal, noise=noise)
        found = ours(Prepared(in_double(prepared.tokens), prepared.plans))
    assert expected.mask.sum(1).tolist() == [12, 12, 12]
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=2e-6, atol=0)
