"""The contract of tokenizers.

Letters: B batch, N tokens, P values per token, A position axes, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from m3.parts import build_spec
from m3.plugins import Signal, Tokenizer
from m3.testing.claims import attempt, claim, copied, name_of, near, noise, same, seeded, without_gradient
from m3.types import Tokens

WIDTH = 48
"""D of the parts that the kit builds: room for sin-cos and rotary positions over three axes with two heads."""


def check_tokenizer(
    tokenizer: dict[str, Any],
    signal: Signal,
    batch: Tensor,
    times: Tensor | None = None,
    tolerance: float | None = None,
) -> Tokenizer:
    """Check a tokenizer on a batch of normalised signals and return it.

    Args:
        tokenizer: its settings, as in a recipe.
        signal: what the modality hands over (`Modality.signal`).
        batch: at least two signals (B, ...), as `Modality.normalise` returns them.
        times: (B, T) seconds, for modalities that know them.
        tolerance: largest difference between a signal and what `detokenize` makes of its tokens; None: 0, or
            any where the tokenizer says `is_lossless = False`.

    Raises:
        AssertionError: a contract is not kept; the sentence names it and the remedy.
    """
    where = f"tokenizer `{name_of(tokenizer)}`"
    claim(len(batch) > 1, f"{where}: the kit needs at least two signals; give it more samples.")
    part = build_tokenizer(tokenizer, signal)
    _check_facts(part, where)
    before = batch.clone()
    tokens = part.tokenize(batch, times)
    claim(same(batch, before), f"{where}: tokenize changes the signal it is given; work on a copy.")
    _check_tokens(part, tokens, batch, where)
    if times is None:
        _check_grid(part, tokens, batch, where)
    again = part.tokenize(batch, times)
    claim(_equal(tokens, again), f"{where}: tokenize gives other tokens the second time; it must not draw at random.")
    for row in range(len(batch)):
        alone = part.tokenize(batch[row : row + 1], None if times is None else times[row : row + 1])
        claim(
            _equal(rows_of(tokens, slice(row, row + 1)), alone, is_exact=False),
            f"{where}: sample {row} alone has other tokens than in a batch of {len(batch)}; each sample must be "
            f"cut by itself.",
        )
    _check_round_trip(part, tokens, batch, tolerance, where)
    holed = with_gap(signal, batch) if signal.has_gaps else batch
    _check_embedding(part, part.tokenize(holed, times), tokenizer, where)
    _check_decode(part, tokens, where)
    _check_other_signals(part, batch, tolerance, where)
    other = signal._replace(kind="classes" if signal.kind == "values" else "values", classes=5)
    attempt(lambda: build_tokenizer(tokenizer, other), where, f"being built for a signal of {other.kind}")
    return part


def build_tokenizer(tokenizer: dict[str, Any], signal: Signal) -> Tokenizer:
    """Make a tokenizer of the kit's width with weights that are always the same."""
    found, spec = build_spec("tokenizers", tokenizer, "tokenizer")
    part = seeded(lambda: found(spec, signal, WIDTH))
    with torch.no_grad():  # the model initialises what a tokenizer leaves empty
        for number, parameter in enumerate(part.parameters()):
            if parameter.requires_grad:
                parameter.copy_(noise(parameter.shape) * 0.1 + 0.01 * number)
    return part


def spread(part: Tokenizer, is_token: Tensor, tokens: Tokens, size: tuple[int, ...]) -> Tensor:
    """Return (B, *size) bool per position from (B, N) bool per token, as `M3Model.spread` does."""
    values = is_token.unsqueeze(-1).expand(tokens.values.shape)
    return part.signal.without_channels(part.detokenize(values, tokens.positions, size))


def with_gap(signal: Signal, batch: Tensor) -> Tensor:
    """Return the batch with the first position of its first signal unknown: NaN, or class -1."""
    batch = batch.clone()
    if signal.kind == "classes":
        batch[0].view(-1)[0] = -1
    elif signal.channel_axis == 1:
        batch[0].view(len(batch[0]), -1)[:, 0] = torch.nan
    else:
        batch[0].view(-1, batch.shape[-1])[0] = torch.nan
    return batch


