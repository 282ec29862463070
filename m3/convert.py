"""Published weights: read into our model, written back in their own format.

The format is found from the names of the tensors, its table is read, and what differs is said.

    from m3 import convert
    model = convert.load("mae_pretrain_vit_base.pth")
    convert.save(model, "back.pth", "vit")
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import save_file

from m3 import formats
from m3.config import M3Config
from m3.errors import M3Error, nearest, within
from m3.foreign.checkpoint import Foreign, read_foreign
from m3.foreign.format import Format
from m3.foreign.rows import Row, read_rows, write_rows
from m3.model import M3Model
from m3.network import resolved
from m3.parts import class_name
from m3.recipe import with_overrides


@dataclass(frozen=True)
class Conversion:
    """What came out.

    Attributes:
        model: with the weights, in evaluation mode.
        format: name of the format.
        title: what people call it.
        rows: the table that was read.
        left: their name -> why it was left out.
        notes: sentences on what was chosen or changed.
    """

    model: M3Model
    format: str
    title: str
    rows: list[Row]
    left: dict[str, str]
    notes: list[str]


def load(path: str | Path, overrides: Sequence[str] = (), format: str | None = None) -> M3Model:
    """Read a model from a published checkpoint; arguments and errors as in `convert`."""
    return convert(path, overrides, format).model


def convert(path: str | Path, overrides: Sequence[str] = (), format: str | None = None) -> Conversion:
    """Read a published checkpoint. Nothing in it is run.

    Args:
        path: .safetensors, .pth, .pt or .bin file, or a folder of one with its `config.json`.
        overrides: changes to the config as in a recipe, `backbone.heads=12`.
        format: name of a file in `m3/formats`; found from the names of the tensors if left out.

    Raises:
        M3Error: the file can't be read, is in no known format, or does not fit into it whole.
    """
    given = with_overrides({}, tuple(overrides))
    name, form, foreign = _recognised(read_foreign(path), format)
    with within(f"{path} ({form.title})"):
        sections = with_overrides(form.config(foreign, given), tuple(overrides))
        sections["modalities"] = {n: resolved(s, f"modalities.{n}") for n, s in sections["modalities"].items()}
        config = M3Config(**sections)
    with torch.device("meta"):
        model = M3Model(config)
    shapes = {key: x.shape for key, x in model.state_dict().items()}
    rows = form.rows(config)
    tensors, left = read_rows(rows, foreign.tensors, list(form.left), shapes, str(path))
    # Some are saved half in half precision (OpenAI's CLIP), but a model computes in one.
    widest = reduce(torch.promote_types, {x.dtype for x in tensors.values() if x.is_floating_point()})
    tensors = {key: x.to(widest) if x.is_floating_point() else x for key, x in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return Conversion(model.eval(), name, form.title, rows, left, form.notes(foreign, config))


def save(model: M3Model, out: str | Path, format: str) -> Path:
    """Write a model in a published format.

    Args:
        model: what is written.
        out: a .safetensors file, a .pth file ({"model": ...}), or a folder for the weights and the
            settings as the library calls them.
        format: name of a file in `m3/formats`.

    Returns:
        The file with the tensors.

    Raises:
        M3Error: the format can't hold the model.
    """
    form, out = _format(format), Path(out)
    config: M3Config = model.config  # type: ignore[assignment]  # PreTrainedModel forgets its class
    with within(f"{format} ({form.title})"):
        tensors = write_rows(form.rows(config), model.state_dict(), form.title)
    if out.suffix in (".pth", ".pt", ".bin"):
        torch.save({"model": tensors}, out)
        return out
    file = out if out.suffix == ".safetensors" else out / form.files[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.clone() for name, x in tensors.items()}, file, metadata={"format": "pt"})
    settings = form.settings(config)
    if settings and file != out:
        (out / form.files[1]).write_text(json.dumps(settings, indent=2) + "\n")
    return file


def names() -> list[str]:
    """Return the names of the formats."""
    return sorted(info.name for info in pkgutil.iter_modules(formats.__path__))


def _format(name: str) -> Format:
    if name not in names():
        raise M3Error(f"`{name}` is no format; there are {', '.join(names())}.{nearest(name, names())}")
    return getattr(importlib.import_module(f"m3.formats.{name}"), class_name(name))()


def _recognised(foreign: Foreign, wanted: str | None) -> tuple[str, Format, Foreign]:
    """Return the name of the format, itself, and the checkpoint in its tidied names."""
    for name in [wanted] if wanted else names():
        form = _format(name)
        tidied = form.tidy(foreign)
        if form.fits(tidied):
            return name, form, tidied
    first = ", ".join(list(foreign.shapes)[:3])
    known = wanted or ", ".join(names())
    raise M3Error(f"{foreign.where} has names such as {first}, which is none of the formats that are read ({known}).")
