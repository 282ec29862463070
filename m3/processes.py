"""Rows of all processes, as plain numbers, and what they tell each other.

Letters: B samples of a process, W processes.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if world() > 1 else 0


@torch.no_grad()
def gather(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return name -> (W * B, ...) of name -> (B, ...), in the order of the processes, without gradient.

    Every process must call it, with the same shapes.
    """
    rows = {name: x.detach() for name, x in rows.items()}
    if world() == 1:
        return rows
    result = {}
    for name, x in rows.items():
        sent = x.to(torch.uint8).contiguous() if x.dtype == torch.bool else x.contiguous()
        parts = [torch.empty_like(sent) for _ in range(world())]
        dist.all_gather(parts, sent)
        result[name] = torch.cat(parts).to(x.dtype)
    return result


@torch.no_grad()
def summed(x: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; every process must call it, with the same shape."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def of_first(value: T) -> T:
    """Return what the first process gave; every process must call it."""
    held = [value]
    if world() > 1:
        dist.broadcast_object_list(held, src=0)
    return held[0]


def in_all(value: T) -> list[T]:
    """Return what every process gave, in their order; every process must call it."""
    held = [value] * world()
    if world() > 1:
        dist.all_gather_object(held, value)
    return held


def gathered(value: T) -> list[T] | None:
    """Return what every process gave, in their order, at the first process, None at the others; all must call it."""
    if world() == 1:
        return [value]
    held: list[T] | None = [value] * world() if rank() == 0 else None
    dist.gather_object(value, held)
    return held


def concatenate(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put rows of several batches one behind the other."""
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
