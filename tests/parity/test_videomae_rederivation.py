"""VideoMAE and its dual masking written a second time, from the papers' description: the same loss and gradients.

Theirs differs from M3's in form: pixels in [0, 1] are normalised per channel, values are ordered (frame, row, column,
channel), mask tokens are appended to the visible ones instead of put between, keys have no bias.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from m3 import masking
from m3.config import M3Config
from m3.model import M3Model
from m3.network import Prepared
from m3.types import Batch, Tokens

T, H, W, FRAMES, PATCH = 6, 4, 4, 2, 3
COUNT, PLACES = T * H * W, H * W
WIDTH, HEADS, DEPTH = 24, 3, 2
DECODER_WIDTH, DECODER_HEADS, DECODER_DEPTH = 12, 2, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECODER = "objectives.reconstruct.decoders.video"


def build_model(target: dict, decode: bool = False, visible: int = 3 * T) -> M3Model:
    """A small VideoMAE in float64; every parameter random, also the biases of keys."""
    scorer: dict = {"type": "fixed", "visible": visible, "scorer": {"type": "tube"}}
    decoder = {"type": "self_decoder", "width": DECODER_WIDTH, "depth": DECODER_DEPTH, "heads": DECODER_HEADS}
    if decode:
        scorer["decode"] = {"share": 0.5, "scorer": {"type": "running_cell"}}
        decoder["queries"] = "asked"
    model = M3Model(
        M3Config(
            modalities={
                "video": {
                    "type": "video",
                    "size": (H * PATCH, W * PATCH),
                    "frames": T * FRAMES,
                    "tokenizer": {"type": "tube", "size": PATCH, "frames": FRAMES},
                    "positions": {"type": "flat_sincos"},
                }
            },
            backbone={"width": WIDTH, "depth": DEPTH, "heads": HEADS, "class_tokens": 0},
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "masking": scorer,
                    "decoder": {**decoder, "embed_bias": False},
                    "targets": {"video": {"target": {"type": "values", **target}}},
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
    """Clips whose patches have all contrasts; the lowest shows what eps is added to, and is still exact in float32."""
    generator = torch.Generator().manual_seed(11)
    shape = (count, 3, T * FRAMES, H * PATCH, W * PATCH)
    contrast = 0.05 + 0.95 * torch.rand(count, 1, T * FRAMES, 1, 1, generator=generator) ** 4
    noise = torch.rand(shape, generator=generator) * contrast
    return Batch({"video": (noise * 255).to(torch.uint8)}, keys=torch.arange(count) + 40)


VIDEOMAE = {"normalise": "channel", "eps_on": "deviation", "eps": tuple(1e-6 / s for s in STD)}
OMNIMAE = {"normalise": "channel", "eps": tuple(1e-6 / s**2 for s in STD)}


# -- theirs, sample by sample ---------------------------------------------------------------------------------


class Theirs:
    def __init__(self, model: M3Model, is_outside: bool = True) -> None:
        self.p, self.is_outside = dict(model.named_parameters()), is_outside

    def linear(self, name: str, x: Tensor) -> Tensor:
        x = x @ self.p[f"{name}.weight"].T
        return x + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else x

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def block(self, name: str, x: Tensor, heads: int) -> Tensor:
        width = x.shape[-1]
        weight, bias = self.p[f"{name}.attention.qkv.weight"], self.p[f"{name}.attention.qkv.bias"]
        normed = self.norm(f"{name}.norm1", x)
        query = normed @ weight[:width].T + bias[:width]
        key = normed @ weight[width : 2 * width].T  # no bias
        value = normed @ weight[2 * width :].T + bias[2 * width :]
        parts = []
        for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
            parts.append(torch.softmax(q @ k.T / math.sqrt(width // heads), -1) @ v)
        x = x + self.linear(f"{name}.attention.projection", torch.cat(parts, -1))
        hidden = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x))
        return x + self.linear(f"{name}.mlp.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    def table(self, width: int) -> Tensor:
        rows = []
        for n in range(COUNT):
            angles = [n / 10000 ** (2 * (j // 2) / width) for j in range(width)]
            rows.append([math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(angles)])
        return torch.tensor(rows, dtype=torch.float64)

    def tube(self, pixels: Tensor, number: int) -> Tensor:
        """One tube of a uint8 clip (3, T', H', W') as (3, frames, rows, columns) in [0, 1]."""
        t, y, x = number // PLACES * FRAMES, number // W % H * PATCH, number % W * PATCH
        return pixels[:, t : t + FRAMES, y : y + PATCH, x : x + PATCH].double() / 255

    def target(self, pixels: Tensor, number: int) -> Tensor:
        """(frame, row, column, channel)."""
        values = self.tube(pixels, number).permute(1, 2, 3, 0).reshape(-1, 3)
        mean = values.mean(0)
        variance = ((values - mean) ** 2).sum(0) / (len(values) - 1)
        root = variance.sqrt() + 1e-6 if self.is_outside else (variance + 1e-6).sqrt()
        return ((values - mean) / root).flatten()

    def embedded(self, pixels: Tensor, number: int) -> Tensor:
        mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None, None] for x in (MEAN, STD))
        return self.linear("tokenizers.video.projection", ((self.tube(pixels, number) - mean) / std).flatten())

    def predict(self, pixels: Tensor, visible: list[int], asked: list[int]) -> Tensor:
        """Predict the tubes `asked`, each appended as a mask token -> (T, values in their order)."""
        x = torch.stack([self.embedded(pixels, n) for n in visible]) + self.table(WIDTH)[visible]
        for depth in range(DEPTH):
            x = self.block(f"backbone.blocks.{depth}", x, HEADS)
        x = self.linear(f"{DECODER}.embed", self.norm("backbone.norm", x))
        place = self.table(DECODER_WIDTH)
        x = torch.cat([x + place[visible], self.p[f"{DECODER}.mask_token"] + place[asked]])
        for depth in range(DECODER_DEPTH):
            x = self.block(f"{DECODER}.blocks.{depth}", x, DECODER_HEADS)
        x = self.linear(f"{DECODER}.output", self.norm(f"{DECODER}.norm", x[-len(asked) :]))
        return x.unflatten(-1, (3, FRAMES, PATCH, PATCH)).permute(0, 2, 3, 4, 1).flatten(1)

    def loss(self, clips: Tensor, visible: list[list[int]], asked: list[list[int]]) -> Tensor:
        """Mean over the tubes that are asked for and hidden, of all samples."""
        losses = []
        for pixels, seen, wanted in zip(clips, visible, asked, strict=True):
            truth = torch.stack([self.target(pixels, n) for n in wanted])
            each = F.mse_loss(self.predict(pixels, seen, wanted), truth, reduction="none").mean(-1)
            losses += [x for x, n in zip(each, wanted, strict=True) if n not in seen]
        return torch.stack(losses).mean()


