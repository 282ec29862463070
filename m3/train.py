"""The training loop. The only file that knows Accelerate; read it from top to bottom.

accelerate launch -m m3.train RECIPE [a.b=c ...] [--resume]      the same code as: m3 train RECIPE ...
"""

from __future__ import annotations

import gc
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType, set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from m3 import checkpoint
from m3.build import meta_model, model_config
from m3.cost import highest_speed
from m3.data.loader import Order, Samples, buckets_of, train_loader
from m3.data.source import Source, Split, describe_coverage
from m3.data.source import open_source as open_data
from m3.data.stream import Place, StreamOrder, load_place
from m3.ema import Average, teacher_of
from m3.errors import M3Error, nearest
from m3.evaluate.task import Row, build_tasks
from m3.guard import Guard
from m3.held_out import HeldOut
from m3.initialise import load_weights
from m3.machine import cores, use_bf16
from m3.memory import compiled, keep_freed_memory
from m3.model import M3Model
from m3.monitors import Health, Watch
from m3.network import Prepared
from m3.plugins import Pool
from m3.preemption import Preempted, Preemption, explained
from m3.processes import concatenate, gather
from m3.progress import HELD_OUT, METRICS, Clock, Lines, Skipped, cut, means
from m3.provenance import note_start
from m3.recipe import Recipe, TrainSpec, dump_recipe
from m3.resuming import restore
from m3.saving import Parts, Saver, facts_of, save_model
from m3.schedule import Plan, check_mix, drawn, learning_rate, make_optimizer, momentum, plan_run, set_rates
from m3.seeing import padding, picture_of, progress_bar, show_line
from m3.sharded import whole
from m3.show import count_parameters
from m3.types import Loss
from m3.unused import Unused


def build_model(recipe: Recipe) -> M3Model:
    """Make the model of a recipe with the weights of its seed."""
    set_seed(recipe.seed)
    model = M3Model(model_config(recipe))
    if recipe.train.checkpoint_activations:
        model.recompute()
    return model


def open_source(recipe: Recipe, model: M3Model, split: Split) -> Source:
    """Open the recipe's source."""
    return open_data(recipe.data, model.modalities, recipe.seed, split)


