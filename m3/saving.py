"""Checkpoints and models of a run: what is in them, when they are written, and how a run goes on from one.

Every process hands what it alone knows to the first, which writes; so a write in the background needs no other
process. Weights that are cut up over processes (FSDP) are written by Accelerate instead, by all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m3 import checkpoint
from m3.data.loader import Order
from m3.data.remote import Patience
from m3.data.stream import StreamOrder, save_place
from m3.ema import Average
from m3.errors import M3Error, nearest
from m3.evaluate.task import Row
from m3.model import M3Model
from m3.processes import gathered, of_first, whole
from m3.processor import M3Processor
from m3.progress import Lines, Skipped, no_progress_bars, not_finite
from m3.recipe import Recipe, dump_recipe
from m3.schedule import Plan, learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator

MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.pt"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full disk or a folder that may not be written raises: torch.save and safetensors have their own."""


UNIMPORTANT = {"workers": True, "max_unreadable": True, "options": set(Patience.model_fields)}
"""Keys of `data` that change no sample."""


def facts_of(recipe: Recipe, model: M3Model, plan: Plan, samples: int) -> dict[str, Any]:
    """Return what a checkpoint says of its run: the model, what decides the order of the data, and the plan."""
    config = model.config
    order = {
        "seed": recipe.seed,
        "data": recipe.data.model_dump(mode="json", exclude=UNIMPORTANT),
        "train.batch_size": recipe.train.batch_size,
        "number of training samples": samples,
    }
    described = {name: getattr(config, name) for name in ("modalities", "backbone", "towers", "objectives")}
    return json.loads(json.dumps({"model": described, "order": order, "plan": plan._asdict()}))


class Parts(NamedTuple):
    """What of a run changes as it trains.

    Attributes:
        model: the plain model.
        optimizer: as prepared by Accelerate.
        average: of the weights; None: there is none.
        skipped: the samples that could not be read.
        metrics: lines that a checkpoint relies on.
    """

    model: M3Model
    optimizer: Any
    average: Average | None
    skipped: Skipped
    metrics: Lines


