"""Where a model looks: what the class token attends to on held-out samples, and each modality to each other one.

Attention is worked out again from what goes into a block, by its own projections, norms, positions and masks; the fused
kernels that the model computes with never hold it.

Letters: H heads, N tokens of a modality, R prefix tokens, V tokens of the encoder, L = R + V, M modalities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3.evaluate.encodings import only
from m3.model import M3Model
from m3.types import Batch, Encoded, Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS = 4
"""Heads that are drawn one by one."""
LINES = 9
"""Pictures below each other, as far as one sample has no more."""
NUMBERED = 12
"""Most modalities whose matrix has its numbers written into it."""


@dataclass(frozen=True)
class Looked:
    """What one sample of a model shows of its attention.

    Attributes:
        pictures: modality -> the sample, uint8 (height, width, 3), and the attention (H, height, width) over it, in
            multiples of what each token would get if all got the same.
        paid: (M, M) attention that the tokens of each modality (row) pay to those of each (column), summed over queries
            and averaged over heads.
        counts: (M,) tokens of each.
    """

    pictures: dict[str, tuple[np.ndarray, np.ndarray]]
    paid: Tensor
    counts: Tensor


def attention_figures(model: M3Model, batches: Iterable[Batch]) -> dict[str, Figure]:
    """Return title -> picture of what the last block of each transformer attends to.

    Each transformer is shown all that it ever reads together. Where it has class tokens, their attention is drawn,
    elsewhere the mean over all tokens.

    Args:
        model: in evaluation mode.
        batches: of one sample each.
    """
    joint: dict[str, tuple[str, ...]] = {}
    for view in model.views:
        tower = model.tower_of[view.modalities[0]]
        joint[tower] = max(joint.get(tower, ()), view.modalities, key=len)
    batches, figures = list(batches) if joint else [], {}
    for tower, names in joint.items():
        groups = (*(["class token"] if _backbone(model, tower).spec.class_tokens else []), *names)
        shown = [look(model, tower, only(batch, names), groups) for batch in batches if names[0] in batch.signals]
        of = f" of {tower}" if tower else ""
        if any(one.pictures for one in shown):
            who = "the class token looks" if groups[0] not in names else "all tokens look on average"
            figures[f"Where {who} (last block{of})"] = _maps([one.pictures for one in shown if one.pictures])
        if len(names) > 1 and shown:
            paid, counts = (torch.stack(x).sum(0) for x in zip(*((one.paid, one.counts) for one in shown), strict=True))
            figures[f"What attends to what (last block{of})"] = _matrix(groups, paid, counts)
    return figures


@torch.no_grad()
def attention(model: M3Model, tower: str, batch: Batch, block: int = -1) -> tuple[Tensor, Encoded]:
    """Return how much each token takes of each in a block, (B, H, L, L), and what the encoder made of the batch.

    Each row adds up to 1. Padding gets nothing; what it takes itself means nothing.

    Args:
        model: in evaluation mode.
        tower: name of the transformer that reads the batch; empty for the backbone.
        batch: raw signals, all of which are shown.
        block: number of the block, counted from the end if negative.
    """
    part: Any = _backbone(model, tower).blocks[block].attention
    given: list[tuple[Any, ...]] = []
    handle = part.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    try:
        encoded = model.encode(batch)
    finally:
        handle.remove()
    return part.probabilities(*given[0]), encoded


def look(model: M3Model, tower: str, batch: Batch, groups: tuple[str, ...]) -> Looked:
    """Return what a batch of one sample shows; groups are `class token`, if there is one, and modalities."""
    weights, encoded = attention(model, tower, batch)
    prefix, plan = encoded.prefix_count, encoded.plan
    number = plan.packed_modality()[0]
    is_there = torch.ones_like(number, dtype=torch.bool) if plan.is_valid is None else plan.is_valid[0]
    weights = weights[0].float()
    order = torch.tensor([groups.index(name) for name in plan.visible], device=number.device)
    group = torch.cat([number.new_zeros(prefix), order[number]])
    is_member = F.one_hot(group, len(groups)).float()
    is_member[prefix:] *= is_there.unsqueeze(1)
    paid = torch.einsum("qg,qk,kj->gj", is_member, weights.mean(0), is_member)
    queries = weights[:, :prefix] if prefix else weights[:, is_there]
    row = queries.mean(1)[:, prefix:] * max(1, int(is_there.sum()))  # (H, V), 1 where all get the same
    pictures = {}
    for place, name in enumerate(plan.visible):
        is_own = (number == place) & is_there
        if is_own.any() and (drawn := _over(model, name, batch, row[:, is_own], plan.packed_index()[0][is_own])):
            pictures[name] = drawn
    return Looked(pictures, paid.cpu(), is_member.sum(0).cpu())


def _over(
    model: M3Model, name: str, batch: Batch, weights: Tensor, index: Tensor
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the picture of a modality and the attention (H, tokens) to its tokens at index, place by place.

    None: it is no picture, or several tokens share a place.
    """
    part, tokens = model.modalities[name], model.tokenise(batch)[name]
    signal = part.normalise(batch.signals[name])
    extent = part.signal.extent(signal)
    if not part.is_map or tokens.positions.shape[-1] != len(extent):
        return None
    everywhere = torch.zeros(len(weights), tokens.count, device=weights.device).index_copy_(1, index, weights)
    number = token_at(model, name, tokens, extent)
    if len(extent) == 3:  # of a video the middle frame
        middle = extent[0] // 2
        number, signal = number[middle], signal[:, :, middle : middle + 1]
    return part.show(signal[0], None), everywhere[:, number].cpu().numpy()


