"""Blocks of transformers as units: of what is computed again in the backward pass, and of what processes share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")
L = TypeVar("L", bound="Layer")


class Layer(nn.Module):
    """A block of a transformer, whose `forward` is `recomputable`.

    Attributes:
        is_recomputed: keep only what goes into the block, and compute what is in it again in the backward pass (Chen et
            al. 2016).
    """

    is_recomputed = False


def recomputable(forward: Callable[Concatenate[L, P], Tensor]) -> Callable[Concatenate[L, P], Tensor]:
    """Make the `forward` of a `Layer` keep nothing where the layer says so; it must draw no random numbers.

    It happens within the module, so that FSDP gathers its weights once for both.
    """

    @wraps(forward)
    def run(self: L, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if not (self.is_recomputed and torch.is_grad_enabled()):
            return forward(self, *args, **kwargs)
        return checkpoint(forward, self, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # type: ignore[return-value]

    return run
