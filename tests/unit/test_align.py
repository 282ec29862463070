"""MaskAlign: the loss by hand, masks that follow the teacher's attention, and the teacher outside the model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3.config import M3Config
from m3.errors import M3Error
from m3.model import M3Model
from m3.network import Prepared
from m3.random import Draws
from m3.teachers import open_teacher
from m3.types import Batch
from tests.parity.slow_vit import Slow, check, in_double, make_batch, patches, position, random_weights, standardised

NAME, PATCH, ROWS, COLUMNS, WIDTH, DEPTH, HEADS = "timm:vit_tiny_patch16_224", 4, 4, 4, 12, 3, 3
TEACHER = {"model": NAME, "size": 64}  # 4 x 4 tokens of 16 pixels


def build(masking: dict, layers: int = 2, class_tokens: int = 1) -> M3Model:
    image = {"type": "image", "size": (ROWS * PATCH, COLUMNS * PATCH), "tokenizer": {"type": "patch", "size": PATCH}}
    objective = {"type": "align", "of": "image", "masking": masking, "teacher": TEACHER, "layers": layers}
    backbone = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "final_norm": False, "class_tokens": class_tokens}
    return M3Model(M3Config(modalities={"image": image}, backbone=backbone, objectives={"align": objective}))


def test_loss_and_gradients_equal_maskalign_written_from_the_paper() -> None:
    model = random_weights(build({"type": "fixed", "visible": 5}))
    with torch.no_grad():
        model.backbone.prefix.mul_(1.5)
    batch = make_batch(2, ROWS * PATCH, COLUMNS * PATCH)
    prepared = model.prepare(batch)
    (view,) = model.views
    seen = prepared.plans[view].visible["image"].tolist()
    provider = model.objectives["align"]
    pixels = provider.spec.teacher.pictures(provider.tokenizer["of"], prepared.tokens["image"])
    assert pixels.shape == (2, 3, 64, 64)
    teacher = open_teacher(NAME, None, (64, 64)).layers(pixels, 2).double()
    slow, losses = Slow(dict(model.named_parameters()) | {"backbone.norm.weight": torch.ones(WIDTH).double()}), []
    slow.p["backbone.norm.bias"] = torch.zeros(WIDTH).double()
    mixture = slow.p["objectives.align.mixture"].reshape(2, DEPTH)
    for number, (image, places) in enumerate(zip(batch.signals["image"], seen, strict=True)):
        x = slow.linear("tokenizers.image.projection", patches(image, PATCH)[places])
        states, _ = slow.encode(x + torch.stack([position(i, COLUMNS, WIDTH) for i in places]), HEADS, DEPTH)
        for layer in range(2):  # the last two of the teacher's blocks begin as the student's blocks 1 and 2
            mixed = sum((mixture[layer, s] + 0.01 + (s == layer + 1)) * states[s] for s in range(DEPTH))
            guess = slow.linear(f"objectives.align.adaptors.{layer}", mixed)
            answer = standardised(teacher[layer, number][[0, *(i + 1 for i in places)]], eps=1e-5)
            error = (guess - answer).abs()
            losses.append(torch.where(error < 1, error**2 / 2, error - 0.5))
    found = model(Prepared(in_double(prepared.tokens), prepared.plans))
    assert found.parts.parts["align/alignment"].count == model.counts(prepared)["align/alignment"] == 2 * 2 * 6 * 192
    check(model, found.loss, 2 * torch.stack(losses).mean())


def test_without_a_class_token_the_patches_alone_are_aligned() -> None:
    model = build({"type": "fixed", "visible": 5}, class_tokens=0)
    prepared = model.prepare(make_batch(2, ROWS * PATCH, COLUMNS * PATCH))
    assert model.counts(prepared)["align/alignment"] == 2 * 2 * 5 * 192
    model(prepared).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_missing_pictures_do_not_count() -> None:
    model = build({"type": "fixed", "visible": 5}).eval()
    batch = make_batch(3, ROWS * PATCH, COLUMNS * PATCH)
    lacking = Batch(batch.signals, batch.keys, {"image": torch.tensor([True, False, True])})
    both = Batch({"image": batch.signals["image"][[0, 2]]}, batch.keys[[0, 2]])
    found, wanted = model(lacking), model(both)
    assert found.parts.parts["align/alignment"].count == 2 * 2 * 6 * 192
    torch.testing.assert_close(found.loss, wanted.loss)


def test_the_student_sees_what_the_teacher_attends_to() -> None:
    """Drawn without replacement with the attention as weights: of one token, exactly with these probabilities."""
    batch = 3000
    model = build({"type": "fixed", "visible": 1, "scorer": {"type": "attention", **TEACHER}})
    scorer = model.views[next(iter(model.views))].select.scorer
    one = make_batch(1, ROWS * PATCH, COLUMNS * PATCH)
    tokens = model.tokenise(one)["image"]
    weights = torch.arange(1.0, 17.0) ** 2 / (torch.arange(1.0, 17.0) ** 2).sum()

    class Staring:
        def attention(self, pixels: torch.Tensor) -> torch.Tensor:
            return weights.expand(len(pixels), -1) * 0.9  # the class token attends to itself too

    class Spec:
        def open(self, tokenizer):
            return Staring()

        def pictures(self, tokenizer, tokens):
            return torch.zeros(batch, 1)

    scorer.spec = Spec()
    scores = scorer({"image": tokens}, Draws(torch.arange(batch)))["image"]
    often = torch.bincount(scores.argmin(1), minlength=16) / batch
    assert (often - weights).abs().max() < 5 * (0.18 * 0.82 / batch) ** 0.5


def test_attentive_masks_of_a_model_are_exact_and_stay_outside(tmp_path: Path) -> None:
    model = build({"type": "fixed", "visible": 5, "scorer": {"type": "attention", **TEACHER}})
    batch = make_batch(4, ROWS * PATCH, COLUMNS * PATCH)
    (plan,) = model.prepare(batch).plans.values()
    assert plan.visible["image"].shape == (4, 5)
    alone = model.prepare(Batch({"image": batch.signals["image"][2:3]}, batch.keys[2:3]))
    assert torch.equal(next(iter(alone.plans.values())).visible["image"][0], plan.visible["image"][2])
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == dict(model.named_parameters()).keys()
    assert json.loads((tmp_path / "config.json").read_text())["objectives"]["align"]["teacher"] == TEACHER | {
        "width": 192
    }


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layers": 4}, "objectives.align.layers: 4 are to be aligned, but the student has 3 blocks"),
        ({"layers": 0}, "objectives.align.layers"),
    ],
)
def test_wrong_settings_are_named(changes: dict, text: str) -> None:
    with pytest.raises(M3Error, match=text):
        build({"type": "fixed", "visible": 5}, **changes)
