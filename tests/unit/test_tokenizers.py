"""Patches: the order of their values, there and back, unknown values, and parity with convolutions."""

import pytest
import torch
import torch.nn.functional as F

from m3.errors import M3Error
from m3.parts import find
from m3.plugins import Signal
from m3.tokenizers.class_patch import ClassPatch
from m3.tokenizers.patch import Patch, grid_of, patchify, unpatchify


def patch(size=(2, 3), channels: int = 2, extent=(4, 9), **signal) -> Patch:
    torch.manual_seed(1)
    return Patch(Patch.Spec(size=size), Signal("values", channels, extent, **signal), width=8)


def class_patch(has_gaps: bool = True) -> ClassPatch:
    torch.manual_seed(1)
    signal = Signal("classes", 1, (4, 6), classes=5, has_gaps=has_gaps)
    return ClassPatch(ClassPatch.Spec(size=(2, 3), class_width=4), signal, width=8)


@pytest.mark.parametrize("size", [(2, 3), (1, 9), (4, 1), (4, 9)])
def test_patchify_and_back_is_the_same(size: tuple[int, int]) -> None:
    x = torch.arange(2 * 3 * 4 * 9).reshape(2, 3, 4, 9)
    values = patchify(x, size)
    assert values.shape == (2, 36 // (size[0] * size[1]), 3 * size[0] * size[1])
    assert torch.equal(unpatchify(values, size, (4, 9)), x)


def test_values_are_ordered_channel_row_column_and_patches_row_by_row() -> None:
    x = torch.arange(2 * 4 * 9).reshape(1, 2, 4, 9)
    values = patchify(x, (2, 3))
    assert values[0, 0].tolist() == [0, 1, 2, 9, 10, 11, 36, 37, 38, 45, 46, 47]
    assert values[0, :, 0].tolist() == [0, 3, 6, 18, 21, 24]


def test_tokens_have_the_coordinates_of_their_patches() -> None:
    tokens = patch().tokenize(torch.arange(72.0).reshape(1, 2, 4, 9))
    assert tokens.is_valid is None
    assert tokens.count == 6
    assert tokens.positions.tolist() == [[[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]]


def test_a_finer_map_lies_between_the_coordinates_of_the_reference() -> None:
    tokens = patch().tokenize(torch.arange(2 * 8 * 18.0).reshape(1, 2, 8, 18))
    assert tokens.positions[0, :, 0].unique().tolist() == [-0.25, 0.25, 0.75, 1.25]
    assert tokens.positions[0, :6, 1].tolist() == [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25]


def test_a_map_is_put_together_again_by_its_tokenizer() -> None:
    x = torch.arange(2 * 2 * 8 * 18.0).reshape(2, 2, 8, 18)
    part = patch()
    assert torch.equal(part.detokenize(part.decode(part.tokenize(x).values), part.tokenize(x).positions, (8, 18)), x)


def test_the_projection_is_that_of_a_convolution() -> None:
    """Exactly in the order of ViT's `Conv2d(channels, width, patch, patch)` kernel, so its weights can be taken."""
    part, x = patch(), torch.randn(2, 2, 4, 9, generator=torch.Generator().manual_seed(2))
    kernel = part.projection.weight.reshape(8, 2, 2, 3)
    expected = F.conv2d(x, kernel, part.projection.bias, stride=(2, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(part.embed(part.tokenize(x).values), expected)


def test_unknown_values_enter_as_the_mean_only_where_gaps_are_declared() -> None:
    values = torch.arange(12.0).reshape(1, 1, 12)
    holed, filled = values.clone(), values.clone()
    holed[..., 3:7], filled[..., 3:7] = torch.nan, 0.0
    gaps, none = patch(has_gaps=True), patch(has_gaps=False)
    assert torch.equal(gaps.embed(holed), gaps.embed(filled))
    assert not torch.equal(gaps.embed(holed), gaps.embed(values))
    assert none.embed(holed).isnan().all(), "an undeclared hole must not be hidden"
    assert torch.equal(none.embed(values), gaps.embed(values))


def test_class_patches_hold_ids_in_order_and_come_back() -> None:
    ids = torch.arange(2 * 4 * 6).reshape(2, 4, 6) % 6 - 1
    part = class_patch()
    tokens = part.tokenize(ids)
    assert tokens.values.dtype == torch.int64
    assert tokens.values[0, 0].tolist() == [-1, 0, 1, -1, 0, 1]
    assert tokens.values[0, 3].tolist() == [2, 3, 4, 2, 3, 4]
    assert torch.equal(part.detokenize(tokens.values, tokens.positions, (4, 6)), ids)


def test_unknown_classes_have_a_row_of_their_own() -> None:
    part, without = class_patch(), class_patch(has_gaps=False)
    assert (len(part.class_embedding.weight), len(without.class_embedding.weight)) == (6, 5)
    ids = torch.tensor([[[0, 4, -1, 2, -1, 1]]])
    rows = part.class_embedding.weight[[0, 4, 5, 2, 5, 1]]
    torch.testing.assert_close(part.embed(ids)[0, 0], part.projection.weight @ rows.flatten() + part.projection.bias)
    for known in range(5):
        assert not torch.equal(part.embed(ids), part.embed(ids.masked_fill(ids < 0, known)))
    part.embed(ids).sum().backward()
    assert part.class_embedding.weight.grad is not None
    assert part.class_embedding.weight.grad.abs().sum(1).bool().tolist() == [True, True, True, False, True, True]


def test_class_embedding_and_projection_are_those_of_a_convolution() -> None:
    """MultiMAE embeds every position and convolves the map of embeddings."""
    part, ids = class_patch(), torch.arange(2 * 4 * 6).reshape(2, 4, 6) % 5
    embedded = part.class_embedding(ids).permute(0, 3, 1, 2)
    kernel = part.projection.weight.reshape(8, 2, 3, 4).permute(0, 3, 1, 2)
    expected = F.conv2d(embedded, kernel, part.projection.bias, stride=(2, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(part.embed(part.tokenize(ids).values), expected)


def test_scores_are_read_position_by_position() -> None:
    part = class_patch()
    assert part.output_width == 30
    wanted = torch.tensor([[[3, 0, 4, 1, 2, 3]]])
    scores = torch.arange(30.0).reshape(1, 1, 30).remainder(7) + 10 * F.one_hot(wanted, 5).flatten(2)
    assert torch.equal(part.decode(scores), wanted)


def test_errors_name_the_sizes_and_the_remedy() -> None:
    with pytest.raises(M3Error, match=r"a map of 4 x 10 can't be cut into patches of 2 x 3; resize it to multiples"):
        patch().tokenize(torch.arange(80.0).reshape(1, 2, 4, 10))
    with pytest.raises(M3Error, match="size 4 x 9 is not a multiple of the patch 3 x 3; change one of them"):
        patch(size=3)
    with pytest.raises(M3Error, match="size 5 x 6 is not a multiple of the patch 2 x 3"):
        grid_of((5, 6), (2, 3))
    with pytest.raises(M3Error, match="`patch` reads maps of values, got classes over 2 axes; use `class_patch`"):
        Patch(Patch.Spec(size=2), Signal("classes", 1, (4, 4), 3), 8)
    with pytest.raises(M3Error, match="`patch` reads maps of values, got values over 1 axes"):
        Patch(Patch.Spec(size=2), Signal("values", 1, (4,)), 8)
    with pytest.raises(M3Error, match="`class_patch` reads class maps, got values; use `patch` for values"):
        ClassPatch(ClassPatch.Spec(size=2), Signal("values", 1, (4, 4)), 8)


def test_tokenizers_are_found_by_their_file_name() -> None:
    assert find("tokenizers", "patch") is Patch
    assert find("tokenizers", "class_patch") is ClassPatch
    with pytest.raises(M3Error, match=r"`class_pach` in `tokenizers` is not known.*Did you mean `class_patch`\?"):
        find("tokenizers", "class_pach")
