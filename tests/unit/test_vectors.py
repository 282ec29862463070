"""Vectors: checked and normalised as computed by hand; a teacher's pooled features through a multi-head codebook."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from m3 import M3Error, M3Model, M3Processor, M3Tokenizer
from m3.data.world import WorldSource
from m3.data.world.scene import Split
from m3.modalities.vector import HEIGHT, Vector
from m3.parts import build_spec
from m3.plugins import Signal
from m3.recipe import recipe_from
from m3.teachers import open_teacher
from m3.tokenizers.vector import Vector as VectorTokenizer
from m3.train import train

HEADS = 4


# ------------------------------------------------------------------------------------------- the modality


def test_vectors_are_normalised_as_computed_by_hand() -> None:
    raw = torch.tensor([[3.0, -4.0, 0.0, 12.0]])
    fixed = Vector(Vector.Spec(size=4, mean=(1, 0, 0, 2), std=2.0))
    assert fixed.normalise(raw).tolist() == [[[1.0], [-2.0], [0.0], [5.0]]]
    unit = Vector(Vector.Spec(size=4, normalise="unit"))
    # Length 13, and sqrt(4) = 2: each number times 2 / 13.
    torch.testing.assert_close(unit.normalise(raw), torch.tensor([[[6.0], [-8.0], [0.0], [24.0]]]) / 13)
    assert unit.normalise(unit.blank(2)).tolist() == [[[0.0]] * 4] * 2


def test_statistics_are_those_of_each_number() -> None:
    part = Vector(Vector.Spec(size=2))
    assert part.statistics(torch.tensor([[1.0, 5.0], [3.0, -1.0]])).tolist() == [[2, 2], [4, 4], [10, 26]]


def test_unit_vectors_score_two_times_one_minus_the_cosine() -> None:
    part = Vector(Vector.Spec(size=2, normalise="unit"))
    a, b = part.normalise(torch.tensor([[1.0, 0.0]])), part.normalise(torch.tensor([[3.0, 4.0]]))
    weight = torch.ones(1, 1, dtype=torch.bool)
    assert part.finish_score(part.score(a, b, weight)) == pytest.approx(2 * (1 - 0.6))


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (np.arange(5.0), "a vector must have shape (4,), got (5,); set `size` to its length"),
        (np.arange(4.0).reshape(1, 4), "a vector must have shape (4,), got (1, 4)"),
        (np.array([1.0, np.nan, 0.0, 2.0]), "a vector has NaN or infinite numbers"),
        (["a", "b", "c", "d"], "a vector must be one array of numbers"),
    ],
)
def test_what_is_no_vector_of_this_size_is_refused(sample: object, sentence: str) -> None:
    with pytest.raises(M3Error, match=re.escape(sentence)):
        Vector(Vector.Spec(size=4)).to_raw(sample)


def test_a_mean_of_another_length_is_refused() -> None:
    with pytest.raises(M3Error, match="`mean` has 3 numbers, but `size` is 4; give one or all"):
        build_spec("modalities", {"type": "vector", "size": 4, "mean": [1, 2, 3]}, "modalities.own")


def test_files_of_numpy_are_read(tmp_path: Path) -> None:
    part, given = Vector(Vector.Spec(size=3)), np.array([2, 0, -7])
    np.save(tmp_path / "a.npy", given)
    np.savez(tmp_path / "b.npz", feature=given)
    np.savez(tmp_path / "c.npz", one=given, two=given)
    assert part.to_raw(part.load(tmp_path / "a.npy")).tolist() == [2, 0, -7]
    assert part.to_raw(part.load(tmp_path / "b.npz")).tolist() == [2, 0, -7]
    with pytest.raises(M3Error, match="must hold one array, this one holds 2"):
        part.load(tmp_path / "c.npz")


def test_bars_point_up_for_positive_numbers_and_are_as_long_as_the_number() -> None:
    picture = Vector(Vector.Spec(size=3)).show(torch.tensor([[3.0], [-1.5], [0.0]]))
    is_bar = (picture != 255).any(-1)
    half = HEIGHT // 2
    assert picture.shape == (HEIGHT, 128, 3)
    assert is_bar[:half, 0].all(), "3 fills the upper half"
    assert not is_bar[half:, 0].any()
    assert is_bar[half : half + half // 2, 2].all(), "-1.5 fills half of the lower half"
    assert is_bar[:, 2].sum() == half // 2
    assert not is_bar[:, 4:].any()


def test_the_tokenizer_makes_each_vector_a_token() -> None:
    part = VectorTokenizer(VectorTokenizer.Spec(), Signal("values", 3, (1,)), 8)
    signal = torch.arange(12.0).view(2, 3, 2)
    tokens = part.tokenize(signal)
    assert tokens.values.tolist() == [[[0, 2, 4], [1, 3, 5]], [[6, 8, 10], [7, 9, 11]]]
    assert torch.equal(part.detokenize(tokens.values, tokens.positions, (2,)), signal)
    with pytest.raises(M3Error, match="reads channels over one axis, got values over 2; use `patch` for maps"):
        VectorTokenizer(VectorTokenizer.Spec(), Signal("values", 3, (4, 4)), 8)


# ------------------------------------------------------------------------------ codes of global features


def features(split: Split, count: int) -> np.ndarray:
    """Pooled features (count, 192) of a random-weight teacher, of the world's images."""
    scenes = WorldSource(1, split, count, 32, 32, signals=("image",))
    pixels = torch.stack([torch.from_numpy(scenes.read(i)["signals"]["image"]).permute(2, 0, 1) for i in range(count)])
    teacher = open_teacher("timm:vit_tiny_patch16_224", None, (32, 32))
    return teacher(pixels).mean((2, 3)).numpy()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    splits: tuple[tuple[Split, str, int], ...] = (("train", "train", 512), ("held_out", "val", 64))
    for split, name, count in splits:
        (folder / "data" / name / "feature").mkdir(parents=True)
        for number, vector in enumerate(features(split, count)):
            np.save(folder / "data" / name / "feature" / f"{number:04d}.npy", vector)
    known = np.stack([np.load(path) for path in sorted((folder / "data" / "train" / "feature").glob("*.npy"))])
    recipe = {
        "name": "feature",
        "out": str(folder / "run"),
        "modalities": {
            "feature": {
                "type": "vector",
                "size": 192,
                "mean": known.mean(0).tolist(),
                "std": known.std(0).tolist(),
                "tokenizer": {"type": "vector"},
            }
        },
        "backbone": {"width": 64, "heads": 2},
        "objectives": {
            "autoencode": {
                "type": "autoencode",
                "of": "feature",
                "coder": {"type": "mlp", "depth": 2},
                "quantiser": {"type": "vq", "codes": 64, "width": 8 * HEADS, "heads": HEADS, "decay": 0.9},
            }
        },
        "data": {"source": "folder", "root": str(folder / "data"), "workers": 0},
        "train": {"steps": 120, "batch_size": 64, "lr": 2e-3, "warmup": 10, "threads": 1, "trackers": []},
        "evaluate": {"samples": 64, "tasks": {"codes": {"target": "feature", "baseline": "constant"}}},
    }
    rows = {row.task: row for row in train(recipe_from(recipe, "test"))}
    assert rows["codes"].measure == "MSE"
    assert rows["codes"].model < 0.5 * rows["codes"].baseline
    assert rows["feature codes in use"].model > 0.5
    assert (folder / "run" / "preview.png").stat().st_size > 1000
    return folder


