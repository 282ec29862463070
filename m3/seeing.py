"""What a run shows while it trains: its progress bar, how much of its batches is padding, pictures for trackers.

Letters: B batch, V visible tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as PILImage
from tqdm import tqdm

from m3.network import Prepared
from m3.processes import gather

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 120
"""Columns of the bar where no terminal says how many it has."""


def progress_bar(name: str, start: int, steps: int, is_shown: bool) -> tqdm:
    """Make the bar of a run; its time left counts evaluations and checkpoints as they come."""
    form = "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
    return tqdm(total=steps, initial=start, desc=name, bar_format=form, disable=not is_shown)


def show_line(bar: tqdm, line: dict[str, Any], losses: dict[str, float]) -> None:
    """Put a line of metrics behind the bar, as far as it fits into the terminal; the losses come last.

    Args:
        bar: of the run.
        line: of metrics.
        losses: the parts of the loss in it.
    """
    if bar.disable:
        return
    bar.postfix = None
    room = shutil.get_terminal_size((WIDTH, 24)).columns - len(str(bar)) - len(", ") - 1
    bar.set_postfix_str(text_of(line, losses, room))


def text_of(line: dict[str, Any], losses: dict[str, float], room: int) -> str:
    """Return speed, utilisation, waiting, padding and as many losses as fit into `room` letters."""
    forms = {
        "samples_per_second": "{:.4g}/s",
        "utilisation": "{:.0%} used",
        "data_wait": "wait {:.0%}",
        "padding": "pad {:.0%}",
    }
    pieces = [form.format(line[key]) for key, form in forms.items() if key in line]
    if line["skipped"]:
        pieces.append(f"unreadable {line['skipped']}")
    short = [name.rpartition("/")[2] for name in losses]
    names = short if len(set(short)) == len(short) else list(losses)
    parts = [f"{name} {value:.3f}" for name, value in zip(names, losses.values(), strict=True)]
    for count in range(len(parts), -1, -1):
        left = [f"+{len(parts) - count}"] if count < len(parts) else []
        text = ", ".join([*pieces, *parts[:count], *left])
        if len(text) <= room:
            return text
    return ""


@torch.no_grad()
def padding(prepared: Iterable[Prepared]) -> dict[str, float]:
    """Return which share of the tokens that the encoders are given does not exist, in the micro-batches of a step.

    Every process must call it; nothing is returned where no tokens are encoded (tokenizers that are trained).
    """
    plans = [plan for micro in prepared for plan in micro.plans.values()]
    if not plans:
        return {}
    given = [plan.packed_index() for plan in plans]
    counts = torch.tensor([[0, sum(index.numel() for index in given)]], device=given[0].device)
    for plan in plans:
        if plan.is_valid is not None:
            counts[0, 0] += (~plan.is_valid).sum()
    missing, total = gather({"tokens": counts})["tokens"].sum(0).tolist()
    return {"padding": missing / total}


def picture_of(drawn: Path | Figure) -> np.ndarray:
    """Return a PNG file or a figure as uint8 (H, W, 3)."""
    file: Path | BytesIO
    if isinstance(drawn, Path):
        file = drawn
    else:
        file = BytesIO()
        drawn.savefig(file, format="png")
    return np.asarray(PILImage.open(file).convert("RGB"))
