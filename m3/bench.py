"""`m3 bench`: speed of a training step as a share of what the machine's matrix products reach in the same run.

Every measurement runs in a fresh process, so that peak memory is its own. Letters: B batch.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from m3.build import meta_model
from m3.cost import cost
from m3.data.loader import Samples, first_batches
from m3.errors import M3Error
from m3.machine import use_bf16
from m3.matmul import matmul_rate, seconds
from m3.memory import compiled, keep_freed_memory
from m3.recipe import DataSpec, Recipe
from m3.schedule import make_optimizer
from m3.train import build_model, open_source

WARM_UP = 2


def bench(
    recipes: list[Recipe], against: str | None, as_json: bool, steps: int, rounds: int, batch: int | None = None
) -> dict[str, Any]:
    """Measure recipes, print a table or JSON, and return the figures.

    Args:
        recipes: the first one, and others that are measured beside it; their micro-batch, precision and `compile` are
            used.
        against: `transformers`: measure ViTMAEForPreTraining of the same shape in the same run.
        as_json: print JSON instead of a table.
        steps: timed steps of each round; the median counts.
        rounds: how often everybody is measured, in turn, so that a slow minute of the machine hits all.
        batch: B, the samples of a measured step; None: the recipe's micro-batch, at most 8 on a CPU.
    """
    recipes = [with_batch(recipe, batch) for recipe in recipes]
    recipe, is_alone = recipes[0], len(recipes) == 1
    peers: dict[str, tuple[Callable[..., dict[str, float]], Recipe]] = {
        "m3" if is_alone else each.name: (_measure_ours, each) for each in recipes
    }
    if len(peers) < len(recipes) or (against and not is_alone):
        raise M3Error("bench: name each recipe once; --against measures one recipe, without others beside it.")
    if against:
        _check_is_mae(recipe)
        eager = recipe.train.model_copy(update={"compile": False})
        peers[against] = (_measure_transformers, recipe.model_copy(update={"train": eager}))
        if recipe.train.compile:
            peers[f"{against} compiled"] = (_measure_transformers, recipe)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, (work, its_recipe) in peers.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found[name].append(pool.submit(work, its_recipe, steps).result())
    flops = {name: cost(meta_model(own)).train_flops for name, (_, own) in peers.items()}
    figures = {name: _figures(measured, flops[name]) for name, measured in found.items()}
    result = {"recipe": recipe.name, **_settings(recipe), "train_flops_per_sample": next(iter(flops.values()))}
    result["peers"] = figures
    if against:
        result["speed_ratio"] = figures["m3"]["samples_per_second"] / figures[against]["samples_per_second"]
    result["data_samples_per_second"] = _data_rate(recipe)
    print(json.dumps(result)) if as_json else _print(result, against)
    return result


def with_batch(recipe: Recipe, batch: int | None) -> Recipe:
    """Set B, the samples of a measured step: the given ones, or the recipe's micro-batch, at most 8 on a CPU."""
    count = recipe.train.micro_batch or recipe.train.batch_size
    batch = batch or (count if torch.cuda.is_available() else min(count, 8))
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": batch})})


def micro_batch(recipe: Recipe) -> int:
    """Return B, the samples of a measured step, of a recipe that `with_batch` made."""
    assert recipe.train.micro_batch is not None, "`with_batch` sets it"
    return recipe.train.micro_batch


def _settings(recipe: Recipe) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    precision = "bf16" if use_bf16(recipe.train.precision) else "fp32"
    settings = {"device": device, "threads": torch.get_num_threads(), "precision": precision}
    return settings | {"compile": recipe.train.compile, "batch": micro_batch(recipe)}


def _figures(found: list[dict[str, float]], flops: int) -> dict[str, float]:
    """Combine rounds: median time, highest matmul rate and memory; utilisation is against the round's own rate."""
    seconds = statistics.median(f["seconds"] for f in found)
    used = statistics.median(f["batch"] * flops / f["seconds"] / f["matmul"] for f in found)
    return {
        "samples_per_second": found[0]["batch"] / seconds,
        "tflops": found[0]["batch"] * flops / seconds / 1e12,
        "matmul_tflops": statistics.median(f["matmul"] for f in found) / 1e12,
        "utilisation": used,
        "peak_memory_mib": max(f["memory"] for f in found),
    }


def _measure_ours(recipe: Recipe, steps: int) -> dict[str, float]:
    before = _resident()
    model = build_model(recipe)
    nn.Module.to(model, _device())
    optimizer = make_optimizer(model, recipe.train)
    network: nn.Module = compiled(model) if recipe.train.compile else model  # type: ignore[assignment]
    size = micro_batch(recipe)
    batch = next(first_batches(_samples(recipe), size, size)).to(_device())

    def loss() -> torch.Tensor:
        return network(model.prepare(batch)).loss

    return _time(loss, optimizer, recipe, steps, before)