def token_at(model: M3Model, name: str, tokens: Tokens, size: tuple[int, ...]) -> Tensor:
    """Return the number of the token that holds each place of a signal of `size`, of tokens of one sample."""
    bits = torch.arange(max(1, (tokens.count - 1).bit_length()), device=tokens.values.device)
    number = torch.arange(tokens.count, device=bits.device)
    is_set = (number >> bits.unsqueeze(1)) % 2 == 1  # tokenizers lay out truths, whatever their tokens hold
    tokens = replace(tokens, values=tokens.values.expand(len(bits), -1, -1))
    laid = model.spread(name, is_set, tokens, size).long()
    return (laid << bits.view(-1, *[1] * len(size))).sum(0)


def _backbone(model: M3Model, tower: str) -> Any:
    return model.towers[tower] if tower else model.backbone


def _maps(samples: list[dict[str, tuple[np.ndarray, np.ndarray]]]) -> Figure:
    """Draw a line for each sample and modality: the picture, the mean over heads and single heads."""
    from matplotlib.figure import Figure

    samples = samples[: max(1, LINES // len(samples[0]))]
    lines = [(name, *drawn) for pictures in samples for name, drawn in pictures.items()]
    shown = min(HEADS, len(lines[0][2]))
    titles = ["seen", "mean of heads", *(f"head {number + 1}" for number in range(shown))]
    width = max(1.0, max(picture.shape[1] / picture.shape[0] for _, picture, _ in lines))
    side = min(1.3, 8 / len(titles) / width)
    figure = Figure(figsize=(side * width * len(titles) + 0.3, (side + 0.15) * len(lines) + 0.5), dpi=110)
    figure.set_layout_engine("constrained")
    figure.supxlabel("x: what a token gets, against all getting the same", fontsize=7)
    axes = figure.subplots(len(lines), len(titles), squeeze=False)
    for line, (name, picture, weights) in zip(axes, lines, strict=True):
        for axis, title, found in zip(line, titles, [None, weights.mean(0), *weights[:shown]], strict=True):
            if found is None:
                axis.imshow(picture, interpolation="nearest")
            else:
                extent = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
                axis.imshow(picture.mean(-1), cmap="gray", interpolation="nearest")
                axis.imshow(found, cmap="inferno", alpha=0.7, vmin=0, interpolation="nearest", extent=extent)
                axis.set_xlabel(f"at most {found.max():.1f} x", fontsize=7, labelpad=2)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if axis in axes[0]:
                axis.set_title(title, fontsize=8)
        line[0].set_ylabel(name, fontsize=8)
    return figure


def _matrix(groups: tuple[str, ...], paid: Tensor, counts: Tensor) -> Figure:
    """Draw the share of each row's attention that each column gets; below, its share of all tokens."""
    from matplotlib.figure import Figure

    is_there = counts > 0
    names = [name for name, there in zip(groups, is_there.tolist(), strict=True) if there]
    shares = (paid / counts.clamp(min=1).unsqueeze(1))[is_there][:, is_there]
    table = torch.cat([shares, (counts / counts.sum())[is_there].unsqueeze(0)]).numpy()
    side = 0.62 * len(names)
    figure = Figure(figsize=(side + 2.0, side + 1.6), layout="constrained", dpi=110)
    axis = figure.subplots()
    axis.imshow(table, cmap="Blues", vmin=0, vmax=max(0.5, float(table.max())))
    axis.axhline(len(names) - 0.5, color="0.3", linewidth=1.2)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names) + 1), [*names, "share of tokens"], fontsize=8)
    axis.set_xlabel("attended to", fontsize=8)
    axis.spines[:].set_visible(False)
    if len(names) <= NUMBERED:
        for (row, column), value in np.ndenumerate(table):
            colour = "white" if value > 0.6 * max(0.5, table.max()) else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    return figure
