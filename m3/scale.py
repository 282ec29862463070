"""What each of several processes holds and sends in a training step: computed, not measured.

Letters: P parameters, T trained ones, N processes, U parameters of the largest block, R those outside of blocks.
"""

from __future__ import annotations

from typing import NamedTuple

from m3.cost import cost
from m3.layer import Layer
from m3.model import M3Model
from m3.recipe import Recipe
from m3.schedule import micro_batches

FP32 = 4
ASSUMED = (
    "Assumed: fp32 weights, gradients and two moments of AdamW; activations of one micro-batch in fp32; DDP's buckets "
    "hold gradients once more; FSDP2 holds two gathered blocks (one ahead), the parameters outside of blocks, and one "
    "block's gradients, and with several micro-batches all gradients in whole; what it gathers and scatters is in bf16 "
    "if train.precision is not fp32 (activations then need about half of what is said). Sent is what each process "
    "sends, by rings: (N - 1) / N of the bytes for a gather or scatter, twice that for an all-reduce. Not counted: the "
    "CUDA context, NCCL's buffers, fragmentation, temporary results, samples of coupled losses."
)


class Share(NamedTuple):
    """What one process holds and sends, in bytes.

    Attributes:
        weights: its own and gathered ones.
        gradients: with the buckets they are sent in.
        optimizer: moments.
        activations: of a micro-batch.
        sent: in a step.
        by: what is sent.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    sent: int
    by: str

    @property
    def total(self) -> int:
        """Bytes held at the most."""
        return self.weights + self.gradients + self.optimizer + self.activations


def shares(recipe: Recipe, model: M3Model, world: int) -> dict[str, Share]:
    """Return config file in recipes/accelerate -> what each process holds and sends.

    Args:
        recipe: its batch, micro-batch and precision count.
        model: on the device `meta`.
        world: N.
    """
    micro, turns = micro_batches(recipe.train, world)
    activations = cost(model).activation_bytes * micro
    parameters = list(model.parameters())
    all_, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.modules() if isinstance(layer, Layer)]
    unit, rest = max(blocks, default=0), all_ - sum(blocks)
    moved = FP32 if recipe.train.precision == "fp32" else 2
    ring = (world - 1) / world
    part = -(-FP32 * trained // world)
    held = moved * unit if turns == 1 else moved * trained  # gradients that wait to be scattered
    return {
        "eight_gpus (DDP)": Share(
            FP32 * all_,
            2 * FP32 * trained if world > 1 else FP32 * trained,
            2 * FP32 * trained,
            activations,
            int(2 * ring * FP32 * trained),
            "all-reduce of gradients",
        ),
        "zero2 (FSDP2)": Share(
            -(-FP32 * all_ // world) + moved * all_,
            part + held,
            2 * part,
            activations,
            int(ring * moved * (turns * all_ + trained)),
            "gather of weights, scatter of gradients",
        ),
        "fsdp2 (FSDP2)": Share(
            -(-FP32 * all_ // world) + moved * (rest + 2 * unit),
            part + held,
            2 * part,
            activations,
            int(ring * moved * (2 * turns * all_ + trained)),
            "two gathers of weights, scatter of gradients",
        ),
    }
