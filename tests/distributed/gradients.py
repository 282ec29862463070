"""Run under torchrun: gradients of one global batch of 8, however it is cut; written by the main process.

python gradients.py RECIPE OUT MICRO_BATCH PROCESSES
"""

import gc
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from m3 import load_recipe
from m3.data.loader import Order, Samples, train_loader
from m3.train import build_model, gradients, open_source
from m3.types import Batch

GLOBAL = 8


SMALL = ["data.samples=40", "backbone.width=64", "backbone.heads=4", "backbone.depth=2"]


def with_one_modality(batch: Batch) -> Batch:
    """Leave each sample one modality, by its position in the global batch: 2 of 8 image only, 2 depth only, ..."""
    turn = batch.keys % GLOBAL * len(batch.signals) // GLOBAL
    return replace(batch, is_present={name: turn == number for number, name in enumerate(batch.signals)})


def main(name: str, out: str, micro: int, processes: int) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    world, rank = accelerator.num_processes, accelerator.process_index
    assert world == processes, f"{world} processes run instead of {processes}"
    beside = Path(__file__).with_name(f"{name}.yaml")
    recipe = load_recipe(beside) if beside.is_file() else load_recipe(name, SMALL)
    model = build_model(recipe)
    network = accelerator.prepare(model)
    samples = Samples(open_source(recipe, model, "train"), model.modalities, recipe.data, recipe.seed)
    order = Order(len(samples.source), recipe.seed, micro, GLOBAL // (micro * world), rank, world, start=3, stop=4)
    batches = list(train_loader(samples, order, workers=0))
    if name == "disjoint":
        batches = [with_one_modality(batch) for batch in batches]
    prepared = [model.prepare(batch) for batch in batches]
    _, sums, counts, _ = gradients(accelerator, model, network, prepared)
    sums = accelerator.reduce(sums, "sum")
    if accelerator.is_main_process:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        save_file(found | {"loss": sums / counts.clamp(min=1), "counts": counts}, out)
    accelerator.wait_for_everyone()
    del network  # as the trainer does: before its process group
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
