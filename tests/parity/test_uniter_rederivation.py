"""UNITER written a second time, sample by sample from the paper's description: values and gradients of every loss.

Chen et al. 2020, section 3: embedding of words and regions, post-norm BERT blocks, MLM, MRFR, MRC, MRC-kl, ITM, WRA.
"""

import math

import pytest
import torch
from torch import Tensor

from m3.config import M3Config
from m3.model import M3Model
from m3.network import Prepared
from m3.types import HIDDEN, Batch, MaskPlan

WIDTH, HEADS, DEPTH, EPS = 16, 2, 2, 1e-12
WORDS, FEATURES, CLASSES = 9, 6, 4
SAMPLES = 6


def masked(decoder: dict, seen: dict, hidden: str, **target) -> dict:
    return {
        "type": "reconstruct",
        "inputs": ["text", "regions"],
        "masking": {"type": "fixed", "visible": seen, "hidden": hidden},
        "decoder": {"type": "head", "hidden": WIDTH, **decoder},
        "targets": {"it": target},
    }


SEEN_REGIONS, SEEN_WORDS = {"text": 1.0, "regions": 0.6}, {"text": 0.6, "regions": 1.0}
LABELS = {"of": "region_labels", "at": "regions"}
OBJECTIVES = {
    "words": masked({"tied": True}, SEEN_WORDS, "mix", of="text", loss="cross_entropy"),
    "features": masked({"tied": True}, SEEN_REGIONS, "replace", of="regions", loss="mse"),
    "classes": masked(
        {}, SEEN_REGIONS, "replace", **LABELS, loss="cross_entropy", target={"type": "most_likely", "skip": 1}
    ),
    "shares": masked({}, SEEN_REGIONS, "replace", **LABELS, loss="kl", target={"type": "soft_labels"}),
    "match": {
        "type": "match",
        "modalities": ["text", "regions"],
        "swap": {"of": "regions", "group": 3},
        "alignment": 0.1,
    },
}


def build_model() -> M3Model:
    """A small UNITER in float64; every parameter random, so that no bias or scale can be forgotten."""
    region = {"tokenizer": {"type": "region"}, "count": 5}
    model = M3Model(
        M3Config(
            modalities={
                "text": {
                    "type": "text",
                    "vocabulary": "words:a b c d e f g h",
                    "length": 6,
                    "tokenizer": {"type": "embedding"},
                    "positions": {"type": "learned"},
                },
                "regions": {"type": "regions", "features": FEATURES, **region},
                "region_labels": {"type": "region_labels", "classes": CLASSES, **region},
            },
            backbone={
                "width": WIDTH,
                "depth": DEPTH,
                "heads": HEADS,
                "norm": "post",
                "input_norm": True,
                "final_norm": False,
                "modality_embedding": True,
                "norm_eps": EPS,
            },
            objectives=OBJECTIVES,
        )
    ).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale + is_norm)
    return model


def make_batch() -> Batch:
    """Sentences of 2 to 6 words, 1 to 5 regions; the fourth sample has no regions, the fifth none of their labels."""
    generator = torch.Generator().manual_seed(11)
    lengths, counts = [6, 2, 5, 4, 3, 6], [5, 3, 1, 2, 4, 5]
    text = torch.randint(0, WORDS, (SAMPLES, 6), generator=generator, dtype=torch.int32)
    features = torch.randn(SAMPLES, 5, FEATURES, generator=generator)
    labels = torch.rand(SAMPLES, 5, CLASSES, generator=generator).softmax(-1)
    low, high = torch.rand(2, SAMPLES, 5, 2, generator=generator).sort(0).values
    boxes = torch.cat([low, high], -1)
    for i in range(SAMPLES):
        text[i, lengths[i] :] = -1
        boxes[i, counts[i] :] = features[i, counts[i] :] = labels[i, counts[i] :] = torch.nan
    raw = {"text": text, "regions": torch.cat([features, boxes], -1), "region_labels": torch.cat([labels, boxes], -1)}
    there = torch.tensor([True, True, True, False, True, True])
    labelled = torch.tensor([True, True, True, False, False, True])
    return Batch(raw, torch.arange(SAMPLES) + 40, {"regions": there, "region_labels": labelled})


