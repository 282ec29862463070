"""VQ-KD, BEiT v2's tokenizer (Peng et al. 2022, section 3.2): codes from which a teacher's features are rebuilt.

Letters: B batch, N patches, D width, d width of a code, K codes, C channels of the teacher.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.model import M3Model
from m3.network import Prepared
from m3.teachers import LibraryTeacher
from m3.tokenizer_model import M3Tokenizer
from m3.types import Batch
from tests.parity.slow_vit import (
    Slow,
    check,
    in_double,
    make_batch,
    patches,
    position,
    recipe_model,
)
from tests.parity.timm_teacher import TimmTeacher

ROWS, COLUMNS, PATCH, WIDTH, HEADS, DEPTH, CODES, CODE_WIDTH = 3, 4, 16, 24, 3, 2, 9, 6
PLACES, FEATURES = ROWS * COLUMNS, 192
IMAGE = {"type": "image", "size": (ROWS * PATCH, COLUMNS * PATCH), "tokenizer": {"type": "patch", "size": PATCH}}
OVERRIDES = [
    f"modalities.image.size=[{ROWS * PATCH},{COLUMNS * PATCH}]",
    f"modalities.image.tokenizer.size={PATCH}",
    *(f"backbone.{name}={value}" for name, value in (("width", WIDTH), ("depth", DEPTH), ("heads", HEADS))),
    "objectives.autoencode.coder.depth=1",
    f"objectives.autoencode.quantiser.codes={CODES}",
    f"objectives.autoencode.quantiser.width={CODE_WIDTH}",
]
NAME = "objectives.autoencode"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TimmTeacher:
    return TimmTeacher(tmp_path_factory.mktemp("teacher") / "weights.pth", (ROWS * PATCH, COLUMNS * PATCH))


def build(**target: object) -> M3Model:
    """The published tokenizer at a small size, float64, with random weights and a codebook that has started."""
    settings = {"model": TimmTeacher.model, **target}
    own = [f"{NAME}.target.{key}={value}" for key, value in settings.items()]
    model = recipe_model("tokenizer_vqkd_vit_b", [*OVERRIDES, *own])
    quantiser = model.objectives["autoencode"].quantiser
    book = torch.randn(CODES, CODE_WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    quantiser.book.copy_(torch.stack([code / code.norm() for code in book]).unsqueeze(0))
    quantiser.steps.fill_(3)
    return model


def images(count: int = 3) -> Batch:
    return make_batch(count, ROWS * PATCH, COLUMNS * PATCH)


def prepared_of(model: M3Model, batch: Batch) -> Prepared:
    prepared = model.prepare(batch)
    return Prepared(in_double(prepared.tokens), prepared.plans)


# -- written a second time, token by token ------------------------------------------------------------------------


class SlowVqkd(Slow):
    """Encoder, nearest code by angle, decoder."""

    def __init__(self, model: M3Model) -> None:
        super().__init__(dict(model.named_parameters()))
        self.book = model.objectives["autoencode"].quantiser.book[0]

    def tail(self, name: str, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm", x)))
        return x + self.linear(f"{name}.mlp.fc2", hidden)

    def vectors(self, image: Tensor) -> Tensor:
        """Vectors of length 1 (N, d), before they become codes."""
        x = self.linear("tokenizers.image.projection", patches(image, PATCH))
        x = x + torch.stack([position(i, COLUMNS, WIDTH) for i in range(PLACES)])
        for number in range(DEPTH):
            x = self.block(f"{NAME}.coder.encoder.blocks.{number}", x, HEADS)
        x = self.linear(f"{NAME}.to_code", self.tail(f"{NAME}.coder.tail", x))
        return torch.stack([row / row.square().sum().sqrt() for row in x])

    def codes(self, vectors: Tensor) -> list[int]:
        """For each vector the code at the least distance."""
        return [min(range(CODES), key=lambda k, row=row: (row - self.book[k]).norm()) for row in vectors.detach()]

    def rebuild(self, codes: Tensor) -> Tensor:
        """Features (N, C) of codes (N, d)."""
        x = self.linear(f"{NAME}.from_code", codes)
        x = x + torch.stack([position(i, COLUMNS, WIDTH) for i in range(PLACES)])
        x = self.tail(f"{NAME}.coder.norm", self.block(f"{NAME}.coder.blocks.0", x, HEADS))
        return self.linear(f"{NAME}.output", x)

    def losses(self, image: Tensor, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For each token 1 - cosine to the teacher, and how far its vector is from its code (mean over d)."""
        vectors = self.vectors(image)
        chosen = torch.stack([self.book[k] for k in self.codes(vectors)])
        guesses = self.rebuild(vectors + (chosen - vectors).detach())
        angles = [1 - (g @ t) / (g @ g).sqrt() / (t @ t).sqrt() for g, t in zip(guesses, features, strict=True)]
        return angles, [((row - code) ** 2).mean() for row, code in zip(vectors, chosen, strict=True)]


