"""How a run goes on from a checkpoint, whether that is whole or cut up, on however many processes it was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from m3 import checkpoint, sharded
from m3.errors import M3Error
from m3.processes import of_first
from m3.saving import EMA, MODEL, OPTIMIZER, Parts, named_tensors, own_weights, process_file, set_random_states
from m3.schedule import Plan, learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator


def restore(accelerator: Accelerator, run: Path, parts: Parts, facts: dict[str, Any], console: Console) -> int:
    """Load the newest undamaged checkpoint of a run and return the step to continue with; 0 when there is none.

    Raises:
        M3Error: all are damaged, or it belongs to another model, other data, a longer run or another version of M3.
    """
    found = of_first(_find(run, console) if accelerator.is_main_process else None)
    if found is None:
        console.print(f"--resume: {run} holds no checkpoint yet, so the run starts at step 0", soft_wrap=True)
        return 0
    if isinstance(found, M3Error):
        raise found
    state = checkpoint.read_state(found)
    checkpoint.check_same_model(state["model"], facts["model"], found)
    checkpoint.check_same_order(state.get("order", {}), facts["order"], found)
    step, before, now = int(state["step"]), Plan(**state["plan"]), Plan(**facts["plan"])
    if step > now.steps:
        raise M3Error(
            f"{found} is past the {now.steps} steps of this run; raise train.steps or start without --resume."
        )
    _load(accelerator, found, parts)
    console.print(
        f"resuming at step {step} of {now.steps}" if step < now.steps else f"all {step} steps are done already"
    )
    if learning_rate(step, before) != learning_rate(step, now):
        console.print(
            f"[yellow]the learning rate follows another curve[/] than in the first {step} steps (planned for "
            f"{before.steps}): it jumps from {learning_rate(step, before):.3g} to {learning_rate(step, now):.3g}",
            soft_wrap=True,
        )
    return step


def _find(run: Path, console: Console) -> Path | M3Error | None:
    """Return an error instead of raising it in one process alone, which would leave the others waiting."""
    try:
        return checkpoint.newest_undamaged(
            run, lambda text: console.print(f"[red]damaged checkpoint[/] {text}", highlight=False, soft_wrap=True)
        )
    except M3Error as error:
        return error


def _load(accelerator: Accelerator, found: Path, parts: Parts) -> None:
    """Put what a checkpoint holds into a run, whole or cut up, however it was when it was written."""
    rank, world = accelerator.process_index, accelerator.num_processes
    folder = found / sharded.FOLDER
    names = sharded.shapes(folder) if folder.is_dir() else {}
    if parts.average and not ((found / EMA).is_file() or "ema.0" in names):
        raise M3Error(f"{found} holds no averaged weights, but train.ema is set; remove train.ema or start anew.")
    weights = {} if names else load_file(found / MODEL)
    own = own_weights(parts.model)
    written = {name: tensor.shape for name, tensor in weights.items()}
    written |= {name.removeprefix("model."): size for name, size in names.items() if name.startswith("model.")}
    checkpoint.check_same_weights(written, {name: tensor.shape for name, tensor in own.items()}, found)
    if names:
        optimizer = _optimizer_like(parts.optimizer, names)
        sharded.read(folder, named_tensors(parts, optimizer))
    else:
        optimizer = torch.load(found / OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer["state"] = _cut(optimizer["state"], _parameters(parts.optimizer))
        for name, tensor in own.items():
            sharded.fill(tensor, weights[name])
        if parts.average:
            parts.average.load_state_dict(load_file(found / EMA))
    parts.optimizer.load_state_dict(optimizer)
    if process_file(found, rank).is_file():  # there may be more processes now
        own = torch.load(process_file(found, rank), weights_only=True)
        parts.skipped.load_state_dict(own["skipped"])
        if own["world"] == world:
            set_random_states(own["random"])


def _parameters(optimizer: Any) -> list[Tensor]:
    """Return the parameters in the order in which an optimizer's state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_like(optimizer: Any, names: dict[str, torch.Size]) -> dict[str, Any]:
    """Return an optimizer's state with room for what was written under names such as `optimizer.7.exp_avg`."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = _parameters(optimizer)
    for name, shape in names.items():
        if name.startswith("optimizer."):
            number, key = name.split(".")[1:]
            like = parameters[int(number)]
            room = torch.zeros_like(like) if like.shape == shape else torch.zeros(shape, device=like.device)
            state.setdefault(int(number), {})[key] = room
    return {**optimizer.state_dict(), "state": state}


def _cut(state: dict[int, dict[str, Tensor]], parameters: list[Tensor]) -> dict[int, dict[str, Tensor]]:
    """Cut an optimizer's whole tensors up as their parameters are."""
    for number, values in state.items():
        like = parameters[number]
        for key, value in values.items():
            if sharded.is_cut(like) and value.shape == like.shape:
                values[key] = torch.zeros_like(like)
                sharded.fill(values[key], value)
    return state