class Saver:
    """Writes the checkpoints of a run, in the background if the recipe wants it; every process makes one."""

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        parts: Parts,
        order: Order | StreamOrder,
        facts: dict[str, Any],
        console: Console,
    ) -> None:
        """Keep what every checkpoint needs.

        Args:
            accelerator: the processes.
            recipe: of the run.
            parts: what is saved.
            order: of the data.
            facts: what a checkpoint says of its run.
            console: where to say that one could not be written.
        """
        self.accelerator, self.run, self.spec = accelerator, recipe.folder, recipe.train
        self.parts, self.order, self.facts, self.console = parts, order, facts, console
        self.steps: int = facts["plan"]["steps"]
        self.every = self.spec.save_every or max(1, self.steps // 10)
        newest = checkpoint.newest(self.run)
        self.best: dict[str, Any] | None = checkpoint.read_state(newest).get("best") if newest else None
        self.is_sharded = accelerator.distributed_type.name in ("FSDP", "MEGATRON_LM", "TP")
        if self.is_sharded and self.spec.save_in_background:
            raise M3Error(
                "train.save_in_background: weights that are cut up over processes are written by all of them, in the "
                "foreground; remove the key."
            )
        self.copy: Callable[[Any], Any] = HostCopy() if self.spec.save_in_background else _on_host
        self.writer = ThreadPoolExecutor(1, "checkpoint")  # Python waits for its thread before the process ends
        self.written: Future[None] | None = None
        self.step = 0

    def measured(self, rows: list[Row], step: int) -> None:
        """Take note of what was measured on held-out samples; called by all processes, `rows` of the first count.

        Raises:
            M3Error: `train.keep_best` names none of them.
        """
        name = self.spec.keep_best
        values = of_first({row.task: (row.model, row.higher_is_better) for row in rows})
        if name is None:
            return
        if name not in values:
            raise M3Error(f"train.keep_best: `{name}` was not measured on held-out samples.{nearest(name, values)}")
        value, is_higher_better = values[name]
        best = self.best["value"] if self.best else None
        if best is None or (value > best if is_higher_better else value < best):
            self.best = {"of": name, "value": value, "step": step}

    def is_due(self, step: int) -> bool:
        """Return True when the recipe wants a checkpoint after this many steps."""
        is_best = self.best is not None and self.best["step"] == step
        is_kept = self.spec.keep_every is not None and step % self.spec.keep_every == 0
        return step % self.every == 0 or step == self.steps or is_best or is_kept

    def save(self, step: int, is_needed: bool = False) -> None:
        """Write a checkpoint after so many steps; every process takes part.

        A write in the background only copies here, and the one before it must be done.

        Args:
            step: steps that are done.
            is_needed: the run ends here, so that a failure is an error whatever the recipe says.

        Raises:
            M3Error: the weights are not finite, or it can't be written and the run does not go on without.
        """
        self.finish()
        # Their norm is infinite or NaN where one of them is, and ten times faster than looking at each.
        if not whole(torch.nn.utils.get_total_norm([p.detach() for p in self.parts.model.parameters()])).isfinite():
            raise not_finite(step, "the weights", checkpoint.newest(self.run))
        self.step = step
        fill, is_main = self._contents(step), self.accelerator.is_main_process
        state = {"step": step, **self.facts, **({"best": self.best} if self.best else {})}
        if self.is_sharded:
            self._write(fill, state, self.accelerator.wait_for_everyone)
        elif is_main:
            self.written = self.writer.submit(self._write, fill, state, lambda: None)
        if is_needed or not self.spec.save_in_background:
            self.finish(is_needed)

    def finish(self, is_needed: bool = False) -> None:
        """Wait until what is being written is on disk; every process takes part.

        Raises:
            M3Error: it could not be written, and the recipe or `is_needed` says that the run ends then.
        """
        written, self.written, failure = self.written, None, None
        if written is not None:
            try:
                written.result()
            except WRITE_ERRORS as error:
                failure = str(error)
        failure = of_first(failure)
        if failure is None:
            return
        last = checkpoint.newest(self.run)
        what = (
            f"the checkpoint of step {self.step} can't be written to {self.run / 'checkpoints'}: {failure}; "
            f"{f'the one before it, {last.name}, is whole' if last else 'there is none before it'}"
        )
        if is_needed or self.spec.on_save_error == "stop":
            raise M3Error(f"{what}. Make room or allow writing there, then go on with --resume.")
        self.console.print(
            f"[red]{what}[/]. Training goes on without (train.on_save_error: stop would end it); make room or allow "
            f"writing there.",
            highlight=False,
            soft_wrap=True,
        )

    def _write(self, fill: Callable[[Path], None], state: dict[str, Any], wait: Callable[[], None]) -> None:
        target = checkpoint.folder_of(self.run, state["step"])
        is_main = self.accelerator.is_main_process
        try:
            checkpoint.write(target, fill, state, is_main, wait)
        except WRITE_ERRORS:
            checkpoint.remove(checkpoint.partial(target))
            raise
        if is_main:
            best = state["best"]["step"] if "best" in state else None
            checkpoint.prune(self.run, self.spec.keep, self.spec.keep_every, best)

    def _contents(self, step: int) -> Callable[[Path], None]:
        """Copy what a checkpoint holds and return what writes it into a folder."""
        order, world = self.order, self.accelerator.num_processes
        place = order.state(step) if isinstance(order, StreamOrder) else None
        own = {"random": random_states(), "skipped": self.parts.skipped.state_dict(), "place": place}
        processes = gathered(own)  # of all processes at the first, None at others
        tensors = {EMA: self.parts.average.state_dict()} if self.parts.average else {}
        if not self.is_sharded:
            tensors |= {MODEL: own_weights(self.parts.model), OPTIMIZER: self.parts.optimizer.state_dict()}
        tensors = self.copy(tensors)

        def fill(folder: Path) -> None:
            if self.is_sharded:
                self.accelerator.save_state(str(folder))
            if not self.accelerator.is_main_process:
                return
            self.parts.metrics.sync()
            for name, tree in tensors.items():
                if name == OPTIMIZER:
                    torch.save(tree, folder / name)
                else:
                    save_file(tree, folder / name)
            for rank, known in enumerate(processes or []):
                torch.save({"world": world, **known}, _process_file(folder, rank))
                if known["place"] is not None:
                    save_place(folder, rank, known["place"])

        return fill


class HostCopy:
    """Copies of trees of tensors in memory of the host, which is taken at the first copy and used again."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def __call__(self, tree: Any) -> Any:
        """Return the tree with copies of its tensors; those of the last call are overwritten."""
        self.turn = 0
        copied = self._copied(tree)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copied(self, tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: self._copied(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(map(self._copied, tree))
        if not isinstance(tree, Tensor):
            return tree
        held = self.held[self.turn] if self.turn < len(self.held) else None
        if held is None or (held.shape, held.dtype) != (tree.shape, tree.dtype):
            held = torch.empty(tree.shape, dtype=tree.dtype, pin_memory=tree.is_cuda)
            self.held[self.turn : self.turn + 1] = [held]
        self.turn += 1
        return held.copy_(tree.detach(), non_blocking=True)


def _on_host(tree: Any) -> Any:
    """Return a tree of tensors as it is saved while training waits: on a CPU they are not copied."""
    if isinstance(tree, dict):
        return {key: _on_host(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(_on_host, tree))
    return tree.detach().cpu().contiguous() if isinstance(tree, Tensor) else tree


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model, without the further names of a tensor that has several."""
    own: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        own.setdefault(id(tensor), name)
    return {name: state[name].detach() for name in own.values()}


def random_states() -> dict[str, Any]:
    """Return the states of this process's generators, as `torch.load` reads them without running any code."""
    kind, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (kind, torch.from_numpy(np.int64(keys)), *rest)}
    states["torch"] = torch.get_rng_state()
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_states(states: dict[str, Any]) -> None:
    """Go on with the random numbers where `random_states` was called."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def restore(accelerator: Accelerator, run: Path, parts: Parts, facts: dict[str, Any], console: Console) -> int:
    """Load the newest undamaged checkpoint of a run and return the step to continue with; 0 when there is none.

    Raises:
        M3Error: all are damaged, or it belongs to another model, other data or a longer run.
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
    """Put what a checkpoint holds into a run."""
    average, rank, world = parts.average, accelerator.process_index, accelerator.num_processes
    if (found / MODEL).is_file() and (found / OPTIMIZER).is_file():
        weights = load_file(found / MODEL)
        with torch.no_grad():
            for name, tensor in own_weights(parts.model).items():
                tensor.copy_(weights[name])
        parts.optimizer.load_state_dict(torch.load(found / OPTIMIZER, map_location="cpu", weights_only=True))
    else:
        accelerator.load_state(str(found))
    if average:
        path = found / EMA
        if not path.is_file():
            raise M3Error(f"{found} holds no averaged weights, but train.ema is set; remove train.ema or start anew.")
        average.load_state_dict(load_file(path, device=str(parts.model.device)))
    if _process_file(found, rank).is_file():  # there may be more processes now
        own = torch.load(_process_file(found, rank), weights_only=True)
        parts.skipped.load_state_dict(own["skipped"])
        if own["world"] == world:
            set_random_states(own["random"])


def _process_file(folder: Path, rank: int) -> Path:
    return folder / f"process-{rank:05d}.pt"


def save_model(recipe: Recipe, model: M3Model, average: Average | None, steps: int) -> None:
    """Write the model of so many steps, and the one of averaged weights, as `from_pretrained` reads them."""
    model.config.about = {"recipe": recipe.name, "steps": steps}
    processor = M3Processor(model.config.modalities)
    copies = {"model": None} if average is None else {"model": None, "model_ema": average}
    for name, weights in copies.items():
        folder = recipe.folder / name
        with no_progress_bars(), weights.lent_to(model) if weights else nullcontext():
            model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
