"""Reading that may fail or hang: tried again after growing waits, then given up for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import NonNegativeInt, PositiveFloat

from m3.errors import M3Error
from m3.plugins import Strict

T = TypeVar("T")

PERMANENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, M3Error)
"""What no further try changes."""


class Patience(Strict):
    """How long a place is asked for data; in `data.options` of source `shards`.

    Attributes:
        retries: further tries after one that failed or took too long.
        wait: seconds before the first of them; twice as long before each following one.
        timeout: seconds that a try of an address (not a local file) may take; null: as long as it takes.
        pause: seconds for which a place that failed in all tries is not asked again: its samples are skipped at once.
    """

    retries: NonNegativeInt = 3
    wait: PositiveFloat = 0.5
    timeout: PositiveFloat | None = 60.0
    pause: PositiveFloat = 60.0


class Remote:
    """Reads with patience; every process has its own memory of which places failed."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.failed: dict[str, tuple[float, str]] = {}

    def read(self, address: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, which reads from an address.

        Raises:
            M3Error: every try failed, now or a short while ago.
            OSError: the file is not there, or may not be read.
        """
        since, reason = self.failed.get(address, (float("-inf"), ""))
        if time.monotonic() - since < self.patience.pause:
            raise M3Error(f"{address} can't be read: {reason}.")
        limit = self.patience.timeout if "://" in address else None
        for turn in range(self.patience.retries + 1):
            try:
                return work() if limit is None else _within(limit, work)
            except PERMANENT:
                raise
            except Exception as error:  # whatever a store raises: tried again, then told
                reason = f"{self.patience.retries + 1} tries failed, the last with {type(error).__name__} ({error})"
            if turn < self.patience.retries:
                time.sleep(self.patience.wait * 2**turn)
        self.failed[address] = (time.monotonic(), reason)
        raise M3Error(f"{address} can't be read: {reason}.")


def _within(limit: float, work: Callable[[], T]) -> T:
    """Return what `work` returns; a thread that is still at it after `limit` seconds is left behind."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((work(), None))
        except BaseException as error:  # handed to the thread that waits
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if not found:
        raise TimeoutError(f"no answer in {limit:g} seconds")
    value, error = found[0]
    if error is not None:
        raise error
    return value
