"""Runs that are killed, asked to stop, or lose a part of themselves go on as if nothing had been."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from m3.errors import M3Error
from m3.preemption import SIGNALS, Preempted, Preemption, explained
from m3.recipe import load_recipe
from m3.train import train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(script: str, *arguments: str, within: float) -> str:
    """Run one of the scripts of this folder in a process of its own, because it forks others; all end in time."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", str(HERE / script), *arguments]
    with tempfile.TemporaryFile("w+") as output:  # not a pipe, which its children would keep open
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            code = child.wait(within)
        except subprocess.TimeoutExpired:
            code = f"{script} did not end within {within} s"
            os.killpg(child.pid, signal.SIGKILL)  # its children too
            child.wait(30)
        output.seek(0)
        printed = output.read()
    print(printed)
    assert code == 0, f"{code}: {printed[-4000:]}"
    return printed


def table(printed: str) -> dict[str, list[int]]:
    """Return case -> tried, differences, lost steps, lost samples."""
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][2:]
    return {row[0]: [int(number) for number in row[1:]] for row in rows}


def test_a_few_kills_a_signal_and_broken_shards_lose_nothing() -> None:
    few = ["--recipes", "mae_tiny", "--kills", "2", "--signals", "1", "--shards", "1"]
    printed = run("kills.py", "kills", "signals", "shards", "remote", *few, within=1800)
    found = table(printed)
    assert [name.split(" (")[0] for name in found] == [
        "kill -9, mae_tiny", "SIGTERM, SIGUSR1", "second signal", "shards: missing", "shards: truncated",
        "shards: flipped", "failing remote",
    ]  # fmt: skip
    assert all(row[0] >= 1 and row[1:] == [0, 0, 0] for row in found.values())
    assert "SIGTERM and SIGUSR1, each saved at its step and exit code 75; 0 differences" in printed


def test_a_run_folder_that_is_read_only_for_a_while_loses_nothing() -> None:
    printed = run("kills.py", "read-only", within=1800)
    if "a tmpfs can't be mounted here" in printed:
        pytest.skip("only the superuser may mount")
    assert table(printed) == {"read-only folder": [2, 0, 0, 0]}


@pytest.mark.slow
def test_many_kills_and_every_fault_lose_nothing() -> None:
    found = table(run("kills.py", within=7200))
    assert sum(row[0] for name, row in found.items() if name.startswith("kill -9")) >= 30
    assert len(found) >= 14
    assert all(row[1:] == [0, 0, 0] for row in found.values())


@pytest.mark.slow
def test_two_thousand_steps_leave_memory_files_and_processes_flat() -> None:
    assert run("memory.py", within=3600).count("per 1,000 steps") == 3


# -- signals --------------------------------------------------------------------------------------------


def test_the_first_signal_is_noted_and_the_second_left_to_the_system_and_handlers_come_back() -> None:
    def mine(*_: object) -> None:
        raise AssertionError

    before = {number: signal.signal(number, mine) for number in SIGNALS}
    try:
        with Preemption() as asked:
            assert not asked.is_asked
            os.kill(os.getpid(), signal.SIGUSR1)
            assert asked.is_asked
            assert all(signal.getsignal(number) == signal.SIG_DFL for number in SIGNALS)
        assert all(signal.getsignal(number) is mine for number in SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_worker_ends_with_the_run_that_was_killed_while_it_handed_over_a_batch(tmp_path: Path) -> None:
    script = tmp_path / "loads.py"
    script.write_text(
        """
import os, signal, time
from torch.utils.data import DataLoader
from m3.preemption import prepare_worker

class Large:
    def __len__(self): return 9
    def __getitem__(self, index): return "x" * 1_000_000  # more than a pipe holds

if __name__ == "__main__":
    batches = iter(DataLoader(Large(), collate_fn=list, num_workers=2, worker_init_fn=prepare_worker))
    next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    with open(tmp_path / "said", "w") as said:  # not a pipe, which the workers would hold open
        code = subprocess.run([sys.executable, script], stdout=said, stderr=subprocess.DEVNULL).returncode
    numbers = [int(number) for number in (tmp_path / "said").read_text().split()]
    assert len(numbers) == 2
    assert code == -signal.SIGKILL
    workers = [psutil.Process(number) for number in numbers if psutil.pid_exists(number)]
    assert psutil.wait_procs(workers, timeout=20)[1] == [], "they wait for ever to hand over"


def test_training_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    from m3.check import shrink

    recipe, caught = shrink(load_recipe("mae_tiny", ["train.threads=1"]), tmp_path / "run"), []

    def work() -> None:
        try:
            caught.append(train(recipe, is_shown=False))
        except BaseException as error:
            caught.append(error)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(300)
    assert not thread.is_alive(), "six steps in a thread did not end within 300 s"
    assert isinstance(caught[0], list)
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_called_from_python_a_signal_is_an_exception_of_its_own(tmp_path: Path, monkeypatch) -> None:
    from m3 import train as trainer
    from m3.check import shrink

    rates = trainer.set_rates

    def asking(optimizer, step: int, *rest) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        rates(optimizer, step, *rest)

    monkeypatch.setattr(trainer, "set_rates", asking)
    recipe = shrink(load_recipe("mae_tiny", ["train.threads=1"]), tmp_path / "run")
    with pytest.raises(Preempted, match="mae_tiny was asked to stop and is saved at step 2; go on with --resume"):
        train(recipe, is_shown=False)


# -- what has died --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "world", "sentence"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            "1",
            r"a process that loads data has died \(DataLoader worker \(pid 7\) is killed by signal: Killed. ?\)",
        ),
        (
            "DataLoader timed out after 3 seconds",
            "1",
            r"no data came for as long as train.timeout allows \(3 sec",
        ),
        ("[x.cc:1]\nConnection closed by peer [::1]:9", "2", r"another process of the run has died or hangs \(Conn"),
        ("Connection closed by peer", "1", None),
        ("shapes don't match", "2", None),
    ],
)
def test_a_death_is_explained_and_other_errors_are_left(monkeypatch, message: str, world: str, sentence) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)

    @explained
    def fails() -> None:
        raise RuntimeError(message)

    with pytest.raises(M3Error if sentence else RuntimeError, match=sentence) as caught:
        fails()
    assert isinstance(caught.value, M3Error) == bool(sentence)
