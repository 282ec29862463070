"""UNITER, written a second time from its description with the published names, becomes ours with the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3 import M3Model, M3Processor, convert
from m3.errors import M3Error
from m3.types import Batch
from tests.parity.published import assert_equal, assert_refuses, word_pieces

D, HEADS, DEPTH, HIDDEN, LENGTH, IDS, FEATURES, CLASSES = 24, 4, 2, 48, 8, 17, 10, 6
PUBLISHED: dict[str, dict[str, int]] = {
    "base": {"D": 768, "HEADS": 12, "DEPTH": 12, "HIDDEN": 3072},
    "large": {"D": 1024, "HEADS": 16, "DEPTH": 24, "HIDDEN": 4096},
}
"""Both read BERT's 28 996 cased word pieces, 512 places, and features of 2048 with 1601 classes."""
SENTENCES = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w0 w1"]
TOKENS = [[2, 6, 7, 8, 3], [2, 9, 3], [2, 10, 11, 12, 13, 14, 15, 5, 6, 3]]
"""[CLS] = 2, [SEP] = 3, w0 = 5."""
REGIONS = [4, 2, 3]
PREDICTED = ["words", "features", "labels"]


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published pretrained model."""
    linear: dict[str, tuple[int, int]] = {"img_linear": (D, FEATURES), "pos_linear": (D, 7)}
    linear = {f"uniter.img_embeddings.{name}": shape for name, shape in linear.items()}
    norms = [f"uniter.img_embeddings.{name}" for name in ("img_layer_norm", "pos_layer_norm", "LayerNorm")]
    norms += ["uniter.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    norms += ["feat_regress.net.2", "region_classifier.net.2"]
    for name in ("uniter.pooler.dense", "cls.predictions.transform.dense"):
        linear[name] = (D, D)
    linear |= {"feat_regress.net.0": (D, D), "region_classifier.net.0": (D, D)}
    linear |= {"region_classifier.net.3": (CLASSES, D), "itm_output": (2, D)}
    for n in range(DEPTH):
        block = f"uniter.encoder.layer.{n}"
        linear |= {f"{block}.attention.self.{name}": (D, D) for name in ("query", "key", "value")}
        linear |= {f"{block}.attention.output.dense": (D, D), f"{block}.intermediate.dense": (HIDDEN, D)}
        linear[f"{block}.output.dense"] = (D, HIDDEN)
        norms += [f"{block}.attention.output.LayerNorm", f"{block}.output.LayerNorm"]
    found: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
    found |= {f"{name}.bias": (shape[0],) for name, shape in linear.items()}
    found |= {f"{name}.{part}": (D,) for name in norms for part in ("weight", "bias")}
    words = {"word": IDS, "position": LENGTH, "token_type": 2}
    found |= {f"uniter.embeddings.{name}_embeddings.weight": (count, D) for name, count in words.items()}
    found |= {"uniter.img_embeddings.mask_embedding.weight": (2, FEATURES)}
    return found | {"cls.predictions.bias": (IDS,), "feat_regress.bias": (FEATURES,)}


def weights() -> dict[str, Tensor]:
    """Random in every tensor, norms near 1, and the tied ones under both names."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in shapes().items():
        is_norm = len(shape) == 1 and name.endswith("weight")
        state[name] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5 + is_norm
    state["uniter.img_embeddings.mask_embedding.weight"][0] = 0
    state["cls.predictions.decoder.weight"] = state["uniter.embeddings.word_embeddings.weight"].clone()
    state["feat_regress.weight"] = state["uniter.img_embeddings.img_linear.weight"].clone()
    return state


