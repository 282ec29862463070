"""How a run ends that can't go on: asked to by a signal, or because something else has died."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from m3.errors import M3Error

P = ParamSpec("P")
R = TypeVar("R")

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again with --resume."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

PEER_DIED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "timed out")
"""What gloo and NCCL say when another process no longer answers."""


class Preempted(Exception):
    """A run has saved itself and ends, because it was asked to."""


class Preemption:
    """While it is open, the first SIGTERM or SIGUSR1 is only noted; the second ends the process at once.

    Signals reach Python's main thread only; a run in another thread can't be asked to stop, and leaves them alone.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
        _let_the_next_one_kill(number, frame)


def prepare_worker(_: int) -> None:
    """Let a loader's worker outlive the first signal, which schedulers send to all processes of a job, but not the run.

    A worker that is handing over a batch when the run is killed would wait for ever, and keep its memory.
    """
    for number in SIGNALS:
        signal.signal(number, _let_the_next_one_kill)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:  # another one adopts orphans
        time.sleep(1)
    os._exit(1)


def _let_the_next_one_kill(_: int, __: FrameType | None) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def explained(run: Callable[P, R]) -> Callable[P, R]:
    """Say in one sentence why a run ends when a data worker or another process has died."""

    @functools.wraps(run)
    def explaining(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return run(*args, **kwargs)
        except RuntimeError as error:  # torch has no narrower class for any of these
            cause = _cause(str(error))
            if cause is None:
                raise
            raise M3Error(cause) from error

    return explaining


def _cause(message: str) -> str | None:
    last = message.strip().splitlines()[-1] if message.strip() else ""
    if message.startswith("DataLoader timed out"):
        return (
            f"no data came for as long as train.timeout allows ({message.split('after ')[-1].strip()}); look for a "
            f"source that hangs, or raise train.timeout."
        )
    if "DataLoader worker" in message:
        return (
            f"a process that loads data has died ({last}); memory often ran out: lower data.workers or "
            f"train.micro_batch, then go on with --resume."
        )
    if os.environ.get("WORLD_SIZE", "1") != "1" and any(sign in message for sign in PEER_DIED):
        return (
            f"process {os.environ.get('RANK', '?')} ends because another process of the run has died or hangs "
            f"({last}); the cause stands in that one's output. Go on with --resume."
        )
    return None
