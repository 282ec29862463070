"""IPOT: a slow loop, exact solvers, marginals, padding.

Letters: B batch, M and N vectors of the two sets, D width.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from m3.transport import cosine_cost, ipot, transport_cost


def costs(batch: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(batch, n, 5, generator=generator, dtype=torch.float64) for n in (rows, columns))
    return cosine_cost(x, y)


def everything(cost: Tensor) -> tuple[Tensor, Tensor]:
    batch, rows, columns = cost.shape
    return torch.ones(batch, rows).bool(), torch.ones(batch, columns).bool()


def slow_ipot(cost: list[list[float]], beta: float, iterations: int) -> list[list[float]]:
    """Algorithm 1 of Xie et al. 2018, number by number, for one sample without padding."""
    m, n = len(cost), len(cost[0])
    plan = [[1.0] * n for _ in range(m)]
    left = [1 / m] * m
    for _ in range(iterations):
        q = [[math.exp(-cost[i][j] / beta) * plan[i][j] for j in range(n)] for i in range(m)]
        right = [1 / n / sum(q[i][j] * left[i] for i in range(m)) for j in range(n)]
        left = [1 / m / sum(q[i][j] * right[j] for j in range(n)) for i in range(m)]
        plan = [[left[i] * q[i][j] * right[j] for j in range(n)] for i in range(m)]
    return plan


@pytest.mark.parametrize(("beta", "iterations"), [(0.5, 50), (0.5, 1), (2.0, 7)])
def test_the_plan_is_that_of_the_slow_loop(beta: float, iterations: int) -> None:
    cost = costs(3, 4, 6)
    found = ipot(cost, *everything(cost), beta=beta, iterations=iterations)
    for sample in range(3):
        expected = torch.tensor(slow_ipot(cost[sample].tolist(), beta, iterations), dtype=torch.float64)
        torch.testing.assert_close(found[sample], expected, rtol=1e-9, atol=1e-15)


def test_a_plan_worked_out_by_hand() -> None:
    """Each row goes where it costs nothing: half of the mass on each zero of the cost."""
    cost = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    found = ipot(cost, *everything(cost))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.5], [0.5, 0.0]]]), atol=1e-7, rtol=0)


def test_one_step_worked_out_by_hand() -> None:
    """Kernel exp(-log 2) = 1/2 off the diagonal; symmetric, so rows and columns are scaled alike: 1/3 and 1/6."""
    cost = torch.tensor([[[0.0, math.log(2)], [math.log(2), 0.0]]])
    found = ipot(cost, *everything(cost), beta=1.0, iterations=1)
    torch.testing.assert_close(found, torch.tensor([[[1 / 3, 1 / 6], [1 / 6, 1 / 3]]]))


@pytest.mark.parametrize("seed", range(4))
def test_equal_sets_are_matched_one_to_one(seed: int) -> None:
    cost = costs(1, 7, 7, seed)
    found = ipot(cost, *everything(cost), iterations=2000)
    rows, columns = linear_sum_assignment(cost[0].numpy())
    best = cost[0].numpy()[rows, columns].mean()
    assert (found * cost).sum().item() == pytest.approx(best, abs=1e-4)
    assert found[0].argmax(1).tolist() == columns.tolist()


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (6, 4)])
def test_the_cost_is_that_of_the_linear_programme(rows: int, columns: int) -> None:
    cost = costs(1, rows, columns, seed=9)
    found = ipot(cost, *everything(cost), iterations=2000)
    sums = [np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))]
    masses = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    exact = linprog(cost[0].flatten().numpy(), A_eq=np.concatenate(sums), b_eq=masses)
    assert (found * cost).sum().item() == pytest.approx(exact.fun, abs=1e-4)
    torch.testing.assert_close(found.sum(2), torch.full((1, rows), 1 / rows, dtype=torch.float64))
    torch.testing.assert_close(
        found.sum(1), torch.full((1, columns), 1 / columns, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_fifty_steps_come_close_to_the_best_plan() -> None:
    """The setting of UNITER: within a few per cent of the exact cost, and never below it by more than the marginals."""
    cost = costs(8, 9, 12, seed=2)
    short = (ipot(cost, *everything(cost)) * cost).sum((1, 2))
    long = (ipot(cost, *everything(cost), iterations=5000) * cost).sum((1, 2))
    assert ((short - long).abs() / long).max() < 0.05


def test_padding_changes_nothing() -> None:
    cost = costs(2, 4, 6)
    padded = torch.full((2, 7, 8), 0.3, dtype=torch.float64)
    padded[:, :4, :6] = cost
    is_row, is_column = (torch.arange(7) < 4).expand(2, -1), (torch.arange(8) < 6).expand(2, -1)
    found = ipot(padded, is_row, is_column)
    torch.testing.assert_close(found[:, :4, :6], ipot(cost, *everything(cost)))
    assert found[:, 4:].abs().sum() == found[:, :, 6:].abs().sum() == 0


def test_float32_stays_finite_where_all_costs_are_far_apart() -> None:
    x = torch.eye(6).unsqueeze(0)
    y = torch.cat([torch.eye(6), -torch.eye(6)]).unsqueeze(0)
    cost = cosine_cost(x, y)
    found = ipot(cost, *everything(cost), iterations=1000)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(2), torch.full((1, 6), 1 / 6))


def test_an_empty_set_costs_nothing_and_gives_no_gradient() -> None:
    x, y = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    is_x = torch.tensor([[True, True, False], [False, False, False]])
    distance = transport_cost(x, y, is_x, torch.ones(2, 5).bool())
    assert distance[1] == 0
    assert distance[0] > 0
    distance.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[1].abs().sum() == x.grad[0, 2].abs().sum() == 0


def test_the_gradient_is_that_of_a_fixed_plan() -> None:
    """d distance / d x with T held: the sum of T times the gradient of 1 - cosine, written out."""
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(1, n, 3, generator=generator, dtype=torch.float64) for n in (2, 4))
    x.requires_grad_()
    is_x, is_y = torch.ones(1, 2).bool(), torch.ones(1, 4).bool()
    transport_cost(x, y, is_x, is_y).sum().backward()
    with torch.no_grad():
        plan = ipot(cosine_cost(x, y), is_x, is_y)
        expected = torch.zeros(2, 3, dtype=torch.float64)
        for i in range(2):
            a = x[0, i] / x[0, i].norm()
            for j in range(4):
                b = y[0, j] / y[0, j].norm()
                expected[i] -= plan[0, i, j] * (b - (a @ b) * a) / x[0, i].norm()
    torch.testing.assert_close(x.grad[0], expected)
