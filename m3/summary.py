"""`m3 show`: what a recipe resolves to, and what it costs, worked out without running it.

Letters: B batch.
"""

from __future__ import annotations

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch import nn

from m3.build import meta_model
from m3.cost import cost, meta_batch, smallest_batch
from m3.model import M3Model
from m3.recipe import Recipe, dump_recipe
from m3.scale import ASSUMED, shares
from m3.schedule import micro_batches
from m3.show import count_parameters


def print_summary(recipe: Recipe, world: int | None = None) -> None:
    """Print the resolved recipe and the tables; with `world`, what each of so many processes holds and sends."""
    console = Console()
    model = meta_model(recipe)
    if recipe.train.checkpoint_activations:
        model.recompute()
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
    if world:
        console.print(_scale_table(recipe, model, world))


def _scale_table(recipe: Recipe, model: M3Model, world: int) -> Table:
    micro, turns = micro_batches(recipe.train, world)
    table = Table(title=f"Each of {world} processes, {turns} micro-batch(es) of {micro}", title_justify="left")
    table.caption, table.caption_justify, table.caption_style = ASSUMED, "left", ""
    for column in ("recipes/accelerate", "weights", "gradients", "optimizer", "activations", "memory", "sent per step"):
        table.add_column(column, justify="left" if column == "recipes/accelerate" else "right")
    for name, share in shares(recipe, model, world).items():
        held = (share.weights, share.gradients, share.optimizer, share.activations, share.total)
        table.add_row(name, *map(_bytes, held), f"{_bytes(share.sent)}\n{share.by}")
    return table


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
    prepared = model.prepare(meta_batch(model, smallest_batch(model)))
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
