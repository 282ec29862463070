"""What a run shows while it trains."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from m3 import cost, progress, seeing
from m3.build import meta_model
from m3.check import shrink
from m3.model import M3Model
from m3.network import Prepared
from m3.plugins import View
from m3.provenance import read_starts
from m3.recipe import load_recipe
from m3.schedule import choices
from m3.train import train
from m3.types import MaskPlan

LINE = {"samples_per_second": 1234.5, "utilisation": 0.456, "data_wait": 0.012, "padding": 0.25, "skipped": 0}


def test_the_bar_says_speed_utilisation_waiting_padding_and_losses() -> None:
    text = seeing.text_of(LINE, {"masked/image": 0.5, "masked/depth": 1.25}, 80)
    assert text == "1234/s, 46% used, wait 1%, pad 25%, image 0.500, depth 1.250"


def test_parts_with_one_last_name_are_written_out() -> None:
    text = seeing.text_of({"skipped": 2}, {"a/image": 0.5, "b/image": 1.0}, 80)
    assert text == "unreadable 2, a/image 0.500, b/image 1.000"


def test_losses_that_do_not_fit_are_counted() -> None:
    losses = {f"all/part{i}": float(i) for i in range(9)}
    text = seeing.text_of(LINE, losses, 66)
    assert text == "1234/s, 46% used, wait 1%, pad 25%, part0 0.000, part1 1.000, +7"
    assert len(text) <= 66
    assert seeing.text_of(LINE, losses, 10) == ""


def test_the_bar_fits_into_120_columns(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    bar = seeing.progress_bar("multimae_text_vit_b_of_mine", 0, 100000, True)
    bar.update(12345)
    seeing.show_line(bar, LINE, {f"reconstruct/modality{i}": i + 0.5 for i in range(9)})
    bar.close()
    last = re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]
    assert "12345/100000" in last
    assert "46% used" in last
    assert "modality0 0.500" in last
    assert 80 < len(last) <= 120


def test_padding_is_what_does_not_exist_of_what_the_encoder_is_given() -> None:
    def plan(*counts: int) -> MaskPlan:
        slots = torch.arange(4).expand(len(counts), 4)
        is_valid = torch.arange(4) < torch.tensor(counts).unsqueeze(1)
        return MaskPlan({"text": slots}, {}, is_valid=None if min(counts) == 4 else is_valid)

    micro = [
        Prepared({}, {View(("text",), "a"): plan(4, 3, 1), View(("text",), "b"): plan(4, 4)}),
        Prepared({}, {View(("text",), "a"): plan(2, 2)}),
    ]
    assert seeing.padding(micro) == {"padding": (1 + 3 + 2 + 2) / (12 + 8 + 8)}
    assert seeing.padding([Prepared({}, {})]) == {}


def test_utilisation_is_the_share_of_what_matrix_products_alone_would_reach(monkeypatch) -> None:
    monkeypatch.setattr(cost, "matmul_rate", lambda dtype, tries: 1e12)
    recipe = load_recipe("mae_tiny", ["train.precision=fp32"])
    flops = cost.cost(meta_model(recipe)).train_flops
    assert cost.highest_speed(recipe, 3, Console()) == pytest.approx(3e12 / flops)


def test_what_a_drawn_objective_costs_is_weighted(monkeypatch) -> None:
    assert choices({"a": 1, "b": 3}, ["b", "c", "a"]) == {("c", "a"): 0.25, ("b", "c"): 0.75}
    assert choices(None, ["a"]) == {None: 1.0}


def test_utilisation_is_worked_out_once_a_run_has_lasted(monkeypatch) -> None:
    asked = []
    clock = progress.Clock(0, 8, lambda: asked.append(1) or 100.0)
    lines = []
    for step in range(1, 5):
        clock.since -= 12.5
        lines.append(clock.line(step, {}, 0.1, 1.0, {}))
    assert ["utilisation" in line for line in lines] == [False, False, True, True]
    assert lines[-1]["utilisation"] == pytest.approx(lines[-1]["samples_per_second"] / 100)
    assert len(asked) == 1


def test_a_part_that_reads_values_only_leaves_utilisation_out(monkeypatch, capsys) -> None:
    monkeypatch.setattr(M3Model, "prepare", lambda self, batch, active: batch.keys.tolist())
    recipe = shrink(load_recipe("mae_tiny"), Path("unused"))
    asked = []
    clock = progress.Clock(0, 8, lambda: asked.append(1) or cost.highest_speed(recipe, 1, Console(width=500)))
    for step in (1, 2):
        clock.since -= 40.0
        assert "utilisation" not in clock.line(step, {}, 0.1, 1.0, {})
    assert len(asked) == 1
    said = capsys.readouterr().out
    assert "can't be told: a part of the model reads values where there are only shapes (NotImplementedError: " in said


def test_measuring_the_highest_speed_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    assert cost.highest_speed(shrink(load_recipe("mae_tiny"), Path("unused")), 1, Console()) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_tells_its_trackers_and_its_folder(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = shrink(load_recipe("mae_tiny"), tmp_path / "run").model_dump(mode="json", exclude_none=True)
    settings["train"] |= {"trackers": ["tensorboard"]}
    settings["evaluate"] |= {"every": 2}
    from m3.recipe import recipe_from

    train(recipe_from(settings, "here"), is_shown=False)
    events = EventAccumulator(str(next((tmp_path / "run" / "logs").rglob("events*")).parent), {"images": 0})
    events.Reload()
    tags = events.Tags()
    assert "predictions" in tags["images"]
    steps = [event.step for event in events.Images("predictions")]
    assert steps == [2, 3]
    shape = np.asarray(seeing.picture_of(tmp_path / "run" / "preview.png")).shape
    last = events.Images("predictions")[-1]
    assert (last.height, last.width, 3) == shape
    assert any(tag.startswith("held_out/") for tag in tags["scalars"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["padding"] == 0.0
    (start,) = read_starts(tmp_path / "run")
    assert (start["step"], start["processes"]) == (0, 1)
