"""Weights for another size: what is seen by the new ones is what the old ones saw, as far as it can be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m3.errors import M3Error
from m3.foreign.adapt import adapt, grid_of, keep_coordinates, projected, resized
from m3.positions import Sincos, grid
from m3.signals import Signal
from m3.testing.tokenizer import build_tokenizer

timm_layers = pytest.importorskip("timm.layers", reason="needs timm")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def test_positions_of_pictures_are_resized_as_timm_does() -> None:
    table = noise(6, 4, 4)
    flat = table.flatten(1).t()[None]
    theirs = timm_layers.resample_abs_pos_embed(flat, [6, 3], num_prefix_tokens=0)
    torch.testing.assert_close(resized(table, (6, 3)).flatten(1).t()[None], theirs)


def test_time_is_resized_by_itself() -> None:
    table = torch.arange(4.0).view(1, 4, 1, 1).expand(2, 4, 3, 3)  # says only when
    found = resized(table, (8, 3, 3))
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(found, expected.view(1, 8, 1, 1).expand(2, 8, 3, 3))
    places = torch.arange(9.0).view(1, 1, 3, 3).expand(2, 4, 3, 3)  # says only where
    torch.testing.assert_close(resized(places, (8, 3, 3)), places[:, :1].expand(2, 8, 3, 3))


def test_a_table_along_one_axis_is_resized_linearly() -> None:
    assert resized(torch.tensor([[0.0, 4.0]]), (4,)).tolist() == [[0.0, 1.0, 3.0, 4.0]]


def test_kernels_are_resized_as_timm_does() -> None:
    """timm's matrix is bicubic, ours linear; where patches only grow linearly, both must undo the growth exactly."""
    kernel = noise(5, 3 * 4 * 4)
    found = projected(kernel, (3, 4, 4), (3, 8, 8))
    patches = noise(2, 3, 4, 4)
    larger = F.interpolate(patches, (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(larger.flatten(1) @ found.t(), patches.flatten(1) @ kernel.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_grey_pictures_give_the_same_tokens_with_any_number_of_channels(channels: int) -> None:
    kernel, grey = noise(5, 3 * 16), noise(2, 1, 16)
    found = projected(kernel, (3, 4, 4), (channels, 4, 4))
    old, new = grey.expand(2, 3, 16).flatten(1), grey.expand(2, channels, 16).flatten(1)
    torch.testing.assert_close(new @ found.t(), old @ kernel.t())


def test_what_has_no_rule_is_refused_by_name() -> None:
    weights = {"backbone.norm.weight": torch.zeros(4)}
    with pytest.raises(M3Error, match=r"`backbone.norm.weight` of shape \(4,\) can't become \(6,\)"):
        adapt(weights, {}, {}, {"backbone.norm.weight": torch.Size([6])})
    weights = {"tokenizers.image.projection.weight": torch.zeros(4, 48)}
    with pytest.raises(M3Error, match=r"of shape \(4, 48\) can't become \(6, 48\)"):
        adapt(weights, {}, {}, {"tokenizers.image.projection.weight": torch.Size([6, 48])})


def test_fixed_positions_of_a_finer_grid_stand_at_the_old_coordinates() -> None:
    old = {"image": {"type": "image", "size": 32, "tokenizer": {"type": "patch", "size": 8}}}
    new = {"image": {"type": "image", "size": [64, 32], "tokenizer": {"type": "patch", "size": 8}}}
    assert (grid_of(old["image"]), grid_of(new["image"])) == ((4, 4), (8, 4))
    assert keep_coordinates(old, new) == ["image: 8 x 4 tokens stand at the coordinates of 4 x 4"]
    assert new["image"]["positions"] == {"type": "sincos", "grid": [4, 4]}
    tokenizer = build_tokenizer({"type": "patch", "size": 8}, Signal("values", 3, (64, 32)))
    finer = Sincos(Sincos.Spec(grid=(4, 4)), tokenizer, 16, "xy")
    built = build_tokenizer({"type": "patch", "size": 8}, Signal("values", 3, (32, 32)))
    plain = Sincos(Sincos.Spec(), built, 16, "xy")
    cpu = torch.device("cpu")
    found = finer(grid((8, 4), (8, 4), cpu))
    torch.testing.assert_close(found, plain(grid((8, 4), (4, 4), cpu)))  # what a model of 4 x 4 does on 8 x 4 tokens
    with pytest.raises(M3Error, match=r"positions.grid: 1 numbers for 2 axes"):
        Sincos(Sincos.Spec(grid=(4,)), tokenizer, 16, "xy")
