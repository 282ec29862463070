"""Optimal transport between two sets of vectors, by the inexact proximal point method (IPOT).

Letters: B batch, M and N vectors of the two sets, D width.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

BETA, ITERATIONS = 0.5, 50
"""Chen et al. 2020 (UNITER): weight of the proximal term, and steps."""


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """Return (B, M, N) 1 - cosine of x (B, M, D) and y (B, N, D), in [0, 2]."""
    return 1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).transpose(1, 2)


@torch.no_grad()
def ipot(
    cost: Tensor, is_row: Tensor, is_column: Tensor, beta: float = BETA, iterations: int = ITERATIONS, inner: int = 1
) -> Tensor:
    """Return the plan (B, M, N) that moves equal masses of the rows to equal masses of the columns at least cost.

    Xie et al. 2018, "A Fast Proximal Point Method for Computing Exact Wasserstein Distance", algorithm 1: each step
    scales exp(-cost / beta) * plan to the marginals; unlike Sinkhorn's, the plan goes to the exact one for any beta.

    Args:
        cost: (B, M, N).
        is_row: (B, M) bool, True for vectors that take part; each has mass 1 / their number.
        is_column: (B, N) bool, the same.
        beta: weight of the proximal term; a larger one needs more steps.
        iterations: proximal steps.
        inner: scalings within a step (1 is enough).

    Returns:
        Rows sum to 1 / M (exactly) and columns to 1 / N; 0 at what takes no part, everywhere in a sample of
        which one set is empty.
    """
    rows, columns = _masses(is_row, cost.dtype), _masses(is_column, cost.dtype)
    takes_part = is_row.unsqueeze(2) & is_column.unsqueeze(1)
    kernel = (-cost / beta).exp() * takes_part
    plan = takes_part.to(cost.dtype)
    left, right = rows, columns
    for _ in range(iterations):
        scaled = kernel * plan
        for _ in range(inner):
            right = _ratio(columns, scaled.transpose(1, 2) @ left)
            left = _ratio(rows, scaled @ right)
        plan = left * scaled * right.transpose(1, 2)
    return plan


def transport_cost(x: Tensor, y: Tensor, is_x: Tensor, is_y: Tensor) -> Tensor:
    """Return (B,) the cost of the best plan between x (B, M, D) and y (B, N, D), under the cosine cost.

    The plan is worked out in float32 or better and without gradient: the distance pulls on the vectors alone.
    """
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        exact = torch.promote_types(x.dtype, torch.float32)
        cost = cosine_cost(x.to(exact), y.to(exact))
        return (ipot(cost.detach(), is_x, is_y) * cost).sum((1, 2))


def _masses(is_there: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, M, 1) equal masses that sum to one over what is there."""
    mass = is_there.to(dtype)
    return (mass / mass.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)


def _ratio(mass: Tensor, total: Tensor) -> Tensor:
    """Return mass / total, 0 where there is nothing to be scaled."""
    return torch.where(total > 0, mass / total.clamp(min=torch.finfo(total.dtype).tiny), 0)
