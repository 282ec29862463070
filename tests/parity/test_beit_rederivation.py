"""BEiT and MaskDistill written a second time from their papers: the same losses and gradients.

Bao et al. 2021; Peng et al. 2022 ("A Unified View of Masked Image Modeling"). Letters: N patches, H heads, K codes.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3.config import M3Config
from m3.model import M3Model
from m3.network import Prepared
from m3.tokenizer_model import M3Tokenizer
from tests.parity.slow_vit import (
    Slow,
    check,
    in_double,
    make_batch,
    patches,
    random_weights,
    recipe_model,
)
from tests.parity.timm_teacher import TimmTeacher

ROWS, COLUMNS, PATCH, WIDTH, HEADS, DEPTH, CODES = 3, 4, 16, 24, 3, 2, 48
PLACES, SEEN = ROWS * COLUMNS, 7
OVERRIDES = [
    f"modalities.image.size=[{ROWS * PATCH},{COLUMNS * PATCH}]",
    f"modalities.image.tokenizer.size={PATCH}",
    *(f"backbone.{name}={value}" for name, value in (("width", WIDTH), ("depth", DEPTH), ("heads", HEADS))),
    f"objectives.reconstruct.masking.visible={SEEN}",
    "objectives.reconstruct.masking.scorer.area=[1,5]",
]
START = 0.1  # of LayerScale
BATCH = make_batch(2, ROWS * PATCH, COLUMNS * PATCH)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of the same patches, in float64."""
    image = {"type": "image", "size": (ROWS * PATCH, COLUMNS * PATCH), "tokenizer": {"type": "patch", "size": PATCH}}
    quantiser = {"type": "fsq", "levels": [8, 6]}
    objective = {"type": "autoencode", "of": "image", "coder": {"type": "vit", "depth": 1}, "quantiser": quantiser}
    backbone = {"width": 16, "depth": 1, "heads": 2}
    model = M3Model(M3Config(modalities={"image": image}, backbone=backbone, objectives={"codes": objective}))
    folder = tmp_path_factory.mktemp("tokenizer")
    random_weights(model, seed=6).save_pretrained(folder)
    return folder


def build(name: str, target: str, **settings: object) -> M3Model:
    """A published recipe at a small size, float64, with random weights."""
    own = [f"objectives.reconstruct.targets.{target}.target.{key}={value}" for key, value in settings.items()]
    return recipe_model(name, [*OVERRIDES, *own])


def loss_and_hidden(model: M3Model) -> tuple[Tensor, list[list[int]]]:
    """The model's loss, and the patches that its masks hide."""
    prepared = model.prepare(BATCH)
    (plan,) = prepared.plans.values()
    hidden = plan.target["image"].tolist()
    assert [len(row) for row in hidden] == [PLACES - SEEN] * len(BATCH)
    assert hidden[0] != hidden[1]
    loss = model(Prepared(in_double(prepared.tokens), prepared.plans)).loss
    assert loss is not None
    return loss, hidden


# -- written a second time, sample by sample ----------------------------------------------------------------------


class SlowBeit(Slow):
    """BEiT's ViT: mask tokens in the place of hidden patches; only their distances tell where patches are."""

    def bias(self) -> Tensor:
        """(H, 1 + N, 1 + N), the same in all blocks: a number for each distance, and three for the class token."""
        table, prefix = (self.p[f"backbone.relative_biases.0.{name}"] for name in ("table", "prefix"))
        rows = []
        for query in range(-1, PLACES):
            row = []
            for key in range(-1, PLACES):
                down, right = query // COLUMNS - key // COLUMNS, query % COLUMNS - key % COLUMNS
                if min(query, key) >= 0:
                    row.append(table[:, down + ROWS - 1, right + COLUMNS - 1])
                else:  # the class token looks at a patch, a patch at it, it at itself
                    row.append(prefix[:, 2 if query == key else 0 if query < key else 1])
            rows.append(torch.stack(row, dim=1))
        return torch.stack(rows, dim=1)

    def predict(self, image: Tensor, asked: list[int], target: str) -> Tensor:
        """One linear layer on the states of the hidden patches."""
        embedded = self.linear("tokenizers.image.projection", patches(image, PATCH))
        x = torch.stack([self.p["mask_tokens.image"][0] if i in asked else embedded[i] for i in range(PLACES)])
        _, states = self.encode(x, HEADS, DEPTH, self.bias())
        return self.linear(f"objectives.reconstruct.decoders.{target}.output", states[1:][asked])


def test_loss_and_gradients_equal_beit_written_from_the_paper(tokenizer: Path) -> None:
    model = build("beit_vit_b", "codes", tokenizer=tokenizer)
    found, hidden = loss_and_hidden(model)
    frozen = M3Tokenizer.from_pretrained(tokenizer)
    codes = frozen.encode(frozen.modality.normalise(BATCH.signals["image"]).double()).tolist()
    assert len({code for row in codes for code in row}) > 4
    slow, losses = SlowBeit(dict(model.named_parameters()), START), []
    for image, own, asked in zip(BATCH.signals["image"], codes, hidden, strict=True):
        for place, scores in zip(asked, slow.predict(image, asked, "codes"), strict=True):
            assert scores.shape == (CODES,)
            odds = [torch.exp(score) for score in scores]
            losses.append(-torch.log(odds[own[place]] / sum(odds)))
    check(model, found, torch.stack(losses).mean())


def test_loss_and_gradients_equal_maskdistill_written_from_the_paper(tmp_path: Path) -> None:
    """Layer-normed features of the clean picture; errors below 1 count with their squares."""
    teacher = TimmTeacher(tmp_path / "teacher.pth", (ROWS * PATCH, COLUMNS * PATCH))
    model = build("maskdistill_vit_b", "features", model=teacher.model, weights=teacher.path)
    found, hidden = loss_and_hidden(model)
    features = teacher.features(BATCH.signals["image"])
    slow, losses, below = SlowBeit(dict(model.named_parameters()), START), [], 0
    for image, own, asked in zip(BATCH.signals["image"], features, hidden, strict=True):
        for place, guess in zip(asked, slow.predict(image, asked, "features"), strict=True):
            for error in (guess - own[place]).abs():
                losses.append(error**2 / 2 if error < 1 else error - 1 / 2)
                below += bool(error < 1)
    assert 0.2 < below / len(losses) < 0.8, "both branches"
    assert len(losses) == 2 * (PLACES - SEEN) * 192
    check(model, found, torch.stack(losses).mean(), near=1e-5)