def in_double(tokens: dict[str, Tokens], batch: Batch) -> dict[str, Tokens]:
    """Tokens worked out in float64: float32 pixels would be too coarse for patches without contrast."""
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None, None] for x in (MEAN, STD))
    signal = (batch.signals["video"].double() / 255 - mean) / std
    x = signal.unflatten(4, (W, -1)).unflatten(3, (H, -1)).unflatten(2, (T, -1))
    values = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
    return {"video": Tokens(values, tokens["video"].positions, tokens["video"].is_valid)}


def check(model: M3Model, plan: masking.MaskPlan, batch: Batch, theirs: Theirs) -> None:
    tokens = in_double(model.tokenise(batch), batch)
    output = model(Prepared(tokens, dict.fromkeys(model.views, plan)))
    visible, asked = plan.visible["video"].tolist(), plan.target["video"].tolist()
    expected = theirs.loss(batch.signals["video"], visible, asked)
    # Our targets and losses are computed in float32.
    torch.testing.assert_close(output.loss.double(), expected, rtol=2e-6, atol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found, wanted = torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected, parameters)
    for name, own, other in zip(names, found, wanted, strict=True):
        assert other.abs().max() > 1e-7, f"{name} gets no gradient"
        assert (own - other).abs().max() / other.abs().max() < 1e-4, name


@pytest.mark.parametrize(("target", "is_outside"), [(VIDEOMAE, True), (OMNIMAE, False)], ids=["videomae", "omnimae"])
def test_loss_and_gradients_equal_videomae_written_again(target: dict, is_outside: bool):
    model, batch = build_model(target), make_batch(2)
    (plan,) = model.prepare(batch).plans.values()
    visible = plan.visible["video"].tolist()
    assert [len({n % PLACES for n in row}) for row in visible] == [3, 3]
    assert visible[0] != visible[1]
    check(model, plan, batch, Theirs(model, is_outside))


