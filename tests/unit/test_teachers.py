"""Frozen teachers: their features are the library's own, and no part of the model that is trained or saved."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from m3.config import M3Config
from m3.errors import M3Error
from m3.model import M3Model
from m3.network import build_modalities
from m3.teachers import open_teacher

NAME, SIZE = "vit_tiny_patch16_224", 32
PIXELS = (torch.arange(2 * 3 * SIZE * SIZE) * 7 % 251).to(torch.uint8).reshape(2, 3, SIZE, SIZE)


def test_features_are_timms_last_layer() -> None:
    teacher = open_teacher(f"timm:{NAME}", None, (SIZE, SIZE))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (teacher.mean, teacher.std))
    with torch.no_grad():
        tokens = teacher.network.forward_features((PIXELS.float() / 255 - mean) / std)[:, 1:]  # type: ignore[operator]
    expected = tokens.transpose(1, 2).reshape(2, 192, 2, 2)
    torch.testing.assert_close(teacher(PIXELS), expected, rtol=1e-5, atol=1e-5)


def test_working_out_shapes_leaves_the_shared_network_its_weights() -> None:
    """`m3 show` runs on the meta device; the teacher is one for the whole process."""
    open_teacher.cache_clear()
    with torch.device("meta"):
        teacher = open_teacher(f"timm:{NAME}", None, (SIZE, SIZE))
        assert teacher(torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)).shape == (2, 192, 2, 2)
    expected = open_teacher.__wrapped__(f"timm:{NAME}", None, (SIZE, SIZE))(PIXELS)
    assert torch.equal(teacher(PIXELS), expected)


def test_every_vector_is_standardised() -> None:
    part = build_modalities({"f": {"type": "feature_map", "teacher": f"timm:{NAME}", "size": SIZE}})["f"]
    features = part.normalise(PIXELS)
    torch.testing.assert_close(features.mean(1), torch.zeros(2, 2, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(features.std(1, correction=0), torch.ones(2, 2, 2), rtol=0, atol=1e-3)
    assert part.signal.size == (2, 2)


def test_weights_come_from_a_file_and_foreign_ones_are_refused(tmp_path: Path) -> None:
    other = timm.create_model(NAME, num_classes=0, img_size=SIZE)
    save_file(other.state_dict(), tmp_path / "good.safetensors")
    loaded = open_teacher(f"timm:{NAME}", str(tmp_path / "good.safetensors"), (SIZE, SIZE))
    assert torch.equal(loaded.network.blocks[3].mlp.fc1.weight, other.blocks[3].mlp.fc1.weight)  # type: ignore[index,union-attr]
    save_file({"a": torch.arange(3.0)}, tmp_path / "bad.safetensors")
    with pytest.raises(M3Error, match=r"bad.safetensors is not a state of the teacher `timm:.*` is missing|is not a"):
        open_teacher(f"timm:{NAME}", str(tmp_path / "bad.safetensors"), (SIZE, SIZE))
    with pytest.raises(M3Error, match=r"there is no file .*nowhere.pth for the weights of the teacher"):
        open_teacher(f"timm:{NAME}", str(tmp_path / "nowhere.pth"), (SIZE, SIZE))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vit", "^the teacher `vit` must be written as timm:MODEL, open_clip:MODEL or m3:FOLDER.$"),
        ("timm:vit_tiny_patch16_225", "^timm knows no model `vit_tiny_patch16_225`. Did you mean `vit_tiny_patch16_"),
        ("open_clip:ViT-B-33", "^open_clip knows no model `ViT-B-33`. Did you mean `ViT-B-32"),
    ],
)
def test_a_wrong_name_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        open_teacher(name, None, (SIZE, SIZE))


def test_the_teacher_is_no_part_of_the_model() -> None:
    settings = {
        "type": "feature_map",
        "teacher": f"timm:{NAME}",
        "size": SIZE,
        "tokenizer": {"type": "patch", "size": 1},
    }
    image = {"type": "image", "size": SIZE, "tokenizer": {"type": "patch", "size": 8}}
    model = M3Model(
        M3Config(
            modalities={"image": image, "features": settings},
            backbone={"width": 16, "depth": 1, "heads": 2},
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "inputs": ["image"],
                    "decoder": {"type": "cross_decoder", "width": 16, "depth": 1, "heads": 2},
                    "targets": {"features": {"loss": "smooth_l1"}},
                }
            },
        )
    )
    assert sum(p.numel() for p in model.parameters()) < 50_000
    assert not [key for key in model.state_dict() if "teacher" in key]
