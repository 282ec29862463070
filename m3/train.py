"""The training loop. The only file that knows Accelerate; read it from top to bottom.

accelerate launch -m m3.train RECIPE [a.b=c ...] [--resume]      the same code as: m3 train RECIPE ...
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from m3 import checkpoint
from m3.config import M3Config
from m3.data.loader import Order, Samples, first_batches, train_loader
from m3.data.source import Source, Split
from m3.data.source import open_source as open_data
from m3.ema import Average
from m3.errors import M3Error
from m3.evaluate.reconstruction import Row, fit_averages, measure
from m3.memory import compiled, keep_freed_memory
from m3.model import M3Model, Prepared, resolved
from m3.processor import M3Processor
from m3.progress import Clock, append, cut
from m3.recipe import Recipe, dump_recipe
from m3.schedule import Plan, learning_rate, make_optimizer, plan_run
from m3.show import count_parameters, metrics_table, preview
from m3.types import Loss

EVALUATION_BATCH = 32
AVERAGED_SAMPLES = 512
"""Training samples that the constant baselines are fitted on."""


def build_model(recipe: Recipe) -> M3Model:
    """Make the model of a recipe with the weights of its seed."""
    set_seed(recipe.seed)
    return M3Model(model_config(recipe))


def model_config(recipe: Recipe) -> M3Config:
    """Return the part of a recipe that describes the model."""
    return M3Config(
        modalities={name: resolved(entry, f"modalities.{name}") for name, entry in recipe.modalities.items()},
        backbone=recipe.backbone.model_dump(),
        objectives=recipe.objectives,
        seed=recipe.seed,
    )


def open_source(recipe: Recipe, model: M3Model, split: Split) -> Source:
    """Open the recipe's source."""
    return open_data(recipe.data, model.modalities, recipe.seed, split)


