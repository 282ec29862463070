"""Rows of all processes, as plain numbers.

Letters: B samples of a process, W processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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


def concatenate(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put rows of several batches one behind the other."""
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
