"""Run under torchrun: gradients of one global batch of 8, however it is cut; written by the main process.

python gradients.py RECIPE OUT MICRO_BATCH PROCESSES
"""

import gc
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from m3 import load_recipe
from m3.data.loader import Order, Samples, train_loader
from m3.train import build_model, gradients, open_source

GLOBAL = 8


SMALL = ["data.samples=40", "backbone.width=64", "backbone.heads=4", "backbone.depth=2"]


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
    prepared = [model.prepare(batch) for batch in train_loader(samples, order, workers=0)]
    _, sums, counts, _ = gradients(accelerator, model, network, prepared)
    sums = accelerator.reduce(sums, "sum")
    if accelerator.is_main_process:
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        save_file(found | {"loss": sums / counts, "counts": counts}, out)
    accelerator.wait_for_everyone()
    del network  # as the trainer does: before its process group
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
