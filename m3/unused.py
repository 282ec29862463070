"""Parameters that a step does not use, e.g. heads of objectives that were not drawn, with several processes.

DistributedDataParallel waits for the gradient of every parameter. Those that the loss does not depend on are added to
it with factor 0, so that it need not search for them, and have no gradient afterwards, so that AdamW leaves them alone
as it does in one process. What another process used keeps its gradient here too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3.processes import summed


class Unused:
    """The parameters that the last micro-batch of a step, on this process, gives no gradient."""

    def __init__(self, loss: Tensor, model: nn.Module) -> None:
        """Find them; every process must do so, at the same point of a step.

        Args:
            loss: () what is propagated back, of the last micro-batch.
            model: with the gradients of the micro-batches before it.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        reached = _reached(loss)
        is_used = [id(p) in reached or p.grad is not None for p in trained]
        self.uses = summed(torch.tensor(is_used, dtype=torch.float32, device=loss.device))
        self.numbers = [number for number, used in enumerate(is_used) if not used]
        self.parameters = [trained[number] for number in self.numbers]

    def touched(self) -> Tensor | float:
        """Return () 0 that depends on each of them."""
        return sum(p.reshape(-1)[0] * 0 for p in self.parameters)

    def forget(self) -> None:
        """Remove the gradient 0 of those that no process used; called after the backward pass."""
        if not self.parameters:
            return
        for parameter, uses in zip(self.parameters, self.uses[self.numbers].tolist(), strict=True):
            if not uses:
                parameter.grad = None


def _reached(loss: Tensor) -> set[int]:
    """Return the ids of the parameters that a loss depends on."""
    seen, waiting, found = set(), [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))  # type: ignore[attr-defined]  # of AccumulateGrad
        waiting.extend(following for following, _ in node.next_functions)
    return found
