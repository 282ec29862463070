"""Models of our own as teachers: they tell what the model itself says, and nothing of them enters the student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from m3.config import M3Config
from m3.errors import M3Error
from m3.evaluate.attention_maps import attention
from m3.model import M3Model
from m3.network import build_modalities
from m3.own_teacher import OwnTeacher
from m3.targets import Teacher
from m3.teachers import open_teacher
from m3.types import Batch

HEIGHT, WIDTH, PATCH, COUNT = 16, 24, 8, 6
IMAGE = {"type": "image", "size": (HEIGHT, WIDTH), "tokenizer": {"type": "patch", "size": PATCH}}
DEPTH_MAP = {"type": "depth", "size": (HEIGHT, WIDTH), "tokenizer": {"type": "patch", "size": PATCH}}
TEXT = {"type": "text", "vocabulary": "words:a b c", "length": 5, "tokenizer": {"type": "embedding"}}
LARGE = {"width": 20, "depth": 3, "heads": 2, "class_tokens": 2}
SMALL = {"width": 16, "depth": 2, "heads": 2}
PIXELS = torch.randint(0, 256, (3, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
BATCH = Batch({"image": PIXELS}, torch.arange(3))
SHAPES = {  # what the pictures are read by
    "backbone": {"modalities": {"image": IMAGE, "depth": DEPTH_MAP}, "backbone": LARGE},
    "tower": {
        "modalities": {"text": TEXT, "image": IMAGE},
        "towers": {"photo": {"modalities": ["image"], **LARGE}, "words": {"modalities": ["text"], **SMALL}},
        "objectives": {"pair": {"type": "contrast", "width": 8, "sides": {"image": {}, "text": {}}}},
    },
    "relative": {
        "modalities": {"image": {**IMAGE, "positions": {"type": "relative"}}},
        "backbone": {**LARGE, "relative_bias": "shared"},
    },
}


def save(folder: Path, **settings) -> str:
    torch.manual_seed(5)
    model = M3Model(M3Config(**settings))
    for parameter in model.parameters():  # what starts at 0 would hide that it is left out
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def student(objective: dict, **backbone) -> M3Model:
    torch.manual_seed(6)
    return M3Model(
        M3Config(modalities={"image": IMAGE}, backbone={**SMALL, **backbone}, objectives={"learn": objective})
    )


def distill(folder: str) -> dict:
    target = {"of": "image", "target": {"type": "teacher", "model": f"m3:{folder}"}, "loss": "smooth_l1"}
    masking = {"type": "fixed", "visible": 3, "hidden": "replace"}
    return {"type": "reconstruct", "masking": masking, "decoder": {"type": "head"}, "targets": {"it": target}}


def align(folder: str) -> dict:
    masking = {"type": "fixed", "visible": 3, "scorer": {"type": "attention", "model": f"m3:{folder}"}}
    return {"type": "align", "of": "image", "masking": masking, "teacher": {"model": f"m3:{folder}"}, "layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("teacher"), **SHAPES["backbone"])


@pytest.mark.parametrize("kind", SHAPES)
def test_it_tells_what_the_model_itself_says(kind: str, tmp_path: Path) -> None:
    teacher = open_teacher(f"m3:{save(tmp_path, **SHAPES[kind])}", None, (HEIGHT, WIDTH))
    model = M3Model.from_pretrained(tmp_path).eval()
    encoded = model.encode(BATCH, (0, 1, 2))
    features = teacher(PIXELS)
    assert features.shape == (3, 20, 2, 3)
    for row in range(2):
        for column in range(3):
            assert torch.equal(features[:, :, row, column], encoded.states[:, 3 * row + column])
    assert torch.equal(teacher(PIXELS.float()), features)

    layers = teacher.layers(PIXELS, 2)
    assert layers.shape == (2, 3, 1 + COUNT, 20)
    for found, number in zip(layers, (1, 2), strict=True):
        assert torch.equal(found[:, 0], encoded.layers[number][:, 0]), "the first of two class tokens"
        assert torch.equal(found[:, 1:], encoded.layers[number][:, 2:])

    weights, _ = attention(model, "photo" if kind == "tower" else "", BATCH)
    expected = torch.stack([weights[:, 0, 0, 2:], weights[:, 1, 0, 2:]]).mean(0)
    assert expected.std() > 0.01
    torch.testing.assert_close(teacher.attention(PIXELS), expected)
    assert isinstance(teacher, OwnTeacher)
    assert not any(module._forward_pre_hooks for module in teacher._on(PIXELS.device).modules())


def test_it_is_shared_computes_in_float32_and_shapes_need_no_weights(folder: str, tmp_path: Path) -> None:
    """`m3 show` works shapes out without reading weights; the model's own number type is not the teacher's."""
    teacher = open_teacher(f"m3:{folder}", None, (HEIGHT, WIDTH))
    assert teacher is open_teacher(f"m3:{folder}", None, (HEIGHT, WIDTH))
    expected = teacher(PIXELS)
    M3Model.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    other = OwnTeacher(str(tmp_path), (HEIGHT, WIDTH))
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert other(PIXELS).dtype == torch.float32
        assert other.attention(PIXELS).dtype == other.layers(PIXELS, 1).dtype == torch.float32
        assert torch.equal(teacher(PIXELS), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not other(PIXELS).requires_grad

    (tmp_path / "model.safetensors").unlink()
    blind = OwnTeacher(str(tmp_path), (HEIGHT, WIDTH))
    with torch.device("meta"):
        assert blind(torch.zeros(2, 3, HEIGHT, WIDTH)).shape == (2, 20, 2, 3)
        assert blind.layers(torch.zeros(2, 3, HEIGHT, WIDTH), 2).shape == (2, 2, 7, 20)
        assert blind.attention(torch.zeros(2, 3, HEIGHT, WIDTH)).shape == (2, 6)
        teacher(torch.zeros(2, 3, HEIGHT, WIDTH))
    assert torch.equal(teacher(PIXELS), expected)
    assert student(distill(str(tmp_path))).objectives["learn"].providers["it"].width == 20
    with pytest.raises(
        M3Error, match=r"^there is no model in .* for a teacher \(.*safetensors.*; give the model folder"
    ):
        blind(PIXELS)


def test_a_feature_map_is_what_it_makes_of_a_picture(folder: str) -> None:
    part = build_modalities({"f": {"type": "feature_map", "teacher": f"m3:{folder}", "size": (HEIGHT, WIDTH)}})["f"]
    assert (part.signal.channels, part.signal.size) == (20, (2, 3))
    states = M3Model.from_pretrained(folder).eval().encode(BATCH).states
    expected = F.layer_norm(states, (20,)).transpose(1, 2).reshape(3, 20, 2, 3)
    torch.testing.assert_close(part.normalise(PIXELS), expected)


@pytest.mark.parametrize("make", [distill, align])
def test_a_student_learns_from_it_and_holds_nothing_of_it(make, folder: str, tmp_path: Path) -> None:
    model = student(make(folder), final_norm=make is distill)
    before = {name: weight.clone() for name, weight in load_file(Path(folder) / "model.safetensors").items()}
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(BATCH).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    teacher = open_teacher(f"m3:{folder}", None, (HEIGHT, WIDTH))
    assert isinstance(teacher, OwnTeacher)
    taught = teacher._on(PIXELS.device)
    assert all(torch.equal(weight, before[name]) for name, weight in taught.state_dict().items())
    assert not any(parameter.requires_grad for parameter in taught.parameters())

    assert [module for module in model.modules() if isinstance(module, M3Model)] == [model]
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys() == dict(model.named_parameters()).keys()
    learned = {"decoders.it.output.weight", "decoders.it.output.bias"}
    if make is align:
        learned = {"mixture", *(f"adaptors.{number}.{part}" for number in (0, 1) for part in ("weight", "bias"))}
    others = {name for name in saved if not name.startswith(("backbone.", "tokenizers.image.", "mask_tokens.image"))}
    assert others == {f"objectives.learn.{name}" for name in learned}


@pytest.mark.parametrize("make", [distill, align])
def test_a_student_is_loaded_where_the_teacher_is_gone(make, folder: str, tmp_path: Path) -> None:
    there = shutil.copytree(folder, tmp_path / "teacher")
    model = student(make(str(there)), final_norm=make is distill).eval()
    model.save_pretrained(tmp_path / "student")
    shutil.rmtree(there)
    batch = Batch({"image": PIXELS}, torch.arange(3))
    loaded = M3Model.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded.encode(batch).sequence, model.encode(batch).sequence)
    with pytest.raises(M3Error, match=r"there is no model in .* for a teacher"):
        student(make(str(tmp_path / "nowhere")), final_norm=make is distill)


def test_targets_are_its_features_of_the_clean_picture(folder: str) -> None:
    model = student(distill(folder))
    prepared = model.prepare(BATCH)
    (plan,) = prepared.plans.values()
    index = plan.target["image"]
    provider = model.objectives["learn"].providers["it"]
    assert isinstance(provider, Teacher)
    states = M3Model.from_pretrained(folder).eval().encode(BATCH).states
    expected = F.layer_norm(states, (20,)).gather(1, index.unsqueeze(-1).expand(-1, -1, 20))
    torch.testing.assert_close(provider(prepared.tokens["image"], index), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_teach_is_refused(folder: str, tmp_path: Path) -> None:
    two = save(tmp_path / "two", modalities={"left": IMAGE, "right": IMAGE}, backbone=SMALL)
    none = save(tmp_path / "none", modalities={"depth": DEPTH_MAP}, backbone=SMALL)
    grey = save(tmp_path / "grey", modalities={"image": {**IMAGE, "channels": 1}}, backbone=SMALL)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"model_type": "m3", ')
    for name, size, sentence in [
        (
            str(tmp_path / "nowhere"),
            (HEIGHT, WIDTH),
            r"^there is no model in `.*nowhere` for a teacher \(it has no config",
        ),
        (str(tmp_path / "torn"), (HEIGHT, WIDTH), r"^there is no model in `.*torn` for a teacher \(.*JSON.*; give the"),
        (
            str(tmp_path / "bert"),
            (HEIGHT, WIDTH),
            "^`.*bert` holds a model of type `bert`, none of ours; make it one with",
        ),
        (
            two,
            (HEIGHT, WIDTH),
            "must read exactly one modality of type `image`, but it reads left, right; choose another",
        ),
        (none, (HEIGHT, WIDTH), "must read exactly one modality of type `image`, but it reads none; choose another"),
        (grey, (HEIGHT, WIDTH), "reads pictures of 1 channels, not 3; choose another"),
        (folder, (32, 32), r"reads pictures of 16 x 24, not 32 x 32; set its `size` to \[16, 24\] or choose"),
    ]:
        with pytest.raises(M3Error, match=sentence) as found:
            open_teacher(f"m3:{name}", None, size)
        assert "\n" not in str(found.value)


def test_wrong_settings_are_refused_when_the_student_is_built(folder: str, tmp_path: Path) -> None:
    wanted = distill(folder)
    wanted["targets"]["it"]["target"]["weights"] = "some.pth"
    with pytest.raises(M3Error, match=r"weights: the teacher `m3:.*` has its own in its folder; leave `weights` out"):
        student(wanted)
    with pytest.raises(M3Error, match="has its own in its folder"):
        open_teacher(f"m3:{folder}", "some.pth", (HEIGHT, WIDTH))
    coarse = {**IMAGE, "tokenizer": {"type": "patch", "size": (16, 24)}}
    whole = save(tmp_path, modalities={"image": coarse}, backbone=SMALL)
    with pytest.raises(M3Error, match="makes 1 tokens of a picture of 16 x 24, the model 6; choose another `size`"):
        student(distill(whole))


def test_without_a_class_token_there_are_features_only(tmp_path: Path) -> None:
    folder = save(tmp_path, modalities={"image": IMAGE}, backbone={**SMALL, "class_tokens": 0})
    teacher = open_teacher(f"m3:{folder}", None, (HEIGHT, WIDTH))
    assert teacher(PIXELS).shape == (3, 16, 2, 3)
    for ask in (lambda: teacher.layers(PIXELS, 1), lambda: teacher.attention(PIXELS)):
        with pytest.raises(M3Error, match=r"has no class token, .*; choose a model that was trained with one"):
            ask()


def test_more_blocks_than_it_has_are_refused(folder: str) -> None:
    with pytest.raises(M3Error, match="has 3 blocks, not 4; lower `layers`"):
        open_teacher(f"m3:{folder}", None, (HEIGHT, WIDTH)).layers(PIXELS, 4)
