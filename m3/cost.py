"""What training costs: operations and memory, counted on tensors that hold nothing.

Letters: B batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from m3.build import meta_model
from m3.machine import use_bf16
from m3.matmul import matmul_rate
from m3.model import M3Model
from m3.partners import swap_of
from m3.recipe import Recipe
from m3.schedule import choices
from m3.types import Batch


@dataclass(frozen=True)
class Cost:
    """What training costs.

    Attributes:
        forward_flops: floating-point operations of one sample's forward pass (a multiply-add is two).
        train_flops: the same for forward and backward.
        state_bytes: weights, gradients and AdamW's two moments, float32.
        activation_bytes: kept for the backward pass, per sample, in float32.
    """

    forward_flops: int
    train_flops: int
    state_bytes: int
    activation_bytes: int


def smallest_batch(model: M3Model) -> int:
    """Return how many samples the model takes at least: one, or a group of those that borrow from each other."""
    return math.lcm(*(swap.group for view in model.views if (swap := swap_of(view))))


def meta_batch(model: M3Model, samples: int) -> Batch:
    """Make a batch of the model's usual sizes without memory."""
    with torch.device("meta"):
        signals = {name: modality.blank(samples) for name, modality in model.modalities.items()}
        return Batch(signals, torch.zeros(samples, dtype=torch.long))


def cost(model: M3Model, active: tuple[str, ...] | None = None) -> Cost:
    """Count operations and saved activations of a meta model, exactly: what twice the smallest batch adds to it.

    Args:
        model: on the device `meta`.
        active: names of the objectives that take part; None: all.
    """
    least = smallest_batch(model)
    one, two = _count(model, least, active), _count(model, 2 * least, active)
    forward, training, saved = ((b - a) // least for a, b in zip(one, two, strict=True))
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(forward, training, 16 * parameters, saved)


def _count(model: M3Model, samples: int, active: tuple[str, ...] | None) -> tuple[int, int, int]:
    """Return forward FLOPs, training FLOPs and bytes saved for the backward pass."""
    saved: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            kept.append(x)  # keeps the storage alive, so that its address is not used again
        return x

    def note_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and x.requires_grad:
                note(x)

    kept: list[Tensor] = []
    # A block that is computed again keeps what goes into it, which autograd is not told.
    again = [layer for layer in model.layers() if layer.is_recomputed]
    hooks = [layer.register_forward_pre_hook(note_inputs, with_kwargs=True) for layer in again]
    with FlopCounterMode(display=False) as counter:
        prepared = model.prepare(meta_batch(model, samples), active=active)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = model(prepared).loss
        forward = counter.get_total_flops()
        loss.backward()
    for hook in hooks:
        hook.remove()
    return forward, counter.get_total_flops(), sum(saved.values())


def highest_speed(recipe: Recipe, world: int, console: Console) -> float | None:
    """Return the samples/s at which training would do nothing but matrix products as fast as this device can.

    None, with a sentence, where a part of the model can't be counted without data: no reason to end a run.

    The operations are those of a sample's forward and backward pass, the mean over what `train.mix` draws; the rate is
    measured now, on this process, and taken to be that of all. It costs seconds and no random numbers of the run.
    """
    model = meta_model(recipe)
    drawn = choices(recipe.train.mix, list(model.objectives))
    try:
        flops = sum(share * cost(model, active).train_flops for active, share in drawn.items())
    except Exception as error:  # whatever a plugin's part raises
        cause = escape(f"{type(error).__name__}: {error}".splitlines()[0])
        console.print(
            f"[yellow]how busy the machine is can't be told[/]: a part of the model reads values where there are only "
            f"shapes ({cause}); `m3 show` stops at the same.",
            soft_wrap=True,
        )
        return None
    rate = matmul_rate(torch.bfloat16 if use_bf16(recipe.train.precision) else torch.float32, tries=3)
    return world * rate / flops
