"""Tars that break and stores that fail in the middle of a run, for `kills.py`."""

from __future__ import annotations

import io
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from survival import RECIPES, STEPS, Recipe, at_step, differences, finish, lost_steps, metrics, tiny

from m3.data import shards

TARS, PER_TAR = 6, 8
PATIENCE = {"retries": 3, "wait": 0.001, "timeout": 1.0}


def write_tars(folder: Path) -> list[Path]:
    """Write as many pictures as a run of 12 steps of 4 samples reads, each once."""
    folder.mkdir(parents=True)
    paths = [folder / f"{number:03d}.tar" for number in range(TARS)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(PER_TAR):
                pixels = np.random.default_rng([number, i]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                member = tarfile.TarInfo(f"{number}_{i}.png")
                member.size = len(file.getvalue())
                tar.addfile(member, io.BytesIO(file.getvalue()))
    return paths


def reading(root: str, out: Path) -> Recipe:
    """Return a recipe that reads from tars."""
    data = {"source": "shards", "root": root, "samples": None, "held_out": 0, "workers": 0}
    data |= {"options": PATIENCE, "max_unreadable": 0.5}
    calm = {"evaluate__every": None, "evaluate__tasks": {}}
    return tiny(RECIPES[0], out, **{f"data__{key}": value for key, value in data.items()}, **calm)


def remove(tar: Path) -> None:
    tar.unlink()
    shards._descriptor.cache_clear()  # as long as it is open, a file that was removed can be read


def cut_off(tar: Path) -> None:
    with tar.open("r+b") as file:
        file.truncate(1024)


def flip(tar: Path) -> None:
    """Flip bits of all but the first header."""
    data = np.frombuffer(tar.read_bytes(), np.uint8).copy()
    data[512:] ^= 0x5A
    tar.write_bytes(data.tobytes())


HARMS: dict[str, Callable[[Path], None]] = {"missing": remove, "truncated": cut_off, "flipped": flip}


def broken_shards(folder: Path, count: int, seed: int, report: Callable[..., None]) -> None:
    """Break a random tar at a random step: all steps are taken, and only samples of that tar are skipped."""
    draws = random.Random(seed)
    for kind, harm in HARMS.items():
        steps = samples = unreadable = 0
        for number in range(count):
            paths = write_tars(folder / f"{kind}-{number}" / "data")
            tar, step = draws.choice(paths), draws.randrange(2, STEPS // 2)
            recipe = reading(str(paths[0].parent), folder / f"{kind}-{number}" / "run")
            finish(recipe, at_step(step, lambda harm=harm, tar=tar: harm(tar)))
            lines = metrics(recipe)
            steps += len(set(range(1, STEPS + 1)) ^ {line["step"] for line in lines})
            of = lines[-1].get("skipped_of", {})
            assert of.get(str(tar)), f"the {kind} tar was never met"
            samples += sum(lost for name, lost in of.items() if name != str(tar))
            unreadable += of[str(tar)]
        said = f"{count} tars {kind} from a random step on, {unreadable} samples in them unreadable and reported"
        report(f"shards: {kind}", said, [], count, steps, samples)


class Failing(LocalFileSystem):
    """A store of which every third read fails, and every eleventh hangs; notes each."""

    protocol = "failing"
    cachable = False
    reads = 0
    notes: Path

    @classmethod
    def _strip_protocol(cls, path):  # type: ignore[override]
        return super()._strip_protocol(str(path).removeprefix("failing://"))

    def cat_file(self, path, start=None, end=None, **options):  # type: ignore[override]
        Failing.reads += 1
        if Failing.reads % 3 == 0 or Failing.reads % 11 == 0:
            with self.notes.open("a") as file:
                file.write("x")
        if Failing.reads % 11 == 0:
            time.sleep(2 * PATIENCE["timeout"])
        elif Failing.reads % 3 == 0:
            raise ConnectionError("503, slow down")
        return super().cat_file(path, start, end, **options)


def failing_remote(folder: Path, report: Callable[..., None]) -> None:
    """Read a run from a store that fails and hangs again and again: it is the run that reads from the disk."""
    paths = write_tars(folder / "data")
    reference = reading(str(paths[0].parent), folder / "local")
    finish(reference)
    recipe, Failing.notes = reading(f"failing://{paths[0].parent}", folder / "remote"), folder / "failures"
    finish(recipe, lambda: fsspec.register_implementation("failing", Failing, clobber=True))
    failures = len(Failing.notes.read_text())
    found = differences(recipe, reference)
    skipped = sum(metrics(recipe)[-1].get("skipped_of", {}).values())
    said = f"{failures} reads of a store failed or hung and were tried again"
    report("failing remote", said, found, failures, lost_steps(recipe, reference), skipped)
