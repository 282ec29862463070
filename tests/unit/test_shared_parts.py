"""One tokenizer for several modalities, one decoder for several targets: OmniMAE."""

import copy
from pathlib import Path

import pytest
import torch

from m3.check import shrink
from m3.config import M3Config
from m3.errors import M3Error
from m3.model import M3Model
from m3.plugins import Signal
from m3.recipe import load_recipe
from m3.tokenizers.tube import Tube
from m3.train import build_model
from m3.types import Batch


def omnimae() -> M3Model:
    torch.manual_seed(0)
    return build_model(shrink(load_recipe("omnimae_tiny"), Path("unused")))


def batch(count: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (count, 3, 48, 48), dtype=torch.uint8, generator=generator)
    video = torch.randint(0, 256, (count, 3, 16, 48, 48), dtype=torch.uint8, generator=generator)
    return Batch({"image": image, "video": video}, torch.arange(count))


def test_an_image_is_a_tube_that_stands_still_at_time_0() -> None:
    tokenizer = Tube(Tube.Spec(size=(3, 2), frames=2), Signal("values", 3, (8, 6, 4)), 10)
    image = torch.arange(2 * 3 * 6 * 4.0).view(2, 3, 6, 4)
    still, video = tokenizer.tokenize(image), tokenizer.tokenize(torch.stack([image] * 2, 2).repeat(1, 1, 4, 1, 1))
    assert torch.equal(still.values, video.values[:, :4])
    assert torch.equal(still.positions, video.positions[:, :4])
    assert still.positions[0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert torch.equal(tokenizer.detokenize(still.values, still.positions, (6, 4)), image)
    moving = torch.cat([still.values[..., :6], still.values[..., 6:12] + 2, still.values[..., 12:]], -1)
    assert tokenizer.detokenize(moving, still.positions, (6, 4)).shape == image.shape
    assert tokenizer.detokenize(still.values > 50, still.positions, (6, 4)).dtype == torch.bool


def test_the_projection_and_the_decoder_are_there_once() -> None:
    model = omnimae()
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if name.startswith("tokenizers")] == [
        "tokenizers.video.projection.weight",
        "tokenizers.video.projection.bias",
    ]
    assert not [name for name in names if "stills" in name]
    assert sorted(model.state_dict()) == sorted(names)


@pytest.mark.parametrize("active", ["clips", "stills"])
def test_each_objective_trains_the_shared_parts(active: str) -> None:
    model = omnimae()
    model(model.prepare(batch(), active=(active,))).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_loss_of_images_is_that_of_a_model_of_one_tube() -> None:
    """The same weights in a model that knows clips of one tube only, and is shown the image twice."""
    model = omnimae().double()
    config = copy.deepcopy(model.config.to_dict())
    modality = {**config["modalities"]["video"], "frames": 2}
    objective = config["objectives"]["clips"] | {"masking": {"type": "fixed", "visible": 0.25}}
    alone = M3Model(
        M3Config(modalities={"video": modality}, backbone=config["backbone"], objectives={"clips": objective})
    )
    alone = alone.double()
    alone.load_state_dict(model.state_dict())
    images = batch()
    stills = Batch({"video": torch.stack([images.signals["image"]] * 2, 2)}, images.keys)
    shown = torch.arange(3 * 36).view(3, 36) % 5 == 0
    one = model.reconstruct(images, {"image": shown}, objective="stills")
    two = alone.reconstruct(stills, {"video": shown})
    torch.testing.assert_close(one.output["image"], two.output["video"])
    torch.testing.assert_close(one.predicted["image"], two.predicted["video"].mean(2))


def test_a_saved_model_and_a_copy_share_as_well(tmp_path: Path) -> None:
    model = omnimae().eval()
    model.save_pretrained(tmp_path)
    for other in (M3Model.from_pretrained(tmp_path).eval(), copy.deepcopy(model)):
        expected = model.reconstruct(batch(), seed=4, objective="stills").output["image"]
        assert torch.equal(other.reconstruct(batch(), seed=4, objective="stills").output["image"], expected)
        with torch.no_grad():
            other.objectives["clips"].decoders["video"].output.bias += 1
        torch.testing.assert_close(other.reconstruct(batch(), seed=4, objective="stills").output["image"], expected + 1)


def config_of(**changes) -> M3Config:
    config = load_recipe("omnimae_tiny").model_dump(mode="json", exclude_none=True)
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = config
        for key in parents:
            inner = inner[key]
        inner[last] = value
    return M3Config(modalities=config["modalities"], backbone=config["backbone"], objectives=config["objectives"])


CASES = [
    (
        {"modalities__image__tokenizer": {"same_as": "vido"}},
        r"^modalities.image.tokenizer.same_as: there is no modality `vido`. Did you mean `video`\?$",
    ),
    (
        {"modalities__image__tokenizer": {"same_as": "video", "size": 4}},
        "^modalities.image.tokenizer: with `same_as`, `size` is that of `video`; remove it here.$",
    ),
    (
        {"modalities__image__positions": {"type": "sincos"}},
        "^modalities.image.tokenizer: with `same_as`, `positions` is that of `video`; remove it here.$",
    ),
    (
        {"modalities__more": {"type": "image", "size": 48, "tokenizer": {"same_as": "image"}}},
        "^modalities.more.tokenizer.same_as: `image` has no tokenizer of its own; name the one that it has.$",
    ),
    (
        {"modalities__image": {"type": "depth", "size": 48, "tokenizer": {"same_as": "video"}}},
        "^modalities.image.tokenizer.same_as: the tokenizer of `video` can't read `image`; give it one of its own.$",
    ),
    (
        {"objectives__stills__decoder": {"same_as": "vido"}},
        r"^objectives.stills.targets.image.decoder.same_as: no other objective has a decoder for `vido`. Did you mean",
    ),
    (
        {"objectives__clips__decoder": {"type": "cross_decoder"}},
        "^objectives.stills.targets.image.decoder.same_as: only a `self_decoder` of targets of one width can be shared",
    ),
    (
        {"objectives__clips__targets__video": {"target": {"type": "values", "step": 0}}},
        "^objectives.stills.targets.image.decoder.same_as: only a `self_decoder` of targets of one width can be shared",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), CASES)
def test_what_cannot_be_shared_is_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        M3Model(config_of(**changes))
