"""Order, loader, geometry, processor."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3.check import shrink
from m3.data.geometry import random_crop
from m3.data.loader import Loaded, Order, Samples, collate, train_loader
from m3.errors import M3Error
from m3.network import build_modalities
from m3.plugins import Crop
from m3.processor import M3Processor
from m3.recipe import load_recipe
from m3.train import build_model, open_source
from m3.types import Batch

MODALITIES = {
    "image": {"type": "image", "size": [32, 48]},
    "depth": {"type": "depth", "size": [32, 48], "missing": 0},
    "semantic": {"type": "semantic_map", "size": [16, 24], "classes": 3, "ignore": 255},
}


def positions(micro: int, accumulation: int, world: int) -> list[set[tuple[int, int]]]:
    """What each step trains on, over all processes."""
    orders = [Order(10, 7, micro, accumulation, rank, world, stop=5) for rank in range(world)]
    batches = [list(order) for order in orders]
    steps = []
    for step in range(5):
        turns = range(step * accumulation, (step + 1) * accumulation)
        steps.append({pair for own in batches for turn in turns for pair in own[turn]})
    return steps


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)])
def test_every_cut_trains_on_the_same_samples(micro: int, accumulation: int, world: int) -> None:
    assert positions(micro, accumulation, world) == positions(8, 1, 1)


def test_an_epoch_visits_every_sample_once_and_the_next_in_another_order() -> None:
    indices = [index for batch in Order(10, 7, 4, stop=5) for _, index in batch]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]


def test_a_later_start_continues_the_same_order() -> None:
    whole = list(Order(10, 7, 4, 2, stop=6))
    assert list(Order(10, 7, 4, 2, start=4, stop=6)) == whole[8:]


def test_workers_change_nothing(tmp_path: Path) -> None:
    recipe = shrink(load_recipe("multimae_tiny"), tmp_path)
    model = build_model(recipe)
    samples = Samples(open_source(recipe, model, "train"), model.modalities, recipe.data, recipe.seed)
    order = Order(len(samples.source), 0, 4, stop=3)
    for alone, shared in zip(train_loader(samples, order, 0), train_loader(samples, order, 2), strict=True):
        assert alone.ids == shared.ids
        assert all(torch.equal(alone.signals[name], shared.signals[name]) for name in alone.signals)


def test_kept_samples_are_read_once_and_are_the_same(tmp_path: Path) -> None:
    read: dict[int, list[int]] = {}
    batches: dict[int, list[Batch]] = {}
    for keep in (0, 3, 6):
        recipe = shrink(load_recipe("mae_tiny", ["data.samples=6", f"data.keep={keep}"]), tmp_path)
        model = build_model(recipe)
        source = open_source(recipe, model, "train")
        samples = Samples(source, model.modalities, recipe.data, recipe.seed)
        numbers, reads = read.setdefault(keep, []), source.read
        source.read = lambda number, numbers=numbers, reads=reads: [numbers.append(number), reads(number)][1]  # type: ignore[method-assign]
        batches[keep] = list(train_loader(samples, Order(6, 0, 2, stop=9), 0))
    assert sorted(read[6]) == list(range(6))
    assert len(read[0]) == 18
    assert 6 < len(read[3]) < 18
    for other in (3, 6):
        for once, again in zip(batches[0], batches[other], strict=True):
            assert once.ids == again.ids
            assert torch.equal(once.signals["image"], again.signals["image"])
    assert len({x.signals["image"].sum().item() for x in batches[6]}) == 9, "crops differ from epoch to epoch"


def test_one_crop_keeps_all_modalities_aligned() -> None:
    """A rectangle drawn in image, depth and semantic map is in the same place after any crop and flip."""
    parts = build_modalities(MODALITIES)
    image, depth, classes = np.zeros((64, 96, 3), np.uint8), np.ones((64, 96), np.float32), np.zeros((64, 96), np.uint8)
    image[16:40, 24:72], depth[16:40, 24:72], classes[16:40, 24:72] = 255, 5.0, 2
    raw = {"image": image, "depth": depth, "semantic": classes}
    for key in range(20):
        crop = random_crop(key, (0.5, 1.0), 0.5, (64, 96))
        fitted = {name: parts[name].fit(parts[name].to_raw(x), crop) for name, x in raw.items()}
        is_bright = fitted["image"][0] > 127
        assert (is_bright == (fitted["depth"] > 3)).float().mean() > 0.95
        is_mostly_bright = torch.nn.functional.avg_pool2d(fitted["image"][:1].float(), 2)[0] > 127
        assert (is_mostly_bright == (fitted["semantic"] == 2)).float().mean() > 0.95
    assert parts["image"].fit(parts["image"].to_raw(image), Crop()).shape == (3, 32, 48)


def test_crops_follow_their_settings() -> None:
    crops = [random_crop(key, (0.2, 0.6), 0.25, (100, 200)) for key in range(400)]
    areas = torch.tensor([c.box[2] * c.box[3] for c in crops if c.box])
    assert areas.min() > 0.19
    assert areas.max() < 0.61
    assert 0.15 < sum(c.is_flipped for c in crops) / 400 < 0.35
    assert random_crop(3, (0.2, 0.6), 0.25, (100, 200)) == crops[3]


@pytest.mark.parametrize("size", [(300, 400), (100, 400)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    """Of 2000 draws each, means differ by at most five standard errors of deviations below 0.3."""
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(torch.empty(1, *size), [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    shares = torch.tensor(theirs, dtype=torch.float64) / torch.tensor([*size, *size])
    ours = torch.tensor([random_crop(key, (0.2, 1.0), 0.5, size).box for key in range(2000)], dtype=torch.float64)
    assert (ours.mean(0) - shares.mean(0)).abs().max() < 5 * 0.3 * (2 / 2000) ** 0.5
    assert (ours.std(0) - shares.std(0)).abs().max() < 0.02


def test_a_crop_that_never_fits_is_the_largest_centred_part_of_an_allowed_aspect() -> None:
    """90 % of 30 x 120 pixels in the aspect 4/3 are 49 pixels high; 30 x 40 from column 40 is the widest part."""
    for key in range(5):
        assert random_crop(key, (0.9, 1.0), 0.0, (30, 120)).box == pytest.approx((0, 1 / 3, 1, 1 / 3))
        assert random_crop(key, (0.9, 1.0), 0.0, (120, 30)).box == pytest.approx((1 / 3, 0, 1 / 3, 1))


def test_a_sample_may_lack_a_modality() -> None:
    full = Loaded({"image": torch.arange(3), "depth": torch.arange(2.0)}, 4, "a", labels={"shape": 1})
    lacking = Loaded({"image": torch.arange(3) + 5}, 9, "b", {}, {"shape": 2}, (("c: broken", "tar"),))
    modalities = build_modalities({"image": {"type": "image"}, "depth": {"type": "depth"}})
    batch = collate([full, lacking], modalities)
    assert batch.keys.tolist() == [4, 9]
    assert list(batch.is_present) == ["depth"]
    assert batch.is_present["depth"].tolist() == [True, False]
    assert batch.signals["image"].tolist() == [[0, 1, 2], [5, 6, 7]]
    assert (batch.ids, batch.skipped, batch.labels["shape"].tolist()) == (("a", "b"), ("c: broken",), [1, 2])


def test_the_processor_reads_paths_pictures_arrays_and_tensors(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(np.arange(32 * 48, dtype=np.uint16).reshape(32, 48)).save(tmp_path / "d.png")
    processor = M3Processor(MODALITIES)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    batch = processor(
        image=[tmp_path / "a.png", Image.fromarray(pixels), pixels, tensor], depth=[tmp_path / "d.png"] * 4
    )
    assert all(torch.equal(image, tensor) for image in batch.signals["image"])
    assert torch.isnan(batch.signals["depth"][0, 0, 0])
    assert batch.signals["depth"][0, 1, 2] == pytest.approx(0.050)
    some = processor(image=[pixels, None], semantic=[None, pixels[..., 0] % 3])
    assert {name: there.tolist() for name, there in some.is_present.items()} == {
        "image": [True, False],
        "semantic": [False, True],
    }
    processor.save_pretrained(tmp_path / "saved")
    assert M3Processor.from_pretrained(tmp_path / "saved").modalities == MODALITIES


def test_the_processor_says_what_is_wrong(tmp_path: Path) -> None:
    processor = M3Processor(MODALITIES)
    pixels = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
    with pytest.raises(M3Error, match=r"no modality `imagee`. Did you mean `image`\?"):
        processor(imagee=pixels)
    with pytest.raises(M3Error, match="every modality needs the same number of samples"):
        processor(image=[pixels, pixels], depth=[pixels[..., 0]])
    with pytest.raises(M3Error, match=r"there is no file .*gone.png for `image`; check the path"):
        processor(image=tmp_path / "gone.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(M3Error, match=r"empty.png can't be read as `image`: cannot identify image file"):
        processor(image=tmp_path / "empty.png")
    with pytest.raises(M3Error, match=r"an image must be uint8 with 3 channels, got torch.float32"):
        processor(image=torch.rand(3, 32, 48))
