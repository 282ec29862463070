"""An exponential moving average of the weights, kept outside the model: the teacher of objectives that have one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from m3.errors import M3Error
from m3.network import Network
from m3.processes import rank
from m3.sharded import fill, is_cut, own_part, whole
from m3.types import Encoded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Teacher = dict[str, Tensor] | Callable[..., Encoded] | None
"""Name of a parameter -> its average, or, where that is cut up, what encodes tokens with it; None: there is none."""


class Average:
    """average <- decay * average + (1 - decay) * weights after every step, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = [p.detach().float().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float | None = None, is_taken: Tensor | None = None) -> None:
        """Take in the model's current weights.

        Args:
            model: whose weights.
            decay: of this update; None: the one it was made with.
            is_taken: () float on the model's device; 0: leave the average as it is.
        """
        share: float | Tensor = 1 - (self.decay if decay is None else decay)
        share = share if is_taken is None else is_taken * share
        for own, parameter in zip(self.weights, model.parameters(), strict=True):
            own_part(own).lerp_(own_part(parameter.detach()).float(), share)

    @contextmanager
    def lent_to(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the average for as long as the context lasts, then its own weights again to the bit.

        The average stays where it is, since it is also the teacher of objectives that have one.
        """
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        _put(self.weights, model)
        try:
            yield
        finally:
            _put(kept, model)

    def whole(self) -> Average:
        """Return the average at the first process, put together where it is cut up; all must call it, none keeps it."""
        found = copy(self)
        pieces = (whole(weight) for weight in self.weights)
        found.weights = [piece if rank() == 0 else own for piece, own in zip(pieces, self.weights, strict=True)]
        return found

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """Return name of a parameter -> its average, the tensors themselves."""
        return dict(zip((name for name, _ in model.named_parameters()), self.weights, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average for a checkpoint."""
        return {str(i): weight for i, weight in enumerate(self.weights)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take an average from a checkpoint."""
        for i, weight in enumerate(self.weights):
            fill(weight, state[str(i)])


@torch.no_grad()
def _put(weights: list[Tensor], model: nn.Module) -> None:
    for weight, parameter in zip(weights, model.parameters(), strict=True):
        parameter.copy_(weight)


def teacher_of(model: Network, average: Average | None, build: Callable[[], Network], precision: Any = None) -> Teacher:
    """Return the model's teacher, whose weights are the average's own tensors.

    Args:
        model: the student.
        average: of its weights.
        build: makes a network like it, for a teacher that is cut up and therefore needs modules of its own, since FSDP
            puts the student's gathered weights into the student's modules whatever others stand there.
        precision: FSDP's policy, as the student's.

    Raises:
        M3Error: an objective learns from an average, and the run keeps none.
    """
    if not model.has_teacher:
        return None
    if average is None:
        raise M3Error(
            "an objective learns from a moving average of the model, but the run keeps none; set train.ema, e.g. "
            "{start: 0.996, end: 1.0}."
        )
    first = average.weights[0]
    return _cut_up(build(), average, first.device_mesh, precision) if is_cut(first) else average.named(model)


def _cut_up(network: Network, average: Average, mesh: DeviceMesh, precision: Any) -> Callable[..., Encoded]:
    """Cut a network up as the average is, let its weights be the average's tensors, and return what encodes tokens."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    network.requires_grad_(False)
    for module in (*network.layers(), network):  # it never runs backward, so nothing stays gathered
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision or MixedPrecisionPolicy())
    for number, parameter in enumerate(network.parameters()):
        own_part(parameter).copy_(own_part(average.weights[number]))
        average.weights[number] = parameter
    register_fsdp_forward_method(network, "encode_tokens")
    return network.encode_tokens
