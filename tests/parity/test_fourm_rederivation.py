"""4M's encoder, decoder and loss, written once more from the paper's description, one sample and modality at a time.

No padding, no packing, no attention masks other than the causal one of sequences: what is hidden from a token is not
there. Letters: D width, L tokens of one sample.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from m3 import M3Config, M3Model
from m3.backbone import Backbone, BackboneSpec
from m3.decoder import Decoder
from m3.types import OWN, Batch, Tokens

WIDTH, HEADS, EPS, SAMPLES = 24, 3, 1e-6, 6
ORDERED = {"text", "boxes"}
NAMES = ("image", "semantic", "text", "boxes")
OUTPUTS = {"semantic": 1.0, "text": 1.0, "boxes": 1.0}
MASKING = {
    "type": "budget",
    "visible": [1, 14],
    "targets": [2, 13],
    "mixture": [{"inputs": {"image": 1.0}, "targets": OUTPUTS}, {"inputs": 0.5, "targets": OUTPUTS}],
}
STYLES = {
    "4M": {"bias": False, "mlp": "swiglu"},
    "4M with normed queries and keys": {"bias": False, "mlp": "swiglu", "qk_norm": True},
    "plain": {},
}


def build(style: str = "4M", counted: bool = True, **changes) -> M3Model:
    torch.manual_seed(4)
    modalities = {
        "image": {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 4}},
        "semantic": {
            "type": "semantic_map",
            "size": 4,
            "classes": 6,
            "tokenizer": {"type": "class_patch", "size": 1, "class_width": 4},
        },
        "text": {
            "type": "text",
            "vocabulary": "words:a b c d e f",
            "length": 6,
            "sentinels": 5,
            "tokenizer": {"type": "embedding"},
        },
        "boxes": {
            "type": "boxes",
            "labels": ["x", "y"],
            "count": 2,
            "bins": 8,
            "tokenizer": {"type": "embedding", "sentinels": 6},
        },
    }
    backbone = {"width": WIDTH, "depth": 2, "heads": HEADS, "class_tokens": 0, "modality_embedding": True}
    backbone |= {"axis_order": "yx"} | STYLES[style]
    objective = {"type": "translate", "masking": MASKING | {"counted": counted}} | changes
    model = M3Model(M3Config(modalities=modalities, backbone=backbone, objectives={"translate": objective})).double()
    with torch.no_grad():
        for name, p in model.named_parameters():  # norms and biases that are 1 and 0 would hide mistakes
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
            elif "modality_embeddings" in name or "mask_token" in name:
                p.mul_(20)
    return model


def batch_of(count: int = SAMPLES) -> Batch:
    generator = torch.Generator().manual_seed(8)
    lengths = torch.arange(count) % 5 + 2
    text = torch.randint(1, 7, (count, 6), generator=generator, dtype=torch.int32)
    boxes = torch.rand(count, 2, 5, generator=generator) * torch.tensor([1, 1, 1, 1, 1.99])
    boxes[0, 1] = torch.nan
    return Batch(
        {
            "image": torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8),
            "semantic": torch.randint(0, 6, (count, 4, 4), generator=generator).to(torch.uint8),
            "text": text.masked_fill(torch.arange(6) >= lengths.unsqueeze(1), -1),
            "boxes": boxes,
        },
        torch.arange(count) + 3,
    )


class Plain:
    """The network as the paper describes it, on the model's own parameters."""

    def __init__(self, model: M3Model) -> None:
        self.p = dict(model.named_parameters())
        self.tied = model.config.objectives["translate"].get("tied", True)

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.p[f"{name}.weight"].T
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * self.p[f"{name}.weight"]
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def attend(self, q: Tensor, k: Tensor, v: Tensor, name: str, is_causal: bool) -> Tensor:
        """Head by head, query by query."""
        wide, out = WIDTH // HEADS, []
        for head in range(HEADS):
            part = slice(head * wide, (head + 1) * wide)
            queries, keys = q[:, part], k[:, part]
            if f"{name}.q_norm.weight" in self.p:
                queries, keys = self.norm(queries, f"{name}.q_norm"), self.norm(keys, f"{name}.k_norm")
            rows = []
            for i, query in enumerate(queries):
                last = i + 1 if is_causal else len(keys)
                weights = (keys[:last] @ query / math.sqrt(wide)).softmax(0)
                rows.append(weights @ v[:last, part])
            out.append(torch.stack(rows))
        return self.linear(torch.cat(out, dim=1), f"{name}.projection")

    def self_attention(self, x: Tensor, name: str, is_causal: bool = False) -> Tensor:
        return self.attend(*self.linear(x, f"{name}.qkv").chunk(3, dim=1), name, is_causal)

    def cross_attention(self, x: Tensor, context: Tensor, name: str) -> Tensor:
        keys, values = self.linear(context, f"{name}.kv").chunk(2, dim=1)
        return self.attend(self.linear(x, f"{name}.q"), keys, values, name, False)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        hidden = self.linear(x, f"{name}.fc1")
        if f"{name}.fc3.weight" in self.p:
            gated = hidden * torch.sigmoid(hidden) * self.linear(x, f"{name}.fc3")
            return self.linear(gated, f"{name}.fc2")
        return self.linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, f"{name}.fc2")

    def place(self, *coordinates: float) -> Tensor:
        """Sines, then cosines, axis by axis, in the order (row, column)."""
        each = WIDTH // (2 * len(coordinates))
        rows = []
        for x in coordinates:
            angles = [x / 10000 ** (i / each) for i in range(each)]
            rows += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        # The network keeps its tables in float32.
        return torch.tensor(rows, dtype=torch.float64).float().double()

    def mark(self, name: str, *coordinates: float) -> Tensor:
        return self.place(*coordinates) + self.p[f"modality_embeddings.{name}"][0]

    def where(self, name: str, token: int) -> tuple[float, ...]:
        return (token,) if name in ORDERED else (token // 4, token % 4)

    def content(self, name: str, value: Tensor) -> Tensor:
        if name == "image":
            return self.linear(value.double(), "tokenizers.image.projection")
        if name == "semantic":
            x = self.p["tokenizers.semantic.class_embedding.weight"][value[0]]
            return self.linear(x, "tokenizers.semantic.projection")
        return self.p[f"tokenizers.{name}.table.weight"][value[0]]

    def encode(self, tokens: list[tuple[str, int, Tensor, tuple[float, ...]]]) -> Tensor:
        """tokens: modality, token, value, coordinates -> the context of the decoder (L, D)."""
        marks = torch.stack([self.mark(name, *where) for name, _, _, where in tokens])
        x = torch.stack([self.content(name, value) for name, _, value, _ in tokens]) + marks
        for i in range(2):
            block = f"backbone.blocks.{i}"
            x = x + self.self_attention(self.norm(x, f"{block}.norm1"), f"{block}.attention")
            x = x + self.mlp(self.norm(x, f"{block}.norm2"), f"{block}.mlp")
        return self.linear(self.norm(x, "backbone.norm"), "objectives.translate.context") + marks

    def decode(self, x: Tensor, context: Tensor, is_causal: bool) -> Tensor:
        for i in range(2):
            block = f"objectives.translate.decoder.blocks.{i}"
            x = x + self.self_attention(self.norm(x, f"{block}.norm1"), f"{block}.self_attention", is_causal)
            queries, own = self.norm(x, f"{block}.query_norm"), self.norm(context, f"{block}.context_norm")
            x = x + self.cross_attention(queries, own, f"{block}.cross_attention")
            x = x + self.mlp(self.norm(x, f"{block}.norm2"), f"{block}.mlp")
        return self.norm(x, "objectives.translate.decoder.norm")

    def losses(self, name: str, said: list[int], places: list[tuple[float, ...]], context: Tensor) -> list[Tensor]:
        """Cross-entropy of every asked element; of a sequence, the first of `said` is given."""
        own = "objectives.translate"
        if name in ORDERED:
            words = self.p[f"{own}.words.{name}.weight"]
            x = torch.stack([words[word] + self.mark(name, i) for i, word in enumerate(said[:-1])])
            head = words if self.tied else self.p[f"{own}.heads.{name}.weight"]
            truth = said[1:]
        else:
            x = torch.stack([self.p[f"{own}.mask_token"][0] + self.mark(name, *place) for place in places])
            head, truth = self.p[f"{own}.heads.{name}.weight"], said
        scores = self.decode(x, context, name in ORDERED) @ head.T
        return [row.logsumexp(0) - row[k] for row, k in zip(scores, truth, strict=True)]


def plain_losses(model: M3Model, batch: Batch, counted: bool) -> dict[str, list[Tensor]]:
    """All losses of the batch, modality by modality, under the model's own masks."""
    prepared = model.prepare(batch)
    plan, plain = next(iter(prepared.plans.values())), Plain(model)
    found: dict[str, list[Tensor]] = {name: [] for name in OUTPUTS}
    for sample in range(len(batch)):
        context = plain.encode(seen_of(plan, prepared.tokens, sample, plain, counted))
        for name in OUTPUTS:
            said, places = asked_of(plan, prepared.tokens, name, sample, plain)
            if len(said) > (name in ORDERED):
                found[name] += plain.losses(name, said, places, context)
    return found


def seen_of(plan, tokens: dict[str, Tokens], sample: int, plain: Plain, counted: bool) -> list:
    names, seen = list(plan.visible), []
    modality, index = plan.packed_modality()[sample].tolist(), plan.packed_index()[sample].tolist()
    slots = {n: plan.shown.get(n, torch.full_like(i, OWN)) for n, i in plan.visible.items()}
    shown, counts = plan.pack(slots)[sample].tolist(), dict.fromkeys(names, 0)
    for m, token, sentinel, is_there in zip(modality, index, shown, plan.is_valid[sample].tolist(), strict=True):
        if is_there:
            name = names[m]
            value = tokens[name].values[sample, token]
            value = value if sentinel == OWN else torch.full_like(value, sentinel)
            where = (counts[name],) if counted and name in ORDERED else plain.where(name, token)
            seen.append((name, token, value, where))
            counts[name] += 1
    return seen


def asked_of(plan, tokens: dict[str, Tokens], name: str, sample: int, plain: Plain) -> tuple[list[int], list]:
    said, places = [], []
    asked = plan.asked.get(name, torch.full_like(plan.target[name], OWN))[sample].tolist()
    for slot, (token, word) in enumerate(zip(plan.target[name][sample].tolist(), asked, strict=True)):
        if plan.asks(name)[sample, slot] or (name in ORDERED and slot == 0):
            said.append(int(tokens[name].values[sample, token, 0]) if word == OWN else word)
            places.append(plain.where(name, token))
    return said, places


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("average", ["modality", "token"])
@pytest.mark.parametrize(("tied", "counted"), [(True, True), (False, False)])
def test_loss_and_gradients_are_those_of_the_description(style, average, tied, counted):
    weights = {"text": 0.5, "semantic": 3.0}
    model = build(style, counted, average=average, tied=tied, weights=weights)
    batch = batch_of()
    found = plain_losses(model, batch, counted)
    assert all(found.values()), "every modality must be asked for"
    factors = {name: weights.get(name, 1.0) for name in found}
    if average == "modality":
        terms = [factors[name] * sum(losses) / len(losses) for name, losses in found.items()]
        expected = sum(terms) / len(terms)
    else:
        total = sum(len(losses) for losses in found.values())
        expected = sum(factors[name] * sum(losses) for name, losses in found.items()) / total
    names, parameters = zip(*model.named_parameters(), strict=True)
    theirs = torch.autograd.grad(expected, parameters)
    output = model(batch)
    ours = torch.autograd.grad(output.loss, parameters)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, own, other in zip(names, ours, theirs, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    for name, losses in found.items():
        part = output.parts.parts[f"translate/{name}"]
        assert part.count.item() == len(losses)
        assert part.sum.item() == pytest.approx(sum(loss.item() for loss in losses), rel=1e-6)


def test_blocks_have_the_papers_parameters():
    """4M-B: 84.95 M in the encoder's blocks, 113.28 M in the decoder's (of 198.83 M in the transformer)."""
    spec = BackboneSpec(width=768, depth=12, heads=12, class_tokens=0, mlp="swiglu", bias=False)
    with torch.device("meta"):
        encoder, decoder = Backbone(spec), Decoder(spec, 12)
    blocks = [sum(p.numel() for p in part.blocks.parameters()) for part in (encoder, decoder)]
    assert [round(count / 1e6, 2) for count in blocks] == [84.95, 113.28]
    norms, context = 2 * 768, 768 * 768 + 768
    assert round((sum(blocks) + norms + context) / 1e6, 2) == 198.83
