"""Runs that are killed, asked to stop, or lose a part of themselves go on as if nothing had been."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from m3.errors import M3Error
from m3.preemption import SIGNALS, Preempted, Preemption, explained
from m3.recipe import load_recipe
from m3.train import train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(script: str, *arguments: str) -> str:
    """Run one of the scripts of this folder; a process of its own, because it forks others."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_a_few_kills_and_a_signal_lose_nothing() -> None:
    printed = run("kills.py", "kills", "signals", "--recipes", "mae_tiny", "--kills", "2", "--signals", "1")
    assert printed.count("0 differences") == 3
    assert "SIGTERM and SIGUSR1, each saved at its step and exit code 75; 0 differences" in printed


@pytest.mark.slow
def test_many_kills_and_every_fault_lose_nothing() -> None:
    printed = run("kills.py")
    lines = printed.splitlines()
    assert sum(int(line.split()[1]) for line in lines if line.startswith("kills:")) >= 30
    assert all("0 differences" in line for line in lines)


@pytest.mark.slow
def test_two_thousand_steps_leave_memory_files_and_processes_flat() -> None:
    assert run("memory.py").count("per 1,000 steps") == 3


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


def test_training_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    from m3.check import shrink

    recipe, caught = shrink(load_recipe("mae_tiny", ["train.threads=1"]), tmp_path / "run"), []

    def work() -> None:
        try:
            caught.append(train(recipe, is_shown=False))
        except BaseException as error:
            caught.append(error)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
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
