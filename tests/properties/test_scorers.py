"""Scorers that shape a mask: exact counts, the shapes they promise, every place reached equally often."""

import json
import math

import pytest
import torch

from m3 import masking
from m3.plugins import View
from m3.positions import grid
from m3.random import Draws
from m3.types import Tokens

ROWS, COLUMNS = 14, 14


def make_tokens(batch: int, counts: tuple[int, ...] = (ROWS, COLUMNS)) -> dict[str, Tokens]:
    positions = grid(counts, counts, torch.device("cpu"))
    values = torch.arange(batch * positions.shape[1], dtype=torch.float32).reshape(batch, -1, 1)
    return {"image": Tokens(values, positions)}


def seen(scorer: dict, visible: int, batch: int, counts: tuple[int, ...] = (ROWS, COLUMNS), first: int = 0):
    """Which tokens are seen, (batch, *counts) bool."""
    settings = {"type": "fixed", "visible": visible, "scorer": scorer}
    plan = masking.build(View(("image",), json.dumps(settings)))(
        make_tokens(batch, counts), Draws(torch.arange(batch) + first)
    )
    index = plan.visible["image"]
    assert index.shape == (batch, visible)
    flat = torch.zeros(batch, math.prod(counts), dtype=torch.bool).scatter(1, index, True)
    assert (flat.sum(1) == visible).all(), "a token is seen twice"
    return flat.reshape(batch, *counts)


def test_simmim_hides_thirty_whole_units_of_two_by_two_patches() -> None:
    """60 % of 7 x 7 units, rounded up: 30, so that 4 x 19 patches of 196 are seen."""
    is_seen = seen({"type": "cells", "unit": 2}, 76, 300)
    units = is_seen.reshape(300, 7, 2, 7, 2)
    is_unit = units.any(4).any(2)
    assert torch.equal(is_unit, units.all(4).all(2)), "a unit is cut"
    assert (is_unit.sum((1, 2)) == 19).all()
    assert len({tuple(row.tolist()) for row in is_unit.flatten(1)}) == 300


def test_cells_are_hidden_equally_often() -> None:
    batch = 4000
    often = seen({"type": "cells", "unit": 2}, 76, batch).double().mean(0)
    assert (often - 76 / 196).abs().max() < 5 * (0.388 * 0.612 / batch) ** 0.5


def test_cells_of_a_grid_that_the_unit_does_not_divide_are_smaller_at_its_end() -> None:
    is_seen = seen({"type": "cells", "unit": 2}, 5, 200, counts=(3, 5))
    cells = {(0, 0): 4, (0, 4): 2, (2, 0): 2, (2, 4): 1}
    for (row, column), size in cells.items():
        assert is_seen[:, row : row + 2, column : column + 2][0].numel() == size
    # Five tokens are, in score order, whole cells and a rest of the last one.
    for sample in is_seen:
        parts = [sample[row : row + 2, column : column + 2] for row in (0, 2) for column in (0, 2, 4)]
        assert sum(not bool(part.all()) and bool(part.any()) for part in parts) <= 1


def test_units_span_all_axes_and_are_the_same_on_a_finer_grid() -> None:
    is_seen = seen({"type": "cells", "unit": 2}, 16, 100, counts=(2, 4, 4))
    cells = is_seen.reshape(100, 1, 2, 2, 2, 2, 2)
    assert torch.equal(cells.any(6).any(4).any(2), cells.all(6).all(4).all(2))
    fine = {"image": Tokens(torch.zeros(1, 64, 1), grid((8, 8), (4, 4), torch.device("cpu")))}
    part, spec = masking.build_spec("scorers", {"type": "cells", "unit": 2}, "scorer")
    scores = part(spec)(fine, Draws(torch.arange(1)))["image"].reshape(2, 4, 2, 4)
    assert len(scores.unique()) == 4, "a cell of two tokens of the usual grid holds sixteen of one twice as fine"


@pytest.mark.parametrize("scorer", ["cells"])
def test_scores_of_a_sample_do_not_depend_on_its_batch(scorer: str) -> None:
    whole = seen({"type": scorer}, 76, 6)
    assert torch.equal(whole[3:5], seen({"type": scorer}, 76, 2, first=3))
