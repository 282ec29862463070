"""How parts are found by name.

A part is named in a recipe by its type. `image` is the class `Image` in the file `modalities/image.py`, found
by that rule alone: no registry. Others publish an entry point (group `m3.modalities`, `m3.tokenizers`,
`m3.objectives`, ...) or are named in full, `"their_package.lidar:Lidar"`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from m3.errors import M3Error, nearest, read_settings

# Where the built-in parts of each kind live: a folder of files, or files that hold several.
HOMES = {
    "modalities": ("m3.modalities",),
    "tokenizers": ("m3.tokenizers",),
    "objectives": ("m3.objectives",),
    "sources": ("m3.data.sources",),
    "maskings": ("m3.maskings",),
    "scorers": ("m3.scorers", "m3.shaped_scorers"),
    "decoders": ("m3.heads", "m3.dense"),
    "targets": ("m3.targets",),
    "positions": ("m3.positions",),
    "quantisers": ("m3.quantize",),
    "coders": ("m3.coders",),
    "tasks": ("m3.evaluate.tasks",),
}


def find(kind: str, name: str) -> type:
    """Return the class that a recipe means by `name` in one of the `HOMES`.

    Raises:
        M3Error: no such part, or it fails to load; the message names the part and the cause.
    """
    if ":" in name:
        return _import(kind, name, name)
    for home in HOMES[kind]:
        if name.isidentifier() and importlib.util.find_spec(f"{home}.{name}" if _is_package(home) else home):
            module = importlib.import_module(f"{home}.{name}" if _is_package(home) else home)
            found = getattr(module, class_name(name), None)
            if found is not None:
                return found
    for entry in entry_points(group=f"m3.{kind}"):
        if entry.name == name:
            return _import(kind, name, entry.value)
    raise M3Error(
        f"`{name}` in `{kind}` is not known: neither built in, nor an installed plugin; install the package that "
        f'provides it or write "package.module:Class".{nearest(name, available(kind))}'
    )


def available(kind: str) -> list[str]:
    """Return the names that `find` knows: built in and from installed packages."""
    names = []
    for home in map(importlib.import_module, HOMES[kind]):
        if _is_package(home.__name__):
            names += [info.name for info in pkgutil.iter_modules(home.__path__) if not info.name.startswith("_")]
        else:
            own = {n: o for n, o in vars(home).items() if getattr(o, "__module__", "") == home.__name__}
            names += [type_name(name) for name, part in own.items() if hasattr(part, "Spec")]
    return sorted({*names, *(entry.name for entry in entry_points(group=f"m3.{kind}"))})


def class_name(name: str) -> str:
    """`semantic_map` -> `SemanticMap`."""
    return "".join(word.capitalize() for word in name.split("_"))


def type_name(name: str) -> str:
    """`SemanticMap` -> `semantic_map`."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _is_package(home: str) -> bool:
    return hasattr(importlib.import_module(home), "__path__")


def _import(kind: str, name: str, target: str) -> type:
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise M3Error(
            f"the plugin `{name}` in `{kind}` failed to load: {type(error).__name__}: {error}. "
            f"Install or repair the package `{module.partition('.')[0]}`."
        ) from error


def build_spec(kind: str, settings: dict[str, Any], where: str) -> tuple[Any, Any]:
    """Return the class that `settings["type"]` names and its `Spec`, filled from the other settings.

    Args:
        kind: one of `HOMES`.
        settings: what the recipe or a config says about the part.
        where: key path for error messages, e.g. `modalities.image`.

    Raises:
        M3Error: no `type`, an unknown one, an unknown key or a wrong value.
    """
    if not isinstance(settings, dict) or "type" not in settings:
        raise M3Error(f"{where}: there is no `type`; add one.{nearest('', available(kind))}")
    settings = dict(settings)
    try:
        part = find(kind, str(settings.pop("type")))
    except M3Error as error:
        raise M3Error(f"{where}.type: {error}") from error
    return part, read_settings(part.Spec, settings, where)
