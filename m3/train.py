"""The training loop. The only file that knows Accelerate; read it from top to bottom.

accelerate launch -m m3.train RECIPE [a.b=c ...] [--resume]      the same code as: m3 train RECIPE ...
"""

from __future__ import annotations

import gc
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, LoggerType, set_seed
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from m3 import checkpoint
from m3.config import M3Config
from m3.data.loader import Order, Samples, buckets_of, train_loader
from m3.data.source import Source, Split, describe_coverage
from m3.data.source import open_source as open_data
from m3.data.stream import Place, StreamOrder, load_place
from m3.ema import Average, teacher_of
from m3.errors import M3Error, nearest
from m3.evaluate.task import Row, build_tasks
from m3.held_out import HeldOut
from m3.initialise import load_weights
from m3.machine import cores, use_bf16
from m3.memory import compiled, keep_freed_memory
from m3.model import M3Model
from m3.monitors import Watch
from m3.network import Prepared, resolved
from m3.plugins import Pool
from m3.processes import concatenate, gather
from m3.processor import M3Processor
from m3.progress import Clock, Skipped, append, are_finite, cut, means, no_progress_bars, not_finite
from m3.recipe import Recipe, dump_recipe
from m3.schedule import Plan, check_mix, drawn, learning_rate, make_optimizer, momentum, plan_run, set_rates
from m3.show import count_parameters
from m3.types import Loss


def build_model(recipe: Recipe) -> M3Model:
    """Make the model of a recipe with the weights of its seed."""
    set_seed(recipe.seed)
    return M3Model(model_config(recipe))


def model_config(recipe: Recipe) -> M3Config:
    """Return the part of a recipe that describes the model."""
    return M3Config(
        modalities={name: resolved(entry, f"modalities.{name}") for name, entry in recipe.modalities.items()},
        backbone=recipe.backbone.model_dump(),
        towers={name: tower.model_dump(mode="json") for name, tower in recipe.towers.items()},
        objectives=recipe.objectives,
        seed=recipe.seed,
    )


def open_source(recipe: Recipe, model: M3Model, split: Split) -> Source:
    """Open the recipe's source."""
    return open_data(recipe.data, model.modalities, recipe.seed, split)


