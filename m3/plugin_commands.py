"""`m3 plugin list | new | check`: see what is there, start a plugin, hold one to the contracts."""

from __future__ import annotations

import argparse
import re
from importlib.metadata import entry_points
from pathlib import Path
from string import Template
from typing import Any

from m3.errors import M3Error, nearest
from m3.parts import HOMES, available, build_spec, class_name, find
from m3.plugins import Modality

CHECKED = ("modalities", "tokenizers", "scorers", "targets", "positions")
"""Kinds that can be checked without a recipe."""


def add_arguments(commands: Any) -> None:
    """Add `plugin` with its actions to the subparsers of `m3`."""
    text = "list, start and check plugins"
    actions = commands.add_parser("plugin", help=text, description=text).add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(run=run)
        return action

    add("list", _list, "print all parts that recipes can name, and whether they load")
    action = add("new", _new, "write a small package to start from")
    action.add_argument("name", help="name of the new part in recipes, e.g. lidar")
    action.add_argument("--kind", choices=["modality"], default="modality", help="what it is (default modality)")
    action = add("check", _run_check, "hold a plugin to the contracts")
    action.add_argument("name", help="its name in recipes, or package.module:Class of a modality")
    action.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings, e.g. size=32 tokenizer.size=8")


def _list(options: argparse.Namespace) -> None:
    list_plugins()


def _new(options: argparse.Namespace) -> None:
    new_plugin(options.name, Path.cwd())


def _run_check(options: argparse.Namespace) -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    check_plugin(options.name, options.overrides)


def list_plugins() -> None:
    """Print kind, name, origin and state of every part."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("kind", "name", "from", "loads"):
        table.add_column(column, overflow="fold")
    for kind in HOMES:
        for name in available(kind):
            try:
                find(kind, name)
                state = "[green]yes[/]"
            except M3Error as error:
                state = f"[red]no[/]: {error}"
            table.add_row(kind, name, origin(kind, name), state)
    Console().print(table)


def origin(kind: str, name: str) -> str:
    """Return `built in`, or the package and version that a part comes from."""
    entry = next((entry for entry in entry_points(group=f"m3.{kind}") if entry.name == name), None)
    if entry is None:
        return "built in"
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
    try:
        is_hidden = find(kind, name).__module__.startswith(HOMES[kind])
    except M3Error:
        is_hidden = False
    return f"built in (hides that of {package})" if is_hidden else package


def new_plugin(name: str, parent: Path) -> Path:
    """Write a package with an example modality and tokenizer, and return its folder.

    Args:
        name: of the modality in recipes.
        parent: folder in which `m3-NAME` is made.

    Raises:
        M3Error: the name is no lower-case identifier or is taken, or the folder exists.
    """
    from m3.plugin_template import FILES

    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise M3Error(f"`{name}` can't be the name of a part; use lower-case letters, digits and _, e.g. lidar.")
    if name in available("modalities"):
        raise M3Error(f"there is a modality `{name}` already ({origin('modalities', name)}); choose another name.")
    folder = parent / f"m3-{name}"
    if folder.exists():
        raise M3Error(f"{folder} exists; choose another name or remove it.")
    for path, text in FILES.items():
        target = folder / Template(path).substitute(name=name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(text).substitute(name=name, Class=class_name(name)), encoding="utf-8")
    print(f"Wrote {folder}. Next:\n  pip install -e {folder}\n  m3 plugin check {name}")
    return folder


def check_plugin(name: str, overrides: list[str] | tuple[str, ...] = ()) -> None:
    """Run the conformance kit on every part of a name and print what was checked.

    Args:
        name: in recipes, or package.module:Class of a modality.
        overrides: settings `a.b=c`; those of a modality's tokenizer begin with `tokenizer.`, and the other way round.

    Raises:
        M3Error: there is no such part, it needs a recipe to be checked, or it does not keep a contract.
    """
    kinds = ["modalities"] if ":" in name else [kind for kind in HOMES if name in available(kind)]
    if not kinds:
        names = {known for kind in HOMES for known in available(kind)}
        raise M3Error(f"there is no part `{name}`; install the package that provides it.{nearest(name, names)}")
    for kind in kinds:
        if kind not in CHECKED:
            raise M3Error(f"`{name}` in `{kind}` can't be checked by itself; name it in a recipe and run `m3 check`.")
        try:
            beside = _check(kind, name, overrides)
        except AssertionError as error:
            raise M3Error(str(error)) from error
        where = "" if ":" in name else f", {origin(kind, name)}"
        print(f"{name} in {kind} ({beside}{where}) keeps its contracts.")


def _check(kind: str, name: str, overrides: list[str] | tuple[str, ...]) -> str:
    """Check one part and return what it was checked with."""
    from m3 import testing
    from m3.overrides import with_overrides

    settings = with_overrides({"type": name}, overrides)
    if kind == "scorers":
        testing.check_scorer(settings)
        return "on grids of one to three axes"
    if kind == "targets":
        testing.check_target(settings)
        return "on patches"
    if kind == "positions":
        for counts in ((12,), (4, 6), (2, 3, 4)):
            testing.check_positions(settings, counts)
        return "on grids of one to three axes"
    other = "tokenizer" if kind == "modalities" else "modality"
    partner = settings.pop(other, None)
    if partner is None:
        partner = _partner(kind, settings)
    modality, tokenizer = (settings, partner) if kind == "modalities" else (partner, settings)
    testing.check_modality(modality, _samples(modality), tokenizer)
    return f"with {other} `{partner.get('type')}`"


def _partner(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer that reads the modality, or a modality that the tokenizer reads; own ones are tried first."""
    from m3.testing.tokenizer import build_tokenizer

    other = "tokenizers" if kind == "modalities" else "modalities"
    home = find(kind, settings["type"]).__module__.partition(".")[0]
    reasons = []
    for is_own in (True, False):
        for name in available(other):
            try:
                if (find(other, name).__module__.partition(".")[0] == home) == is_own:
                    pair = (settings, {"type": name}) if kind == "modalities" else ({"type": name}, settings)
                    build_tokenizer(pair[1], _modality(pair[0]).signal)
                    return {"type": name}
            except M3Error as error:
                reasons.append(f"{name}: {str(error).rstrip('.')}")
    raise M3Error(
        f"no part of `{other}` fits `{settings['type']}` as it is set; name one, e.g. {other[:-1]}.type=NAME "
        f"({'; '.join(reasons)})."
    )


def _modality(settings: dict[str, Any]) -> Modality:
    part, spec = build_spec("modalities", settings, "modality")
    return part(spec)


def _samples(settings: dict[str, Any]) -> list[Any]:
    """Return the modality's own examples, or random tensors that look like its blank ones."""
    import torch

    part = _modality(settings)
    samples = part.example_samples()
    if samples:
        return samples
    blank, draw = part.blank(4), torch.Generator().manual_seed(0)
    if blank.is_floating_point():
        samples = list(torch.rand(blank.shape, generator=draw).to(blank.dtype))
    else:
        top = part.signal.classes or 256
        samples = list(torch.randint(0, top, blank.shape, generator=draw).to(blank.dtype))
    try:
        part.to_raw(samples[0])
    except Exception as error:
        raise M3Error(
            f"modality `{settings['type']}` refuses random samples ({error}); define `example_samples` in its class."
        ) from error
    return samples
