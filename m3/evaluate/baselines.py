"""What can be said about a signal without a model: means, medians, most frequent classes, visible neighbours.

Letters: B batch, N tokens of a modality, P values per token, C channels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m3.errors import M3Error
from m3.model import M3Model
from m3.plugins import Modality, Signal
from m3.types import Batch, Tokens, take


@dataclass(frozen=True)
class Average:
    """What is best to say about a modality without looking.

    Attributes:
        place: (N, P) token values, each place for itself.
        overall: (P,) token values, one per channel, or one class, for all places.
    """

    place: Tensor
    overall: Tensor


def known_values(model: M3Model, batch: Batch, name: str) -> Tensor:
    """Return the token values (B, N, P) of a modality, unknown (NaN or -1) where no token exists."""
    part = model.tokenise(batch)[name]
    if part.is_valid is None:
        return part.values
    unknown = torch.nan if part.values.is_floating_point() else -1
    return part.values.masked_fill(~part.is_valid.unsqueeze(-1), unknown)


def average(batches: list[Tensor], signal: Signal, modality: Modality) -> Average:
    """Average token values (B, N, P) that hold `signal`; batches may be of different N."""
    length = max(values.shape[1] for values in batches)
    unknown = torch.nan if signal.kind == "values" else -1
    values = torch.cat([F.pad(x, (0, 0, 0, length - x.shape[1]), value=unknown) for x in batches])
    if signal.kind == "classes":
        counts = torch.zeros(*values.shape[1:], signal.classes + 1, device=values.device)
        for sample in values:  # one by one: the counts of a whole vocabulary are large
            counts += F.one_hot(sample + 1, signal.classes + 1)
        counts = counts[..., 1:]
        return Average(counts.argmax(-1), counts.sum((0, 1)).argmax(-1).expand(values.shape[-1]))
    middle = (lambda x: x.nanmedian(0).values) if modality.centre == "median" else (lambda x: x.nanmean(0))
    channels = signal.channels - 4 if signal.is_boxed else signal.channels  # the box is the token's position
    if signal.channel_axis == 1:  # (channel, position) within a token
        overall = middle(values.unflatten(-1, (channels, -1)).movedim(2, -1).reshape(-1, channels))
        overall = overall.repeat_interleave(values.shape[-1] // channels)
    else:
        overall = middle(values.reshape(-1, channels)).repeat(values.shape[-1] // channels)
    return Average(middle(values).nan_to_num(0.0), overall.nan_to_num(0.0))


def constant(average: Average, by_position: bool, tokens: Tokens) -> Tensor:
    """Return the best token values (B, N, P) that are the same for all samples: everywhere, or place by place."""
    batch, count = tokens.values.shape[:2]
    if not by_position:
        return average.overall.expand(batch, count, -1)
    guess = average.place
    if len(guess) < count:  # longer than any that was averaged: the last place's
        guess = torch.cat([guess, guess[-1:].expand(count - len(guess), -1)])
    return guess[:count].expand(batch, -1, -1)


def neighbours(signal: Signal, tokens: Tokens, is_visible: Tensor) -> Tensor:
    """Predict each token as the mean, per channel, of the visible tokens next to it (diagonals included): (B, N, P).

    A token without a visible neighbour gets the mean of all visible tokens of its sample, or 0, the mean of
    the data, if there are none.
    """
    if signal.kind != "values":
        raise M3Error("baseline `neighbours` averages values, but the target holds classes; use `constant`.")
    colour = tokens.values.nan_to_num(0.0).unflatten(-1, (signal.channels, -1)).mean(-1)  # (B, N, C)
    seen = is_visible.float()
    steps = (tokens.positions[0].unsqueeze(1) - tokens.positions[0].unsqueeze(0)).abs()
    is_near = (steps < 1.5).all(-1).float()  # (N, N)
    near = torch.einsum("nm,bm,bmc->bnc", is_near, seen, colour)
    near_count = torch.einsum("nm,bm->bn", is_near, seen).unsqueeze(-1)
    everywhere = (colour * seen.unsqueeze(-1)).sum(1, keepdim=True) / seen.sum(1).clamp(min=1)[:, None, None]
    guess = torch.where(near_count > 0, near / near_count.clamp(min=1), everywhere)
    return guess.unsqueeze(-1).expand(-1, -1, -1, tokens.values.shape[-1] // signal.channels).flatten(2)


def nearest_visible(tokens: Tokens, is_visible: Tensor) -> Tensor:
    """Find the visible token nearest to each token: (B, N) int64, the first of equally near ones.

    Distances are straight lines through the coordinates, so through space and time for tubes, in tokens along each
    axis. In a sample without visible tokens it is the first token.
    """
    found = []
    positions = tokens.positions.expand(len(is_visible), -1, -1)
    for place, seen in zip(positions, is_visible, strict=True):  # one by one: N x N distances are many
        distance = (place.unsqueeze(1) - place).square().sum(-1)
        found.append(distance.masked_fill(~seen, torch.inf).argmin(1))
    return torch.stack(found)


def repeated(tokens: Tokens, values: Tensor, is_visible: Tensor) -> Tensor:
    """Predict each token as the nearest visible one: values (B, N, P) -> (B, N, P); 0 where that one is unknown."""
    there = is_visible.any(1)[:, None, None]
    return take(values.nan_to_num(0.0), nearest_visible(tokens, is_visible)) * there