def train(recipe: Recipe, resume: bool = False, is_shown: bool = True) -> list[Row]:
    """Run a recipe to its end and return the final table of metrics.

    Args:
        recipe: what to do.
        resume: continue from the newest checkpoint of the run folder, if there is one.
        is_shown: print what is done and what came out.
    """
    # ---------------------------------------------------------------------------------------- processes
    spec, run = recipe.train, recipe.folder
    check_trackers(spec.trackers)
    AcceleratorState._reset_state()  # a second run in one Python process may want another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if use_bf16(spec.precision) else "no",
        log_with=list(spec.trackers) or None,
        project_dir=str(run),
        # A step of one drawn objective leaves the heads of the others without gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=bool(spec.mix))],
    )
    console = Console(quiet=not (is_shown and accelerator.is_main_process))
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    if device.type == "cpu":  # `accelerate launch` leaves one thread to each process
        keep_freed_memory()
        torch.set_num_threads(spec.threads or max(1, cores() // world))

    # ----------------------------------------------------------------------------------- model and data
    raw_model = build_model(recipe)
    check_mix(spec.mix, list(raw_model.objectives))
    if recipe.init and not (resume and checkpoint.newest(run)):
        console.print(load_weights(raw_model, recipe.init), soft_wrap=True)
    tasks = build_tasks(recipe.evaluate.tasks, raw_model, recipe.seed)
    source = open_source(recipe, raw_model, "train")
    samples = Samples(source, raw_model.modalities, recipe.data, recipe.seed)
    buckets = buckets_of(source)
    length = None if source.stream else len(source)
    plan = plan_run(spec, length and length * recipe.data.repeats, world)  # an epoch is all samples in all their crops
    optimizer = make_optimizer(raw_model, spec)
    model, optimizer = accelerator.prepare(raw_model, optimizer)
    average = Average(raw_model, spec.ema.start) if spec.ema else None
    raw_model.teacher = teacher_of(raw_model, average)
    network: Any = compiled(model) if spec.compile else model
    describe(console, recipe, raw_model, plan, accelerator)
    console.print(describe_coverage(source), highlight=False, soft_wrap=True)
    skipped = Skipped(console, "samples", length, recipe.data.max_unreadable)
    unseen = open_source(recipe, raw_model, "held_out")
    held_out = HeldOut(recipe, raw_model, tasks, samples, unseen, skipped, console)

    # ------------------------------------------------------------------------------------ where to start
    facts = facts_of(recipe, raw_model, plan, len(source))
    start = restore(accelerator, run, raw_model, average, facts, console) if resume else 0
    if accelerator.is_main_process:
        open_run(recipe, start, plan.steps, console)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("logs", config={"recipe": dump_recipe(recipe)})
    shares = (plan.micro_batch, plan.accumulation, rank, world)
    order = Order(len(source), recipe.seed, *shares, start, plan.steps, recipe.data.repeats, buckets)
    if source.stream:
        place = load_place(checkpoint.folder_of(run, start), rank, world) if start else Place()
        order = StreamOrder(source.stream, order, place)
    batches = iter(train_loader(samples, order, recipe.data.workers))
    clock, watch = Clock(start, spec.batch_size), Watch(console, plan.warmup)

    # ---------------------------------------------------------------------------------------- train loop
    network.train()
    with tqdm(total=plan.steps, initial=start, desc=recipe.name, unit="step", disable=console.quiet) as bar:
        for step in range(start, plan.steps):
            # The batches of the step first: the loss is divided by the counts of all of them, on all ranks.
            with clock.waiting():
                micro_batches = [skipped.count(next(batches)) for _ in range(plan.accumulation)]
            active = drawn(spec.mix, list(raw_model.objectives), recipe.seed, step)
            prepared = [raw_model.prepare(batch.to(device), active=active) for batch in micro_batches]

            set_rates(optimizer, step, spec, plan)
            names, sums, counts, watched = gradients(accelerator, raw_model, network, prepared)
            norm: Any = accelerator.clip_grad_norm_(model.parameters(), spec.clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            raw_model.after_step()
            if average and spec.ema:
                average.update(raw_model, momentum(step, spec.ema, plan.steps))
            bar.update()

            # -------------------------------------------------------------------- report, save, evaluate
            done = step + 1
            if step == start:
                clock.restart(done)
            if done % spec.log_every == 0 or done == plan.steps:
                values = means(names, add_over_processes(accelerator, sums), counts)
                if not are_finite(values):
                    raise not_finite(done, f"the losses {values}", checkpoint.newest(run))
                seen = values | watch(watched, done)
                line = clock.line(done, seen, learning_rate(step, plan), float(norm), len(skipped.messages))
                accelerator.log({key: v for key, v in line.items() if isinstance(v, float)}, step=done)
                bar.set_postfix_str(" ".join(f"{name.split('/')[-1]} {v:.3f}" for name, v in values.items()))
                if accelerator.is_main_process:
                    append(run, line)
            reported = time.perf_counter()
            if done % (spec.save_every or max(1, plan.steps // 10)) == 0 or done == plan.steps:
                if not all(bool(p.isfinite().all()) for p in raw_model.parameters()):  # never over good ones
                    raise not_finite(done, "the weights", checkpoint.newest(run))
                save(accelerator, run, {"step": done, **facts}, average, spec.keep, order)
            if recipe.evaluate.every and done % recipe.evaluate.every == 0 and done < plan.steps:
                if accelerator.is_main_process:
                    held_out.evaluate(done, run / "previews" / f"step-{done:08d}.png")
                accelerator.wait_for_everyone()
            clock.leave_out(reported)

    # --------------------------------------------------------------------------------------------- finish
    rows: list[Row] = []
    if accelerator.is_main_process:
        raw_model.config.about = {"recipe": recipe.name, "steps": plan.steps}
        save_model(recipe, raw_model, average)
        rows = held_out.evaluate(plan.steps, run / "preview.png")
        held_out.conclude(rows, console)
    del model, network  # gloo can hang for ever when DDP is freed after its process group (pytorch issue 190489)
    accelerator.free_memory()
    gc.collect()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return rows


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise for a tracker that Accelerate does not know or that is not installed; it would only warn."""
    known = [str(kind) for kind in LoggerType]
    installed = ["all", *map(str, get_available_trackers())]
    for name in names:
        if name not in known:
            raise M3Error(f"train.trackers: `{name}` is no tracker.{nearest(name, known)}")
        if name not in installed:
            raise M3Error(
                f"train.trackers: `{name}` is not installed; install it (pip install {name}) or choose "
                f"another (train.trackers=[] for none)."
            )


def gradients(
    accelerator: Accelerator, model: M3Model, network: nn.Module, prepared: list[Prepared]
) -> tuple[list[str], Tensor, Tensor, dict[str, Tensor]]:
    """Run forward and backward over the micro-batches of one step on this process.

    Every part of the loss is divided by its count over all micro-batches of all processes, known before the
    first backward pass, so the gradient does not depend on how the batch was cut.

    Args:
        accelerator: the processes.
        model: the plain model.
        network: the model as wrapped and compiled.
        prepared: this process's micro-batches.

    Returns:
        The names of the parts, the sum of each on this process, its count on all processes, and the features of the
        last micro-batch that are watched.
    """
    each = [model.counts(micro) for micro in prepared]
    names = list(each[0])
    own = torch.stack([torch.stack([counts[name].float() for name in names]) for counts in each]).sum(0)
    total = add_over_processes(accelerator, own)
    counts = dict(zip(names, total, strict=True))
    pools = step_pools(accelerator, network, prepared) if model.is_coupled and len(prepared) > 1 else None
    sums, watched = torch.zeros_like(total), {}
    for turn, micro in enumerate(prepared):
        is_last = turn == len(prepared) - 1
        with nullcontext() if is_last else accelerator.no_sync(network):
            with accelerator.autocast():
                loss: Loss = network(micro, pools[turn] if pools else None).parts
            # Gradients are averaged over processes; the loss is a sum over them.
            accelerator.backward(loss.total(counts) * accelerator.num_processes)
        sums += torch.stack([loss.parts[name].sum.detach().float() for name in names])
        watched = loss.watched
    return names, sums, total, watched


@torch.no_grad()
def step_pools(accelerator: Accelerator, network: nn.Module, prepared: list[Prepared]) -> list[dict[str, Pool]]:
    """Return for each micro-batch what its coupled objectives must know of all samples of the step.

    One more forward pass without gradient over all micro-batches (Gao et al. 2021, gradient caching): memory stays
    that of one micro-batch, the gradient is that of the whole batch.
    """
    turns = []
    for micro in prepared:
        with accelerator.autocast():
            turns.append({name: gather(rows) for name, rows in network(micro, is_only_rows=True).rows.items()})
    pools = []
    for turn, micro in enumerate(prepared):
        start = (turn * accelerator.num_processes + accelerator.process_index) * micro.samples
        pools.append({name: Pool(concatenate([rows[name] for rows in turns]), start) for name in turns[0]})
    return pools


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
    if plan.warmup >= plan.steps > 1:
        console.print(
            f"[yellow]train.warmup covers the whole run[/] ({plan.warmup} of {plan.steps} steps): the learning rate "
            f"only reaches {learning_rate(plan.steps - 1, plan):.3g}; lower train.warmup",
            soft_wrap=True,
        )


def facts_of(recipe: Recipe, model: M3Model, plan: Plan, samples: int) -> dict[str, Any]:
    """Return what a checkpoint says of its run: the model, what decides the order of the data, and the plan."""
    config = model.config
    order = {
        "seed": recipe.seed,
        "data": recipe.data.model_dump(mode="json", exclude={"workers", "max_unreadable"}),
        "train.batch_size": recipe.train.batch_size,
        "number of training samples": samples,
    }
    described = {name: getattr(config, name) for name in ("modalities", "backbone", "towers", "objectives")}
    return json.loads(json.dumps({"model": described, "order": order, "plan": plan._asdict()}))


def open_run(recipe: Recipe, start: int, steps: int, console: Console) -> None:
    """Make the run folder, save the resolved recipe, and cut the metrics back to the step we start from.

    A new run moves an earlier one of the same name out of its way.
    """
    run = recipe.folder
    aside = None if start else checkpoint.set_aside(run)
    if aside:
        console.print(
            f"{run} held an earlier run, which now lies in {aside} (--resume would have continued it)", soft_wrap=True
        )
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    cut(run, start, start == steps)


def save(
    accelerator: Accelerator,
    run: Path,
    state: dict[str, Any],
    average: Average | None,
    keep: int,
    order: Order | StreamOrder,
) -> None:
    """Write a checkpoint of the step that `state` names; every process takes part."""

    def fill(folder: Path) -> None:
        accelerator.save_state(str(folder))
        if average and accelerator.is_main_process:
            save_file(average.state_dict(), folder / "ema.safetensors")
        if isinstance(order, StreamOrder):
            order.save(folder, state["step"])

    target = checkpoint.folder_of(run, state["step"])
    checkpoint.write(target, fill, state, accelerator.is_main_process, accelerator.wait_for_everyone)
    if accelerator.is_main_process:
        checkpoint.prune(run, keep)


def restore(
    accelerator: Accelerator,
    run: Path,
    model: M3Model,
    average: Average | None,
    facts: dict[str, Any],
    console: Console,
) -> int:
    """Load the newest checkpoint of a run and return the step to continue with; 0 when there is none."""
    found = checkpoint.newest(run)
    if found is None:
        console.print(f"--resume: {run} holds no checkpoint yet, so the run starts at step 0", soft_wrap=True)
        return 0
    state = checkpoint.read_state(found)
    checkpoint.check_same_model(state["model"], facts["model"], found)
    checkpoint.check_same_order(state.get("order", {}), facts["order"], found)
    step, before, now = int(state["step"]), Plan(**state["plan"]), Plan(**facts["plan"])
    if step > now.steps:
        raise M3Error(
            f"{found} is past the {now.steps} steps of this run; raise train.steps or start without --resume."
        )
    accelerator.load_state(str(found))
    if average:
        path = found / "ema.safetensors"
        if not path.is_file():
            raise M3Error(f"{found} holds no averaged weights, but train.ema is set; remove train.ema or start anew.")
        average.load_state_dict(load_file(path, device=str(model.device)))
    console.print(
        f"resuming at step {step} of {now.steps}" if step < now.steps else f"all {step} steps are done already"
    )
    if learning_rate(step, before) != learning_rate(step, now):
        console.print(
            f"[yellow]the learning rate follows another curve[/] than in the first {step} steps (planned for "
            f"{before.steps}): it jumps from {learning_rate(step, before):.3g} to {learning_rate(step, now):.3g}",
            soft_wrap=True,
        )
    return step


def save_model(recipe: Recipe, model: M3Model, average: Average | None) -> None:
    """Write the model, and the one of averaged weights, as `from_pretrained` reads them."""
    processor = M3Processor(model.config.modalities)
    copies = {"model": None} if average is None else {"model": None, "model_ema": average}
    for name, weights in copies.items():
        folder = recipe.folder / name
        if weights:
            weights.swap(model)
        with no_progress_bars():
            model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        if weights:
            weights.swap(model)


if __name__ == "__main__":
    from m3.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