def test_loss_and_gradients_equal_dual_masking_written_again():
    """The decoder gets a mask token for each decoded tube, also for those that the encoder sees; no loss asks there."""
    model, batch = build_model(VIDEOMAE, decode=True), make_batch(3)
    (plan,) = model.prepare(batch).plans.values()
    counts = plan.is_target["video"].sum(1).tolist()
    assert len(set(counts)) > 1, "six slots are no multiple of four: the numbers of targets differ"
    assert all(0 < count < COUNT // 2 for count in counts)
    check(model, plan, batch, Theirs(model))


def test_appended_mask_tokens_and_the_full_sequence_give_the_same_numbers():
    """VideoMAE's order, visible ones first, is M3's `all` up to the order; no attention can tell."""
    model, batch = build_model(VIDEOMAE), make_batch(2)
    (plan,) = model.prepare(batch).plans.values()
    tokens = in_double(model.tokenise(batch), batch)
    encoded = model.encode_tokens(tokens, plan)
    decoder = model.objectives["reconstruct"].decoders["video"]
    results = []
    for queries in ("all", "asked"):
        decoder.spec = decoder.spec.model_copy(update={"queries": queries})
        results.append(decoder(encoded, tokens, plan.target["video"]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_uneven", [False, True])
def test_dual_masking_in_micro_batches_is_that_of_the_whole_batch(is_uneven: bool):
    """1 x 8 = 2 x 4 = 4 x 2, also where samples have different numbers of targets or no clip at all."""
    model, batch = build_model(VIDEOMAE, decode=True, visible=10), make_batch(8)
    present = torch.tensor([True, True, True, True, True, False, True, True])

    def part(start: int, stop: int) -> Prepared:
        is_present = {"video": present[start:stop]} if is_uneven and not present[start:stop].all() else {}
        piece = Batch({"video": batch.signals["video"][start:stop]}, batch.keys[start:stop], is_present)
        prepared = model.prepare(piece)
        return Prepared(in_double(prepared.tokens, piece), prepared.plans)

    found = []
    for size in (8, 4, 2):
        pieces = [model(part(start, start + size)).parts.parts["reconstruct/video"] for start in range(0, 8, size)]
        loss = sum(piece.sum for piece in pieces) / sum(piece.count for piece in pieces)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


# -- transformers ---------------------------------------------------------------------------------------------


def build_published() -> VideoMAEForPreTraining:
    config = VideoMAEConfig(
        image_size=4 * PATCH,
        patch_size=PATCH,
        num_frames=T * FRAMES,
        tubelet_size=FRAMES,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        decoder_hidden_size=DECODER_WIDTH,
        decoder_num_hidden_layers=DECODER_DEPTH,
        decoder_num_attention_heads=DECODER_HEADS,
        decoder_intermediate_size=4 * DECODER_WIDTH,
        layer_norm_eps=1e-6,
        use_mean_pooling=False,
        norm_pix_loss=True,
    )
    theirs = VideoMAEForPreTraining(config).double().eval()
    theirs.decoder.norm.eps = 1e-6  # the original's; theirs forgets to set it
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.shape[-1] ** -0.5 + is_scale)
    return theirs


def copy_block(state: dict[str, Tensor], theirs: torch.nn.Module, name: str) -> None:
    own = theirs.state_dict()
    parts = [own[f"attention.attention.{x}.weight"] for x in ("query", "key", "value")]
    query, value = (own[f"attention.attention.{x}.bias"] for x in ("query", "value"))
    state[f"{name}.attention.qkv.weight"] = torch.cat(parts)
    state[f"{name}.attention.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    for kind in ("weight", "bias"):
        state[f"{name}.attention.projection.{kind}"] = own[f"attention.output.dense.{kind}"]
        state[f"{name}.norm1.{kind}"] = own[f"layernorm_before.{kind}"]
        state[f"{name}.norm2.{kind}"] = own[f"layernorm_after.{kind}"]
        state[f"{name}.mlp.fc1.{kind}"] = own[f"intermediate.dense.{kind}"]
        state[f"{name}.mlp.fc2.{kind}"] = own[f"output.dense.{kind}"]


def copied_state(theirs: VideoMAEForPreTraining) -> dict[str, Tensor]:
    vit, decoder = theirs.videomae, theirs.decoder
    projection = vit.embeddings.patch_embeddings.projection
    # They predict (frame, row, column, channel), M3 (channel, frame, row, column).
    values = FRAMES * PATCH * PATCH
    order = torch.arange(values * 3).reshape(values, 3).t().flatten()
    state = {
        "tokenizers.video.projection.weight": projection.weight.flatten(1),
        "tokenizers.video.projection.bias": projection.bias,
        f"{DECODER}.mask_token": theirs.mask_token[0],
        f"{DECODER}.embed.weight": theirs.encoder_to_decoder.weight,
        f"{DECODER}.output.weight": decoder.head.weight[order],
        f"{DECODER}.output.bias": decoder.head.bias[order],
    }
    for kind in ("weight", "bias"):
        state[f"backbone.norm.{kind}"] = getattr(vit.layernorm, kind)
        state[f"{DECODER}.norm.{kind}"] = getattr(decoder.norm, kind)
    for number, block in enumerate(vit.encoder.layer):
        copy_block(state, block, f"backbone.blocks.{number}")
    for number, block in enumerate(decoder.decoder_layers):
        copy_block(state, block, f"{DECODER}.blocks.{number}")
    return state


def test_loss_equals_that_of_transformers():
    """Theirs fixes the positions in float32, and undoes the normalisation of its input."""
    theirs, ours, batch = build_published(), build_model(VIDEOMAE), make_batch(3)
    ours.load_state_dict(copied_state(theirs))
    (plan,) = ours.prepare(batch).plans.values()
    tokens = in_double(ours.tokenise(batch), batch)
    is_hidden = torch.ones(3, COUNT, dtype=torch.bool).scatter(1, plan.visible["video"], False)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None, None] for x in (MEAN, STD))
    pixels = ((batch.signals["video"].double() / 255 - mean) / std).transpose(1, 2)
    with torch.no_grad():
        expected = theirs(pixels, bool_masked_pos=is_hidden).loss
        found = ours(Prepared(tokens, dict.fromkeys(ours.views, plan))).loss
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