def train(recipe: Recipe, resume: bool = False) -> list[Row]:
    """Run a recipe to its end and return the final table of metrics.

    Args:
        recipe: what to do.
        resume: continue from the newest checkpoint of the run folder, if there is one.
    """
    # ---------------------------------------------------------------------------------------- processes
    spec, run = recipe.train, recipe.folder
    AcceleratorState._reset_state()  # a second run in one Python process may want another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if use_bf16(spec.precision) else "no",
        log_with=list(spec.trackers) or None,
        project_dir=str(run),
    )
    console = Console(quiet=not accelerator.is_main_process)
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    if device.type == "cpu":  # `accelerate launch` leaves one thread to each process
        keep_freed_memory()
        torch.set_num_threads(spec.threads or max(1, len(os.sched_getaffinity(0)) // world))

    # ----------------------------------------------------------------------------------- model and data
    raw_model = build_model(recipe)
    source = open_source(recipe, raw_model, "train")
    samples = Samples(source, raw_model.modalities, recipe.data, recipe.seed)
    plan = plan_run(spec, len(source) * recipe.data.repeats, world)  # an epoch is all samples in all their crops
    optimizer = make_optimizer(raw_model, spec)
    model, optimizer = accelerator.prepare(raw_model, optimizer)
    average = Average(raw_model, spec.ema) if spec.ema else None
    network: Any = compiled(model) if spec.compile else model
    describe(console, recipe, raw_model, plan, accelerator)

    # ------------------------------------------------------------------------------------ where to start
    start = restore(accelerator, run, raw_model, average) if resume else 0
    if accelerator.is_main_process:
        open_run(run, recipe, start)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("logs", config={"recipe": dump_recipe(recipe)})
    order = Order(
        len(source),
        recipe.seed,
        plan.micro_batch,
        plan.accumulation,
        rank,
        world,
        start,
        plan.steps,
        recipe.data.repeats,
    )
    batches = iter(train_loader(samples, order, recipe.data.workers))
    clock = Clock(console, start, spec.batch_size, len(source))
    bar = tqdm(
        total=plan.steps,
        initial=start,
        desc=recipe.name,
        unit="step",
        disable=not accelerator.is_main_process,
    )

    # ---------------------------------------------------------------------------------------- train loop
    network.train()
    for step in range(start, plan.steps):
        # The batches of the step first: the loss is divided by the counts of all of them, on all ranks.
        waited = time.perf_counter()
        micro_batches = [next(batches) for _ in range(plan.accumulation)]
        clock.waited += time.perf_counter() - waited
        clock.count_skipped(micro_batches, recipe.data.max_unreadable)
        prepared = [raw_model.prepare(batch.to(device)) for batch in micro_batches]

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        sums, counts = gradients(accelerator, raw_model, network, prepared)
        norm: Any = accelerator.clip_grad_norm_(model.parameters(), spec.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.update(raw_model)
        bar.update()

        # ------------------------------------------------------------------------ report, save, evaluate
        done = step + 1
        if done % spec.log_every == 0 or done == plan.steps:
            values = (add_over_processes(accelerator, sums) / counts.clamp(min=1)).tolist()
            values = dict(zip(raw_model.part_names, values, strict=True))
            line = clock.line(done, values, learning_rate(step, plan), float(norm))
            accelerator.log({key: v for key, v in line.items() if isinstance(v, float)}, step=done)
            bar.set_postfix_str(" ".join(f"{name.split('/')[-1]} {v:.3f}" for name, v in values.items()))
            if accelerator.is_main_process:
                append(run, line)
        if done % (spec.save_every or max(1, plan.steps // 10)) == 0 or done == plan.steps:
            save(accelerator, run, done, raw_model, average, spec.keep)
        if recipe.evaluate.every and done % recipe.evaluate.every == 0 and done < plan.steps:
            if accelerator.is_main_process:
                evaluate(recipe, raw_model, samples, run, done)
            accelerator.wait_for_everyone()
    bar.close()

    # --------------------------------------------------------------------------------------------- finish
    rows: list[Row] = []
    if accelerator.is_main_process:
        rows = finish(recipe, raw_model, average, samples, console, clock)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return rows


def use_bf16(precision: str) -> bool:
    """Return True for bfloat16 autocast: asked for, or `auto` on a device that computes it natively."""
    if precision == "auto":
        if torch.cuda.is_available():
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return precision == "bf16"


def gradients(
    accelerator: Accelerator, model: M3Model, network: nn.Module, prepared: list[Prepared]
) -> tuple[Tensor, Tensor]:
    """Run forward and backward over the micro-batches of one step on this process.

    Every part of the loss is divided by its count over all micro-batches of all processes, known before the
    first backward pass, so the gradient does not depend on how the batch was cut.

    Args:
        accelerator: the processes.
        model: the plain model.
        network: the model as wrapped and compiled.
        prepared: this process's micro-batches.

    Returns:
        The sum of each part on this process, and its count on all processes, in the order of `part_names`.
    """
    each = [model.counts(micro) for micro in prepared]
    own = torch.stack([torch.stack([counts[name].float() for name in model.part_names]) for counts in each]).sum(0)
    total = add_over_processes(accelerator, own)
    counts = dict(zip(model.part_names, total, strict=True))
    sums = torch.zeros_like(total)
    for turn, micro in enumerate(prepared):
        is_last = turn == len(prepared) - 1
        with nullcontext() if is_last else accelerator.no_sync(network):
            with accelerator.autocast():
                parts: Loss = network(micro).parts
            # Gradients are averaged over processes; the loss is a sum over them.
            accelerator.backward(parts.total(counts) * accelerator.num_processes)
        sums += torch.stack([parts.parts[name].sum.detach().float() for name in model.part_names])
    return sums, total


def add_over_processes(accelerator: Accelerator, x: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    return accelerator.reduce(x, "sum")  # type: ignore[return-value]  # a tensor comes back as a tensor


def describe(console: Console, recipe: Recipe, model: M3Model, plan: Plan, accelerator: Accelerator) -> None:
    """Print what is about to run, with the learning rate that follows from the batch."""
    spec = recipe.train
    rule = f"{spec.lr:g} x {spec.batch_size} / {spec.lr_per}" if spec.lr_per else "as given"
    console.print(
        f"[bold]{recipe.name}[/]: {count_parameters(model) / 1e6:.2f} M parameters, {plan.steps} steps of "
        f"{spec.batch_size} samples ({accelerator.num_processes} process(es) x {plan.accumulation} x "
        f"{plan.micro_batch}), learning rate {plan.lr:g} ({rule}), {accelerator.device.type} in "
        f"{'bf16' if accelerator.mixed_precision == 'bf16' else 'fp32'}, {torch.get_num_threads()} threads"
    )


def open_run(run: Path, recipe: Recipe, start: int) -> None:
    """Make the run folder, save the resolved recipe, and cut the metrics back to the step we start from."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    cut(run, start)


def save(accelerator: Accelerator, run: Path, step: int, model: M3Model, average: Average | None, keep: int) -> None:
    """Write a checkpoint of this step; every process takes part."""

    def fill(folder: Path) -> None:
        accelerator.save_state(str(folder))
        if average and accelerator.is_main_process:
            save_file(average.state_dict(), folder / "ema.safetensors")

    target = checkpoint.folder_of(run, step)
    state = {"step": step, "model": _description(model)}
    checkpoint.write(target, fill, state, accelerator.is_main_process, accelerator.wait_for_everyone)
    if accelerator.is_main_process:
        checkpoint.prune(run, keep)


def restore(accelerator: Accelerator, run: Path, model: M3Model, average: Average | None) -> int:
    """Load the newest checkpoint of a run and return the step to continue with; 0 when there is none."""
    found = checkpoint.newest(run)
    if found is None:
        return 0
    state = checkpoint.read_state(found)
    checkpoint.check_same_model(state["model"], _description(model), found)
    accelerator.load_state(str(found))
    if average:
        path = found / "ema.safetensors"
        if not path.is_file():
            raise M3Error(f"{found} holds no averaged weights, but train.ema is set; remove train.ema or start anew.")
        average.load_state_dict(load_file(path, device=str(model.device)))
    return int(state["step"])


def _description(model: M3Model) -> dict[str, Any]:
    config = model.config
    plain = {"modalities": config.modalities, "backbone": config.backbone, "objectives": config.objectives}
    return json.loads(json.dumps(plain))


def evaluate(recipe: Recipe, model: M3Model, samples: Samples, run: Path, step: int | None) -> list[Row]:
    """Measure the recipe's tasks on held-out samples and draw the preview; runs in one process."""
    spec = recipe.evaluate
    source = open_source(recipe, model, "held_out")
    if not len(source):
        return []
    model.eval()
    held_out = Samples(source, model.modalities, recipe.data, recipe.seed)
    averages = fit_averages(model, first_batches(samples, AVERAGED_SAMPLES, EVALUATION_BATCH))
    batches = first_batches(held_out, spec.samples, EVALUATION_BATCH)
    rows = measure(model, batches, spec.tasks, averages, recipe.seed) if spec.tasks else []
    views = {"masked": None} | {
        f"from {', '.join(task.visible)}": task.visible for task in spec.tasks.values() if task.visible
    }
    batch = next(first_batches(held_out, spec.preview_rows, spec.preview_rows)).to(model.device)
    name = "preview.png" if step is None else f"previews/step-{step:08d}.png"
    preview(model, batch, views, run / name, recipe.seed)
    if rows:
        line = {
            "step": step or recipe.train.steps or 0,
            **{f"held_out/{row.task}": row.model for row in rows},
        }
        append(run, line)
    model.train()
    return rows


def finish(
    recipe: Recipe, model: M3Model, average: Average | None, samples: Samples, console: Console, clock: Clock
) -> list[Row]:
    """Save the model, measure it, and print what there is to see."""
    run = recipe.folder
    processor = M3Processor(model.config.modalities)
    copies = {"model": None} if average is None else {"model": None, "model_ema": average}
    for name, weights in copies.items():
        if weights:
            weights.swap(model)
        model.save_pretrained(run / name)
        processor.save_pretrained(run / name)
        (run / name / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        if weights:
            weights.swap(model)
    rows = evaluate(recipe, model, samples, run, None)
    if rows:
        console.print(metrics_table(rows))
    if clock.skipped:
        console.print(f"[yellow]{len(clock.skipped)} unreadable samples were skipped[/]: {next(iter(clock.skipped))}")
    console.print(f"Picture: {run / 'preview.png'}    metrics: {run / 'metrics.jsonl'}\nLoad it:")
    console.print(
        f'  from m3 import M3Model, M3Processor\n  model = M3Model.from_pretrained("{run / "model"}")\n'
        f'  processor = M3Processor.from_pretrained("{run / "model"}")',
        highlight=False,
    )
    return rows


if __name__ == "__main__":
    from m3.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
