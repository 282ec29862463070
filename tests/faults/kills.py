"""Break runs in many ways, let them go on, and count what is lost: `make test-faults`.

OMP_NUM_THREADS=1 python tests/faults/kills.py [--kills 36] [--seed 0] [KIND ...]      kinds: see `KINDS`
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import survival
import torch
from broken_data import broken_shards, failing_remote
from survival import (
    RECIPES,
    STEPS,
    at_event,
    at_step,
    differences,
    ended,
    finish,
    fork,
    log_of,
    lost_steps,
    polled,
    small_disk,
    tear,
    tiny,
)

from m3 import checkpoint
from m3.preemption import EXIT_CODE

ROOT = Path(__file__).parents[2]


KINDS = ("kills", "signals", "disk", "read-only", "flips", "worker", "ranks", "shards", "remote")


class Report:
    """What was tried and what was lost."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, int, int, int]] = []

    def __call__(
        self, case: str, said: str, found: list[str], tried: int, lost_steps: int = 0, lost_samples: int = 0
    ) -> None:
        """Take note of a case.

        Args:
            case: name of the row; several calls with one name are added up.
            said: what was done, in words.
            found: differences from runs that were left alone.
            tried: how often.
            lost_steps: steps that were not taken as in those, or not at all.
            lost_samples: samples that could be read and were not used.
        """
        self.rows.append((case, tried, len(found), lost_steps, lost_samples))
        print(f"{case}: {said}; {len(found)} differences{f': {found}' if found else ''}")
        sys.stdout.flush()

    @property
    def is_clean(self) -> bool:
        """True when nothing differed and nothing was lost."""
        return not any(number for row in self.rows for number in row[2:])

    def print_table(self) -> None:
        """Print one line for each case."""
        print("\n| case | tried | differences | lost steps | lost samples |\n| --- | ---: | ---: | ---: | ---: |")
        for row in self.rows:
            print(f"| {' | '.join(map(str, row))} |")


def samples_of(recipe: survival.Recipe, steps: int) -> int:
    """Return how many samples so many lost steps are."""
    return steps * recipe.train.batch_size


def references(folder: Path, names: tuple[str, ...]) -> dict[str, tuple[survival.Recipe, float]]:
    """Run every recipe without interruption and time it."""
    found = {}
    for name in names:
        recipe = tiny(name, folder / "whole" / name)
        start = time.monotonic()
        finish(recipe)
        found[name] = (recipe, time.monotonic() - start)
    return found