class Slow:
    """UNITER on one sample at a time, in float64."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.p = {name: x.double() for name, x in state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), self.p[f"{name}.weight"], self.p[f"{name}.bias"], eps=1e-12)

    def text(self, ids: list[int]) -> Tensor:
        e = "uniter.embeddings"
        x = self.p[f"{e}.word_embeddings.weight"][ids] + self.p[f"{e}.position_embeddings.weight"][: len(ids)]
        return self.norm(f"{e}.LayerNorm", x + self.p[f"{e}.token_type_embeddings.weight"][0])

    def regions(self, table: Tensor, is_hidden: Tensor) -> Tensor:
        e, features, box = "uniter.img_embeddings", table[:, :-4].double(), table[:, -4:]
        size = box[:, 2:] - box[:, :2]
        seven = torch.cat([box, size, size[:, :1] * size[:, 1:]], dim=1).double()  # measured in float32
        features = features * ~is_hidden[:, None] + self.p[f"{e}.mask_embedding.weight"][is_hidden.long()]
        x = self.norm(f"{e}.img_layer_norm", self.linear(f"{e}.img_linear", features))
        x = x + self.norm(f"{e}.pos_layer_norm", self.linear(f"{e}.pos_linear", seven))
        return self.norm(f"{e}.LayerNorm", x + self.p["uniter.embeddings.token_type_embeddings.weight"][1])

    def encode(self, text: Tensor, regions: Tensor) -> Tensor:
        x = torch.cat([text, regions])
        for n in range(DEPTH):
            block = f"uniter.encoder.layer.{n}"
            q, k, v = (
                self.linear(f"{block}.attention.self.{name}", x).view(len(x), HEADS, -1).transpose(0, 1)
                for name in ("query", "key", "value")
            )
            shares = (q @ k.transpose(1, 2) / (D // HEADS) ** 0.5).softmax(-1)
            attended = (shares @ v).transpose(0, 1).reshape(len(x), D)
            attended = self.linear(f"{block}.attention.output.dense", attended)
            x = self.norm(f"{block}.attention.output.LayerNorm", x + attended)
            changed = self.linear(f"{block}.output.dense", F.gelu(self.linear(f"{block}.intermediate.dense", x)))
            x = self.norm(f"{block}.output.LayerNorm", x + changed)
        return x

    def head(self, first: str, norm: str, x: Tensor) -> Tensor:
        return self.norm(norm, F.gelu(self.linear(first, x)))

    def words(self, x: Tensor) -> Tensor:
        x = self.head("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", x)
        return x @ self.p["uniter.embeddings.word_embeddings.weight"].T + self.p["cls.predictions.bias"]

    def features(self, x: Tensor) -> Tensor:
        x = self.head("feat_regress.net.0", "feat_regress.net.2", x)
        return x @ self.p["uniter.img_embeddings.img_linear.weight"] + self.p["feat_regress.bias"]

    def labels(self, x: Tensor) -> Tensor:
        x = self.head("region_classifier.net.0", "region_classifier.net.2", x)
        return self.linear("region_classifier.net.3", x)

    def match(self, x: Tensor) -> Tensor:
        return self.linear("itm_output", self.linear("uniter.pooler.dense", x[0]).tanh()).softmax(-1)[1]


def tables() -> list[Tensor]:
    """Features and boxes of the regions of each sample."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for count in REGIONS:
        corners = torch.rand(2, count, 2, generator=generator).sort(0).values
        found.append(torch.cat([torch.randn(count, FEATURES, generator=generator), corners[0], corners[1]], dim=1))
    return found


def cut_tokens() -> list[list[int]]:
    """The sentences at most LENGTH long, [SEP] still last."""
    return [ids if len(ids) <= LENGTH else [*ids[: LENGTH - 1], 3] for ids in TOKENS]


def batch_of(model: M3Model) -> Batch:
    return M3Processor(model.config.modalities)(text=SENTENCES, regions=[x.numpy() for x in tables()])


