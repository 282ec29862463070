"""Run under torchrun: gradients of one global batch of 8, however it is cut; written by the main process.

python gradients.py FOLDER MICRO_BATCH PROCESSES DTYPE RECIPE...      writes FOLDER/RECIPE.safetensors of each
"""

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from m3 import load_recipe
from m3.data.loader import Order, Samples, train_loader
from m3.train import build_model, gradients, open_source
from m3.types import Batch

GLOBAL = 8


SMALL = ["data.samples=40", "backbone.width=64", "backbone.heads=4", "backbone.depth=2"]


def use_float64() -> None:
    """Compute in float64 what the code computes in float32, also where it says so."""
    to = torch.Tensor.to

    def wider(x: Any) -> Any:
        return torch.float64 if x is torch.float32 else x

    def to_wider(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return to(self, *map(wider, arguments), **{name: wider(value) for name, value in options.items()})

    torch.set_default_dtype(torch.float64)
    torch.Tensor.to = to_wider
    torch.Tensor.float = torch.Tensor.double


def in_default(batch: Batch) -> Batch:
    """Bring what was read to the type that is computed in."""
    dtype = torch.get_default_dtype()
    signals = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.signals.items()}
    times = {name: x.to(dtype) for name, x in batch.times.items()}
    return replace(batch, signals=signals, times=times)


def with_one_modality(batch: Batch) -> Batch:
    """Leave each sample one modality, by its position in the global batch: 2 of 8 image only, 2 depth only, ..."""
    turn = batch.keys % GLOBAL * len(batch.signals) // GLOBAL
    return replace(batch, is_present={name: turn == number for number, name in enumerate(batch.signals)})


def measure(accelerator: Accelerator, name: str, out: Path, micro: int) -> None:
    """Write gradients, losses and counts of a recipe, and the buffers that the step has moved."""
    world, rank = accelerator.num_processes, accelerator.process_index
    beside = Path(__file__).with_name(f"{name}.yaml")
    recipe = load_recipe(beside) if beside.is_file() else load_recipe(name, SMALL)
    model = build_model(recipe)
    nn.Module.to(model, torch.get_default_dtype())
    if model.has_teacher:
        model.teacher = {name: 1.1 * parameter.detach() for name, parameter in model.named_parameters()}
    network = accelerator.prepare(model)
    samples = Samples(open_source(recipe, model, "train"), model.modalities, recipe.data, recipe.seed)
    order = Order(len(samples.source), recipe.seed, micro, GLOBAL // (micro * world), rank, world, start=3, stop=4)
    batches = [in_default(batch) for batch in train_loader(samples, order, workers=0)]
    if name == "disjoint":
        batches = [with_one_modality(batch) for batch in batches]
    prepared = [model.prepare(batch) for batch in batches]
    _, sums, counts, _ = gradients(accelerator, model, network, prepared)
    model.after_step()
    sums = accelerator.reduce(sums, "sum")
    if accelerator.is_main_process:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        buffers = {f"buffer {name}": buffer.float() for name, buffer in model.named_buffers()}
        save_file(found | buffers | {"loss": sums / counts.clamp(min=1), "counts": counts}, out)
    accelerator.wait_for_everyone()
    del network  # as the trainer does: before its process group
    accelerator.free_memory()
    gc.collect()


def main(folder: Path, micro: int, processes: int, dtype: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    if dtype == "float64":
        use_float64()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == processes, f"{accelerator.num_processes} processes run instead of {processes}"
    for name in names:  # in `uniter` pairs of neighbours are mismatched, so no micro-batch may part them
        measure(accelerator, name, folder / f"{name}.safetensors", max(2, micro) if name == "uniter" else micro)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
