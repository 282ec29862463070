"""Does a long run keep what it should let go of? python tests/faults/memory.py [STEPS]

Prints the slope of memory, open files and child processes over the steps of a very small run.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from survival import RECIPES, tiny

from m3 import held_out
from m3 import train as trainer
from m3.monitors import resident_memory


def measured(steps: int, folder: Path) -> list[tuple[int, float, int, int]]:
    """Train and return (step, MiB, open files, child processes) every ten steps; with workers, saves and measures."""
    found: list[tuple[int, float, int, int]] = []
    changes = {"train__save_every": 50, "train__save_in_background": True, "evaluate__every": 100, "data__workers": 1}
    recipe = tiny(RECIPES[0], folder, train__steps=steps, train__log_every=10, **changes)
    rates = trainer.set_rates

    def looking(optimizer: torch.optim.Optimizer, step: int, *rest: object) -> None:
        if step % 10 == 0:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            memory = (resident_memory() or 0) / 2**20
            found.append((step, memory, len(os.listdir("/proc/self/fd")), len(children)))
        rates(optimizer, step, *rest)  # type: ignore[arg-type]

    trainer.set_rates, held_out.preview = looking, lambda *_: None
    trainer.train(recipe, is_shown=False)
    return found


def slope(steps: list[int], values: list[float]) -> float:
    """Return the least-squares slope per 1,000 steps."""
    x, y = torch.tensor(steps, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x) * 1000)


def main(steps: int) -> int:
    """Measure, print, and return 1 when something grows: over 1 MiB, or a tenth of a file or process, in 1,000."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = [line for line in measured(steps, Path(folder) / "run") if line[0] >= steps // 4]
    grows = False
    for column, (name, limit) in enumerate((("MiB", 1.0), ("open files", 0.1), ("child processes", 0.1)), 1):
        values = [float(line[column]) for line in found]
        rise = slope([line[0] for line in found], values)
        grows |= rise > limit
        print(f"{name}: {values[0]:.1f} at step {found[0][0]}, {values[-1]:.1f} at step {found[-1][0]}, "
              f"{rise:+.3f} per 1,000 steps")  # fmt: skip
    return int(grows)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
