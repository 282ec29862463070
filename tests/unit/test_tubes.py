"""Tubes: order of values, round trips at any size, the projection against Conv3d."""

import itertools

import pytest
import torch
from torch import nn

from m3.errors import M3Error
from m3.plugins import Signal
from m3.tokenizers.tube import Tube


def tube(
    size: tuple[int, ...] = (4, 6, 8), channels: int = 3, frames: int = 2, patch=(3, 2), width: int = 10, **own
) -> Tube:
    return Tube(Tube.Spec(size=patch, frames=frames), Signal("values", channels, size, **own), width)


def test_values_are_ordered_channel_frame_row_column_and_tubes_time_row_column() -> None:
    signal = torch.arange(3 * 4 * 6 * 8.0).view(1, 3, 4, 6, 8)
    tokens = tube().tokenize(signal)
    assert tokens.values.shape == (1, 2 * 2 * 4, 3 * 2 * 3 * 2)
    for number, (t, h, w) in enumerate(itertools.product(range(2), range(2), range(4))):
        expected = [
            float(signal[0, c, 2 * t + i, 3 * h + j, 2 * w + k])
            for c, i, j, k in itertools.product(range(3), range(2), range(3), range(2))
        ]
        assert tokens.values[0, number].tolist() == expected
        assert tokens.positions[0, number].tolist() == [t, h, w]
    assert tokens.is_valid is None


@pytest.mark.parametrize("size", [(4, 6, 8), (2, 3, 2), (8, 3, 20), (6, 12, 2)])
def test_any_size_that_the_tube_divides_comes_back(size: tuple[int, ...]) -> None:
    part = tube()
    signal = torch.arange(2 * 3 * size[0] * size[1] * size[2], dtype=torch.float32).view(2, 3, *size)
    tokens = part.tokenize(signal)
    assert torch.equal(part.detokenize(tokens.values, tokens.positions, size), signal)
    # Positions of another grid lie, centre to centre, between those of the grid the model is built for.
    counts = (size[0] // 2, size[1] // 3, size[2] // 2)
    built_for = (2, 2, 4)
    last = [(n - 0.5) * b / n - 0.5 for n, b in zip(counts, built_for, strict=True)]
    assert tokens.positions[0, -1].tolist() == pytest.approx(last)
    assert tokens.positions[0, 0].tolist() == pytest.approx(
        [b / n / 2 - 0.5 for n, b in zip(counts, built_for, strict=True)]
    )


def test_a_single_frame_is_a_patch() -> None:
    from m3.tokenizers.patch import Patch

    flat = Patch(Patch.Spec(size=(3, 2)), Signal("values", 3, (6, 8)), 10)
    signal = torch.arange(3 * 6 * 8.0).view(1, 3, 6, 8)
    assert torch.equal(tube((1, 6, 8), frames=1).tokenize(signal.unsqueeze(2)).values, flat.tokenize(signal).values)


def test_embed_is_a_three_dimensional_convolution() -> None:
    torch.manual_seed(0)
    part = tube()
    convolution = nn.Conv3d(3, 10, (2, 3, 2), (2, 3, 2))
    with torch.no_grad():
        part.projection.weight.copy_(convolution.weight.flatten(1))  # type: ignore[operator, union-attr]
        part.projection.bias.copy_(convolution.bias)  # type: ignore[operator, union-attr]
    signal = torch.randn(2, 3, 4, 6, 8)
    expected = convolution(signal).flatten(2).transpose(1, 2)
    torch.testing.assert_close(part.embed(part.tokenize(signal).values), expected, atol=1e-5, rtol=1e-5)


def test_unknown_values_enter_as_the_mean() -> None:
    part = tube(has_gaps=True)
    signal = torch.randn(1, 3, 4, 6, 8)
    holes = signal.clone()
    holes[0, :, 0, :2] = torch.nan
    filled = holes.nan_to_num(0.0)
    assert torch.equal(part.embed(part.tokenize(holes).values), part.embed(part.tokenize(filled).values))


@pytest.mark.parametrize("size", [(3, 6, 8), (4, 5, 8), (4, 6, 7)])
def test_a_size_that_the_tube_does_not_divide_is_refused(size: tuple[int, ...]) -> None:
    shown = " x ".join(str(n) for n in size)
    sentence = f"^size {shown} is not a multiple of the tube 2 x 3 x 2; change one of them.$"
    with pytest.raises(M3Error, match=sentence):
        tube(size)
    with pytest.raises(M3Error, match=sentence):
        tube().tokenize(torch.zeros(1, 3, *size))


def test_other_signals_are_refused() -> None:
    with pytest.raises(
        M3Error, match=r"^tokenizer `tube` reads values over three axes, got values over 2; use `patch` for"
    ):
        tube((6, 8))
    with pytest.raises(M3Error, match=r"^tokenizer `tube` reads values over three axes, got classes over 3"):
        Tube(Tube.Spec(), Signal("classes", 1, (4, 16, 16), 5), 8)
