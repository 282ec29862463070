"""`m3 show`: what a recipe resolves to, and what it costs, worked out without running it.

Letters: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from m3.model import M3Model
from m3.recipe import Recipe, dump_recipe
from m3.show import count_parameters
from m3.train import model_config
from m3.types import Batch


@dataclass(frozen=True)
class Cost:
    """What training costs.

    Attributes:
        forward_flops: floating-point operations of one sample's forward pass (a multiply-add is two).
        train_flops: the same for forward and backward.
        state_bytes: weights, gradients and AdamW's two moments, float32.
        activation_bytes: kept for the backward pass, per sample, in float32.
    """

    forward_flops: int
    train_flops: int
    state_bytes: int
    activation_bytes: int


def meta_model(recipe: Recipe) -> M3Model:
    """Build the recipe's model without memory for its weights."""
    with torch.device("meta"):
        return M3Model(model_config(recipe))


def meta_batch(model: M3Model, samples: int) -> Batch:
    """Make a batch of the model's usual sizes without memory."""
    with torch.device("meta"):
        signals = {name: modality.blank(samples) for name, modality in model.modalities.items()}
        return Batch(signals, torch.zeros(samples, dtype=torch.long))


def cost(model: M3Model) -> Cost:
    """Count operations and saved activations of a meta model, exactly: the difference of two and one samples."""
    one, two = _count(model, 1), _count(model, 2)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(two[0] - one[0], two[1] - one[1], 16 * parameters, two[2] - one[2])


def _count(model: M3Model, samples: int) -> tuple[int, int, int]:
    """Return forward FLOPs, training FLOPs and bytes saved for the backward pass."""
    saved: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            kept.append(x)  # keeps the storage alive, so that its address is not used again
        return x

    kept: list[Tensor] = []
    with FlopCounterMode(display=False) as counter:
        prepared = model.prepare(meta_batch(model, samples))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = model(prepared).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops(), sum(saved.values())


def print_summary(recipe: Recipe) -> None:
    """Print the resolved recipe and the tables."""
    console = Console()
    model = meta_model(recipe)
    spent = cost(model)
    console.print(Syntax(dump_recipe(recipe).rstrip(), "yaml", background_color="default"))
    console.print(_parameter_table(model))
    console.print(_token_table(model))
    micro = recipe.train.micro_batch or recipe.train.batch_size
    activations = spent.activation_bytes * micro
    console.print(
        f"FLOPs per sample: {spent.forward_flops / 1e9:.3f} G forward, {spent.train_flops / 1e9:.3f} G training step\n"
        f"Memory: {_bytes(spent.state_bytes)} weights, gradients and optimizer + {_bytes(activations)} activations of "
        f"a micro-batch of {micro} in fp32 = {_bytes(spent.state_bytes + activations)} "
        f"(one process; set train.micro_batch to make it smaller)"
    )


def _parameter_table(model: M3Model) -> Table:
    table = Table(title="Parameters", title_justify="left")
    for column in ("part", "parameters", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    parts = {f"tokenizer {name}": part for name, part in model.tokenizers.items()}
    parts |= {"positions": model.positions, "modality embeddings": model.modality_embeddings}
    parts |= {"mask tokens": model.mask_tokens, "backbone": model.backbone or nn.Identity()}
    parts |= {f"tower {name}": part for name, part in model.towers.items()}
    parts |= {f"objective {name}": part for name, part in model.objectives.items()}
    total = count_parameters(model)
    rows = {name: count_parameters(part) for name, part in parts.items()}
    assert sum(rows.values()) == total, "a part of the model is missing from the table"
    for name, count in rows.items():
        if count:
            table.add_row(name, f"{count:,}", f"{count / total:.1%}")
    table.add_row("[bold]total", f"[bold]{total:,}", "")
    return table


def _token_table(model: M3Model) -> Table:
    table = Table(title="Tokens per sample", title_justify="left")
    for column in ("modality", "raw", "tokens", "visible at most", "predicted at most"):
        table.add_column(column, justify="left" if column in ("modality", "raw") else "right")
    prepared = model.prepare(meta_batch(model, 1))
    plans = list(prepared.plans.values())
    for name, tokens in prepared.tokens.items():
        signal = model.modalities[name].signal
        size = " x ".join(map(str, (signal.channels, *signal.size)))
        visible = max((plan.visible[name].shape[1] for plan in plans if name in plan.visible), default=0)
        target = max((plan.target[name].shape[1] for plan in plans if name in plan.target), default=tokens.count)
        table.add_row(name, size, str(tokens.count), str(visible), str(target))
    for plan in plans:
        read = "encoder" if len(plans) == 1 else f"encoder of {', '.join(plan.visible)}"
        table.add_row(f"[bold]{read}", "", "", f"[bold]{plan.packed_index().shape[1]}", "")
    return table


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
