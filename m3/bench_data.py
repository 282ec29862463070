"""`m3 bench data`: how fast a recipe's data are read, and where the time goes."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from m3.data.loader import Order, Samples, train_loader
from m3.data.sources.folder import Folder
from m3.errors import M3Error
from m3.parts import type_name
from m3.recipe import Recipe
from m3.summary import meta_model
from m3.train import open_source

BATCH = 32
PARTS = {"read": "reading (and decoding pictures)", "fit": "cutting, cropping, resizing", "collate": "making a batch"}


def bench_data(recipe: Recipe, samples: int, as_json: bool) -> dict[str, Any]:
    """Measure, print and return samples per second.

    Args:
        recipe: its source, modalities, crops and workers are used.
        samples: how many are read for each figure.
        as_json: print JSON instead of a table.
    """
    model = meta_model(recipe)
    source = open_source(recipe, model, "train")
    data = Samples(source, model.modalities, recipe.data, recipe.seed)
    count = min(samples, len(source))
    seconds = _stages(data, count)
    figures: dict[str, float] = {"one process": count / sum(seconds.values())}
    for workers in dict.fromkeys((1, recipe.data.workers)):
        if workers:
            figures[f"{workers} worker(s)"] = _loader_rate(data, recipe, count, workers)
    kinds = [type_name(type(part).__name__) for part in model.modalities.values()]
    if isinstance(source, Folder) and kinds == ["image"]:
        figures["torchvision ImageFolder, one process"] = _image_folder_rate(source, recipe, count)
    result = {"recipe": recipe.name, "source": recipe.data.source, "samples": count, "samples_per_second": figures}
    result["seconds_per_sample"] = {PARTS[name]: value / count for name, value in seconds.items()}
    print(json.dumps(result)) if as_json else _print(result)
    return result


def _stages(data: Samples, count: int) -> dict[str, float]:
    """Time the stages of loading in this process, after a few samples that warm up."""
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
    return dict(seconds)


def _loader_rate(data: Samples, recipe: Recipe, count: int, workers: int) -> float:
    """Return samples per second of the trainer's own loader, the start of its workers not counted."""
    steps = max(2, count // BATCH)
    order = Order(len(data.source), recipe.seed, BATCH, start=0, stop=steps + 1, repeats=recipe.data.repeats)
    batches = iter(train_loader(data, order, workers))
    next(batches)
    start = time.perf_counter()
    done = sum(len(batch) for batch in batches)
    return done / (time.perf_counter() - start)


def _image_folder_rate(source: Folder, recipe: Recipe, count: int) -> float:
    """Return samples per second of torchvision with the same files, crop and resizing, in one process."""
    try:
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms import v2
    except ImportError as error:
        raise M3Error("the comparison needs torchvision; run `pip install 'm3-multimodal[vision]'`.") from error
    (part,) = source.modalities.values()
    size, scale = list(part.signal.size), recipe.data.crop
    resize: Any = v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True)
    if scale:
        resize = v2.RandomResizedCrop(size, (scale[0], scale[1]), interpolation=v2.InterpolationMode.BICUBIC)
    transform = v2.Compose([v2.PILToTensor(), resize])
    paths = [value for row in source.rows[:count] for value in row.values.values() if isinstance(value, Path)]
    files = [(os.fspath(path), transform) for path in paths]

    class Files:
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int):
            path, change = files[index]
            return change(default_loader(path))

    loader = DataLoader(Files(), batch_size=BATCH)  # type: ignore[arg-type]  # a map-style data set by its methods
    list(loader) if count <= BATCH else next(iter(loader))
    start = time.perf_counter()
    done = sum(len(batch) for batch in loader)
    return done / (time.perf_counter() - start)


def _print(result: dict[str, Any]) -> None:
    title = f"{result['recipe']}: source {result['source']}, {result['samples']} samples"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("samples/s", justify="right")
    for name, rate in result["samples_per_second"].items():
        table.add_row(name, f"{rate:,.0f}")
    for name, seconds in result["seconds_per_sample"].items():
        table.add_row(f"  {name}", f"{1000 * seconds:.3f} ms")
    Console().print(table)