@explained
def train(recipe: Recipe, resume: bool = False, is_shown: bool = True) -> list[Row]:
    """Run a recipe to its end and return the final table of metrics.

    Args:
        recipe: what to do.
        resume: continue from the newest checkpoint of the run folder, if there is one.
        is_shown: print what is done and what came out.

    Raises:
        M3Error: the recipe does not fit the data or the machine, or something broke that the run can't go on without.
        Preempted: a signal asked the run to stop, and it has saved itself.
    """
    # ---------------------------------------------------------------------------------------- processes
    spec, run = recipe.train, recipe.folder
    accelerator = open_processes(spec, run)
    console = Console(quiet=not (is_shown and accelerator.is_main_process))
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device

    # ----------------------------------------------------------------------------------- model and data
    raw_model = build_model(recipe)
    check_mix(spec.mix, list(raw_model.objectives))
    if recipe.init and not (resume and checkpoint.newest(run)):
        console.print(load_weights(raw_model, recipe.init), soft_wrap=True, markup=False, highlight=False)
    plain_model = whole_model(accelerator, recipe, raw_model)
    tasks = build_tasks(recipe.evaluate.tasks, plain_model, recipe.seed)
    source = open_source(recipe, raw_model, "train")
    samples = Samples(source, raw_model.modalities, recipe.data, recipe.seed)
    length = None if source.stream else len(source)
    plan = plan_run(spec, length and length * recipe.data.repeats, world)  # an epoch is all samples in all their crops
    optimizer = make_optimizer(raw_model, spec)
    model, optimizer = accelerator.prepare(raw_model, optimizer)
    average = averaging(accelerator, recipe, raw_model)
    network: Any = compiled(model) if spec.compile else model
    describe(console, recipe, raw_model, plan, accelerator)
    console.print(describe_coverage(source), highlight=False, soft_wrap=True)
    skipped = Skipped(console, "samples", length, recipe.data.max_unreadable)
    unseen = open_source(recipe, raw_model, "held_out")
    metrics = Lines(run / METRICS, console)
    held_out = HeldOut(recipe, plain_model, tasks, source, unseen, skipped, console, metrics)

    # ------------------------------------------------------------------------------------ where to start
    facts = facts_of(recipe, raw_model, plan, len(source))
    parts = Parts(raw_model, optimizer, average, skipped, metrics)
    start = restore(accelerator, run, parts, facts, console) if resume else 0
    if accelerator.is_main_process:
        open_run(recipe, start, plan.steps, world, console)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("logs", config={"recipe": dump_recipe(recipe)})
    shares = (plan.micro_batch, plan.accumulation, rank, world)
    order = Order(len(source), recipe.seed, *shares, start, plan.steps, recipe.data.repeats, buckets_of(source))
    if source.stream:
        place = load_place(checkpoint.folder_of(run, start), rank, world) if start else Place()
        order = StreamOrder(source.stream, order, place)
    batches = iter(train_loader(samples, order, recipe.data.workers, spec.timeout))
    saver = Saver(accelerator, recipe, parts, order, facts, console)
    guard = Guard(accelerator, raw_model, optimizer, spec.max_skipped, run, console)
    clock = Clock(start, spec.batch_size, None if console.quiet else partial(highest_speed, recipe, world, console))
    watch, health = Watch(console, plan.warmup), Health(console, plan.warmup)

    # ---------------------------------------------------------------------------------------- train loop
    network.train()
    bar = progress_bar(recipe.name, start, plan.steps, not console.quiet)
    with bar, Preemption() as asked:
        for step in range(start, plan.steps):
            # The batches of the step first: the loss is divided by the counts of all of them, on all ranks.
            with clock.waiting():
                micro_batches = [skipped.count(next(batches)) for _ in range(plan.accumulation)]
            active = drawn(spec.mix, list(raw_model.objectives), recipe.seed, step)
            prepared = [raw_model.prepare(batch.to(device), active=active) for batch in micro_batches]

            set_rates(optimizer, step, spec, plan)
            guard.begin()
            names, sums, counts, watched = gradients(accelerator, raw_model, network, prepared)
            norm = whole(accelerator.clip_grad_norm_(model.parameters(), spec.clip or float("inf")))  # type: ignore[arg-type]
            sums = add_over_processes(accelerator, torch.cat([sums, sums.new_full((1,), asked.is_asked)]))
            guard.judge(step + 1, micro_batches, prepared, sums, norm)  # a step that is not finite changes nothing
            optimizer.step()
            optimizer.zero_grad()
            raw_model.after_step()
            guard.undo()
            if average and spec.ema:
                average.update(raw_model, momentum(step, spec.ema, plan.steps), guard.is_taken)
            guard.settle()
            bar.update()

            # -------------------------------------------------------------------- report, evaluate, save
            done = step + 1
            if step == start:
                clock.restart(done)
            if done % spec.log_every == 0 or done == plan.steps:
                values = means(names, sums[:-1], counts)
                seen = values | watch(watched, done) | guard.counted | padding(prepared)
                line = clock.line(done, seen, learning_rate(step, plan), float(norm), skipped.by_origin)
                accelerator.log({key: v for key, v in line.items() if isinstance(v, float)}, step=done)
                show_line(bar, line, values)
                if accelerator.is_main_process:
                    metrics.append(line)
                    health(line, values)
            reported = time.perf_counter()
            if recipe.evaluate.every and done % recipe.evaluate.every == 0 and done < plan.steps:
                saver.measured(evaluate(accelerator, model, average, held_out, done), done)
            if saver.is_due(done) or guard.is_stopping:
                guard.settle(is_all=True, is_end=done == plan.steps)
                saver.save(done, is_needed=done == plan.steps or guard.is_stopping)
            clock.leave_out(reported)
            if guard.is_stopping:
                raise Preempted(f"{recipe.name} was asked to stop and is saved at step {done}; go on with --resume.")

    # --------------------------------------------------------------------------------------------- finish
    rows = evaluate(accelerator, model, average, held_out, plan.steps, "preview.png")
    averaged = average.whole() if average else None
    if accelerator.is_main_process:
        save_model(recipe, plain_model, averaged, plan.steps)
        held_out.conclude(rows, console)
    del model, network  # gloo can hang for ever when DDP is freed after its process group (pytorch issue 190489)
    accelerator.free_memory()
    gc.collect()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return rows