@pytest.fixture(params=[{}, {"D": 36, "DEPTH": 3, "HIDDEN": 60, "FEATURES": 11, "LENGTH": 12}], ids=["small", "larger"])
def sizes(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setitem(globals(), name, value)


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"]
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text(word_pieces(IDS))
    return tmp_path


def assert_same_states_and_matching(model: M3Model, slow: Slow, near: float) -> None:
    """Of every sample, all tokens in sight."""
    states, matched = model.encode(batch_of(model)).states, model.match(batch_of(model))
    for i, (ids, table) in enumerate(zip(cut_tokens(), tables(), strict=True)):
        none = torch.zeros(len(table), dtype=torch.bool)
        expected = slow.encode(slow.text(ids), slow.regions(table, none))
        torch.testing.assert_close(states[i, : len(expected)].double(), expected, rtol=0, atol=near)
        assert matched[i].item() == pytest.approx(slow.match(expected).item(), abs=max(near, 1e-7))


def assert_same_head(model: Any, slow: Slow, name: str, near: float) -> None:
    """What one head says of every place, where some words or regions are hidden."""
    part, batch, longest = model.objectives[name], batch_of(model), max(map(len, cut_tokens()))
    hidden = {"text": torch.arange(longest) % 3 == 1, "regions": torch.arange(max(REGIONS)) % 2 == 1}
    if name == "words":
        hidden["regions"] = torch.zeros(max(REGIONS), dtype=torch.bool)
    else:
        hidden["text"] = torch.zeros(longest, dtype=torch.bool)
    visible = {key: ~mask.expand(3, -1) for key, mask in hidden.items()}
    tokens, encoded = model._look(batch, visible, 0, part.view)
    (decoder,) = part.decoders.values()
    place = "text" if name == "words" else "regions"
    everything = torch.arange(len(hidden[place])).expand(3, -1)
    with torch.no_grad():
        found = decoder(encoded, tokens, everything)
    for i, (ids, table) in enumerate(zip(cut_tokens(), tables(), strict=True)):
        shown = [4 if hidden["text"][k] else number for k, number in enumerate(ids)]
        states = slow.encode(slow.text(shown), slow.regions(table, hidden["regions"][: len(table)]))
        own = states[: len(ids)] if name == "words" else states[len(ids) :]
        torch.testing.assert_close(found[i, : len(own)].double(), getattr(slow, name)(own), rtol=0, atol=near)


@PRECISIONS
def test_states_and_matching_are_the_same_and_every_tensor_goes_back(sizes, folder: Path, dtype, near) -> None:
    found = convert.convert(folder, [f"backbone.heads={HEADS}"])
    assert (found.format, found.left) == ("uniter", {})
    convert.save(found.model, folder / "back.safetensors", "uniter")
    assert_equal(load_file(folder / "back.safetensors"), weights())
    assert_same_states_and_matching(found.model.to(dtype=dtype), Slow(weights()), near)  # type: ignore[call-arg]


@PRECISIONS
@pytest.mark.parametrize("name", PREDICTED)
def test_what_the_heads_say_of_hidden_words_and_regions_is_the_same(
    sizes, folder: Path, name: str, dtype, near
) -> None:
    model = convert.load(folder, [f"backbone.heads={HEADS}"]).to(dtype=dtype)  # type: ignore[call-arg]
    assert_same_head(model, Slow(weights()), name, near)


@pytest.mark.slow
@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_sizes_say_the_same_and_go_back(size: str, tmp_path: Path, monkeypatch) -> None:
    """Nothing is given: the number of heads is the usual one of the width."""
    for name, value in (PUBLISHED[size] | {"LENGTH": 512, "IDS": 28996, "FEATURES": 2048, "CLASSES": 1601}).items():
        monkeypatch.setitem(globals(), name, value)
    theirs = weights()
    save_file(theirs, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text(word_pieces(IDS))
    found, slow = convert.convert(tmp_path), Slow(theirs)
    assert (found.format, found.left) == ("uniter", {})
    assert_same_states_and_matching(found.model, slow, 1e-5)
    for name in PREDICTED:
        assert_same_head(found.model, slow, name, 1e-5)
    del slow  # 2.7 GB
    convert.save(found.model, tmp_path / "back.safetensors", "uniter")
    assert_equal(load_file(tmp_path / "back.safetensors"), theirs)


def test_it_goes_on_training_and_every_part_learns(folder: Path) -> None:
    model: Any = convert.load(folder, [f"backbone.heads={HEADS}", "objectives.match.swap.group=3"])
    generator = torch.Generator().manual_seed(4)
    labels = [torch.cat([torch.rand(len(x), CLASSES, generator=generator).softmax(-1), x[:, -4:]], 1) for x in tables()]
    regions, tables_of_labels = ([x.numpy() for x in part] for part in (tables(), labels))
    batch = M3Processor(model.config.modalities)(text=SENTENCES, regions=regions, region_labels=tables_of_labels)
    model.train()(batch).loss.backward()
    unused = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert unused == set()
    assert model.get_parameter("tokenizers.regions.mask_values").grad.shape == (1, FEATURES)
    assert "regions" not in model.mask_tokens


def test_a_frozen_backbone_freezes_the_norms_before_it(folder: Path) -> None:
    model = convert.load(folder, [f"backbone.heads={HEADS}", "backbone.frozen=true"])
    learning = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {"objectives"}


def test_the_encoder_alone(folder: Path) -> None:
    """As fine-tuned models hold it, with another head."""
    state = {name: x for name, x in weights().items() if name.startswith("uniter.")}
    save_file({**state, "vqa_output.3.weight": torch.zeros(5, D)}, folder / "model.safetensors")
    found = convert.convert(folder, [f"backbone.heads={HEADS}"])
    assert sorted(found.left) == ["uniter.pooler.dense.bias", "uniter.pooler.dense.weight", "vqa_output.3.weight"]
    convert.save(found.model, folder / "back.safetensors", "uniter")
    assert_equal(load_file(folder / "back.safetensors"), {n: x for n, x in state.items() if n not in found.left})


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(M3Error, match=r"width 24 is not a usual one; give backbone\.heads=N"):
        convert.convert(folder)
    given = (f"backbone.heads={HEADS}",)
    assert_refuses(folder, "model.safetensors", "uniter.img_embeddings.LayerNorm.bias", given)
    state = weights()
    state["feat_regress.weight"][0, 0] += 1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(M3Error, match=r"`feat_regress\.weight` is not `uniter\.img_embeddings\.img_linear\.weight`"):
        convert.convert(folder, given)
