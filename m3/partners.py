"""Mismatched pairs: some samples borrow one of their modalities from another sample of the batch.

Partners are drawn within fixed groups of neighbours in the order of the run, so that they do not depend on how the
batch is cut into micro-batches and processes.

Letters: B batch, G samples of a group.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from m3.errors import M3Error, nearest
from m3.plugins import Strict, View
from m3.random import Draws
from m3.types import Partners, Tokens


class Swap(Strict):
    """What a view mismatches.

    Attributes:
        of: the modality that is borrowed.
        group: G, samples among which it may be; the micro-batch must be a multiple of it.
        share: probability that a sample borrows.
        by: `random`, or the name of an objective of type `contrast`, whose similarities make a likely partner one that
            is hard to tell from the right one (Li et al. 2021, ALBEF, section 3.2).
    """

    of: str
    group: int = Field(default=4, ge=2)
    share: float = Field(default=0.5, gt=0, le=1)
    by: str = "random"


def swap_of(view: View) -> Swap | None:
    """Return how samples of a view borrow from others; None: they don't."""
    return Swap(**json.loads(view.swap)) if view.swap else None


def check_swap(view: View, able: list[str]) -> None:
    """Raise M3Error for a view whose mismatches can't be drawn; `able` names the objectives that know similarities."""
    swap = swap_of(view)
    if swap is None:
        return
    if swap.of not in view.modalities:
        raise M3Error(f"`{swap.of}` can't be swapped in a view of {', '.join(view.modalities)}; name one of them.")
    if swap.by != "random" and swap.by not in able:
        raise M3Error(
            f"swap.by: `{swap.by}` is no objective of type `contrast`; write `random` or add one."
            f"{nearest(swap.by, able)}"
        )


def draw_partners(swap: Swap, tokens: dict[str, Tokens], draws: Draws, similarity: Tensor | None = None) -> Partners:
    """Draw who borrows from whom.

    Args:
        swap: the settings.
        tokens: of the view, before anything is swapped.
        draws: of the batch.
        similarity: (B, B) logits, row: who borrows; None: all of a group are equally likely.

    Raises:
        M3Error: the batch is no multiple of the group.
    """
    batch = len(draws.keys)
    if batch % swap.group:
        raise M3Error(
            f"{batch} samples can't be cut into groups of {swap.group} for mismatched pairs; make the micro-batch "
            f"(train.batch_size, or train.micro_batch) a multiple of {swap.group}, or change `group`."
        )
    rows = torch.arange(batch, device=draws.keys.device)
    first = rows - rows % swap.group
    neighbours = first.unsqueeze(1) + torch.arange(swap.group, device=rows.device)  # (B, G)
    chance = draws.uniform("swap/partner", swap.group).clamp(min=2.0**-25)
    lot = -(-chance.log()).log()  # Gumbel's: the largest of logits + lot is drawn with softmax's probabilities
    if similarity is not None:
        lot = lot + similarity.float().gather(1, neighbours)
    there = _there(tokens[swap.of], batch, rows.device)
    lot = lot.masked_fill((neighbours == rows.unsqueeze(1)) | ~there[neighbours], -torch.inf)
    other = first + lot.argmax(1)
    is_swapped = draws.uniform("swap/is", 1).squeeze(1) < swap.share
    index = torch.where(is_swapped, other, rows)
    is_pair = there[index] & ~(is_swapped & (index == rows))
    for name, part in tokens.items():
        if name != swap.of:
            is_pair = is_pair & _there(part, batch, rows.device)
    return Partners(swap.of, index, is_swapped, is_pair)


def swapped(tokens: dict[str, Tokens], partners: Partners) -> dict[str, Tokens]:
    """Return tokens with the partner's in the place of the borrowed modality."""
    own, index = tokens[partners.of], partners.index
    positions = own.positions if len(own.positions) == 1 else own.positions[index]
    is_valid = None if own.is_valid is None else own.is_valid[index]
    group = None if own.group is None else own.group[index]
    lent = replace(own, values=own.values[index], positions=positions, is_valid=is_valid, group=group)
    return {**tokens, partners.of: lent}


def _there(part: Tokens, batch: int, device: torch.device) -> Tensor:
    """Return (B,) bool, True where a sample has a modality."""
    return torch.ones(batch, dtype=torch.bool, device=device) if part.is_valid is None else part.is_valid.any(1)
