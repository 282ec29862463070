"""What a codebook learns from: the vectors of one optimizer step, however they are cut into batches.

Letters: H heads (parts of a vector with a codebook each), K codes, E width of a code, M vectors of a micro-batch,
S vectors of the pool.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from m3.random import Draws


class Seen:
    """The vectors of one step, as far as the codebook needs them.

    Attributes:
        counts: (H, K) vectors assigned to each code.
        sums: (H, K, E) their sums.
        keys: (S,) int64 random rank of each vector in the pool, descending; -1: there is none.
        pool: (S, H, E) the vectors of the highest ranks.
        turns: micro-batches.
    """

    def __init__(self, counts: Tensor, sums: Tensor, pool: int) -> None:
        self.counts, self.sums = torch.zeros_like(counts), torch.zeros_like(sums)
        self.keys = torch.full((pool,), -1, dtype=torch.long, device=sums.device)
        self.pool = sums.new_zeros(pool, sums.shape[0], sums.shape[2])
        self.turns = 0

    def add(self, rows: Tensor, indices: Tensor, is_valid: Tensor | None, step: Tensor) -> None:
        """Add rows (H, M, E) assigned to indices (H, M), all but those where is_valid (M,) is False."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
        counts, sums = assigned(rows, indices, is_valid, self.counts.shape[1])
        self.counts += counts
        self.sums += sums
        first = (self.turns * world + rank) * rows.shape[1]
        self.turns += 1
        numbers = torch.arange(first, first + rows.shape[1], device=rows.device)
        draw = Draws(step * 2**40 + numbers).uniform("codebook", 1).squeeze(1)
        keys = (draw * 2**24).long() * 2**36 + numbers
        if is_valid is not None:
            keys = keys.masked_fill(~is_valid, -1)
        self._keep(torch.cat([self.keys, keys]), torch.cat([self.pool, rows.transpose(0, 1)]))

    def over_processes(self) -> Seen:
        """Add up and merge what all processes have seen."""
        if _is_distributed():
            dist.all_reduce(self.counts)
            dist.all_reduce(self.sums)
            keys = [torch.empty_like(self.keys) for _ in range(dist.get_world_size())]
            pools = [torch.empty_like(self.pool) for _ in keys]
            dist.all_gather(keys, self.keys)
            dist.all_gather(pools, self.pool)
            self._keep(torch.cat(keys), torch.cat(pools))
        return self

    def _keep(self, keys: Tensor, pool: Tensor) -> None:
        best = keys.topk(len(self.keys)).indices
        self.keys, self.pool = keys[best], pool[best]


def codes_used(counts: Tensor) -> tuple[float, float]:
    """Return the share of codes that occur and the perplexity exp(entropy), of counts (H, K), mean over heads.

    The perplexity is 1 when a single code is used, K when all are used equally often.
    """
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    perplexity = torch.exp(torch.special.entr(shares).sum(-1))
    return float((counts > 0).double().mean()), float(perplexity.mean())


def spread_codes(flags: Tensor, size: tuple[int, ...]) -> Tensor:
    """Spread flags (B, *grid) of codes over the places they stand for: (B, *size) bool; of several heads any counts.

    Args:
        flags: bool; one axis more than `size` has where each place has several code numbers.
        size: multiples of the grid.
    """
    flags = flags.any(-1) if flags.ndim > len(size) + 1 else flags
    for axis, extent in enumerate(size, start=1):
        flags = flags.repeat_interleave(extent // flags.shape[axis], axis)
    return flags


def assigned(rows: Tensor, indices: Tensor, is_valid: Tensor | None, codes: int) -> tuple[Tensor, Tensor]:
    """Count and add rows (H, M, E) per code of indices (H, M) -> (H, K) and (H, K, E)."""
    heads, _, width = rows.shape
    weights = rows.new_ones(rows.shape[:2]) if is_valid is None else is_valid.to(rows.dtype).expand(heads, -1)
    flat = (indices + torch.arange(heads, device=rows.device).unsqueeze(1) * codes).flatten()
    counts = rows.new_zeros(heads * codes).index_add_(0, flat, weights.flatten())
    sums = rows.new_zeros(heads * codes, width).index_add_(0, flat, (rows * weights.unsqueeze(-1)).flatten(0, 1))
    return counts.view(heads, codes), sums.view(heads, codes, width)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
