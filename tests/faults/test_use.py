"""What a reader found wrong when using models: mixed batches, masks beyond reason, two objectives, empty input."""

import pytest
import torch

from m3.errors import M3Error
from m3.objectives.reconstruct import reduce
from m3.processor import M3Processor
from m3.recipe import load_recipe
from m3.train import build_model

SMALL = ["backbone.width=32", "backbone.depth=1", "backbone.heads=2"]
IMAGES = (torch.arange(2 * 64 * 64 * 3) * 7 % 251).to(torch.uint8).reshape(2, 64, 64, 3).numpy()
DEPTH = (torch.arange(64 * 64.0).reshape(64, 64) % 97 / 10).numpy()


def test_a_sample_without_depth_is_predicted_as_if_the_whole_batch_had_none() -> None:
    model = build_model(load_recipe("quickstart", SMALL)).eval()
    processor = M3Processor(model.config.modalities)
    mixed = processor(image=list(IMAGES), depth=[DEPTH, None])
    alone = processor(image=list(IMAGES))
    found = [model.reconstruct(batch, visible={"image": 1.0}).predicted["depth"][1] for batch in (mixed, alone)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("visible", [75.0, -0.5, -3, True])
def test_shares_beyond_reason_are_refused(visible: float) -> None:
    model = build_model(load_recipe("mae_tiny", SMALL))
    batch = M3Processor(model.config.modalities)(image=IMAGES[0])
    with pytest.raises(M3Error, match=r"`visible` of `image` is .*; give a share from 0.0 to 1.0 or a"):
        model.reconstruct(batch, visible=visible)


def test_a_mask_that_hides_nothing_is_refused() -> None:
    masking = "objectives.reconstruct.masking={type: fixed, visible: 1.0}"
    model = build_model(load_recipe("mae_tiny", [*SMALL, masking]))
    batch = M3Processor(model.config.modalities)(image=IMAGES[0])
    with pytest.raises(M3Error, match="the masking of `reconstruct` hides nothing that could be predicted"):
        model.counts(model.prepare(batch))


@pytest.mark.parametrize("average", ["token", "sample"])
def test_nothing_asked_for_is_a_loss_of_zero_over_zero(average: str) -> None:
    total, count = reduce(torch.empty(3, 0, 5), None, average)
    assert (float(total), float(count)) == (0.0, 0.0)


def test_pictures_of_targets_with_names_of_their_own() -> None:
    model = build_model(load_recipe("multimae_tiny", SMALL)).eval()
    processor = M3Processor(model.config.modalities)
    result = model.reconstruct(processor(image=IMAGES[0]), visible={"image": 0.5})
    pictures = processor.show(result)
    assert set(pictures) == set(result.predicted) > set(model.modalities) - {"none"}
    assert all(x.ndim == 3 for column in pictures.values() for x in column)


def test_a_model_in_bfloat16_encodes() -> None:
    model = build_model(load_recipe("mae_tiny", SMALL)).to(torch.bfloat16)
    batch = M3Processor(model.config.modalities)(image=IMAGES[0])
    assert model.encode(batch).sequence.dtype == torch.bfloat16


def test_nothing_to_prepare_is_a_sentence() -> None:
    processor = M3Processor(load_recipe("quickstart").modalities)
    for given in ({}, {"image": None}, {"image": [None, None]}):
        with pytest.raises(M3Error, match="nothing was given to prepare; give at least one modality"):
            processor(**given)
