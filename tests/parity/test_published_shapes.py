"""Checkpoints with exactly the published names and shapes, at the published sizes, are read whole and written back.

Shapes alone are looked at: large tensors are on the device `meta` and hold no numbers.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3 import convert
from tests.parity.published_shapes import CASES, Case, Shapes, multimae

SMALL = 100_000
"""Tensors with more numbers have none here."""
SLOW = ("4M-7 Ti", "4M-7 L", "4M-21 B")


def filled(case: Case) -> dict[str, Tensor]:
    """The file, large tensors without numbers; 4M's heads keep theirs, as they are compared with its embeddings."""
    found = {}
    for name, shape in case.shapes.items():
        dtype = torch.long if name.endswith("num_batches_tracked") else torch.float32
        is_light = prod(shape) > SMALL and not name.startswith("decoder_embeddings.")
        empty = torch.empty(shape, device="meta") if is_light else torch.zeros((), dtype=dtype).expand(shape)
        found[name] = case.tables.get(name, empty)
    assert {name: tuple(x.shape) for name, x in found.items()} == case.shapes, "the tables by hand"
    assert case.tables.keys() <= case.shapes.keys()
    return found


COUNTS = {  # M parameters and tensors, as published or counted on the published code; None: not given
    "MAE B, full": (111.91, None),
    "MAE L, full": (329.54, None),
    "MAE H, full": (657.07, None),
    "MAE B, tuned": (86.57, None),
    "MultiMAE B": (98.57, 351),
    "4M-7 B": (441.5, 359),
    "4M-7 L": (1029.3, 659),
    "4M-21 B": (834.4, 433),
}
PARTS = {  # of MultiMAE-B
    "encoder.": 85.05,
    "output_adapters.rgb.": 2.815,
    "output_adapters.depth.": 2.684,
    "output_adapters.semseg.": 3.165,
    "output_adapters.norm_rgb.": 2.815,
    "input_adapters.rgb.": 0.741,
    "input_adapters.depth.": 0.348,
    "input_adapters.semseg.": 0.946,
}


def millions(shapes: Shapes) -> float:
    return sum(prod(shape) for shape in shapes.values()) / 1e6


@pytest.mark.parametrize("name", COUNTS)
def test_the_tables_by_hand_have_the_published_number_of_parameters(name: str) -> None:
    case = CASES[name]()
    shapes, (expected, tensors) = case.shapes, COUNTS[name]
    if name.startswith("4M"):  # fixed positions and the zeros in the place of norms' biases are no parameters
        fixed = {n for n in shapes if re.fullmatch(r".*norm\d?\.bias", n)} | case.tables.keys()
        shapes = {n: shape for n, shape in shapes.items() if n not in fixed}
        # an embedding that both sides share is one
        shapes = {n: x for n, x in shapes.items() if not re.fullmatch(r"decoder_embeddings\..*\.mod_emb", n)}
    digits = len(str(expected).partition(".")[2])
    assert round(millions(shapes), digits) == expected
    assert tensors in (None, len(case.shapes))


def test_the_parts_of_multimae_have_the_published_number_of_parameters() -> None:
    shapes = multimae().shapes
    for name, expected in PARTS.items():
        own = {n: shape for n, shape in shapes.items() if n.startswith(name)}
        assert millions(own) == pytest.approx(expected, abs=6e-3 if expected > 80 else 6e-4), name


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
def test_a_file_of_published_shapes_is_read_whole_and_written_back(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    torch.save({"model": filled(case)}, tmp_path / "theirs.pth")
    found = convert.convert(tmp_path / "theirs.pth", case.overrides)
    assert found.format == case.format
    expected = {n for n in case.shapes if case.left and n.startswith(case.left)}
    assert found.left.keys() == expected
    assert all(found.left.values()), "each with a reason"
    weights = {name: x.to("meta") if x.numel() > SMALL else x for name, x in found.model.state_dict().items()}
    found.model.load_state_dict(weights, assign=True)
    convert.save(found.model, tmp_path / "back.pth", case.format)
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    shapes = {name: tuple(x.shape) for name, x in back.items()}
    assert shapes == {name: shape for name, shape in case.shapes.items() if name not in expected}
