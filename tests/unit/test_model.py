"""The model as its users meet it: save and load, any subset of modalities, masks of their own, other sizes."""

from pathlib import Path

import pytest
import torch

from m3.check import shrink
from m3.model import M3Model
from m3.recipe import load_recipe
from m3.train import build_model
from m3.types import Batch


@pytest.fixture
def model() -> M3Model:
    return build_model(shrink(load_recipe("multimae_tiny"), Path("unused"))).eval()


def batch(count: int, height: int = 64, width: int = 64) -> Batch:
    random = torch.Generator().manual_seed(3)
    signals = {
        "image": torch.randint(256, (count, 3, height, width), generator=random, dtype=torch.uint8),
        "depth": torch.rand((count, height, width), generator=random) * 5,
        "semantic": torch.randint(6, (count, height // 2, width // 2), generator=random, dtype=torch.uint8),
    }
    return Batch(signals, torch.arange(count))


def test_saved_and_loaded_is_the_same_to_the_last_bit(model: M3Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = M3Model.from_pretrained(tmp_path).eval()
    given = batch(3)
    assert torch.equal(loaded(given).loss, model(given).loss)
    assert torch.equal(loaded.encode(given).sequence, model.encode(given).sequence)
    ours, theirs = model.reconstruct(given, seed=5), loaded.reconstruct(given, seed=5)
    assert all(torch.equal(ours.predicted[name], theirs.predicted[name]) for name in ours.predicted)
    assert list(loaded.config.modalities) == ["image", "depth", "semantic"]


@pytest.mark.parametrize("names", [("image",), ("depth", "semantic"), ("image", "depth", "semantic")])
def test_any_subset_of_modalities_is_encoded_and_predicts_the_rest(model: M3Model, names: tuple[str, ...]) -> None:
    given = batch(2)
    part = Batch({name: given.signals[name] for name in names}, given.keys)
    assert model.encode(part).states.shape == (2, 64 * len(names), 32)
    assert model.encode(part, layers=(0,)).layers[0].shape == (2, 1 + 64 * len(names), 32)
    result = model.reconstruct(part, 1.0)
    assert {name: tuple(x.shape) for name, x in result.predicted.items()} == {
        "image": (2, 3, 64, 64),
        "image_normalised": (2, 3, 64, 64),
        "depth": (2, 1, 64, 64),
        "semantic": (2, 32, 32),
    }


def test_a_users_masks_hold_for_every_sample_of_a_batch(model: M3Model) -> None:
    """Uneven masks: each sample sees exactly its own tokens, as it would alone."""
    given = batch(3)
    mask = torch.zeros(3, 64, dtype=torch.bool)
    for sample, count in enumerate((1, 7, 30)):
        mask[sample, torch.arange(count) * 2] = True
    together = model.reconstruct(given, {"image": mask, "depth": 0.25}, seed=1)
    assert together.is_visible["image"].float().mean(1).mul(64).round().tolist() == [1, 7, 30]
    for sample in range(3):
        signals = {name: x[sample : sample + 1] for name, x in given.signals.items()}
        alone = Batch(signals, given.keys[sample : sample + 1])
        single = model.reconstruct(alone, {"image": mask[sample : sample + 1], "depth": 0.25}, seed=1)
        torch.testing.assert_close(
            single.predicted["depth"][0], together.predicted["depth"][sample], atol=1e-5, rtol=1e-5
        )


def test_other_sizes_than_the_model_was_built_for(model: M3Model) -> None:
    given = batch(2, height=32, width=96)
    assert model.encode(given).states.shape[1] == 3 * 4 * 12
    assert model.reconstruct(given).predicted["image"].shape == (2, 3, 32, 96)
    assert model(given).loss.isfinite()