def _check_facts(part: Tokenizer, where: str) -> None:
    for name in ("value_width", "output_width", "axes"):
        value = getattr(part, name, None)
        claim(
            isinstance(value, int) and value > 0,
            f"{where}: `{name}` must be a positive whole number, got {value!r}; set it in __init__.",
        )
    claim(
        len(part.reference) in (0, part.axes) and all(isinstance(n, int) and n > 0 for n in part.reference),
        f"{where}: `reference` must count the tokens along each of the {part.axes} axes (or be empty for free "
        f"coordinates), got {part.reference}; correct it.",
    )


def _check_tokens(part: Tokenizer, tokens: Tokens, batch: Tensor, where: str) -> None:
    """Shapes, types and finiteness of everything in `Tokens`."""
    values, positions, is_valid = tokens.values, tokens.positions, tokens.is_valid
    claim(
        values.ndim == 3 and len(values) == len(batch) and values.shape[2] == part.value_width,
        f"{where}: token values must have shape (samples {len(batch)}, tokens, value_width {part.value_width}), got "
        f"{tuple(values.shape)}; correct tokenize or `value_width`.",
    )
    claim(
        values.is_floating_point() or values.dtype == torch.int64,
        f"{where}: token values must be floats or int64 ids, got {values.dtype}; convert them in tokenize.",
    )
    claim(
        positions.ndim == 3 and len(positions) in (1, len(batch)) and positions.shape[1:] == (tokens.count, part.axes),
        f"{where}: positions must have shape (1 or {len(batch)}, tokens {tokens.count}, axes {part.axes}), got "
        f"{tuple(positions.shape)}; correct tokenize or `axes`.",
    )
    claim(
        positions.is_floating_point() and bool(positions.isfinite().all()),
        f"{where}: positions must be finite floats, also those of tokens that don't exist; fill them with 0.",
    )
    claim(
        is_valid is None or (is_valid.dtype == torch.bool and is_valid.shape == values.shape[:2]),
        f"{where}: is_valid must be bool of shape {tuple(values.shape[:2])}, True for tokens that exist; correct it.",
    )
    there = values if is_valid is None else values[is_valid]
    is_known = there.isfinite() if there.is_floating_point() else there >= 0
    is_gap = there.isnan() if there.is_floating_point() else there == -1
    claim(
        bool((is_known | is_gap if part.signal.has_gaps else is_known).all()),
        f"{where}: tokens that exist hold NaN, infinite or negative ids; only signals with `has_gaps` may have "
        f"unknown values, as NaN or -1.",
    )


def _check_grid(part: Tokenizer, tokens: Tokens, batch: Tensor, where: str) -> None:
    """At the size the model is built for, coordinates count the tokens of the reference grid."""
    if not part.reference or part.signal.extent(batch) != part.signal.size:
        return
    count = math.prod(part.reference)
    claim(
        tokens.count == count,
        f"{where}: a usual signal has {tokens.count} tokens, but `reference` {part.reference} says {count}; "
        f"correct one of them.",
    )
    wanted = torch.cartesian_prod(*[torch.arange(n) for n in part.reference]).view(count, -1).float()
    for row in tokens.positions:
        order = sorted(range(count), key=lambda i, row=row: row[i].tolist())
        claim(
            near(row[order], wanted, 1e-3),
            f"{where}: at the usual size the coordinates must be 0, 1, 2 ... along each axis of `reference` "
            f"{part.reference}; use `m3.positions.grid`.",
        )


def _check_round_trip(part: Tokenizer, tokens: Tokens, batch: Tensor, tolerance: float | None, where: str) -> None:
    size = part.signal.extent(batch)
    back = part.detokenize(tokens.values, tokens.positions, size)
    is_there = tokens.values.new_ones(tokens.values.shape[:2], dtype=torch.bool)
    known = spread(part, is_there if tokens.is_valid is None else tokens.is_valid, tokens, size)
    claim(
        known.dtype == torch.bool and known.shape == part.signal.without_channels(back).shape,
        f"{where}: detokenize must also put token values of True and False together, to mark what was seen, got "
        f"{known.dtype} of shape {tuple(known.shape)}; don't convert or add to values that are no floats.",
    )
    if tolerance is None and not part.is_lossless:
        claim(
            len(back) == len(batch), f"{where}: detokenize must return a signal for each sample; keep the batch axis."
        )
        return
    claim(
        back.shape == batch.shape,
        f"{where}: detokenize must return the shape {tuple(batch.shape)} of the signal, got {tuple(back.shape)}; "
        f"correct it, or say `is_lossless = False`.",
    )
    axis = part.signal.channel_axis if part.signal.kind == "values" else None
    is_known = known if axis is None else known.unsqueeze(axis)
    difference = (back.double() - batch.double()).abs().masked_fill(~is_known, 0)
    is_gap = batch.isnan() & back.isnan()
    worst = float(difference.masked_fill(is_gap, 0).max())
    claim(
        worst <= (tolerance or 0.0),
        f"{where}: detokenize(tokenize(x)) differs from x by up to {worst:.3g}, more than {tolerance or 0.0:g}; "
        f"correct it, give the kit a `tolerance`, or say `is_lossless = False`.",
    )


