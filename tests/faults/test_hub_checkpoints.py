"""Published checkpoints straight from the Hub: what is asked for, and what is said when nothing is there."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import save_file

from m3 import convert
from m3.errors import M3Error
from m3.foreign import checkpoint
from m3.initialise import load_weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> list[list[str]]:
    """A Hub of one repository, `timm/tiny`, with weights and settings of timm; the patterns that were asked for."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    folder, asked = tmp_path / "tiny", []
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 0}))

    class Api:
        def list_repo_files(self, name: str) -> list[str]:
            if name != "timm/tiny":
                raise OSError(f"404: {name} is unknown")
            return ["config.json", "model.safetensors", "pytorch_model.bin"]

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("m3.initialise.hf_hub_download", lambda name, file: str(folder / file))
    return asked


def test_a_repository_is_read_and_no_pickle_of_it(hub):
    model = convert.load("timm/tiny")
    assert hub == [["*.json", "README.md", "*.safetensors"]]
    assert tuple(model.config.modalities["image"]["size"]) == (32, 32)
    assert model.backbone.spec.depth == 2


def test_training_can_start_from_a_repository(hub):
    model = convert.load("timm/tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert "ViT in timm's names" in load_weights(model, "timm/tiny")
    assert model.backbone.blocks[1].attention.qkv.weight.abs().sum() > 0


def test_a_name_that_is_nowhere_is_one_sentence(hub):
    with pytest.raises(M3Error, match=r"`timm/other` is no file here, and the Hub gives nothing of that name \(404"):
        convert.load("timm/other")


def test_a_missing_file_never_asks_the_hub(hub):
    with pytest.raises(M3Error, match=r"weights/vit.pth is not there"):
        checkpoint.read_foreign("weights/vit.pth")
    assert hub == []
    assert issubclass(RepositoryNotFoundError, OSError)
