"""Tiny runs in processes of their own that can be killed, and the comparison with one that was not.

Children are forked from a process that has imported everything but started no thread, which saves each of them the
ten seconds that importing takes.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from m3 import checkpoint, held_out
from m3 import train as trainer
from m3.check import shrink
from m3.cli import main
from m3.recipe import Recipe, dump_recipe, load_recipe, recipe_from

STEPS = 12
LIMIT = 600
"""Seconds after which a run that has not ended is taken to hang; it then says where it stands."""
TIMES = ("samples_per_second", "data_wait", "seconds", "utilisation")
RECIPES = ("mae_tiny", "flip_tiny", "fourm_tiny")


def tiny(name: str, out: Path, **changes: Any) -> Recipe:
    """Return a recipe of seconds: 12 steps, a checkpoint every 3, measures every 4, a line every step."""
    settings: dict = shrink(load_recipe(name), out, STEPS).model_dump(mode="json", exclude_none=True)
    settings["train"] |= {"threads": 1, "save_every": 3, "ema": 0.9, "log_every": 1}
    settings["evaluate"] |= {"every": 4}
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        settings[section][inner] = value
    return recipe_from(settings, name)


def fork(recipe: Recipe, before: Callable[[], None] = lambda: None, resume: bool = True) -> int:
    """Start a run as `m3 train FILE [--resume]` in a child and return its process id; its output goes to a file."""
    recipe.folder.parent.mkdir(parents=True, exist_ok=True)
    file = recipe.folder.parent / f"{recipe.folder.name}.yaml"
    file.write_text(dump_recipe(recipe))
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log_of(recipe), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        held_out.preview = lambda *_: None  # drawing takes longer than all steps
        faulthandler.dump_traceback_later(LIMIT - 20, exit=True)
        before()
        code = main(["train", str(file), *(["--resume"] if resume else [])])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def log_of(recipe: Recipe) -> Path:
    """Return where the output of a run's children is."""
    return recipe.folder.parent / f"{recipe.folder.name}.log"


def ended(child: int, within: float = LIMIT) -> int:
    """Wait for a child and return its exit code, negative for a signal; one that hangs is killed and an error."""
    code = polled(child, within)
    if code is not None:
        return code
    os.kill(child, signal.SIGKILL)
    is_gone = polled(child, 30) is not None
    rest = "was killed" if is_gone else "can't even be killed: it waits for the disk or another device"
    raise AssertionError(f"process {child} did not end within {within} s and {rest}")


def polled(child: int, within: float) -> int | None:
    """Return the exit code of a child, or None when it is still there after so many seconds."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def finish(recipe: Recipe, before: Callable[[], None] = lambda: None) -> None:
    """Run or resume a recipe to its end."""
    code = ended(fork(recipe, before))
    assert code == 0, f"exit code {code}: {log_of(recipe).read_text()[-2000:]}"


@contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """Mount a tmpfs of 24 MiB on a new folder for as long as the context lasts; False where this user may not."""
    place.mkdir()
    how = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    is_there = subprocess.run(how, capture_output=True, timeout=60).returncode == 0
    if not is_there:
        print("a tmpfs can't be mounted here, so nothing was tried")
    try:
        yield is_there
    finally:
        if is_there:
            subprocess.run(["umount", str(place)], check=True, timeout=60)


def at_step(step: int, act: Callable[[], None]) -> Callable[[], None]:
    """Return what makes a child act when it begins a step, from 1."""

    def patch() -> None:
        set_rates = trainer.set_rates

        def acting(optimizer: Any, number: int, *rest: Any) -> None:
            if number + 1 == step:
                act()
            set_rates(optimizer, number, *rest)

        trainer.set_rates = acting

    return patch


def at_event(is_meant: Callable[[str], bool], number: int) -> Callable[[], None]:
    """Return what makes a child kill itself before it touches the n-th file (from 0) whose path is meant."""

    def patch() -> None:
        count = [0]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
                return
            if any(is_meant(str(argument)) for argument in arguments[:2]):
                count[0] += 1
                if count[0] > number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return patch


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the lines of metrics of a run, without the times."""
    text = (recipe.folder / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text.splitlines()]


def tear(recipe: Recipe, share: float) -> bool:
    """Cut the metrics off inside a line that no checkpoint relies on, as a power failure does; False: there is none."""
    file = recipe.folder / "metrics.jsonl"
    last = checkpoint.newest(recipe.folder)
    safe = int(last.name.removeprefix("step-")) if last else 0
    if not file.is_file():
        return False
    whole, loose = [], []
    for line in file.read_text().splitlines(keepends=True):
        (loose if not line.endswith("\n") or json.loads(line)["step"] > safe else whole).append(line)
    if not loose:
        return False
    text = "".join(loose)
    file.write_text("".join(whole) + text[: max(1, int(share * (len(text) - 1)))])
    return True


def lost_steps(recipe: Recipe, reference: Recipe) -> int:
    """Return how many steps of the reference a run has not taken just so: its line is missing or another."""
    ours = metrics(recipe)
    return len({line["step"] for line in metrics(reference) if line not in ours})


def differences(recipe: Recipe, reference: Recipe) -> list[str]:
    """Return what differs between a run and the one it should be equal to, bit for bit."""
    found = []
    ours, theirs = metrics(recipe), metrics(reference)
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        found.append(f"lines of the steps {[x['step'] for x in ours]}, not {[x['step'] for x in theirs]}")
    found += [f"metrics: {a} is not {b}" for a, b in zip(ours, theirs, strict=False) if a != b]
    for name in ("model", "model_ema"):
        a, b = (x.folder / name / "model.safetensors" for x in (recipe, reference))
        if b.exists() and (not a.exists() or a.read_bytes() != b.read_bytes()):
            found.append(f"{name}/model.safetensors")
    state, other = (checkpoint.read_state(checkpoint.folder_of(x.folder, STEPS))["files"] for x in (recipe, reference))
    return found + [f"the last checkpoint's {name}" for name in state | other if state.get(name) != other.get(name)]
