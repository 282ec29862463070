"""Regions of a detector: files, crops, tokens, labels as targets at other tokens, mistakes.

Letters: R regions, F values of a feature, K classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from m3 import M3Config, M3Model
from m3.data.files import Member, encode
from m3.data.world import WorldSource
from m3.data.world.scene import SHAPES
from m3.errors import M3Error
from m3.modalities.region_labels import RegionLabels
from m3.modalities.regions import Regions
from m3.plugins import Crop
from m3.processor import M3Processor
from m3.targets import MostLikely, SoftLabels
from m3.tokenizers.region import Region
from m3.types import Batch, Tokens

F, K = 3, 4
REGIONS = Regions(Regions.Spec(features=F, count=4))
LABELS = RegionLabels(RegionLabels.Spec(classes=K, count=4))


def sample(count: int = 2) -> dict[str, np.ndarray]:
    """Boxes 0.1 wide and 0.2 high, one in each tenth from the left."""
    left = np.arange(count) / 10
    return {
        "features": np.arange(count * F, dtype=np.float32).reshape(count, F),
        "boxes": np.stack([left, np.full(count, 0.5), left + 0.1, np.full(count, 0.7)], 1),
        "soft_labels": np.eye(K)[np.arange(count) % K],
    }


def test_both_modalities_read_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **sample())
    raw = REGIONS.to_raw(REGIONS.load(path))
    torch.testing.assert_close(raw, torch.tensor([[0, 1, 2, 0, 0.5, 0.1, 0.7], [3, 4, 5, 0.1, 0.5, 0.2, 0.7]]))
    labels = LABELS.to_raw(LABELS.load(path))
    torch.testing.assert_close(labels[:, :K], torch.eye(K)[:2])
    torch.testing.assert_close(labels[:, K:], raw[:, F:])
    torch.testing.assert_close(REGIONS.to_raw(raw.numpy()), raw)


def test_a_mapping_is_stored_as_a_file_that_is_read_again() -> None:
    stored = encode(sample())
    assert stored.ending == ".npz"
    found = REGIONS.load(Member(stored.data, "a.npz"))
    assert {name: value.tolist() for name, value in found.items()} == {n: v.tolist() for n, v in sample().items()}


def test_a_crop_moves_cuts_and_drops_regions_and_their_labels_alike() -> None:
    """The left half but for its first tenth: the first box is outside, the second 0.25 wide behind the left edge."""
    crop = Crop((0.5, 0.1, 0.4, 0.4))
    found = REGIONS.fit(REGIONS.to_raw(sample(6)), crop)
    torch.testing.assert_close(found[:, 0], torch.tensor([3.0, 6.0, 9.0, 12.0]))
    torch.testing.assert_close(found[0, F:], torch.tensor([0.0, 0.0, 0.25, 0.5]))
    labels = LABELS.fit(LABELS.to_raw(sample(6)), crop)
    torch.testing.assert_close(labels[:, K:], found[:, F:])
    assert labels[:, :K].argmax(1).tolist() == [1, 2, 3, 0]
    assert REGIONS.fit(REGIONS.to_raw(sample(6)), Crop()).shape == (4, F + 4), "no more than `count`"
    assert REGIONS.fit(REGIONS.to_raw(sample(1)), Crop((0.0, 0.5, 0.2, 0.2))).isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((2, 5))}, r"shape \(regions, 3 \+ 4\).*got float64 of shape \(2, 9\)"),
        ({"boxes": np.zeros((3, 4))}, r"`boxes` \(regions, 4\), got \(2, 3\) and \(3, 4\)"),
        ({"boxes": np.array([[0.5, 0, 0.4, 1]] * 2)}, "left <= right"),
        ({"boxes": np.array([[0, 0, 300, 200]] * 2)}, r"boxes in \[0, 1\]"),
        ({"features": np.full((2, F), np.nan)}, "must be finite"),
        ({"features": np.zeros((0, F)), "boxes": np.zeros((0, 4))}, "a sample without any lacks the modality"),
    ],
)
def test_wrong_regions_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(M3Error, match=message):
        REGIONS.to_raw(sample() | changes)


def test_a_file_without_labels_is_named() -> None:
    with pytest.raises(M3Error, match="regions need an array `soft_labels`, got features, boxes"):
        LABELS.to_raw({name: value for name, value in sample().items() if name != "soft_labels"})


def test_a_token_is_a_region_and_its_position_the_seven_numbers_of_its_box() -> None:
    batch = torch.full((2, 3, F + 4), torch.nan)
    batch[0, :2], batch[1, :1] = REGIONS.to_raw(sample()), REGIONS.to_raw(sample(1))
    tokens = Region(Region.Spec(), REGIONS.signal, 8).tokenize(batch)
    assert tokens.values.shape == (2, 3, F)
    assert tokens.is_valid is not None
    assert tokens.is_valid.tolist() == [[True, True, False], [True, False, False]]
    torch.testing.assert_close(tokens.positions[0, 1], torch.tensor([0.1, 0.5, 0.2, 0.7, 0.1, 0.2, 0.02]))
    assert tokens.positions[1, 2].tolist() == [0.0] * 7


def test_label_targets() -> None:
    values = torch.tensor([[[0.7, 0.1, 0.2, 0.0], [0.1, 0.6, 0.2, 0.1], [torch.nan] * 4]])
    tokens = Tokens(values, torch.zeros(1, 3, 7))
    index = torch.tensor([[2, 0, 1]])
    part = Region(Region.Spec(), LABELS.signal, 8)
    assert SoftLabels(SoftLabels.Spec(), part)(tokens, index)[0, 1].tolist() == values[0, 0].tolist()
    assert MostLikely(MostLikely.Spec(), part)(tokens, index).tolist() == [[[-1], [0], [1]]]
    assert MostLikely(MostLikely.Spec(skip=1), part)(tokens, index).tolist() == [[[-1], [2], [1]]]
    with pytest.raises(M3Error, match="skips all of 4 classes"):
        MostLikely(MostLikely.Spec(skip=4), part)


TOKENIZER = {"tokenizer": {"type": "region"}}
ENTRIES = {
    "regions": {"type": "regions", "features": F, "count": 4, **TOKENIZER},
    "region_labels": {"type": "region_labels", "classes": K, "count": 4, **TOKENIZER},
}
TARGET = {"of": "region_labels", "at": "regions", "target": {"type": "soft_labels"}, "loss": "kl"}


def make(**target) -> M3Model:
    torch.manual_seed(1)
    objective = {
        "type": "reconstruct",
        "inputs": ["regions"],
        "masking": {"type": "fixed", "visible": 0.5, "hidden": "replace"},
        "decoder": {"type": "head"},
        "targets": {"labels": {**TARGET, **target}},
    }
    small = {"width": 16, "depth": 1, "heads": 2}
    return M3Model(M3Config(modalities=ENTRIES, backbone=small, objectives={"mrc": objective}))


def batch_of(counts: list[int], labelled: list[bool] | None = None) -> Batch:
    batch = M3Processor(ENTRIES)(regions=[sample(n) for n in counts], region_labels=[sample(n) for n in counts])
    there = {} if labelled is None else {"region_labels": torch.tensor(labelled)}
    return Batch(batch.signals, batch.keys, there)


def test_labels_are_predicted_at_the_hidden_regions() -> None:
    model = make()
    prepared = model.prepare(batch_of([4, 2, 3], [True, False, True]))
    # Half of the regions are hidden, the larger half of three; the second sample has no labels. K values a region.
    assert model.counts(prepared) == {"mrc/labels": torch.tensor(K * (2 + 2))}
    model(prepared).loss.backward()
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("tokenizers.region_labels")
    }
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert not any("region_labels" in name for name in model.positions)
    result = model.eval().reconstruct(batch_of([4, 2, 3]))
    shares = result.values["labels"]
    assert shares.shape == (3, 4, K)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 4))
    assert result.predicted["labels"].shape == (3, 4, K + 4)
    assert model.encode(batch_of([4, 2, 3])).states.shape == (3, 4, 16), "what is only predicted is not encoded"


def test_the_kl_of_a_head_that_says_the_same_of_all_classes() -> None:
    """One class is certain: log K - 0 per region, whatever the region."""
    model = make()
    for p in model.objectives["mrc"].decoders["labels"].output.parameters():
        torch.nn.init.zeros_(p)
    part = model(batch_of([4, 3])).parts.parts["mrc/labels"]
    assert (part.sum / part.count).item() == pytest.approx(np.log(K))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": "region_labels"}, "region_labels, which the encoder never sees"),
        ({"at": "boxes"}, "targets.labels.at: `boxes` is no input of the objective"),
        ({"loss": "cross_entropy"}, "holds probabilities, which loss `cross_entropy` can't compare"),
        ({"target": {"type": "most_likely"}}, "holds classes, which loss `kl` can't compare"),
        ({"target": {"type": "values"}}, "holds values, which loss `kl` can't compare"),
    ],
)
def test_mistakes_in_targets_are_named(changes: dict, message: str) -> None:
    with pytest.raises(M3Error, match=message):
        make(**changes)


def test_labels_of_another_number_of_regions_are_refused() -> None:
    batch = batch_of([4, 3])
    shorter = {**batch.signals, "region_labels": batch.signals["region_labels"][:, :3]}
    with pytest.raises(M3Error, match="region_labels has 3 of them, regions 4; make them equal"):
        make()(Batch(shorter, batch.keys))


def test_scores_and_pictures() -> None:
    truth = torch.full((1, 3, K + 4), torch.nan)
    truth[0, :2] = LABELS.to_raw(sample())
    guess = truth.nan_to_num(0.0)
    guess[0, 0, :K] = torch.tensor([0.9, 0.1, 0.0, 0.0])  # the background does not count: class 1 comes first
    sums = LABELS.score(guess, truth, torch.ones(1, 3).bool())
    assert sums.tolist() == [2.0, 2.0]
    guess[0, 1, :K] = torch.tensor([0.0, 0.1, 0.9, 0.0])
    assert LABELS.finish_score(LABELS.score(guess, truth, torch.ones(1, 3).bool())) == 0.5
    own = REGIONS.to_raw(sample()).unsqueeze(0)
    off = own.clone()
    off[0, 1, 0] += 3
    assert REGIONS.finish_score(REGIONS.score(off, own, torch.tensor([[False, True]]))) == pytest.approx(9 / F)


def test_regions_of_the_world_show_its_objects() -> None:
    source = WorldSource(0, "train", 3, 64, 64, signals=("regions", "boxes", "image"))
    for index in range(3):
        signals = source.read(index)["signals"]
        found = signals["regions"]
        assert found["features"].shape == (len(signals["boxes"]), 192)
        np.testing.assert_allclose(found["boxes"], np.array([box[1:] for box in signals["boxes"]], np.float32))
        np.testing.assert_allclose(found["soft_labels"].sum(1), 1, atol=1e-6)
        assert [SHAPES[k - 1] for k in found["soft_labels"].argmax(1)] == [box[0] for box in signals["boxes"]]
        x0, y0, x1, y1 = found["boxes"][0] * 64
        row, column = int(y0 + 3.5 / 8 * (y1 - y0)), int(x0 + 4.5 / 8 * (x1 - x0))
        place = found["features"][0].reshape(8, 8, 3)[3, 4]
        np.testing.assert_allclose(place, signals["image"][row, column] / 255, atol=1e-6)
