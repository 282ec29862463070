"""Sin-cos positions: against a slow loop, MAE's layout, and coordinates of grids of any shape."""

import math
from types import SimpleNamespace

import pytest
import torch

from m3.errors import M3Error
from m3.positions import Sincos, grid, sincos


def embed_positions(positions: torch.Tensor, width: int, axis_order: str) -> torch.Tensor:
    tokenizer = SimpleNamespace(axes=positions.shape[-1])
    return Sincos(Sincos.Spec(), tokenizer, width, axis_order)(positions)  # type: ignore[arg-type]


def slow_sincos(coordinates: list[float], width: int) -> list[float]:
    """One token: per axis all sines, then all cosines, frequencies 10000^(-i / F)."""
    count = width // len(coordinates) // 2
    row = []
    for x in coordinates:
        angles = [x / 10000 ** (i / count) for i in range(count)]
        row += [math.sin(a) for a in angles]
        row += [math.cos(a) for a in angles]
    return row


def coordinates(axes: int) -> torch.Tensor:
    """Whole, fractional, negative and long coordinates, another one on every axis: (1, 6, A)."""
    first = torch.tensor([0.0, 1.0, -0.25, 2.5, 13.0, 20000.0])
    return torch.stack([first * (axis + 1) + axis for axis in range(axes)], dim=-1).unsqueeze(0)


@pytest.mark.parametrize("axis_order", ["xy", "yx"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_sincos_equals_a_slow_loop(axes, axis_order):
    positions = coordinates(axes)
    found = embed_positions(positions, 24, axis_order)
    rows = [row[::-1] if axis_order == "xy" else row for row in positions[0].tolist()]
    expected = torch.tensor([slow_sincos(row, 24) for row in rows])
    assert found.shape == (1, 6, 24)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)


def test_sincos_literals():
    # F = 2 frequencies, 1 and 1/100.
    found = sincos(torch.tensor([[3.0]]), 4)
    expected = [[0.1411200, 0.0299955, -0.9899925, 0.9995500]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_samples_keep_their_own_positions():
    positions = torch.arange(2 * 5 * 2, dtype=torch.float32).reshape(2, 5, 2) / 3
    both = embed_positions(positions, 16, "xy")
    assert torch.equal(both[1:], embed_positions(positions[1:], 16, "xy"))
    assert not torch.equal(both[0], both[1])


def mae_table(width: int, rows: int, columns: int) -> torch.Tensor:
    """MAE's table as its code builds it: meshgrid(w, h), half of the channels per axis, w first."""
    table = []
    for y in range(rows):
        for x in range(columns):
            table.append(slow_sincos([x, y], width))
    return torch.tensor(table)


def test_first_half_of_the_channels_encodes_x_as_in_mae():
    positions = grid((3, 5), (3, 5), torch.device("cpu"))
    torch.testing.assert_close(embed_positions(positions, 16, "xy")[0], mae_table(16, 3, 5), rtol=0, atol=1e-6)
    table = embed_positions(positions, 16, "xy")[0].reshape(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])  # the same in every row
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])  # the same in every column
    assert not torch.equal(table[:, 0, :8], table[:, 4, :8])
    swapped = embed_positions(positions, 16, "yx")[0].reshape(3, 5, 16)
    assert torch.equal(swapped, table.roll(8, dims=-1))


def test_non_square_grid_counts_row_by_row():
    positions = grid((3, 5), (3, 5), torch.device("cpu"))[0]
    assert positions.tolist() == [[float(y), float(x)] for y in range(3) for x in range(5)]
    assert (positions[1] - positions[0]).tolist() == [0, 1]  # right neighbour
    assert (positions[5] - positions[0]).tolist() == [1, 0]  # neighbour below
    assert positions[4].tolist() == [0, 4]
    assert positions[5].tolist() == [1, 0]


def test_non_square_neighbours_are_alike_and_distant_tokens_are_not():
    table = embed_positions(grid((3, 5), (3, 5), torch.device("cpu")), 64, "xy")[0]
    distance = torch.cdist(table, table)
    centre = 1 * 5 + 2
    near = [centre - 1, centre + 1, centre - 5, centre + 5]
    far = [i for i in range(15) if i not in (*near, centre)]
    assert distance[centre, near].max() < distance[centre, far].min()


def test_finer_grid_lies_between_the_reference_centres():
    positions = grid((8, 8), (4, 4), torch.device("cpu"))[0].reshape(8, 8, 2)
    centres = [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25]
    assert positions[:, 3, 0].tolist() == centres
    assert positions[3, :, 1].tolist() == centres
    # The mean of the 2 x 2 fine patches that make up a coarse one is the coarse one's centre.
    means = positions.reshape(4, 2, 4, 2, 2).mean((1, 3))
    assert torch.equal(means.reshape(1, 16, 2), grid((4, 4), (4, 4), torch.device("cpu")))


def test_grid_scales_each_axis_by_itself():
    positions = grid((2, 6), (4, 3), torch.device("cpu"))[0].reshape(2, 6, 2)
    assert positions[:, 0, 0].tolist() == [0.5, 2.5]
    assert positions[0, :, 1].tolist() == [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25]


@pytest.mark.parametrize(("axes", "width", "used"), [(1, 15, 14), (2, 18, 16), (3, 16, 12)])
def test_channels_left_over_are_zero(axes, width, used):
    found = sincos(torch.arange(1, axes + 1, dtype=torch.float32), width)
    assert found.shape == (width,)
    assert torch.equal(found[:used], sincos(torch.arange(1, axes + 1, dtype=torch.float32), used))
    assert not found[used:].any()


def test_a_width_without_room_is_refused():
    with pytest.raises(M3Error, match=r"^width 4 is too small for sin-cos positions over 3 axes; use at least 6\.$"):
        sincos(torch.arange(3, dtype=torch.float32), 4)
