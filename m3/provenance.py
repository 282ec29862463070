"""How a run was started: `run.json` in its folder, one entry for each start (the first, and every --resume)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from m3 import __version__

FILE = "run.json"
PACKAGES = ("torch", "transformers", "accelerate", "timm", "open-clip-torch", "torchaudio", "numpy", "safetensors")


def note_start(run: Path, step: int, processes: int) -> None:
    """Append how, when and where this process was started to the run's `run.json`.

    No earlier start is lost: a new run has moved those of another one out of its folder before it calls this.

    Args:
        run: run folder, which exists.
        step: step that the run starts or continues at.
        processes: number of training processes.
    """
    starts = read_starts(run)
    starts.append(
        {
            "step": step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "folder": str(Path.cwd()),
            "m3": __version__,
            "revision": revision(),
            "python": platform.python_version(),
            "packages": {name: version for name in PACKAGES if (version := _version(name))},
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "hardware": hardware(),
            "processes": processes,
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
    )
    aside = run / f".{FILE}.partial"
    aside.write_text(json.dumps(starts, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, run / FILE)


def read_starts(run: Path) -> list[dict[str, Any]]:
    """Return the starts of a run, in order; none where nothing was noted."""
    file = run / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def is_running(run: Path) -> bool | None:
    """Return whether the process that was started last still lives; None on another host, where nobody can tell."""
    starts = read_starts(run)
    if not starts or starts[-1]["host"] != socket.gethostname():
        return None
    try:
        os.kill(starts[-1]["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives and is someone else's
        return True
    return True


def revision() -> str | None:
    """Return the git revision of this code, with `+` when files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():  # installed, or inside somebody else's repository
        return None
    try:
        head = _git(folder, "rev-parse", "HEAD")
        is_changed = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user
        return None
    return head + ("+" if is_changed else "")


def hardware() -> str:
    """Return the processors in a line."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{os.cpu_count()} CPU cores, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