class Slow:
    """UNITER on one sample at a time, with the weights of a model."""

    def __init__(self, model: M3Model, batch: Batch) -> None:
        self.p = dict(model.named_parameters())
        self.ids = [[k for k in row if k >= 0] for row in batch.signals["text"].tolist()]
        table, labels = batch.signals["regions"].double(), batch.signals["region_labels"].double()
        has = batch.is_present["regions"].tolist()
        self.regions = [[r for r in rows if not r.isnan().any()] if has[i] else [] for i, rows in enumerate(table)]
        self.labels = [[r[:CLASSES] for r in rows if not r.isnan().any()] for rows in labels]
        self.is_labelled = batch.is_present["region_labels"].tolist()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.p[f"{name}.weight"] @ x + self.p[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        return centred / ((centred**2).mean() + EPS).sqrt() * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def word(self, place: int, own: int, shown: int) -> Tensor:
        table = self.p["tokenizers.text.table.weight"]
        x = self.p["mask_tokens.text"][0] if shown == HIDDEN else table[own if shown < 0 else shown]
        return x + self.p["positions.text.table"][:, place] + self.p["modality_embeddings.text"][0]

    def region(self, row: Tensor, shown: int) -> Tensor:
        x0, y0, x1, y1 = row[-4:]
        box = torch.stack([x0, y0, x1, y1, x1 - x0, y1 - y0, (x1 - x0) * (y1 - y0)])
        x = self.norm("tokenizers.regions.norm", self.linear("tokenizers.regions.projection", row[:-4]))
        if shown == HIDDEN:
            x = self.p["mask_tokens.regions"][0]
        place = self.norm("positions.regions.norm", self.linear("positions.regions.projection", box))
        return x + place + self.p["modality_embeddings.regions"][0]

    def encode(self, words: list[Tensor], regions: list[Tensor]) -> list[Tensor]:
        """States of the class token, the words, the regions."""
        x = [self.p["backbone.prefix"][0], *words, *regions]
        x = [self.norm("backbone.input_norm", v) for v in x]
        for number in range(DEPTH):
            block = f"backbone.blocks.{number}"
            attended = self.attend(block, x)
            x = [self.norm(f"{block}.norm1", v + a) for v, a in zip(x, attended, strict=True)]
            x = [self.norm(f"{block}.norm2", v + self.mlp(block, v)) for v in x]
        return x

    def attend(self, block: str, x: list[Tensor]) -> list[Tensor]:
        width = WIDTH // HEADS
        qkv = [self.linear(f"{block}.attention.qkv", v) for v in x]
        result = []
        for one in qkv:
            heads = []
            for h in range(HEADS):
                part = slice(h * width, (h + 1) * width)
                query = one[:WIDTH][part]
                scores = torch.stack([query @ o[WIDTH : 2 * WIDTH][part] / math.sqrt(width) for o in qkv])
                shares = scores.exp() / scores.exp().sum()
                heads.append(sum(s * o[2 * WIDTH :][part] for s, o in zip(shares, qkv, strict=True)))
            result.append(self.linear(f"{block}.attention.projection", torch.cat(heads)))
        return result

    def mlp(self, block: str, x: Tensor) -> Tensor:
        return self.linear(f"{block}.mlp.fc2", self.gelu(self.linear(f"{block}.mlp.fc1", x)))

    def gelu(self, x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def hidden(self, objective: str, x: Tensor) -> Tensor:
        head = f"objectives.{objective}.decoders.it"
        return self.norm(f"{head}.hidden.2", self.gelu(self.linear(f"{head}.hidden.0", x)))

    def view(self, plan: MaskPlan, sample: int) -> tuple[list[Tensor], list[Tensor], list[int], list[int]]:
        """States of words and regions under a mask, and the places of each that are asked for."""
        shown = {name: value[sample].tolist() for name, value in plan.shown.items()}
        words = [self.word(i, k, shown["text"][i]) for i, k in enumerate(self.ids[sample])]
        regions = [self.region(row, shown["regions"][i]) for i, row in enumerate(self.regions[sample])]
        states = self.encode(words, regions)[1:]
        asked = []
        for name in ("text", "regions"):
            index, flags = plan.target[name][sample].tolist(), plan.is_target[name][sample].tolist()
            asked.append([i for i, is_asked in zip(index, flags, strict=True) if is_asked])
        return states[: len(words)], states[len(words) :], *asked

    def words(self, plan: MaskPlan) -> Tensor:
        losses = []
        for sample in range(SAMPLES):
            words, _, asked, _ = self.view(plan, sample)
            assert asked, "at least one word of every sentence is hidden"
            for i in asked:
                scores = self.p["tokenizers.text.table.weight"][:WORDS] @ self.hidden("words", words[i])
                scores = scores + self.p["objectives.words.decoders.it.output.bias"]
                losses.append(scores.logsumexp(0) - scores[self.ids[sample][i]])
        return torch.stack(losses).mean()

    def features(self, plan: MaskPlan) -> Tensor:
        losses = []
        for sample in range(SAMPLES):
            _, regions, _, asked = self.view(plan, sample)
            for i in asked:
                guess = self.hidden("features", regions[i]) @ self.p["tokenizers.regions.projection.weight"]
                guess = guess + self.p["objectives.features.decoders.it.output.bias"]
                losses += [(a - b) ** 2 for a, b in zip(guess, self.regions[sample][i][:-4], strict=True)]
        return torch.stack(losses).mean()

    def classes(self, plan: MaskPlan) -> Tensor:
        losses = []
        for truth, scores in self.labelled(plan, "classes"):
            best = max(range(1, CLASSES), key=lambda k, truth=truth: float(truth[k]))
            losses.append(-torch.log(scores.exp()[best] / scores.exp().sum()))
        return torch.stack(losses).mean()

    def shares(self, plan: MaskPlan) -> Tensor:
        losses = []
        for truth, scores in self.labelled(plan, "shares"):
            shares = scores.exp() / scores.exp().sum()
            losses.append(sum(t * torch.log(t / s) for t, s in zip(truth, shares, strict=True)))
        return torch.stack(losses).mean()

    def labelled(self, plan: MaskPlan, objective: str) -> list[tuple[Tensor, Tensor]]:
        """Labels and scores of all hidden regions that have labels."""
        found = []
        for sample in range(SAMPLES):
            _, regions, _, asked = self.view(plan, sample)
            for i in asked if self.is_labelled[sample] else []:
                scores = self.linear(f"objectives.{objective}.decoders.it.output", self.hidden(objective, regions[i]))
                found.append((self.labels[sample][i], scores))
        return found

    def match(self, plan: MaskPlan) -> tuple[Tensor, Tensor]:
        """Matching, and alignment without its weight."""
        partners = plan.partners
        assert partners is not None
        losses, signed = [], []
        for sample in range(SAMPLES):
            lender, is_swapped = int(partners.index[sample]), bool(partners.is_swapped[sample])
            if not self.regions[lender] or (is_swapped and lender == sample):
                continue
            words = [self.word(i, k, -1) for i, k in enumerate(self.ids[sample])]
            states = self.encode(words, [self.region(row, -1) for row in self.regions[lender]])
            pooled = torch.tanh(self.linear("objectives.match.pooler", states[0]))
            scores = self.linear("objectives.match.output", pooled)
            losses.append(scores.logsumexp(0) - scores[0 if is_swapped else 1])
            distance = self.transport(states[1 : 1 + len(words)], states[1 + len(words) :])
            signed.append(-distance if is_swapped else distance)
        return torch.stack(losses).mean(), torch.stack(signed).mean()

    def transport(self, words: list[Tensor], regions: list[Tensor]) -> Tensor:
        m, n = len(words), len(regions)
        cost = [[1 - (a / a.norm()) @ (b / b.norm()) for b in regions] for a in words]
        plan, left = [[1.0] * n for _ in range(m)], [1 / m] * m
        for _ in range(50):
            q = [[math.exp(-float(cost[i][j].detach()) / 0.5) * plan[i][j] for j in range(n)] for i in range(m)]
            right = [1 / n / sum(q[i][j] * left[i] for i in range(m)) for j in range(n)]
            left = [1 / m / sum(q[i][j] * right[j] for j in range(n)) for i in range(m)]
            plan = [[left[i] * q[i][j] * right[j] for j in range(n)] for i in range(m)]
        return torch.stack([plan[i][j] * cost[i][j] for i in range(m) for j in range(n)]).sum()


def gradients(model: M3Model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()}


@pytest.fixture(scope="module")
def prepared() -> tuple[M3Model, Prepared, Slow]:
    model, batch = build_model(), make_batch()
    return model, model.prepare(batch), Slow(model, batch)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradients_of_every_loss(prepared: tuple[M3Model, Prepared, Slow], name: str) -> None:
    model, whole, slow = prepared
    plan = whole.plans[model.objectives[name].views[0]]
    one = Prepared(whole.tokens, whole.plans, whole.draws, (name,))
    found = model(one)
    if name == "match":
        match, alignment = slow.match(plan)
        expected = match + 0.1 * alignment
        parts = {part: (p.sum / p.count).item() for part, p in found.parts.parts.items()}
        assert parts == pytest.approx({"match/match": match.item(), "match/alignment": alignment.item()}, rel=1e-6)
    else:
        expected = getattr(slow, name)(plan)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = gradients(model, found.loss), gradients(model, expected)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, k=key: f"{k}: {m}")


def test_conditional_masking_hides_one_modality_at_a_time(prepared: tuple[M3Model, Prepared, Slow]) -> None:
    model, whole, _ = prepared
    hidden = {}
    for name in ("words", "features"):
        plan = whole.plans[model.objectives[name].views[0]]
        hidden[name] = {modality: int(flags.sum()) for modality, flags in plan.is_target.items()}
    assert hidden["words"]["regions"] == hidden["features"]["text"] == 0
    # 0.6 of 6, 2, 5, 4, 3, 6 words are seen, rounded down; at least one is hidden.
    assert hidden["words"]["text"] == 3 + 1 + 2 + 2 + 2 + 3
    # Of 5, 3, 1, 0, 4, 5 regions; a single one is seen.
    assert hidden["features"]["regions"] == 2 + 2 + 0 + 0 + 2 + 2
