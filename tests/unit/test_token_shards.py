"""From tokenizers to a model that trains on shards of their codes, with captions beside them."""

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3 import M3Config, M3Error, M3Model, M3Processor, M3Tokenizer
from m3.data.world import WorldSource
from m3.network import build_modalities
from m3.recipe import load_recipe, recipe_from
from m3.testing import check_modality
from m3.tokenize_data import tokenize
from m3.train import build_model, train

SMALL = ["backbone.width=32", "backbone.depth=1", "backbone.heads=2"]
KINDS = {
    "image": ("tokenizer_image_fsq", ["objectives.autoencode.quantiser.levels=[4,3]"]),
    "depth": ("tokenizer_depth_vq", ["objectives.autoencode.quantiser.codes=40"]),
    "semantic": ("tokenizer_semantic_vq", ["objectives.autoencode.quantiser.codes=40"]),
    "normals": ("tokenizer_normals_vq", ["objectives.autoencode.quantiser.codes=40"]),
    "audio": ("tokenizer_audio_vq", ["objectives.autoencode.quantiser.codes=40"]),
}
MAPS = ("image", "depth", "semantic", "normals")
DATA = ["data.samples=24", "data.held_out=8", "data.workers=0"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer of each kind, with the weights it starts with."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, (recipe, own) in KINDS.items():
        size = [f"modalities.{name}.size=16", f"modalities.{name}.tokenizer.size=4"]
        size = ["modalities.audio.tokenizer.size=16"] if name == "audio" else size
        build_model(load_recipe(recipe, [*SMALL, *own, *size])).save_pretrained(root / name)
    return {name: root / name for name in KINDS}


@pytest.fixture(scope="module")
def shards(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's maps as codes and its captions as they are."""
    out = tmp_path_factory.mktemp("tokens")
    data = load_recipe("everything_tiny", DATA)
    for name in MAPS:
        tokenize(str(folders[name]), data, out, per_shard=10, copied=["text"] if name == "image" else [])
    return out


def members(path: Path) -> dict[str, np.ndarray]:
    with tarfile.open(path) as tar:
        return {m.name: np.load(io.BytesIO(file.read())) for m in tar if (file := tar.extractfile(m))}


def on_codes(folders: dict[str, Path], text: dict[str, Any], **data: Any) -> dict[str, Any]:
    """A recipe in the manner of 4M: codes of four maps, and captions."""
    coded = {n: {"type": "codes", "path": str(folders[n]), "tokenizer": {"type": "embedding"}} for n in MAPS}
    return {
        "name": "codes",
        "modalities": {**coded, "text": text},
        "backbone": {"width": 32, "depth": 1, "heads": 2},
        "objectives": {
            "reconstruct": {
                "type": "reconstruct",
                "masking": {"type": "dirichlet", "visible": 20},
                "decoder": {"type": "cross_decoder", "width": 16, "depth": 1, "heads": 2},
                "targets": {name: {"loss": "cross_entropy"} for name in (*MAPS, "text")},
            }
        },
        "data": {"held_out": 8, "workers": 0, **data},
        "train": {"steps": 3, "batch_size": 8, "threads": 1, "trackers": [], "precision": "fp32"},
        "evaluate": {
            "samples": 8,
            "preview_rows": 2,
            "tasks": {
                "depth from image": {"target": "depth", "visible": {"image": 1.0}, "baseline": "average_map"},
                "semantic from image": {"target": "semantic", "visible": {"image": 1.0}, "baseline": "constant"},
            },
        },
    }


def test_a_model_trains_on_shards_of_codes_and_then_reads_pictures(
    folders: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    text = load_recipe("everything_tiny").modalities["text"]
    recipe = on_codes(folders, text, source="shards", root=str(shards)) | {"out": str(tmp_path / "run")}
    rows = train(recipe_from(recipe, "test"))
    assert [row.measure for row in rows] == ["L1 error", "mIoU"]
    assert (tmp_path / "run" / "preview.png").stat().st_size > 1000
    model = M3Model.from_pretrained(tmp_path / "run" / "model")
    assert (
        model.config.modalities["image"]["hash"] == json.loads((shards / "tokens.image.json").read_text())["tokenizer"]
    )
    processor = M3Processor.from_pretrained(tmp_path / "run" / "model")
    scene = WorldSource(0, "train", 24, 16, 16).read(3)["signals"]
    batch = processor(image=scene["image"], text="a red cube")
    expected = M3Tokenizer.from_pretrained(folders["image"]).encode(batch_of(folders["image"], scene["image"]))
    assert model.tokenise(batch)["image"].values.flatten().tolist() == expected[0].tolist()
    assert model.reconstruct(batch).predicted["depth"].shape == (1, 4, 4)
    config = M3Config.from_pretrained(tmp_path / "run" / "model")
    for name in MAPS:
        config.modalities[name]["path"] = f"gone/{name}"
    away = M3Model.from_pretrained(tmp_path / "run" / "model", config=config)
    assert torch.equal(away.encode(batch).sequence, model.encode(batch).sequence), "codes need no tokenizer"
    with pytest.raises(M3Error, match=r"there is no tokenizer in `gone/image`"):
        M3Processor(config.modalities)(image=scene["image"])


def batch_of(folder: Path, picture: np.ndarray) -> torch.Tensor:
    modality = M3Tokenizer.from_pretrained(folder).modality
    return modality.normalise(modality.to_raw(picture).unsqueeze(0))


def test_shards_hold_what_codes_on_the_fly_are(folders: dict[str, Path], shards: Path) -> None:
    """The same recipe reads the world itself; its codes are those of the shards."""
    parts = build_modalities({"own": {"type": "codes", "path": str(folders["normals"])}})
    scene = WorldSource(0, "train", 24, 16, 16).read(3)["signals"]["normals"]
    stored = members(shards / "train" / "normals" / "000000.tar")["world/train/000003.npy"]
    assert parts["own"].to_raw(stored).tolist() == parts["own"].to_raw(scene).tolist()
    text = load_recipe("everything_tiny").modalities["text"]
    model = build_model(recipe_from(on_codes(folders, text, samples=24), "test"))
    from m3.data.sources.world import World
    from m3.recipe import DataSpec

    world = World(DataSpec(samples=24), model.modalities, 0, "train")
    assert set(world.read(3).signals) == {*MAPS, "text"}


def test_captions_lie_beside_the_codes(shards: Path) -> None:
    with tarfile.open(shards / "val" / "text" / "000000.tar") as tar:
        rows = tar.getmembers()
        file = tar.extractfile(rows[2])
        assert file is not None
        caption = file.read().decode()
    assert rows[2].name == "world/held_out/000002.txt"
    assert caption == WorldSource(0, "held_out", 8, 16, 16).read(2)["signals"]["text"]


def test_one_folder_holds_one_data_set(folders: dict[str, Path], shards: Path) -> None:
    for change, key in (["data.samples=9"], "data"), (["seed=4"], "seed"):
        with pytest.raises(M3Error, match=f"holds codes made with another `{key}`"):
            tokenize(str(folders["audio"]), load_recipe("everything_tiny", [*DATA, *change]), shards, per_shard=10)
    # How it is loaded and cropped in training says nothing of the samples.
    tokenize(str(folders["depth"]), load_recipe("everything_tiny", [*DATA, "data.workers=1"]), shards, per_shard=10)
    with pytest.raises(M3Error, match=r"--copy names `txt`, which is no modality of the recipe.* `text`"):
        tokenize(str(folders["depth"]), load_recipe("everything_tiny", DATA), shards, 10, ["txt"])


@pytest.mark.parametrize("name", ["depth", "semantic"])
def test_codes_keep_the_contracts_of_modalities(folders: dict[str, Path], name: str) -> None:
    entry = {"type": "codes", "path": str(folders[name])}
    codes = build_modalities({"own": entry})["own"].signal.classes
    samples = [np.arange(i, i + 16).reshape(4, 4) * 7 % codes for i in range(4)]
    check_modality(entry, samples, {"type": "embedding"})


def test_numbers_beyond_the_codebook_are_refused(folders: dict[str, Path]) -> None:
    part = build_modalities({"own": {"type": "codes", "path": str(folders["depth"])}})["own"]
    sentence = "codes must lie in 0 ... 39, got 0 to 40; they were made by another tokenizer"
    with pytest.raises(M3Error, match=re.escape(sentence)):
        part.to_raw(np.arange(0, 160, 10).reshape(4, 4).clip(max=40))


def test_a_short_sound_has_fewer_codes_and_the_rest_does_not_exist(folders: dict[str, Path], tmp_path: Path) -> None:
    import wave

    (tmp_path / "data" / "train" / "audio").mkdir(parents=True)
    (tmp_path / "data" / "val" / "audio").mkdir(parents=True)
    for split, name, seconds in (("train", "long", 2.5), ("train", "short", 0.9), ("val", "other", 1.0)):
        samples = (np.sin(np.arange(int(16000 * seconds)) * 0.2) * 9000).astype("<i2")
        with wave.open(str(tmp_path / "data" / split / "audio" / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, len(samples), "NONE", ""))
            file.writeframes(samples.tobytes())
    recipe = load_recipe("tokenizer_audio_vq", ["data.source=folder", f"data.root={tmp_path / 'data'}"])
    tokenize(str(folders["audio"]), recipe, tmp_path / "out", per_shard=10)
    codes = members(tmp_path / "out" / "train" / "audio" / "000000.tar")
    # 0.9 s are 88 frames of 10 ms in windows of 25 ms: six patches of 16 along time, the last one half filled.
    assert {name: x.shape for name, x in codes.items()} == {"long.npy": (12, 4), "short.npy": (6, 4)}
    part = build_modalities({"own": {"type": "codes", "path": str(folders["audio"])}})["own"]
    raw = part.to_raw(codes["short.npy"])
    assert raw.shape == (12, 4)
    assert raw[6:].unique().tolist() == [-1]
    assert part.show(part.normalise(raw.unsqueeze(0))[0]).shape == (64, 192, 3)


def test_feature_maps_of_a_teacher_are_told_by_codes(tmp_path: Path) -> None:
    """As 4M's tokenizers of CLIP and DINO; the teacher's weights are random, since none come with the code."""
    feature = "{type: feature_map, teacher: 'timm:vit_tiny_patch16_224', size: 32, tokenizer: {type: patch, size: 1}}"
    own = ["modalities.depth=null", f"modalities.feature={feature}", "objectives.autoencode.of=feature"]
    own += ["objectives.autoencode.quantiser={type: vq, codes: 64, width: 16}", "evaluate.samples=32"]
    own += ["evaluate.tasks.depth through codes=null", "evaluate.tasks.depth, harder=null"]
    own += ["evaluate.tasks.feature={target: feature, baseline: average_map}"]
    own += ["train.steps=40", "train.batch_size=16", "train.warmup=5", "train.lr=2e-3", "train.threads=1"]
    own += ["train.trackers=[]", "data.samples=256", "data.held_out=32", "data.workers=0", f"out={tmp_path / 'run'}"]
    rows = train(load_recipe("tokenizer_depth_vq", [*SMALL, *own]))
    table = {row.task: row for row in rows}
    assert table["feature"].measure == "cosine"
    assert table["feature"].is_won
    assert table["feature codes in use"].model > 0.1
    assert (tmp_path / "run" / "preview.png").stat().st_size > 1000
    tokenize(str(tmp_path / "run" / "model"), load_recipe("everything_tiny", DATA), tmp_path / "out", per_shard=30)
    codes = members(tmp_path / "out" / "train" / "feature" / "000000.tar")
    assert {x.shape for x in codes.values()} == {(2, 2)}
    assert len(codes) == 24