def kills(folder: Path, recipes: tuple[str, ...], count: int, seed: int, report: Report) -> None:
    """Kill runs with SIGKILL, up to three times each: at random moments and at random files of a checkpoint's write."""
    whole, hits = references(folder, recipes), 0
    for which, name in enumerate(recipes):
        reference, seconds = whole[name]
        draws = random.Random(f"{seed}/{name}")
        killed = in_write = torn = runs = lost = 0
        found: list[str] = []
        while killed < -(-count // len(recipes)):
            recipe = tiny(name, folder / f"{name}-{runs}", train__save_in_background=bool((runs + which) % 2))
            for turn in range(3):
                if turn % 2 == runs % 2:  # the paths that a checkpoint's write touches, or those of another file
                    number = draws.randrange(20)
                    child = fork(recipe, at_event(lambda path: ".partial" in path and "checkpoints" in path, number))
                    code = ended(child)
                else:
                    child, start = fork(recipe), time.monotonic()
                    code = polled(child, draws.uniform(0.2, 1) * seconds)
                    if code is None:
                        os.kill(child, signal.SIGKILL)
                        code = ended(child)
                    elif turn == 0:  # the machine has less to do than when the reference was timed
                        seconds = time.monotonic() - start
                if code == 0:
                    break
                assert code == -signal.SIGKILL, f"exit code {code}: {log_of(recipe).read_text()[-2000:]}"
                killed += 1
                in_write += bool(list((recipe.folder / "checkpoints").glob(".step-*.partial")))
                torn += draws.random() < 0.5 and tear(recipe, draws.random())
            finish(recipe)
            found += differences(recipe, reference)
            lost += lost_steps(recipe, reference)
            shutil.rmtree(recipe.folder)
            runs += 1
        said = f"{killed} kills in {runs} runs, {in_write} inside a checkpoint's write, {torn} lines torn"
        report(f"kill -9, {name} ({in_write} inside a write)", said, found, killed, lost, samples_of(reference, lost))
        hits += in_write
    assert hits, "no kill hit the write of a checkpoint"


def signals(folder: Path, count: int, seed: int, report: Report) -> None:
    """Ask runs to stop at a random step; a second signal must end them at once."""
    (reference, _), draws, found = references(folder, RECIPES[:1])[RECIPES[0]], random.Random(seed), []
    lost = 0
    for number in range(count):
        changes = {"train__save_in_background": bool(number % 2), "data__workers": number % 3}
        recipe = tiny(RECIPES[0], folder / f"signal-{number}", **changes)
        kind, step = (signal.SIGTERM, signal.SIGUSR1)[number % 2], draws.randrange(1, STEPS)
        code = ended(fork(recipe, at_step(step, lambda kind=kind: _ask_all(kind))))
        assert code == EXIT_CODE, f"exit code {code}: {log_of(recipe).read_text()[-2000:]}"
        last = checkpoint.newest(recipe.folder)
        assert last == checkpoint.folder_of(recipe.folder, step), f"asked in step {step}, saved {last}"
        finish(recipe)
        found += differences(recipe, reference)
        lost += lost_steps(recipe, reference)
    said = f"{count} SIGTERM and SIGUSR1, each saved at its step and exit code {EXIT_CODE}"
    report("SIGTERM, SIGUSR1", said, found, count, lost, samples_of(reference, lost))

    def asked_twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        start = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        while time.monotonic() < start + 60:
            time.sleep(0.01)

    start = time.monotonic()
    code = ended(fork(tiny(RECIPES[0], folder / "twice"), at_step(2, asked_twice)))
    assert code == -signal.SIGTERM
    report("second signal", f"ended by it, {time.monotonic() - start:.1f} s after the start", [], 1)


def _ask_all(kind: int) -> None:
    """Send a signal to this process and those that load its data, as schedulers do."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for process in (*map(int, children), os.getpid()):
        os.kill(process, kind)


def disk(folder: Path, report: Report) -> None:
    """Fill the disk in the middle of a run, and make room again before its end."""
    place = folder / "small"
    with small_disk(place) as is_there:
        if not is_there:
            return
        calm = {"evaluate__every": None}
        reference = tiny(RECIPES[0], folder / "roomy", **calm)
        finish(reference)
        for is_behind in (False, True):
            recipe = tiny(RECIPES[0], place / f"run-{is_behind}", train__save_in_background=is_behind, **calm)
            filler = place / "filler"

            def fill(filler: Path = filler) -> None:
                with filler.open("wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(1 << 12))
                    except OSError:
                        pass

            def hooks(filler: Path = filler) -> None:
                at_step(5, fill)()
                at_step(11, filler.unlink)()

            child = fork(recipe, hooks)
            code = ended(child)
            log = " ".join(log_of(recipe).read_text().split())
            assert code == 0, log[-2000:]
            assert "No space left on device" in log, log
            for step in (6, 9):
                assert f"the checkpoint of step {step} can't be written" in log, log
            where = "in the background" if is_behind else "in the foreground"
            found = differences(recipe, reference)
            said = f"a full tmpfs of 24 MiB from step 5 to 10, 2 checkpoints refused {where}"
            lost = lost_steps(recipe, reference)
            report(f"full disk, saved {where}", said, found, 2, lost, samples_of(reference, lost))


def read_only(folder: Path, report: Report) -> None:
    """Let the run folder be read-only in the middle of a run, which stops the superuser too."""
    calm, place = {"evaluate__every": None}, folder / "run"
    with small_disk(place) as is_there:
        if not is_there:
            return
        reference, recipe = tiny(RECIPES[0], folder / "roomy", **calm), tiny(RECIPES[0], place, **calm)
        finish(reference)

        def remount(how: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True, timeout=60)

        def allow() -> None:
            assert [path.name for path in checkpoint.whole_ones(place)] == ["step-00000003"]
            assert checkpoint.damage(checkpoint.folder_of(place, 3)) is None
            remount("rw")

        def hooks() -> None:
            at_step(5, lambda: remount("ro"))()
            at_step(11, allow)()

        finish(recipe, hooks)
        log = " ".join(log_of(recipe).read_text().split())
        for step in (6, 9):
            assert f"the checkpoint of step {step} can't be written to {place / 'checkpoints'}: " in log, log
        assert "[Errno 30] Read-only file system" in log, log
        assert log.count("the one before it, step-00000003, is whole. Training goes on without") == 2, log
        found, lost = differences(recipe, reference), lost_steps(recipe, reference)
        said = "a run folder that is read-only from step 5 to 10, 2 checkpoints refused"
        report("read-only folder", said, found, 2, lost, samples_of(reference, lost))


def flips(folder: Path, count: int, seed: int, report: Report) -> None:
    """Flip a random bit of a random file of the newest checkpoint."""
    (reference, _), draws, found = references(folder, RECIPES[2:])[RECIPES[2]], random.Random(seed), []
    recipe, lost = tiny(RECIPES[2], folder / "flips"), 0
    for _ in range(count):
        shutil.rmtree(recipe.folder, ignore_errors=True)
        shutil.copytree(reference.folder, recipe.folder)
        newest = checkpoint.newest(recipe.folder)
        assert newest is not None
        file = draws.choice(sorted(newest.iterdir()))
        content = bytearray(file.read_bytes())
        place = draws.randrange(len(content))
        content[place] ^= 1 << draws.randrange(8)
        if file.name == checkpoint.STATE:
            content = content[: len(content) // 2]  # a flipped bit may still be readable JSON; half of it is not
        file.write_bytes(content)
        log_of(recipe).unlink(missing_ok=True)
        finish(recipe)
        log = " ".join(log_of(recipe).read_text().split())
        assert f"{newest.name}: {file.name}" in log, log
        assert f"resuming at step {STEPS - 3} of {STEPS}" in log, log
        found += differences(recipe, reference)
        lost += lost_steps(recipe, reference)
    said = f"{count} damaged newest checkpoints, all reported, the one before used"
    report("flipped bit in a checkpoint", said, found, count, lost, samples_of(reference, lost))


def worker(folder: Path, report: Report) -> None:
    """Kill a process that loads data."""
    reference = references(folder, RECIPES[:1])[RECIPES[0]][0]
    recipe = tiny(RECIPES[0], folder / "worker", data__workers=2)

    def kill() -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

    start = time.monotonic()
    code = ended(fork(recipe, at_step(5, kill)), within=60)
    seconds, log = time.monotonic() - start, " ".join(log_of(recipe).read_text().split())
    assert code == 2, log[-2000:]
    assert "a process that loads data has died" in log, log[-2000:]
    assert "Traceback" not in log, log[-2000:]
    finish(recipe)
    said = f"1 of 2 data workers killed, the run ended {seconds:.1f} s after its start with the cause"
    lost = lost_steps(recipe, reference)
    report("dead data worker", said, differences(recipe, reference), 1, lost, samples_of(reference, lost))


def ranks(folder: Path, report: Report) -> None:
    """Kill one of two processes; ask one of two to stop; go on with another number of processes."""
    fewer = {"data__workers": 0}
    whole = tiny(RECIPES[0], folder / "two", **fewer)
    launched(whole, "none")
    recipe = tiny(RECIPES[0], folder / "dead", **fewer)
    start = time.monotonic()
    log = launched(recipe, "kill")
    assert "another process of the run has died or hangs" in log, log[-3000:]
    seconds = time.monotonic() - start
    assert checkpoint.newest(recipe.folder) == checkpoint.folder_of(recipe.folder, 3)
    launched(recipe, "none")
    said = f"1 of 2 processes killed in step 5, the other ended {seconds:.0f} s after the start with the cause"
    lost = lost_steps(recipe, whole)
    report("dead rank", said, differences(recipe, whole), 1, lost, samples_of(whole, lost))

    recipe = tiny(RECIPES[0], folder / "asked", **fewer)
    log = launched(recipe, "term")
    assert "was asked to stop and is saved at step 5" in log, log[-3000:]
    finish(recipe)  # in one process
    found = []
    for a, b in zip(survival.metrics(recipe), survival.metrics(whole), strict=True):
        for key, value in b.items():
            if abs(a[key] - value) > 1e-5 * max(1, abs(value)):
                found.append(f"{key} of step {a['step']}: {a[key]} is not {value}")
    taken, wanted = ({line["step"] for line in survival.metrics(run)} for run in (recipe, whole))
    lost = len(taken ^ wanted)
    said = "1 of 2 processes asked to stop, both saved at that step; 1 process went on to 1e-5"
    report("SIGTERM to one rank", said, found, 1, lost, samples_of(whole, lost))


def launched(recipe: survival.Recipe, what: str) -> str:
    """Run a recipe in two processes; `kill`: the second dies in step 5, `term`: the second alone gets a SIGTERM."""
    file = recipe.folder.parent / f"{recipe.folder.name}.yaml"
    file.write_text(survival.dump_recipe(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, __file__, "--as-rank", what, str(file)], env=environment, capture_output=True, text=True, timeout=300
    )
    log = " ".join((done.stdout + done.stderr).split())
    assert (done.returncode == 0) == (what == "none"), log[-4000:]
    return log


def as_rank(what: str, file: str) -> int:
    """Be one of the two processes that `launched` starts."""
    kind = {"kill": signal.SIGKILL, "term": signal.SIGTERM}.get(what)
    if kind and os.environ["RANK"] == "1":
        at_step(5, lambda: os.kill(os.getpid(), kind))()
    return survival.main(["train", file, "--resume"])


def main() -> int:
    """Try the kinds that are asked for; 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--kills", type=int, default=36)
    parser.add_argument("--signals", type=int, default=8)
    parser.add_argument("--flips", type=int, default=10)
    parser.add_argument("--shards", type=int, default=4, help="of each harm")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--as-rank", default=None)
    options = parser.parse_args()
    if options.as_rank:
        return as_rank(options.as_rank, options.kinds[0])
    torch.set_num_threads(1)
    report, counted = Report(), {"signals": signals, "flips": flips, "shards": broken_shards}
    with tempfile.TemporaryDirectory() as name:
        for kind in options.kinds:
            folder = Path(name) / kind
            if kind == "kills":
                kills(folder, options.recipes, options.kills, options.seed, report)
            elif kind in counted:
                counted[kind](folder, getattr(options, kind), options.seed, report)
            else:
                folder.mkdir(parents=True)
                others = {"disk": disk, "read-only": read_only, "worker": worker}
                (others | {"ranks": ranks, "remote": failing_remote})[kind](folder, report)
    report.print_table()
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
