"""Scorers that shape a mask: exact counts, the shapes they promise, every place reached equally often."""

import json
import math

import pytest
import torch
from scipy.stats import kstest

from m3 import masking
from m3.errors import M3Error
from m3.plugins import View
from m3.positions import grid
from m3.random import Draws
from m3.shaped_scorers import rectangles
from m3.types import MaskPlan, Tokens

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


@pytest.mark.parametrize("scorer", ["cells", "blocks", "colour_noise"])
def test_scores_of_a_sample_do_not_depend_on_its_batch(scorer: str) -> None:
    whole = seen({"type": scorer}, 76, 6)
    assert torch.equal(whole[3:5], seen({"type": scorer}, 76, 2, first=3))


# -- blocks ---------------------------------------------------------------------------------------------------

BEIT = {"type": "blocks", "area": [16, 75], "aspect": 0.3}
INVERSE = {"type": "blocks", "of": "seen", "area": [9, 9], "aspect": 1.0}


def components(mask: torch.Tensor) -> list[int]:
    """Sizes of the connected parts (by edges) of a small boolean picture."""
    left, sizes = {tuple(p) for p in mask.nonzero().tolist()}, []
    while left:
        edge, size = [left.pop()], 0
        while edge:
            y, x = edge.pop()
            size += 1
            for other in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if other in left:
                    left.remove(other)
                    edge.append(other)
        sizes.append(size)
    return sizes


def test_beit_hides_exactly_75_patches_of_196_in_few_blocks() -> None:
    hidden = ~seen(BEIT, 196 - 75, 300)
    assert (hidden.sum((1, 2)) == 75).all()
    parts = [len(components(sample)) for sample in hidden]
    assert sum(parts) / len(parts) < 3.5, "blocks, not points: uniform noise has above 20 parts"
    inner = [sum(size >= 16 for size in components(sample)) for sample in hidden]
    assert min(inner) >= 1


def test_the_first_block_is_a_whole_rectangle_of_the_asked_for_area_and_aspect() -> None:
    positions = grid((ROWS, COLUMNS), (ROWS, COLUMNS), torch.device("cpu"))
    lot = Draws(torch.arange(500)).uniform("test", 4).chunk(4, dim=1)
    area, aspect = (16 + lot[0] * 60).floor(), 0.3 ** (1 - 2 * lot[1])
    order = rectangles(positions, area, aspect, lot[2], lot[3]).reshape(500, ROWS, COLUMNS)
    for number, sample in enumerate(order):
        is_inside = sample.isfinite()
        rows, columns = is_inside.any(1).sum().item(), is_inside.any(0).sum().item()
        assert is_inside.sum() == rows * columns, "no rectangle"
        assert area[number] <= rows * columns < area[number] + rows
        ratio = rows / columns
        assert 0.2 < ratio < 5, ratio  # rounded to whole rows and columns
        assert sample[is_inside].sort().values.tolist() == [float(i) for i in range(int(rows * columns))]
        first = is_inside.nonzero()[0]
        assert sample[first[0], first[1]] == 0
        assert sample[first[0] + 1, first[1]] == 1, "column by column"
    inside = order.isfinite()
    assert inside[:, 0].any()
    assert inside[:, -1].any()
    assert inside[:, :, 0].any()
    assert inside[:, :, -1].any()


def test_inverse_blocks_show_squares_of_nine() -> None:
    is_seen = seen(INVERSE, 39, 300)
    squares = is_seen.unfold(1, 3, 1).unfold(2, 3, 1).flatten(3).all(-1)  # (B, 12, 12): a whole 3 x 3 begins here
    covered = torch.zeros_like(is_seen)
    for dy in range(3):
        for dx in range(3):
            covered[:, dy : dy + 12, dx : dx + 12] |= squares
    rest = (is_seen & ~covered).sum((1, 2))
    assert rest.max() < 9, "all that is seen is squares, and the start of a last one"
    often = is_seen.double().mean(0)
    assert often.min() > 0.02
    assert often[4:10, 4:10].mean() == pytest.approx(39 / 196, rel=0.35)


def test_blocks_of_a_video_are_tubes() -> None:
    is_seen = seen(BEIT, 4 * 121, 50, counts=(4, ROWS, COLUMNS))
    assert torch.equal(is_seen.any(1), is_seen.all(1))


def test_blocks_need_a_plane() -> None:
    with pytest.raises(M3Error, match="rectangles over two axes of positions; use scorer `span`"):
        seen(BEIT, 4, 2, counts=(30,))


# -- noise of a colour ----------------------------------------------------------------------------------------


def spectrum(colour: str, batch: int = 2000) -> list[float]:
    """Mean power of the scores in three rings of frequencies (cycles per token), low, middle, high."""
    part, spec = masking.build_spec("scorers", {"type": "colour_noise", "colour": colour}, "scorer")
    scores = part(spec)(make_tokens(batch), Draws(torch.arange(batch)))["image"].reshape(batch, ROWS, COLUMNS)
    assert scores.mean().abs() < 0.02
    assert (scores.square().mean(0) - 1).abs().max() < 0.2, "the same variance everywhere"
    power = torch.fft.fft2(scores).abs().square().mean(0) / (ROWS * COLUMNS)
    y, x = torch.meshgrid(torch.fft.fftfreq(ROWS), torch.fft.fftfreq(COLUMNS), indexing="ij")
    radius = (y * y + x * x).sqrt()
    rings = [(0, 0.08), (0.1, 0.22), (0.36, 0.71)]
    return [power[(radius >= low) & (radius < high)].mean().item() for low, high in rings]