def vqkd(model: M3Model, pixels: Tensor, features: Tensor) -> Tensor:
    """Mean angle of all tokens, and the commitment with weight 1."""
    slow = SlowVqkd(model)
    each = [slow.losses(image, truth) for image, truth in zip(pixels, features, strict=True)]
    angles, distances = (torch.stack([x for sample in each for x in sample[part]]) for part in (0, 1))
    return angles.mean() + distances.mean()


def test_loss_and_gradients_equal_vqkd_written_from_the_paper(teacher: TimmTeacher) -> None:
    model, batch = build(weights=teacher.path), images()
    pixels = batch.signals["image"]
    slow = SlowVqkd(model)
    codes = [slow.codes(slow.vectors(image)) for image in pixels]
    assert len({code for row in codes for code in row}) > 4
    output = model(prepared_of(model, batch))
    parts = {name: float((part.sum / part.count).detach()) for name, part in output.parts.parts.items()}
    assert parts.keys() == {"autoencode/image", "autoencode/commitment"}
    assert min(parts.values()) > 0.1, "both matter"
    check(model, output.loss, vqkd(model, pixels, teacher.features(pixels)), near=3e-5)


def test_absent_images_add_nothing(teacher: TimmTeacher) -> None:
    model, batch = build(weights=teacher.path), images(3)
    present = Batch(batch.signals, batch.keys, {"image": torch.tensor([True, False, True])})
    pixels = batch.signals["image"][[0, 2]]
    expected = vqkd(model, pixels, teacher.features(pixels))
    check(model, model(prepared_of(model, present)).loss, expected, near=3e-5)


def test_a_book_that_has_not_started_passes_vectors_unquantised(teacher: TimmTeacher) -> None:
    model, batch = build(weights=teacher.path), images(2)
    quantiser = model.objectives["autoencode"].quantiser
    quantiser.steps.zero_()
    slow, pixels = SlowVqkd(model), batch.signals["image"]
    angles = []
    for image, truth in zip(pixels, teacher.features(pixels), strict=True):
        for guess, wanted in zip(slow.rebuild(slow.vectors(image)), truth, strict=True):
            angles.append(1 - (guess @ wanted) / guess.norm() / wanted.norm())
    check(model, model(prepared_of(model, batch)).loss, torch.stack(angles).mean(), near=3e-5)


# -- counts, saving, use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", [[True, True, True], [True, False, True]])
def test_counts_are_those_of_the_loss_and_the_teacher_need_not_look(present: list[bool], monkeypatch) -> None:
    model, batch = build(), images(3)
    prepared = prepared_of(model, Batch(batch.signals, batch.keys, {"image": torch.tensor(present)}))
    found = {name: float(part.count) for name, part in model(prepared).parts.parts.items()}

    def refuse(*_: object) -> None:
        raise AssertionError("the teacher looked")

    monkeypatch.setattr(LibraryTeacher, "__call__", refuse)
    counts = {name: float(count) for name, count in model.counts(prepared).items()}
    tokens = sum(present) * PLACES
    assert counts == found == {"autoencode/image": tokens * FEATURES, "autoencode/commitment": tokens}
    with pytest.raises(AssertionError, match="the teacher looked"):
        model(prepared)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vqkd")
    build().float().save_pretrained(path)
    return path


