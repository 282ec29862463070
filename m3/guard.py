"""Steps whose loss or gradient is not finite change nothing, are written down, and end the run when they go on.

Letters: P parts of the loss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from m3 import checkpoint
from m3.errors import M3Error
from m3.network import Prepared
from m3.processes import gathered, of_first
from m3.progress import SKIPPED, Lines, read_json_lines
from m3.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


SHOWN = 3
"""Skipped steps that are reported; all are written down."""


class Step(NamedTuple):
    """A step whose verdict was not read yet.

    Attributes:
        number: of the step, from 1.
        ids: names of this process's samples.
        prepared: this process's micro-batches.
        verdict: (2,) float on the host: 1 where the step is skipped; how many processes were asked to stop.
        event: when the verdict has arrived; None: it is there.
    """

    number: int
    ids: list[str]
    prepared: list[Prepared]
    verdict: Tensor
    event: Any


class Guard:
    """Judges every step, on all processes alike.

    No step waits for the device: the optimizer leaves the weights alone where its `found_inf` is 1, as it does for a
    gradient scaler, and on a GPU the verdict on a step is read when the next one is under way.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, limit: int, run: Path, console: Console
    ) -> None:
        """Watch over a run.

        Args:
            accelerator: the processes.
            model: the plain model.
            optimizer: as prepared by Accelerate.
            limit: steps in a row that may be skipped (`train.max_skipped`).
            run: run folder.
            console: where to say that a step was skipped.
        """
        self.accelerator, self.model, self.limit, self.run, self.console = accelerator, model, limit, run, console
        self.optimizer = optimizer.optimizer
        self.lines = Lines(run / SKIPPED, console)
        self.skipped = len(read_json_lines(run / SKIPPED)) if accelerator.is_main_process else 0
        self.in_a_row = self.taken = 0
        self.is_stopping = False
        self.lag = int(accelerator.device.type == "cuda")
        self.steps: deque[Step] = deque()
        learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state = model.state_dict(keep_vars=True)
        self.buffers = [(x, x.detach().clone()) for name, x in state.items() if name not in learned]
        self.is_taken = torch.ones((), device=accelerator.device)

    @property
    def counted(self) -> dict[str, int]:
        """How many steps were skipped since the run began, for a line of metrics; nothing where none was."""
        return {"skipped_steps": self.skipped} if self.skipped else {}

    @torch.no_grad()
    def begin(self) -> None:
        """Remember what a forward pass changes besides gradients, e.g. codebooks."""
        for buffer, before in self.buffers:
            before.copy_(buffer)

    def judge(self, number: int, batches: list[Batch], prepared: list[Prepared], agreed: Tensor, norm: Tensor) -> None:
        """Decide whether a step counts; called between its backward pass and the optimizer.

        Args:
            number: of the step, from 1.
            batches: this process's micro-batches.
            prepared: the same, prepared.
            agreed: (P + 1,) float, the same on all processes: the sums of the loss's parts, and how many processes
                were asked to stop.
            norm: () of the gradient, the same on all processes.
        """
        is_bad = (~(agreed.isfinite().all() & norm.isfinite())).float()
        self.optimizer.found_inf = is_bad
        self.is_taken = 1 - is_bad
        verdict = torch.stack([is_bad, agreed[-1]]).to("cpu", non_blocking=True)
        event = torch.cuda.Event() if self.lag else None
        if event:
            event.record()
        ids = [name for batch in batches for name in batch.ids]
        self.steps.append(Step(number, ids, prepared, verdict, event))

    @torch.no_grad()
    def undo(self) -> None:
        """Bring back what `begin` remembers if the step is skipped."""
        for buffer, before in self.buffers:
            buffer.copy_(torch.where(self.is_taken > 0, buffer, before))

    def settle(self, is_all: bool = False, is_end: bool = False) -> None:
        """Read the verdicts that have arrived, or all of them, and write down the steps that were skipped.

        Raises:
            M3Error: too many in a row, or all of a run that is at its end.
        """
        while len(self.steps) > (0 if is_all else self.lag):
            step = self.steps.popleft()
            if step.event:
                step.event.synchronize()
            is_bad, asked = step.verdict.tolist()
            self.is_stopping = self.is_stopping or asked > 0
            self.in_a_row = self.in_a_row + 1 if is_bad else 0
            self.taken += not is_bad
            if is_bad:
                self._write_down(step)
            self.last = step
            if self.in_a_row > self.limit:
                raise self._error(step)
        if self.in_a_row and is_end and not self.taken:
            raise self._error(self.last)

    def _write_down(self, step: Step) -> None:
        ids = gathered(step.ids)
        self.skipped += 1
        if ids is not None:
            self.lines.append({"step": step.number, "ids": [name for names in ids for name in names]})
            if self.skipped <= SHOWN:
                self.console.print(
                    f"[yellow]step {step.number} is skipped[/]: its loss or gradient is not finite; its samples stand "
                    f"in {self.run / SKIPPED}",
                    highlight=False,
                    soft_wrap=True,
                )

    def _error(self, step: Step) -> M3Error:
        with self.accelerator.autocast():
            own = first_not_finite(self.model, step.prepared)
        found = of_first(next(filter(None, gathered(own) or []), None))
        last = of_first(checkpoint.newest(self.run))
        remedy = f"go on from the last good checkpoint, {last}, with --resume" if last else "start again"
        return M3Error(
            f"step {step.number}: the loss or its gradient was not finite in {self.in_a_row} steps in a row "
            f"(train.max_skipped: {self.limit}); {found or 'the forward pass is finite, so only the gradient is not'}. "
            f"Lower train.lr, set train.clip (e.g. 1.0) or repair the samples named in {self.run / SKIPPED}, then "
            f"{remedy}."
        )


@torch.no_grad()
def first_not_finite(model: nn.Module, prepared: list[Prepared]) -> str | None:
    """Run a forward pass and return a clause that names the first module with a value that is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight `{name}` is not finite"
    found: list[str] = []

    def look(name: str, inputs: Any, output: Any) -> None:
        if not found and not _are_finite(output):
            whence = "" if _are_finite(inputs) else ", and neither is what it is given: look at the data"
            found.append(f"the output of the module `{name}` is the first that is not finite{whence}")

    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: look(name, inputs, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        for micro in prepared:
            model(micro)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _are_finite(tree: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in _tensors(tree) if x.is_floating_point())


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from _tensors(getattr(tree, field.name))
    elif isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(item)
