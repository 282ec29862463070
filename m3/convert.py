"""Published weights: read into our model, written back in their own format.

The format is found from the names of the tensors, its table is read, and what differs is said.

    from m3 import convert
    model = convert.load("mae_pretrain_vit_base.pth")
    convert.save(model, "back.pth", "vit")
"""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import save_file

from m3 import formats
from m3.backbone import BackboneSpec, TowerSpec
from m3.card import loading
from m3.config import M3Config
from m3.errors import M3Error, nearest, read_settings, within
from m3.foreign.adapt import adapt, keep_coordinates
from m3.foreign.checkpoint import FILES, Foreign, named, read_foreign
from m3.foreign.format import Format
from m3.foreign.rows import Row, read_rows, write_rows
from m3.model import M3Model
from m3.network import resolved
from m3.overrides import with_overrides
from m3.parts import class_name
from m3.processor import M3Processor
from m3.progress import no_progress_bars


@dataclass(frozen=True)
class Conversion:
    """What came out.

    Attributes:
        model: with the weights, in evaluation mode.
        format: name of the format.
        title: what people call it.
        rows: the table that was read.
        shapes: our name -> the shape that was read, before the overrides changed it.
        left: their name -> why it was left out.
        notes: sentences on what was chosen or changed.
    """

    model: M3Model
    format: str
    title: str
    rows: list[Row]
    shapes: dict[str, torch.Size]
    left: dict[str, str]
    notes: list[str]


def load(path: str | Path, overrides: Sequence[str] = (), format: str | None = None) -> M3Model:
    """Read a model from a published checkpoint; arguments and errors as in `convert`."""
    return convert(path, overrides, format).model


def convert(path: str | Path, overrides: Sequence[str] = (), format: str | None = None) -> Conversion:
    """Read a published checkpoint. Nothing in it is run.

    Args:
        path: .safetensors, .pth, .pt or .bin file, a folder of one with its `config.json`, or a repository of the
            Hugging Face hub, e.g. `timm/vit_base_patch16_224.mae`.
        overrides: changes to the config as in a recipe, `backbone.heads=12`; `modalities=a,b` takes these alone of
            the checkpoint's, where its format can.
        format: name of a file in `m3/formats`; found from the names of the tensors if left out.

    Raises:
        M3Error: the file can't be read, is in no known format, or does not fit into it whole.
    """
    given, overrides = _given(overrides)
    name, form, foreign = _recognised(read_foreign(path), format)
    with within(f"{path} ({form.title})"):
        if "chosen" in given and not form.is_divisible:
            raise M3Error("its modalities can't be taken by themselves; leave `modalities=` out.")
        sections = _resolved(form.config(foreign, given))
        config = _whole(M3Config(**sections))
        rows = form.rows(config)
        notes, left = form.notes(foreign, config), form.left_out(foreign, config)
    model = _empty(config)
    shapes = {key: x.shape for key, x in model.state_dict().items()}
    read = shapes
    tensors, reasons = read_rows(rows, foreign.tensors, left, shapes, str(path))
    # Some are saved half in half precision (OpenAI's CLIP), but a model computes in one.
    widest = reduce(torch.promote_types, {x.dtype for x in tensors.values() if x.is_floating_point()})
    tensors = {key: x.to(widest) if x.is_floating_point() else x for key, x in tensors.items()}
    wanted = _resolved(with_overrides(sections, tuple(overrides)))
    if wanted != sections:
        notes += keep_coordinates(sections["modalities"], wanted["modalities"])
        model = _empty(M3Config(**wanted))
        shapes = {key: x.shape for key, x in model.state_dict().items()}
        notes += adapt(tensors, sections["modalities"], wanted["modalities"], shapes)
        unwanted = dict.fromkeys(".".join(key.split(".")[:2]) for key in tensors if key not in shapes)
        notes += [f"{part} is left out, as the overrides say" for part in unwanted]
        tensors = {key: x for key, x in tensors.items() if key in shapes}
        absent = [key for key in shapes if key not in tensors]
        if absent:
            raise M3Error(f"{path} has nothing for `{absent[0]}`, which the overrides ask for; leave them out.")
    model.load_state_dict(tensors, assign=True)
    model.config.about = {"source": form.title, "weights": named(path)}
    if foreign.license:
        model.config.about["license"] = foreign.license
    return Conversion(model.eval(), name, form.title, rows, read, reasons, notes)


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
    config = _whole(model.config)  # type: ignore[arg-type]  # PreTrainedModel forgets its class
    with within(f"{format} ({form.title})"):
        tensors = write_rows(form.rows(config), model.state_dict(), form.title)
    if out.suffix in FILES[1:]:
        torch.save({"model": tensors}, out)
        return out
    file = out if out.suffix == ".safetensors" else out / form.files[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.clone() for name, x in tensors.items()}, file, metadata={"format": "pt"})
    settings = form.settings(config)
    if settings and file != out:
        (out / form.files[1]).write_text(json.dumps(settings, indent=2) + "\n")
    return file