def _measure_transformers(recipe: Recipe, steps: int) -> dict[str, float]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    before = _resident()
    image, backbone = next(iter(recipe.modalities.values())), recipe.backbone
    objective = next(iter(recipe.objectives.values()))
    decoder = objective["decoder"]
    size, patch = image.get("size", 224), image["tokenizer"]["size"]
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=backbone.width,
            num_hidden_layers=backbone.depth,
            num_attention_heads=backbone.heads,
            intermediate_size=int(backbone.width * backbone.mlp_ratio),
            image_size=size,
            patch_size=patch,
            decoder_hidden_size=decoder["width"],
            decoder_num_hidden_layers=decoder["depth"],
            decoder_num_attention_heads=decoder["heads"],
            decoder_intermediate_size=int(decoder["width"] * backbone.mlp_ratio),
            mask_ratio=1 - objective["masking"]["visible"],
            norm_pix_loss=True,
            layer_norm_eps=backbone.norm_eps,
        )
    )
    # Built from a config, its positions and mask token are all zero; give it what a trained one has.
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name or "pos_embed" in name or "token" in name:
            nn.init.normal_(parameter.data, std=0.02)
    nn.Module.to(model, _device()).train()
    optimizer = make_optimizer(model, recipe.train)
    network: nn.Module = torch.compile(model) if recipe.train.compile else model  # type: ignore[assignment]
    pixels = torch.rand(micro_batch(recipe), 3, size, size, device=_device())
    return _time(lambda: network(pixel_values=pixels).loss, optimizer, recipe, steps, before)


def _time(
    loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, before: float
) -> dict[str, float]:
    """Time forward, backward and optimizer step; the learning rate is tiny but the work is the same."""
    bf16 = use_bf16(recipe.train.precision)
    keep_freed_memory()  # as the trainer does, and for the peer alike
    for group in optimizer.param_groups:
        group["lr"] = 1e-6

    def step() -> None:
        with torch.autocast(_device(), torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        step()
    times = [seconds(step) for _ in range(steps)]
    memory = _peak_memory() - before
    rate = matmul_rate(torch.bfloat16 if bf16 else torch.float32)
    return {"seconds": statistics.median(times), "matmul": rate, "memory": memory, "batch": micro_batch(recipe)}


def _peak_memory() -> float:
    """Return the highest use of memory so far in MiB: of the GPU's allocator, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _resident() -> float:
    """Return what the process holds before the model is built, in MiB; nothing on a GPU."""
    return 0.0 if torch.cuda.is_available() else psutil.Process().memory_info().rss / 2**20


def _samples(recipe: Recipe) -> Samples:
    """Open the recipe's data, or the embedded world where its folder is not named."""
    if recipe.data.root is None:
        recipe = recipe.model_copy(update={"data": DataSpec(source="world")})
    model = meta_model(recipe)
    return Samples(open_source(recipe, model, "train"), model.modalities, recipe.data, recipe.seed)


def _data_rate(recipe: Recipe, count: int = 64) -> float:
    """Return samples/s that one process reads from the source."""
    samples = _samples(recipe)
    start = time.perf_counter()
    read = sum(len(batch) for batch in first_batches(samples, count, 16))
    return read / (time.perf_counter() - start)


def _check_is_mae(recipe: Recipe) -> None:
    objective = next(iter(recipe.objectives.values()))
    if len(recipe.modalities) != 1 or objective.get("decoder", {}).get("type") != "self_decoder":
        raise M3Error(
            f"{recipe.name} can't be measured against transformers: only MAE on one image modality has a peer."
        )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _print(result: dict[str, Any], against: str | None) -> None:
    console = Console()
    console.print(
        f"{result['recipe']}: batch {result['batch']}, {result['precision']}, compile {result['compile']}, "
        f"{result['device']}, {result['threads']} threads, "
        f"{result['train_flops_per_sample'] / 1e9:.2f} GFLOP per sample and step"
    )
    first = next(iter(result["peers"].values()))
    table = Table()
    for column in ("", "samples/s", "TFLOP/s", "matmul", "utilisation", "peak MiB", "speed"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, f in result["peers"].items():
        numbers = (f"{f['samples_per_second']:.2f}", f"{f['tflops']:.3f}", f"{f['matmul_tflops']:.3f}")
        ratio = f"{f['samples_per_second'] / first['samples_per_second']:.2f}"
        table.add_row(name, *numbers, f"{f['utilisation']:.1%}", f"{f['peak_memory_mib']:.0f}", ratio)
    console.print(table)
    if against:
        console.print(f"m3 is {result['speed_ratio']:.3f} times as fast as {against} (eager)")
    console.print(f"data: {result['data_samples_per_second']:.0f} samples/s read by one process")
