"""Which tensors of another library are which of ours: rows of a table, each read and written back.

A row knows both ways, so a table that reads a format also writes it. Every tensor of both sides must stand in a row
or be left out with a reason; whatever remains is refused by name.

Letters: D width, P values of a patch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from m3.errors import M3Error

Change = Callable[[list[Tensor]], list[Tensor]]


def _same(x: list[Tensor]) -> list[Tensor]:
    return x


@dataclass(frozen=True)
class Row:
    """Tensors of theirs that are tensors of ours.

    Attributes:
        theirs: their names; none: we have what they leave out.
        ours: our names; none: they have what we compute.
        read: theirs -> ours.
        write: ours -> theirs; raises M3Error where theirs can't say it.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Change = _same
    write: Change = _same


def same(theirs: str, ours: str, parts: Iterable[str] = ("weight", "bias")) -> list[Row]:
    """Rows of a layer whose tensors are the same on both sides."""
    return [Row((f"{theirs}.{part}",), (f"{ours}.{part}",)) for part in parts]


def one(theirs: str, ours: str) -> Row:
    """Row of a tensor that is the same on both sides."""
    return Row((theirs,), (ours,))


def shaped(theirs: str, ours: str, their_shape: tuple[int, ...], our_shape: tuple[int, ...]) -> Row:
    """Row of a tensor with the same values in the same order under another shape."""
    return Row((theirs,), (ours,), lambda x: [x[0].reshape(our_shape)], lambda x: [x[0].reshape(their_shape)])


def transposed(theirs: str, ours: str) -> Row:
    """Row of a matrix that multiplies from the other side."""
    return Row((theirs,), (ours,), lambda x: [x[0].t().contiguous()], lambda x: [x[0].t().contiguous()])


def permuted(theirs: str, ours: str, order: Tensor) -> Row:
    """Row of a tensor whose rows stand in another order: ours = theirs[order]."""
    back = torch.argsort(order)
    return Row((theirs,), (ours,), lambda x: [x[0][order]], lambda x: [x[0][back]])


def joined(theirs: tuple[str, ...], ours: str) -> Row:
    """Row of several tensors of equal size that are one of ours, one behind the other (q, k, v)."""
    count = len(theirs)
    return Row(theirs, (ours,), lambda x: [torch.cat(x)], lambda x: [y.clone() for y in x[0].chunk(count)])


def without_key_bias(query: str, value: str, ours: str) -> Row:
    """Row of a q, k, v bias whose key part they leave out: it adds the same to all logits of a query."""

    def read(x: list[Tensor]) -> list[Tensor]:
        return [torch.cat([x[0], torch.zeros_like(x[0]), x[1]])]

    def write(x: list[Tensor]) -> list[Tensor]:
        q, _, v = x[0].chunk(3)
        return [q.clone(), v.clone()]

    return Row((query, value), (ours,), read, write)


def zeros(ours: str, shape: tuple[int, ...]) -> Row:
    """Row of a tensor that theirs has not and that changes nothing while it is 0 (a bias)."""

    def write(x: list[Tensor]) -> list[Tensor]:
        if x[0].any():
            raise M3Error(f"`{ours}` is not 0, and the format has no place for it; it can't hold this model.")
        return []

    return Row((), (ours,), lambda x: [torch.zeros(shape)], write)


def padded(theirs: str, ours: str) -> Row:
    """Row of a table of words, behind whose entries ours has one more, for padding; it is never seen."""

    def read(x: list[Tensor]) -> list[Tensor]:
        return [torch.cat([x[0], torch.zeros_like(x[0][:1])])]

    return Row((theirs,), (ours,), read, lambda x: [x[0][:-1].clone()])


def computed(theirs: str, value: Tensor) -> Row:
    """Row of a table that they save and we compute; `read` leaves it, as the format has looked at it before."""
    return Row((theirs,), (), lambda x: [], lambda x: [value])


@dataclass(frozen=True)
class Left:
    """Names that are left out.

    Attributes:
        pattern: regular expression that the whole name matches.
        reason: half a sentence.
    """

    pattern: str
    reason: str


def read_rows(
    rows: list[Row], tensors: Mapping[str, Tensor], left: list[Left], shapes: dict[str, torch.Size], where: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Turn their tensors into ours.

    Args:
        rows: the table.
        tensors: theirs.
        left: which of theirs are not needed.
        shapes: our name -> the shape it must have.
        where: file, for messages.

    Returns:
        Our name -> tensor, and their name -> why it was left out.

    Raises:
        M3Error: a tensor of theirs has no row, one of a row is missing, or a shape does not fit.
    """
    known = {name for row in rows for name in row.theirs}
    reasons = {}
    for name in tensors:
        if name not in known:
            reason = next((rule.reason for rule in left if re.fullmatch(rule.pattern, name)), None)
            if reason is not None:
                reasons[name] = reason
    strange = [name for name in tensors if name not in known and name not in reasons]
    if strange:
        raise M3Error(f"{where}: no place for {_first(strange)}; this is another model than its other names say.")
    missing = [name for row in rows for name in row.theirs if name not in tensors]
    if missing:
        raise M3Error(f"{where}: {_first(missing)} missing; the file is not whole, or another model.")
    ours: dict[str, Tensor] = {}
    for row in rows:
        for name, tensor in zip(row.ours, _read(row, tensors, where), strict=True):
            if name not in shapes:
                raise M3Error(f"{where}: {', '.join(row.theirs)} would be `{name}`, which the model has not.")
            if tensor.shape != shapes[name]:
                raise M3Error(
                    f"{where}: {', '.join(row.theirs)} makes `{name}` of shape {tuple(tensor.shape)}, but the model "
                    f"needs {tuple(shapes[name])}; say what differs from the defaults (heads, size, ...)."
                )
            ours[name] = tensor.contiguous()
    absent = [name for name in shapes if name not in ours]
    if absent:
        raise M3Error(f"{where}: nothing gives {_first(absent)} of ours.")
    return ours, reasons


def _read(row: Row, tensors: Mapping[str, Tensor], where: str) -> list[Tensor]:
    """Read a row; sizes that its arithmetic does not fit are the user's to know."""
    found = [tensors[name] for name in row.theirs]
    try:
        return row.read(found)
    except (RuntimeError, IndexError) as error:
        each = ", ".join(f"`{name}` of shape {tuple(x.shape)}" for name, x in zip(row.theirs, found, strict=True))
        raise M3Error(
            f"{where}: {each} can't become {', '.join(f'`{name}`' for name in row.ours)} ({error}); say what differs "
            f"from the defaults or from its config.json (heads, size, ...)."
        ) from error


def write_rows(rows: list[Row], tensors: Mapping[str, Tensor], title: str) -> dict[str, Tensor]:
    """Turn our tensors into theirs.

    Raises:
        M3Error: a tensor of ours has no row, or one of a row is missing.
    """
    known = {name for row in rows for name in row.ours}
    strange = [name for name in tensors if name not in known]
    if strange:
        raise M3Error(f"{title} has no place for {_first(strange)}; choose a format that holds the whole model.")
    missing = [name for name in known if name not in tensors]
    if missing:
        raise M3Error(f"{title} needs what this model has not: {_first(sorted(missing))} missing.")
    return {
        name: tensor.contiguous()
        for row in rows
        for name, tensor in zip(row.theirs, row.write([tensors[name] for name in row.ours]), strict=True)
    }


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(f'`{name}`' for name in names[:3])}{more}" + (
        " is" if more == "" and len(names) == 1 else " are"
    )