def print_conversion(path: str, out: str, overrides: Sequence[str], format: str | None) -> None:
    """Read a published checkpoint, write our model into the folder `out`, and say what was found, table by table."""
    if Path(out).is_file() or Path(out).suffix in FILES:
        raise M3Error(
            f"{out} must be a folder, as our model is several files; to write another format say --to FORMAT."
        )
    if Path(path).exists() and Path(out).resolve() in (Path(path).resolve(), Path(path).resolve().parent):
        raise M3Error(f"{out} holds the weights that are read; give another folder for our model.")
    console = Console()
    found = convert(path, overrides, format)
    console.print(f"{path} is {found.title}", highlight=False, soft_wrap=True)
    console.print(_table(found))
    used = len({name for row in found.rows for name in row.theirs})
    console.print(f"{used} tensors are used, {len(found.left)} left out.", highlight=False)
    for name, reason in _grouped(found.left).items():
        console.print(f"[yellow]left out[/] {name}: {reason}", highlight=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False, soft_wrap=True)
    with no_progress_bars():
        found.model.save_pretrained(out)
    M3Processor(found.model.config.modalities).save_pretrained(out)
    count = sum(p.numel() for p in found.model.parameters())
    console.print(f"{count:,} parameters are in {out}. Load it:", highlight=False, soft_wrap=True)
    lines = loading(out, bool(found.model.inputs))
    console.print("\n".join(f"  {line}" for line in lines), highlight=False, soft_wrap=True, markup=False)


def names() -> list[str]:
    """Return the names of the formats."""
    return sorted(info.name for info in pkgutil.iter_modules(formats.__path__))


def _format(name: str) -> Format:
    if name not in names():
        raise M3Error(f"`{name}` is no format; there are {', '.join(names())}.{nearest(name, names())}")
    return getattr(importlib.import_module(f"m3.formats.{name}"), class_name(name))()


def _given(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that overrides give, and the overrides but for `modalities=a,b`, which is `chosen` there."""
    choices = [text for text in overrides if re.match(r"modalities=(?!\s*\{)", text)]
    others = [text for text in overrides if text not in choices]
    given = with_overrides({}, others)
    if choices:
        given["chosen"] = [name.strip(" []") for name in choices[-1].partition("=")[2].split(",")]
    return given, others


def _resolved(sections: dict[str, Any]) -> dict[str, Any]:
    """Put the content of files in the place of their paths."""
    modalities = {name: resolved(entry, f"modalities.{name}") for name, entry in sections["modalities"].items()}
    return sections | {"modalities": modalities}


def _recognised(foreign: Foreign, wanted: str | None) -> tuple[str, Format, Foreign]:
    """Return the name of the format, itself, and the checkpoint in its tidied names."""
    for name in [wanted] if wanted else names():
        form = _format(name)
        tidied = form.tidy(foreign)
        if form.fits(tidied):
            return name, form, tidied
    first = ", ".join(list(foreign.shapes)[:3])
    known = wanted or ", ".join(names())
    raise M3Error(f"{foreign.where} has names such as {first}, which are those of no format that is read ({known}).")


def _whole(config: M3Config) -> M3Config:
    """Return the config with all defaults of its transformers written out."""
    towers = {
        name: read_settings(TowerSpec, tower, f"towers.{name}").model_dump(mode="json")
        for name, tower in (config.towers or {}).items()
    }
    backbone = read_settings(BackboneSpec, config.backbone or {}, "backbone").model_dump(mode="json")
    return M3Config(
        modalities=config.modalities, backbone=backbone, towers=towers, objectives=config.objectives, seed=config.seed
    )


def _empty(config: M3Config) -> M3Model:
    """Make the model without memory for its weights."""
    with torch.device("meta"):
        return M3Model(config)


def _table(found: Conversion) -> Table:
    """Lay out which tensors became which, blocks of the same form in one line."""
    lines: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for row in found.rows:
        if row.ours:
            key = (_form(row.theirs) or "(zeros)", _form(row.ours))
            lines.setdefault(key, []).append(tuple(found.shapes[row.ours[0]]))
    table = Table()
    for title in ("theirs", "ours", "shape", "tensors"):
        table.add_column(title, overflow="fold")
    for (theirs, ours), each in lines.items():
        widest = max(each, key=len)
        table.add_row(escape(theirs), escape(ours), " x ".join(map(str, widest)) or "one number", str(len(each)))
    return table


def _grouped(reasons: dict[str, str]) -> dict[str, str]:
    return {_form((name,)): reason for name, reason in reasons.items()}


def _form(names: tuple[str, ...]) -> str:
    """`blocks.11.norm1.bias` -> `blocks.N.norm1`; of several names what they share stands once."""
    stems = [re.sub(r"\.(weight|bias)$", "", re.sub(r"\.\d+(?=\.)", ".N", name)) for name in names]
    if len(stems) < 2:
        return "".join(stems)
    split = [stem.split(".") for stem in stems]
    shared = sum(1 for _ in itertools.takewhile(lambda words: len(set(words)) == 1, zip(*split, strict=False)))
    rest = ", ".join(".".join(words[shared:]) for words in split)
    return f"{'.'.join(split[0][:shared])}.({rest})" if shared else rest