def test_a_saved_tokenizer_makes_the_same_codes_and_nothing_else(folder: Path) -> None:
    tokenizer, slow, batch = M3Tokenizer.from_pretrained(folder), SlowVqkd(build()), images()
    codes = tokenizer.encode(batch)
    assert codes.tolist() == [slow.codes(slow.vectors(image)) for image in batch.signals["image"]]
    assert (tokenizer.codes, tokenizer.grid, tokenizer.is_two_way) == (CODES, (ROWS, COLUMNS), False)
    with pytest.raises(M3Error) as caught:
        tokenizer.decode(codes)
    assert str(caught.value) == (
        "this tokenizer of `image` only makes codes: they stand for a teacher's features, which are no signal; use it "
        "for those."
    )


def test_the_file_holds_no_teacher_and_the_config_its_width(folder: Path) -> None:
    model = build()
    saved = load_file(folder / "model.safetensors")
    buffers = {f"{NAME}.quantiser.{name}" for name in ("book", "sums", "counts", "steps")}
    assert saved.keys() == dict(model.named_parameters()).keys() | buffers
    assert sum(value.numel() for value in saved.values()) < 100_000
    target = json.loads((folder / "config.json").read_text())["objectives"]["autoencode"]["target"]
    assert (target["model"], target["width"]) == (TimmTeacher.model, FEATURES)


def test_codes_need_no_teacher(tmp_path: Path) -> None:
    """One of our own that is gone: the tokenizer is built from its own config."""
    own = M3Model(M3Config(modalities={"image": IMAGE}, backbone={"width": 20, "depth": 1, "heads": 2}))
    own.save_pretrained(tmp_path / "teacher")
    model = build(model=f"m3:{tmp_path / 'teacher'}").float()
    codes = M3Tokenizer(model).encode(images())
    model.save_pretrained(tmp_path / "tokenizer")
    shutil.rmtree(tmp_path / "teacher")
    loaded = M3Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.model.get_parameter(f"{NAME}.output.weight").shape == (20, WIDTH)
    assert torch.equal(loaded.encode(images()), codes)


def test_it_says_that_it_predicts_features_and_draws_none() -> None:
    model = build()
    assert model.objectives["autoencode"].predicts == f"features of image from {CODES} codes"
    with pytest.raises(M3Error, match="no objective that predicts signals"):
        model.reconstruct(images(2))


# -- BEiT v2 on its codes -----------------------------------------------------------------------------------------


def test_beit_v2_learns_its_codes_and_has_nothing_to_draw(folder: Path) -> None:
    codes = {"of": "image", "target": {"type": "codes", "tokenizer": str(folder)}, "loss": "cross_entropy"}
    masking = {"type": "fixed", "visible": 7, "hidden": "replace"}
    beit = {"type": "reconstruct", "masking": masking, "decoder": {"type": "head"}, "targets": {"codes": codes}}
    backbone = {"width": WIDTH, "depth": 1, "heads": HEADS}
    torch.manual_seed(0)
    model = M3Model(M3Config(modalities={"image": IMAGE}, backbone=backbone, objectives={"beit": beit}))
    prepared = model.prepare(images())
    assert model.objectives["beit"].decoders["codes"].output.weight.shape == (CODES, WIDTH)
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(12):
        loss = model(prepared).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(M3Error, match="no objective that predicts signals"):
        model.reconstruct(images())


# -- what is refused ----------------------------------------------------------------------------------------------

CLASSES = {"type": "semantic_map", "size": 16, "classes": 6, "tokenizer": {"type": "class_patch", "size": 4}}
TIMM = {"type": "teacher", "model": TimmTeacher.model}


@pytest.mark.parametrize(
    ("modality", "settings", "text"),
    [
        (IMAGE, {"target": {"type": "values", "normalise": True}}, r"codes alone .* normalised by; leave `normalise`"),
        (CLASSES, {"loss": "cosine"}, r"`it` holds classes, which loss `cosine` can't compare; use cross_entropy for"),
        (IMAGE, {"target": TIMM, "loss": "cross_entropy"}, r"`it` holds values, which loss `cross_entropy` can't"),
    ],
    ids=["normalised patches", "cosine of classes", "classes of features"],
)
def test_what_codes_can_not_learn_is_refused(modality: dict, settings: dict, text: str) -> None:
    objective = {"type": "autoencode", "of": "it", "coder": {"type": "vit", "depth": 1}, **settings}
    backbone = {"width": WIDTH, "depth": 1, "heads": HEADS}
    with pytest.raises(M3Error, match=text):
        M3Model(M3Config(modalities={"it": modality}, backbone=backbone, objectives={"codes": objective}))
