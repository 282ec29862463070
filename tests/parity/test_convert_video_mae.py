"""transformers' VideoMAE with random weights: read, the same outputs; written, the same tensors, opened by AutoModel.

Letters: B clips, N tubes.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
)
from transformers.utils import logging

from m3 import convert
from m3.errors import M3Error
from m3.model import M3Model
from tests.parity.published import (
    assert_equal,
    difference,
    drawn_plan,
    encode_all,
    encoded_view,
    pixels,
    randomised,
    signals_of,
    tensors_in,
    tokens_of,
)

logging.disable_progress_bar()
logging.set_verbosity_error()


def build(kind: type, is_large: bool = False, **settings):
    sizes = {"image_size": 24, "patch_size": 6, "num_frames": 6, "tubelet_size": 3, "hidden_size": 20}
    if is_large:
        sizes |= {"image_size": 16, "patch_size": 4, "num_frames": 8, "tubelet_size": 2, "hidden_size": 36}
    width = sizes["hidden_size"]
    config = VideoMAEConfig(
        **sizes,
        num_hidden_layers=3 if is_large else 2,
        num_attention_heads=3 if is_large else 4,
        intermediate_size=3 * width,
        decoder_hidden_size=12,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=36,
        **{"use_mean_pooling": False, "layer_norm_eps": 3e-4, **settings},
    )
    return randomised(kind(config), seed=width)


def clips(model: M3Model, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Raw and normalised ones, these also with time first, as theirs are."""
    raw = {"video": pixels(2, model.modalities["video"].signal.size)}
    signals = signals_of(model, raw, dtype)
    return signals, signals["video"].transpose(1, 2)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.parametrize("is_large", [False, True])
def test_predictions_of_hidden_tubes_are_those_of_transformers(tmp_path: Path, is_large, dtype, near):
    theirs = build(VideoMAEForPreTraining, is_large)
    theirs.save_pretrained(tmp_path)
    model = convert.load(tmp_path).to(dtype)
    theirs = theirs.to(dtype)
    signals, turned = clips(model, dtype)
    plan = drawn_plan(model, {"video": pixels(2, model.modalities["video"].signal.size)})
    count = model.tokenizers["video"].tokenize(signals["video"]).count
    is_hidden = torch.ones(2, count, dtype=torch.bool).scatter(1, plan.visible["video"], False)
    asked = torch.stack([row.nonzero()[:, 0] for row in is_hidden])
    with torch.no_grad():
        expected = theirs(turned, bool_masked_pos=is_hidden).logits
        found = model.objectives["reconstruct"].predict(
            "video", encoded_view(model, signals, plan), tokens_of(model, signals), asked
        )
    cube = (3, *model.tokenizers["video"].tube)
    found = found.unflatten(-1, cube).permute(0, 1, 3, 4, 5, 2).flatten(2)  # (frame, row, column, channel)
    assert difference(found, expected) < near


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("is_pooled", [False, True])
def test_an_encoder_alone_gives_the_states_of_transformers(tmp_path: Path, is_pooled, is_large, dtype, near):
    theirs = build(VideoMAEModel, is_large, use_mean_pooling=is_pooled)
    theirs.save_pretrained(tmp_path)
    model = convert.load(tmp_path).to(dtype)
    assert not model.objectives
    signals, turned = clips(model, dtype)
    with torch.no_grad():
        expected = theirs.to(dtype)(turned).last_hidden_state
    assert difference(encode_all(model, signals), expected) < near


def test_a_classifier_is_left_out_with_its_reason(tmp_path: Path):
    build(VideoMAEForVideoClassification, use_mean_pooling=True).save_pretrained(tmp_path)
    found = convert.convert(tmp_path)
    assert sorted(found.left) == ["classifier.bias", "classifier.weight", "fc_norm.bias", "fc_norm.weight"]
    assert "tuned" in found.left["fc_norm.bias"]


@pytest.mark.parametrize("kind", [VideoMAEForPreTraining, VideoMAEModel])
def test_what_is_written_is_opened_by_auto_model_with_equal_tensors(tmp_path: Path, kind):
    theirs = build(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    model = convert.load(tmp_path / "theirs")
    convert.save(model, tmp_path / "ours", "video_mae")
    is_whole = kind is VideoMAEForPreTraining
    back = (AutoModelForPreTraining if is_whole else AutoModel).from_pretrained(tmp_path / "ours")
    assert type(back) is kind
    assert_equal(back.state_dict(), theirs.state_dict())
    assert back.config.layer_norm_eps == 3e-4
    written, given = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert_equal(written, given if is_whole else {f"videomae.{name}": x for name, x in given.items()})
    _, turned = clips(model, torch.float32)
    with torch.no_grad():
        if is_whole:
            is_hidden = torch.arange(32).expand(2, -1) >= 10
            assert torch.equal(back(turned, is_hidden).logits, theirs(turned, is_hidden).logits)
        else:
            assert torch.equal(back(turned)[0], theirs(turned)[0])


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path: Path):
    build(VideoMAEForPreTraining).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = tensors.pop("decoder.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(M3Error, match=r"`decoder\.norm\.weight` is missing"):
        convert.load(tmp_path)
    save_file(tensors | {"decoder.norm.weight": lost, "bridge.weight": lost.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(M3Error, match=r"no place for `bridge\.weight`"):
        convert.load(tmp_path)


def test_settings_that_ours_has_not_are_refused(tmp_path: Path):
    build(VideoMAEForPreTraining, norm_pix_loss=False).save_pretrained(tmp_path)
    with pytest.raises(M3Error, match="norm_pix_loss"):
        convert.load(tmp_path)
