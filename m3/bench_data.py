"""`m3 bench data`: how fast a recipe's data are read, where the time goes, and how fast other libraries read them."""

from __future__ import annotations

import importlib.util
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any

from rich.console import Console
from rich.table import Table

from m3.bench_data_peers import clip_rate, image_folder_rate, running_rate
from m3.data.loader import Order, Samples, train_loader
from m3.data.sources.folder import Folder
from m3.data.sources.mixture import Mixture
from m3.data.video import open_with_decord
from m3.errors import M3Error
from m3.parts import type_name
from m3.recipe import Recipe
from m3.summary import meta_model
from m3.train import open_source

BATCH = 32
PARTS = {
    "read": "reading, decoding pictures",
    "fit": "decoding clips, cropping, resizing",
    "collate": "making a batch",
}
ALONE = "one process"
NOTES = {
    "ImageFolder": "ImageFolder: torchvision's, with the same files, crops and sizes.",
    "clips": "Clips: files opened and the same frames decoded, nothing else, with as many threads.",
}
"""Words in the names of figures -> what stands below the table."""

Figures = dict[str, Callable[[], float]]
"""Name -> function that measures samples per second once."""


def bench_data(recipe: Recipe, samples: int, rounds: int, as_json: bool) -> dict[str, Any]:
    """Measure, print and return samples per second.

    Every round measures everything once, in turn, so that what else the machine does meets all alike; medians count.

    Args:
        recipe: its source, modalities, crops and workers are used.
        samples: how many are read for each figure.
        rounds: how often each is measured.
        as_json: print JSON instead of a table.
    """
    if samples < 1 or rounds < 1:
        raise M3Error("bench data: --samples and --rounds must be at least 1.")
    model = meta_model(recipe)
    data = Samples(open_source(recipe, model, "train"), model.modalities, recipe.data, recipe.seed)
    count = min(samples, len(data.source))
    stages: list[dict[str, float]] = []

    def alone() -> float:
        stages.append(_stages(data, count))
        return 1 / sum(stages[-1].values())

    workers = {n: f"{n} worker{'s' * (n > 1)}" for n in (1, recipe.data.workers) if n}
    own: Figures = {ALONE: alone}
    own |= {name: partial(_loader_rate, data, count, n) for n, name in workers.items()}
    if isinstance(data.source, Mixture):
        parts = {name: Samples(s, s.modalities, recipe.data, recipe.seed) for name, s in data.source.parts.items()}
        own |= {f"source {name}, {ALONE}": partial(_part_rate, part, count) for name, part in parts.items()}
    clips, peers, beside = _peers(data, count, {0: ALONE, **workers})
    figures = own | clips | peers
    found: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(rounds):
        for name, measure in figures.items():
            found[name].append(measure())
    result = {"recipe": recipe.name, "source": recipe.data.source, "samples": count, "rounds": rounds}
    result["samples_per_second"] = {name: median_low(rates) for name, rates in found.items()}
    result["times_as_fast"] = {
        peer: median_low(a / b for a, b in zip(found[name], found[peer], strict=True)) for peer, name in beside.items()
    }
    middle = sorted(stages, key=lambda stage: sum(stage.values()))[len(stages) // 2]
    result["seconds_per_sample"] = {PARTS[name]: seconds for name, seconds in middle.items()}
    print(json.dumps(result)) if as_json else _print(result)
    return result


def _peers(data: Samples, count: int, workers: dict[int, str]) -> tuple[Figures, Figures, dict[str, str]]:
    """Return figures of M3 that only a peer has its like of, figures of peers, and peer -> M3's figure beside it."""
    clips: Figures = {}
    peers: Figures = {}
    beside: dict[str, str] = {}
    kinds = {name: type_name(type(part).__name__) for name, part in data.modalities.items()}
    if not isinstance(data.source, Folder):
        return clips, peers, beside
    if list(kinds.values()) == ["image"]:
        for number, name in workers.items():
            peers[f"ImageFolder, {name}"] = partial(image_folder_rate, data.source, count, BATCH, number)
            beside[f"ImageFolder, {name}"] = name
    for name in [name for name, kind in kinds.items() if kind == "video"]:
        part, values = data.modalities[name], [row.values.get(name) for row in data.source.rows[:count]]
        files = [value for value in values if isinstance(value, Path)]
        clips[f"clips of {name}, decoded"] = partial(clip_rate, files, part, part.load)
        if importlib.util.find_spec("decord") is None:
            continue  # nothing to compare with, as on a Mac
        peers[f"clips of {name}, decord"] = partial(clip_rate, files, part, open_with_decord)
        beside[f"clips of {name}, decord"] = f"clips of {name}, decoded"
    return clips, peers, beside


def _stages(data: Samples, count: int) -> dict[str, float]:
    """Return seconds per sample of the stages of loading in this process, after a few samples that warm up."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(stage: str, work, *arguments):
        start = time.perf_counter()
        result = work(*arguments)
        seconds[stage] += time.perf_counter() - start
        return result

    for first in range(-BATCH, count, BATCH):
        if first == 0:
            seconds.clear()
        batch = []
        for index in range(max(first, 0), min(max(first, 0) + BATCH, count)):
            try:
                sample = timed("read", data.source.read, index)
                batch.append(timed("fit", data.fit, sample, index))
            except Exception as error:  # whatever a broken file raises
                raise M3Error(f"{data.source.name(index)} can't be read; take it out to measure: {error}") from error
        timed("collate", data.collate, batch)
    return {stage: value / count for stage, value in seconds.items()}


def _part_rate(part: Samples, count: int) -> float:
    """Return samples per second of one source of a mixture, in this process."""
    return 1 / sum(_stages(part, min(count, len(part.source))).values())


def _loader_rate(data: Samples, count: int, workers: int) -> float:
    """Return samples per second of the trainer's own loader, the start of its workers not counted."""
    batch = min(BATCH, count)
    timed = max(count // batch, 2 * workers)
    order = Order(len(data.source), data.seed, batch, stop=timed + 6 * workers, repeats=data.spec.repeats)
    with warnings.catch_warnings():  # more workers than cores: the recipe may be for another machine
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        return running_rate(train_loader(data, order, workers), workers, timed)


def _print(result: dict[str, Any]) -> None:
    title = f"{result['recipe']}: source {result['source']}, {result['samples']} samples"
    table = Table(title=title, title_justify="left", caption_justify="left")
    notes = [text for name, text in NOTES.items() if any(name in figure for figure in result["samples_per_second"])]
    table.caption = " ".join([f"Medians of {result['rounds']} rounds in turn.", *notes])
    table.add_column("")
    for column in ("samples/s", "per worker", "M3 beside it"):
        table.add_column(column, justify="right")
    for name, rate in result["samples_per_second"].items():
        last = name.rpartition(", ")[2]
        workers = int(last.split()[0]) if last.split()[-1].startswith("worker") else 0
        times = result["times_as_fast"].get(name)
        beside = "" if times is None else f"{times:.2f} x as fast"
        table.add_row(name, _digits(rate), _digits(rate / workers) if workers else "", beside)
    Console().print(table)
    table = Table(title=f"Time of a sample, {ALONE}", title_justify="left")
    table.add_column("")
    table.add_column("ms", justify="right")
    for name, seconds in result["seconds_per_sample"].items():
        table.add_row(name, f"{1000 * seconds:.3f}")
    Console().print(table)


def _digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
