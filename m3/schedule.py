"""Learning-rate schedule and optimizer groups, both pure functions of the recipe."""

from __future__ import annotations

import math
import re
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
    micro, accumulation = micro_batches(spec, world)
    scale = spec.batch_size / spec.lr_per if spec.lr_per else 1.0
    warmup = round(spec.warmup * unit)
    milestones = tuple(round(milestone * unit) for milestone in spec.milestones)
    lr, min_lr = spec.lr * scale, spec.min_lr * scale
    return Plan(steps, warmup, micro, accumulation, lr, min_lr, spec.schedule, milestones)


def micro_batches(spec: TrainSpec, world: int) -> tuple[int, int]:
    """Return the samples of a micro-batch, and how many of them each of `world` processes has in a step.

    Raises:
        M3Error: the batch can't be cut evenly.
    """
    micro = spec.micro_batch or spec.batch_size // world
    if micro == 0 or spec.batch_size % (micro * world):
        raise M3Error(
            f"train.batch_size {spec.batch_size} can't be cut evenly into {world} processes of micro-batches of "
            f"{max(micro, 1)}; make it a multiple of {max(micro, 1) * world}."
        )
    return micro, spec.batch_size // (micro * world)


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
    """Give the optimizer the learning rate of a step, times each group's factor, and weight decay where it has any."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, plan) * group.get(SCALE, 1.0)
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
    """Make AdamW with the recipe's rules of weight decay and of layers; `lr` is set anew before every step."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scales = dict.fromkeys(named, 1.0) if spec.layer_decay is None else layer_scales(model, spec.layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    order = [True] if spec.decay == "all" else [True, False]
    for scale in sorted({scales[name] for name in named}):
        for decays in order:
            groups[scale, decays] = {"params": [], "weight_decay": spec.weight_decay if decays else 0.0, SCALE: scale}
    for name, parameter in named.items():
        groups[scales[name], _decays(name, parameter, spec.decay)]["params"].append(parameter)
    counted = sum(len(group["params"]) for group in groups.values())
    assert counted == len(named), f"{counted} of {len(named)} parameters are in a group"
    filled = [group for group in groups.values() if group["params"] or spec.layer_decay is None]
    return torch.optim.AdamW(filled, lr=0.0, betas=spec.betas, eps=spec.eps, fused=True)


SCALE = "layer_scale"
"""Key of an optimizer's group: factor on the learning rate."""

FREE = r"positions\.|((backbone|towers\.\w+)\.)?(prefix|prefix_positions)$"
"""What `decay: weights` takes for no weight: learned positions and class tokens."""


def _decays(name: str, parameter: Tensor, rule: str) -> bool:
    """Return True for a parameter that weight decay pulls to 0."""
    if rule == "all":
        return True
    return parameter.ndim > 1 and not (rule == "weights" and re.match(FREE, name))


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return parameter -> factor on its learning rate, smaller the earlier in the network it stands.

    Block i of n has decay ** (n - i), what leads into the first block decay ** (n + 1), what comes after the
    transformer 1; its final norm goes with the last block (BEiT's rule, Bao et al. 2021, as timm's
    `param_groups_layer_decay` reads it).
    """
    names = [name for name, _ in model.named_parameters()]
    places = [re.match(r"(backbone|towers\.\w+)\.blocks\.(\d+)\.", name) for name in names]
    depth: dict[str, int] = {}
    for place in filter(None, places):
        depth[place[1]] = max(depth.get(place[1], 0), int(place[2]) + 1)
    tower_of: dict[str, str] = getattr(model, "tower_of", {})
    scales = {}
    for name, place in zip(names, places, strict=True):
        if place:
            scales[name] = decay ** (depth[place[1]] - int(place[2]))
            continue
        stem = re.match(r"(tokenizers|positions|modality_embeddings|mask_tokens|input_norms)\.(\w+)", name)
        tower = re.match(r"(backbone|towers\.\w+)\.(\w+)", name)
        if stem:
            own = f"towers.{tower_of[stem[2]]}" if tower_of.get(stem[2]) else "backbone"
            scales[name] = decay ** (depth.get(own, 0) + 1)
        elif tower:
            scales[name] = decay if tower[2] == "norm" else decay ** (depth[tower[1]] + 1)
        else:
            scales[name] = 1.0
    return scales


def drawn(mix: dict[str, float] | None, objectives: list[str], seed: int, step: int) -> tuple[str, ...] | None:
    """Return the objectives that take part in a step: one of the mix, the same on all processes, and all others."""
    if mix is None:
        return None
    (one,) = Random(stream_number(f"mix/{seed}/{step}")).choices(list(mix), list(mix.values()))
    return tuple(name for name in objectives if name == one or name not in mix)


def choices(mix: dict[str, float] | None, objectives: list[str]) -> dict[tuple[str, ...] | None, float]:
    """Return what `drawn` may return -> its probability."""
    total = sum((mix or {}).values())
    parts = {tuple(n for n in objectives if n == one or n not in (mix or ())): w for one, w in (mix or {}).items()}
    return {active: weight / total for active, weight in parts.items()} or {None: 1.0}


def check_mix(mix: dict[str, float] | None, objectives: list[str]) -> None:
    """Raise for a mix that names an objective which is not there."""
    for name in mix or ():
        if name not in objectives:
            raise M3Error(f"train.mix names `{name}`, which is no objective.{nearest(name, objectives)}")
