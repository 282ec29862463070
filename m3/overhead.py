"""`m3 bench RECIPE --overhead`: what the trainer's own loop costs beside forward, backward and optimizer."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from m3.bench import micro_batch, with_batch
from m3.model import M3Model
from m3.progress import METRICS, read_json_lines
from m3.recipe import Recipe, recipe_from
from m3.train import Accelerator, train

COUNTED = ((M3Model, "forward"), (Accelerator, "backward"), (torch.optim.AdamW, "step"))
"""What is not overhead."""


def overhead(recipe: Recipe, steps: int, as_json: bool, batch: int | None = None) -> dict[str, Any]:
    """Train for some steps, print and return the share of a step that is none of forward, backward and optimizer.

    Nothing is evaluated, and of the data only waiting counts. On a GPU every part waits until it is done.

    Args:
        recipe: without a data folder it reads the embedded world.
        steps: that are timed, after a first one; the median counts.
        as_json: print JSON instead of a sentence.
        batch: samples of a step; None: the recipe's micro-batch, at most 8 on a CPU.
    """
    recipe = with_batch(recipe, batch)
    spent: list[float] = [0.0]
    before = psutil.cpu_times()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for owner, name in COUNTED:
            stack.enter_context(_timed(owner, name, spent))
        train(_short(recipe, Path(folder), steps + 1), is_shown=False)
        lines = read_json_lines(Path(folder) / METRICS)
    found = [line["seconds"] for line in lines if "seconds" in line]
    waits = [line["data_wait"] for line in lines if "seconds" in line]
    inside = [later - earlier for earlier, later in pairwise(spent[:-1])]  # of the second step on
    shares = [1 - part / whole for part, whole in zip(inside, found, strict=True)]
    now = psutil.cpu_times()
    result = {
        "recipe": recipe.name,
        "batch": micro_batch(recipe),
        "seconds_per_step": statistics.median(found),
        "overhead": statistics.median(share - wait for share, wait in zip(shares, waits, strict=True)),
        "data_wait": statistics.median(waits),
        "machine_idle": (now.idle - before.idle) / max(sum(now) - sum(before), 1e-9),
    }
    print(json.dumps(result) if as_json else _sentence(result))
    return result


def _short(recipe: Recipe, out: Path, steps: int) -> Recipe:
    settings = recipe.model_dump(mode="json", exclude_none=True)
    for key in ("epochs", "milestones", "keep_best", "save_every", "keep_every"):
        settings["train"].pop(key, None)
    settings["train"] |= {"steps": steps, "log_every": 1, "warmup": 0, "trackers": [], "micro_batch": None}
    settings["train"]["batch_size"] = micro_batch(recipe)
    settings["evaluate"] = {"tasks": {}, "preview_rows": 1}
    if recipe.data.root is None:
        settings["data"] = {"source": "world", "workers": recipe.data.workers}
    settings["data"]["held_out"] = 0
    return recipe_from(settings | {"out": str(out)}, recipe.name)


@contextmanager
def _timed(owner: Any, name: str, spent: list[float]) -> Iterator[None]:
    """Add the time in a method to the last entry of `spent`; the optimizer's step begins another one."""
    method = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = _now()
        result = method(*args, **kwargs)
        spent[-1] += _now() - start
        if name == "step":
            spent.append(spent[-1])
        return result

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, method)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _sentence(result: dict[str, Any]) -> str:
    return (
        f"{result['recipe']}: {result['overhead']:.1%} of a step of {result['seconds_per_step']:.3f} s (batch "
        f"{result['batch']}) is neither forward, backward nor optimizer, and {result['data_wait']:.1%} waiting for "
        f"data; meanwhile {result['machine_idle']:.0%} of the machine's processors were idle"
    )