def test_a_vector_has_a_code_from_each_head_and_is_told_from_others_by_them(run: Path) -> None:
    tokenizer = M3Tokenizer.from_pretrained(run / "run" / "model")
    assert (tokenizer.codes, tokenizer.grid) == (64, (1, HEADS))
    truth = tokenizer.modality.normalise(torch.from_numpy(features("held_out", 32)))
    indices = tokenizer.encode(truth)
    assert indices.shape == (32, HEADS)
    decoded = tokenizer.decode(indices)
    assert decoded.shape == truth.shape == (32, 192, 1)
    distance = torch.cdist(decoded[..., 0], truth[..., 0])
    assert (distance.argmin(1) == torch.arange(32)).float().mean() > 0.5, "most are nearest to themselves of 32"


def test_a_model_sees_and_predicts_the_codes_of_a_vector(run: Path, tmp_path: Path) -> None:
    vector = M3Model.from_pretrained(run / "run" / "model").config.modalities["feature"]
    recipe = {
        "name": "codes",
        "out": str(tmp_path / "run"),
        "modalities": {
            "feature": {**vector, "tokenizer": {"type": "codes", "path": str(run / "run" / "model")}},
        },
        "backbone": {"width": 32, "depth": 1, "heads": 2},
        "objectives": {
            "reconstruct": {
                "type": "reconstruct",
                "masking": {"type": "fixed", "visible": 0.5},
                "decoder": {"type": "cross_decoder", "width": 16, "depth": 1, "heads": 2},
                "targets": {"feature": {"loss": "cross_entropy"}},
            }
        },
        "data": {"source": "folder", "root": str(run / "data"), "workers": 0},
        "train": {"steps": 3, "batch_size": 8, "threads": 1, "trackers": []},
        "evaluate": {"samples": 8, "preview_rows": 2},
    }
    train(recipe_from(recipe, "test"))
    model = M3Model.from_pretrained(tmp_path / "run" / "model")
    vectors = list(features("held_out", 2))
    batch = M3Processor.from_pretrained(tmp_path / "run" / "model")(feature=vectors)
    assert model.tokenise(batch)["feature"].values.shape == (2, HEADS, 1)
    assert model.reconstruct(batch).predicted["feature"].shape == (2, 192, 1)
