"""Checkpoints and models of a run: what is in them, and when they are written.

Every process hands what it alone knows to the first, which writes; so a write in the background needs no other
process. Tensors that are cut up over processes (FSDP2) are written by all of them, see `m3.sharded`.
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
from safetensors.torch import save_file
from torch import Tensor, nn

from m3 import checkpoint, sharded
from m3.data.loader import Order
from m3.data.remote import Patience
from m3.data.stream import StreamOrder, save_place
from m3.ema import Average
from m3.errors import M3Error, nearest
from m3.evaluate.task import Row
from m3.foreign.checkpoint import named
from m3.model import M3Model
from m3.processes import gathered, in_all, of_first
from m3.processor import M3Processor
from m3.progress import Lines, Skipped, no_progress_bars, not_finite
from m3.recipe import Recipe, dump_recipe
from m3.schedule import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.pt"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full disk or a folder that may not be written raises: torch.save and safetensors have their own."""


UNIMPORTANT = {"workers": True, "max_unreadable": True, "options": set(Patience.model_fields)}
"""Keys of `data` that change no sample."""


def facts_of(recipe: Recipe, model: M3Model, plan: Plan, samples: int) -> dict[str, Any]:
    """Return what a checkpoint says of its run: recipe, model, what decides the order of the data, and the plan."""
    config = model.config
    order = {
        "seed": recipe.seed,
        "data": recipe.data.model_dump(mode="json", exclude=UNIMPORTANT),
        "train.batch_size": recipe.train.batch_size,
        "number of training samples": samples,
    }
    described = {name: getattr(config, name) for name in ("modalities", "backbone", "towers", "objectives")}
    facts = {"recipe": recipe.name, "model": described, "order": order, "plan": plan._asdict()}
    return json.loads(json.dumps(facts))


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
        norm = torch.nn.utils.get_total_norm([p.detach() for p in self.parts.model.parameters()])
        if not sharded.whole(norm).isfinite():
            raise not_finite(step, "the weights", checkpoint.newest(self.run))
        self.step = step
        fill, is_main = self._contents(step), self.accelerator.is_main_process
        state = {"step": step, **self.facts, **({"best": self.best} if self.best else {})}
        if self.is_sharded:
            self.written = Future()
            try:
                self.written.set_result(self._write(fill, state, together))
            except WRITE_ERRORS as error:
                self.written.set_exception(error)
        elif is_main:
            self.written = self.writer.submit(self._write, fill, state, lambda work: work())
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

    def _write(
        self, fill: Callable[[Path], None], state: dict[str, Any], together: Callable[[checkpoint.Work], None]
    ) -> None:
        target = checkpoint.folder_of(self.run, state["step"])
        is_main = self.accelerator.is_main_process
        try:
            checkpoint.write(target, fill, state, is_main, together)
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
        tensors = {}
        if not self.is_sharded:
            tensors = {MODEL: own_weights(self.parts.model), OPTIMIZER: self.parts.optimizer.state_dict()}
            tensors |= {EMA: self.parts.average.state_dict()} if self.parts.average else {}
        tensors = self.copy(tensors)

        def fill(folder: Path) -> None:
            if self.is_sharded:
                sharded.write(folder / sharded.FOLDER, named_tensors(self.parts, self.parts.optimizer.state_dict()))
            if not self.accelerator.is_main_process:
                return
            self.parts.metrics.sync()
            for name, tree in tensors.items():
                if name == OPTIMIZER:
                    torch.save(tree, folder / name)
                else:
                    save_file(tree, folder / name)
            for rank, known in enumerate(processes or []):
                torch.save({"world": world, **known}, process_file(folder, rank))
                if known["place"] is not None:
                    save_place(folder, rank, known["place"])

        return fill


def together(work: checkpoint.Work) -> None:
    """Do a piece of work as all processes do; what fails in one of them is raised in all."""
    failure = None
    try:
        work()
    except WRITE_ERRORS as error:
        failure = str(error)
    failures = [text for text in in_all(failure) if text is not None]
    if failures:
        raise OSError(failures[0])


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


def named_tensors(parts: Parts, optimizer: dict[str, Any]) -> dict[str, Tensor]:
    """Return what is written in parts: model.NAME, ema.NUMBER, optimizer.NUMBER.KEY, from the optimizer's state too."""
    found = {f"model.{name}": tensor for name, tensor in own_weights(parts.model).items()}
    for number, weight in (parts.average.state_dict() if parts.average else {}).items():
        found[f"ema.{number}"] = weight
    for number, values in optimizer["state"].items():
        found |= {f"optimizer.{number}.{key}": value for key, value in values.items()}
    return found


def process_file(folder: Path, rank: int) -> Path:
    """Return where a checkpoint keeps what one process alone knows."""
    return folder / f"process-{rank:05d}.pt"


def save_model(recipe: Recipe, model: M3Model, average: Average | None, steps: int) -> None:
    """Write the model of so many steps, and the one of averaged weights, as `from_pretrained` reads them."""
    model.config.about = {"recipe": recipe.name, "steps": steps} | ({"init": named(recipe.init)} if recipe.init else {})
    processor = M3Processor(model.config.modalities)
    copies = {"model": None} if average is None else {"model": None, "model_ema": average}
    for name, weights in copies.items():
        folder = recipe.folder / name
        with no_progress_bars(), weights.lent_to(model) if weights else nullcontext():
            model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