def _check_embedding(part: Tokenizer, tokens: Tokens, settings: dict[str, Any], where: str) -> None:
    values = tokens.values if tokens.is_valid is None else tokens.values.masked_fill(~tokens.is_valid.unsqueeze(-1), 0)
    x = part.embed(values)
    claim(
        x.shape == (*values.shape[:2], WIDTH) and x.is_floating_point() and bool(x.isfinite().all()),
        f"{where}: embed must turn values {tuple(values.shape)} into finite floats (..., {WIDTH}), got {x.dtype} "
        f"{tuple(x.shape)}; unknown values (NaN, -1) must enter as numbers.",
    )
    kept = torch.arange(0, tokens.count, 2).flip(0)
    claim(
        near(part.embed(values[:, kept]), x[:, kept]),
        f"{where}: a token's embedding depends on the other tokens it is embedded with; embed sees only the visible "
        f"ones, so each must stand alone.",
    )
    lacking = without_gradient(part, (part.embed(values) * noise(x.shape)).sum())
    claim(
        not lacking,
        f"{where}: the parameters {', '.join(lacking)} get no gradient through embed; remove or use them, or freeze "
        f"them with requires_grad=False.",
    )
    again = build_tokenizer(settings, part.signal)
    again.load_state_dict(part.state_dict())
    for twin in (copied(part, where), again):
        claim(
            same(twin.embed(values), x),
            f"{where}: a copy (pickled, or loaded from state_dict) embeds otherwise; keep all of its state in "
            f"parameters and buffers.",
        )


def _check_decode(part: Tokenizer, tokens: Tokens, where: str) -> None:
    output = noise((*tokens.values.shape[:2], part.output_width))
    values = part.decode(output)
    claim(
        values.shape == tokens.values.shape and values.is_floating_point() == tokens.values.is_floating_point(),
        f"{where}: decode must turn (..., output_width {part.output_width}) into token values (..., "
        f"{part.value_width}) of their kind, got {values.dtype} {tuple(values.shape)}; correct it.",
    )


def _check_other_signals(part: Tokenizer, batch: Tensor, tolerance: float | None, where: str) -> None:
    """Odd and larger sizes are cut or refused with a sentence; a copy of the tokenizer does the same."""
    axis = 1 if part.signal.kind == "values" and part.signal.channel_axis == -1 else batch.ndim - 1
    last = batch.narrow(axis, batch.shape[axis] - 1, 1)
    for what, signal in {
        "a signal longer by one": torch.cat([batch, last], axis),
        "a signal of twice the length": torch.cat([batch, batch], axis),
    }.items():
        tokens = attempt(lambda signal=signal: part.tokenize(signal), where, what)
        if tokens is not None:
            _check_tokens(part, tokens, signal, where)
            _check_round_trip(part, tokens, signal, tolerance, f"{where} with {what}")


def rows_of(tokens: Tokens, rows: slice) -> Tokens:
    """Return some samples of a batch of tokens."""
    positions = tokens.positions if len(tokens.positions) == 1 else tokens.positions[rows]
    is_valid = None if tokens.is_valid is None else tokens.is_valid[rows]
    group = None if tokens.group is None else tokens.group[rows]
    return Tokens(tokens.values[rows], positions, is_valid, group, tokens.counts)


def _equal(a: Tokens, b: Tokens, is_exact: bool = True) -> bool:
    """Compare valid tokens; a missing `is_valid` is the same as one that is True everywhere."""
    there = [
        x.values.new_ones(x.values.shape[:2], dtype=torch.bool) if x.is_valid is None else x.is_valid for x in (a, b)
    ]
    compare = same if is_exact else near
    if not same(*there) or a.values.dtype != b.values.dtype:
        return False
    return compare(a.values[there[0]], b.values[there[1]]) and compare(a.positions, b.positions)
