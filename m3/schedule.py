"""Learning-rate schedule and optimizer groups, both pure functions of the recipe."""

from __future__ import annotations

import math
from random import Random
from typing import Any, NamedTuple

import torch
from torch import nn

from m3.errors import M3Error, nearest
from m3.random import stream_number
from m3.recipe import Momentum, TrainSpec


class Plan(NamedTuple):
    """The numbers of a run that follow from the recipe, the data and the number of processes.

    Attributes:
        steps: optimizer steps.
        warmup: steps of linear warm-up.
        micro_batch: samples per process and forward pass.
        accumulation: forward passes per step.
        lr: highest learning rate.
        min_lr: where the schedule ends.
        schedule: of the learning rate after the warm-up: `cosine`, `linear` or `constant`.
        milestones: steps from which the learning rate is a tenth of what it was, instead of a schedule.
    """

    steps: int
    warmup: int
    micro_batch: int
    accumulation: int
    lr: float
    min_lr: float
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()


def plan_run(spec: TrainSpec, samples: int | None, world: int) -> Plan:
    """Work out steps, micro-batches and learning rate.

    Args:
        spec: the `train` section.
        samples: length of the training source; None: unknown.
        world: number of processes.

    Raises:
        M3Error: the batch can't be cut evenly, or epochs are asked for of a stream.
    """
    if spec.steps is None and samples is None:
        raise M3Error("train.epochs: nobody knows how many samples a stream has; give train.steps instead.")
    unit = 1 if spec.steps is not None else (samples or 0) / spec.batch_size
    steps = spec.steps if spec.steps is not None else max(1, round((spec.epochs or 0) * unit))
    micro = spec.micro_batch or spec.batch_size // world
    if micro == 0 or spec.batch_size % (micro * world):
        raise M3Error(
            f"train.batch_size {spec.batch_size} can't be cut evenly into {world} processes of micro-batches of "
            f"{max(micro, 1)}; make it a multiple of {max(micro, 1) * world}."
        )
    scale = spec.batch_size / spec.lr_per if spec.lr_per else 1.0
    accumulation = spec.batch_size // (micro * world)
    warmup = round(spec.warmup * unit)
    milestones = tuple(round(milestone * unit) for milestone in spec.milestones)
    lr, min_lr = spec.lr * scale, spec.min_lr * scale
    return Plan(steps, warmup, micro, accumulation, lr, min_lr, spec.schedule, milestones)


def learning_rate(step: int, plan: Plan) -> float:
    """Return the learning rate of a step: linear from 0 over the warm-up, then down to `min_lr` as `schedule` says.

    `cosine`: half a cosine; `linear`: a straight line; `constant`: no decay; milestones: a tenth from each on.
    """
    if step < plan.warmup:
        return plan.lr * step / plan.warmup
    if plan.milestones:
        return plan.lr * 0.1 ** sum(step >= milestone for milestone in plan.milestones)
    if plan.schedule == "constant":
        return plan.lr
    progress = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    if plan.schedule == "linear":
        return plan.lr + (plan.min_lr - plan.lr) * progress
    return half_cosine(progress, plan.lr, plan.min_lr)


def weight_decay(step: int, spec: TrainSpec, steps: int) -> float:
    """Return the weight decay of a step: constant, or half a cosine to `weight_decay_end` over the run."""
    if spec.weight_decay_end is None:
        return spec.weight_decay
    return half_cosine(step / steps, spec.weight_decay, spec.weight_decay_end)


def set_rates(optimizer: torch.optim.Optimizer, step: int, spec: TrainSpec, plan: Plan) -> None:
    """Give the optimizer the learning rate and weight decay of a step; groups without decay stay without."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, plan)
        group["weight_decay"] = weight_decay(step, spec, plan.steps) if group["weight_decay"] else 0.0


def momentum(step: int, spec: Momentum, steps: int) -> float:
    """Return the momentum of the averaged weights after a step, the first of which is 0."""
    progress = min(1.0, step / (spec.steps or steps))
    if spec.curve == "cosine":
        return half_cosine(progress, spec.start, spec.end)
    return spec.start + (spec.end - spec.start) * progress


def half_cosine(progress: float, start: float, end: float) -> float:
    """Return the value on the way from `start` (progress 0) to `end` (progress 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.AdamW:
    """Make AdamW with the recipe's rule of weight decay; `lr` is set anew before every step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if spec.decay == "all":
        groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": spec.weight_decay}]
    else:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": spec.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    counted = sum(len(group["params"]) for group in groups)
    assert counted == len(parameters), f"{counted} of {len(parameters)} parameters are in a group"
    return torch.optim.AdamW(groups, lr=0.0, betas=spec.betas, eps=spec.eps, fused=True)


def drawn(mix: dict[str, float] | None, objectives: list[str], seed: int, step: int) -> tuple[str, ...] | None:
    """Return the objectives that take part in a step: one of the mix, the same on all processes, and all others."""
    if mix is None:
        return None
    (one,) = Random(stream_number(f"mix/{seed}/{step}")).choices(list(mix), list(mix.values()))
    return tuple(name for name in objectives if name == one or name not in mix)


def check_mix(mix: dict[str, float] | None, objectives: list[str]) -> None:
    """Raise for a mix that names an objective which is not there."""
    for name in mix or ():
        if name not in objectives:
            raise M3Error(f"train.mix names `{name}`, which is no objective.{nearest(name, objectives)}")