def open_processes(spec: TrainSpec, run: Path) -> Accelerator:
    """Join the processes of a run and set up what each computes with."""
    check_trackers(spec.trackers)
    AcceleratorState._reset_state()  # a second run in one Python process may want another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if use_bf16(spec.precision) else "no",
        log_with=list(spec.trackers) or None,
        project_dir=str(run),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=spec.timeout)),
        ],
    )
    if accelerator.device.type == "cpu":  # `accelerate launch` leaves one thread to each process
        keep_freed_memory()
        torch.set_num_threads(spec.threads or max(1, cores() // accelerator.num_processes))
    return accelerator


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
    is_replicated = isinstance(getattr(network, "_orig_mod", network), DistributedDataParallel)
    sums, watched = torch.zeros_like(total), {}
    for turn, micro in enumerate(prepared):
        is_last = turn == len(prepared) - 1
        with nullcontext() if is_last else accelerator.no_sync(network):
            with accelerator.autocast():
                loss: Loss = network(micro, pools[turn] if pools else None).parts
            # Gradients are averaged over processes; the loss is a sum over them.
            total_loss = loss.total(counts) * accelerator.num_processes
            unused = Unused(total_loss, model) if is_last and is_replicated else None
            accelerator.backward(total_loss + unused.touched() if unused else total_loss)
            if unused:
                unused.forget()
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
        f"{', FSDP' if accelerator.distributed_type.name == 'FSDP' else ''}"
    )
    if plan.warmup >= plan.steps > 1:
        console.print(
            f"[yellow]train.warmup covers the whole run[/] ({plan.warmup} of {plan.steps} steps): the learning rate "
            f"only reaches {learning_rate(plan.steps - 1, plan):.3g}; lower train.warmup",
            soft_wrap=True,
        )


def whole_model(accelerator: Accelerator, recipe: Recipe, model: M3Model) -> M3Model:
    """Return the model that is measured and saved by the first process: the trained one, or a copy where it is cut up.

    Raises:
        M3Error: the recipe needs something that does not work with weights that are cut up.
    """
    if accelerator.distributed_type.name == "DEEPSPEED":
        raise M3Error(
            "DeepSpeed's engine can't be used: under Accelerate it moves the weights before a step can be judged, and "
            "M3's checkpoints can't hold its optimizer; launch with recipes/accelerate/zero2.yaml or fsdp2.yaml, "
            "which share out the same without it."
        )
    if accelerator.distributed_type.name != "FSDP":
        return model
    return build_model(recipe).to(accelerator.device) if accelerator.is_main_process else meta_model(recipe)  # type: ignore[arg-type]


def averaging(accelerator: Accelerator, recipe: Recipe, model: M3Model) -> Average | None:
    """Start the average that the recipe wants of the plain model's weights, cut up as they are: its teacher, if any."""
    average = Average(model, recipe.train.ema.start) if recipe.train.ema else None
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type.name == "FSDP" else None
    precision = plugin.mixed_precision_policy if plugin else None
    model.teacher = teacher_of(model, average, partial(build_model, recipe), precision)
    return average


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    average: Average | None,
    held_out: HeldOut,
    step: int,
    picture: str | None = None,
) -> list[Row]:
    """Measure on held-out samples and show the trackers what came out; the first process does, others return nothing.

    Args:
        accelerator: with the trackers.
        model: the trained one; every process must take part where it is cut up.
        average: of its weights; None: the run keeps none.
        held_out: what is measured.
        step: steps that are done.
        picture: as in `HeldOut.evaluate`.
    """
    if accelerator.distributed_type.name == "FSDP":
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            held_out.model.load_state_dict(weights)
        average = average.whole() if average else None
        if held_out.model.has_teacher and average:
            held_out.model.teacher = average.named(held_out.model)
    if not accelerator.is_main_process:
        return []
    rows = held_out.evaluate(step, average, picture)
    accelerator.log({f"{HELD_OUT}{row.task}": row.model for row in rows}, step=step)
    able = [tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")]
    pictures = {name: picture_of(drawn) for name, drawn in held_out.pictures().items()} if able else {}
    for tracker in able:
        many = tracker.name in ("tensorboard", "wandb", "swanlab")  # they take lists of pictures, others one
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        shown = {name: picture[None] if many else picture for name, picture in pictures.items()}
        tracker.log_images(shown, step=step, **options)
    return rows


def open_run(recipe: Recipe, start: int, steps: int, world: int, console: Console) -> None:
    """Make the run folder, save the resolved recipe, note the start, and cut the metrics back to where we start.

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
    note_start(run, start, world)
    cut(run, start, start == steps)


if __name__ == "__main__":
    from m3.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