def test_red_noise_is_low_blue_high_green_middle_and_purple_all_but_the_middle() -> None:
    low, middle, high = spectrum("red")
    assert low > 4 * middle > 40 * high
    low, middle, high = spectrum("blue")
    assert high > 2 * middle > 8 * low
    low, middle, high = spectrum("green")
    assert middle > 1.5 * low
    assert middle > 4 * high
    low, middle, high = spectrum("purple")
    assert low > 1.3 * middle
    assert high > 1.3 * middle


@pytest.mark.parametrize("colour", ["red", "green", "blue", "purple"])
def test_noise_of_every_colour_shows_exactly_a_quarter_and_all_places_equally_often(colour: str) -> None:
    batch = 4000
    often = seen({"type": "colour_noise", "colour": colour}, 49, batch).double().mean(0)
    assert (often - 0.25).abs().max() < 0.07, "at the edges a filter has fewer neighbours"


def test_normal_draws_are_normal_and_each_of_its_own() -> None:
    x = Draws(torch.arange(200)).normal("test", 50).flatten().double()
    assert kstest(x.numpy(), "norm").pvalue > 1e-3
    assert len(x.unique()) > 9_990


def test_the_wide_blur_must_be_wider() -> None:
    with pytest.raises(M3Error, match=r"`fine` \(2.0\) must be smaller than `coarse` \(1.0\)"):
        seen({"type": "colour_noise", "fine": 2.0, "coarse": 1.0}, 4, 1)


# -- I-JEPA ---------------------------------------------------------------------------------------------------


def target_blocks(batch: int, counts: tuple[int, int] = (16, 16), first: int = 0, **settings) -> MaskPlan:
    masks = {"type": "target_blocks", "visible": 76, "size": 45, **settings}
    tokens = make_tokens(batch, counts)
    return masking.build(View(("image",), json.dumps(masks)))(tokens, Draws(torch.arange(batch) + first))


def test_four_blocks_of_45_tokens_and_a_context_of_76_without_them() -> None:
    plan = target_blocks(300)
    assert plan.blocks == {"image": 4}
    assert plan.target["image"].shape == (300, 180)
    assert plan.visible["image"].shape == (300, 76)
    overlaps = 0
    for seen_tokens, row in zip(plan.visible["image"].tolist(), plan.target["image"].tolist(), strict=True):
        blocks = [row[i : i + 45] for i in range(0, 180, 45)]
        assert seen_tokens == sorted(set(seen_tokens))
        for block in blocks:
            assert block == sorted(set(block))
            assert not set(block) & set(seen_tokens)
            columns = [sorted(i // 16 for i in block if i % 16 == x) for x in range(16)]
            columns = [column for column in columns if column]
            assert all(column == list(range(column[0], column[-1] + 1)) for column in columns)
            assert len({tuple(column) for column in columns[:-1]}) == 1, "whole columns but the last"
            assert 0.6 < len(columns[0]) / len(columns) < 1.7
        overlaps += len(set(row)) < 180
    assert overlaps > 200, "blocks may overlap"


def test_contexts_reach_all_places_and_lie_together() -> None:
    plan = target_blocks(1500)
    seen_tokens = torch.zeros(1500, 256).scatter(1, plan.visible["image"], 1.0).reshape(1500, 16, 16)
    often = seen_tokens.mean(0)
    assert often.min() > 0.04, "the centre is mostly a target"
    sides = [often[:4].mean(), often[-4:].mean(), often[:, :4].mean(), often[:, -4:].mean()]
    assert max(sides) - min(sides) < 0.06, "no side is favoured"
    neighbours = (seen_tokens[:, 1:] * seen_tokens[:, :-1]).sum((1, 2)).mean()
    assert neighbours > 45, "together: 76 tokens at random have 21 such pairs"


def test_target_blocks_do_not_depend_on_the_batch() -> None:
    whole, part = target_blocks(6), target_blocks(2, first=3)
    assert torch.equal(whole.target["image"][3:5], part.target["image"])
    assert torch.equal(whole.visible["image"][3:5], part.visible["image"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"visible": 77}, "77 visible tokens and 4 target blocks of 45 are more than the 256 of `image`; lower"),
        ({"aspect": [1.5, 0.75]}, r"`aspect` is smallest, then largest: write \[0.75, 1.5\]"),
        ({"context": [1.0, 0.5]}, r"`context` is smallest, then largest"),
    ],
)
def test_wrong_settings_of_target_blocks_are_named(settings: dict, text: str) -> None:
    with pytest.raises(M3Error, match=text):
        target_blocks(2, **settings)
