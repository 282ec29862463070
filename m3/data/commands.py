"""`m3 data pack` and `m3 data check`."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from m3.errors import M3Error


def add_arguments(commands: argparse._SubParsersAction) -> None:
    """Define `m3 data ...` among the commands of `m3`."""
    text = "pack data into shards and check them"
    actions = commands.add_parser("data", help=text, description=text).add_subparsers(required=True, metavar="ACTION")
    text = "write the data of a recipe as tar shards; under `accelerate launch` every process writes its part"
    pack = actions.add_parser("pack", help=text, description=text)
    pack.add_argument("recipe", help="YAML file or name of a packaged recipe")
    pack.add_argument("out", metavar="OUT", help="a folder of its own; both splits get a folder in it")
    pack.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to the recipe")
    pack.add_argument("--per-shard", type=int, default=1000, help="samples in a tar (default 1000)")
    pack.add_argument(
        "--layout", choices=["one", "modality"], default="one", help="one tar for all modalities, or each"
    )
    pack.set_defaults(run=pack_command)
    text = "read every member of the shards in a folder or at an address"
    check = actions.add_parser("check", help=text, description=text)
    check.add_argument("root", metavar="ROOT", help="folder, or address such as s3://bucket/folder")
    check.set_defaults(run=check_command)


def pack_command(options: argparse.Namespace) -> None:
    """Pack both splits of a recipe's data: OUT/train and OUT/val, or OUT itself where nothing is held out."""
    from rich.console import Console
    from rich.progress import track

    from m3.data.pack import pack
    from m3.data.source import coverage, open_source
    from m3.model import build_modalities
    from m3.recipe import load_recipe

    if options.per_shard < 1:
        raise M3Error(f"--per-shard: a shard holds at least one sample, got {options.per_shard}.")
    recipe = load_recipe(options.recipe, options.overrides)
    modalities = dict(build_modalities(recipe.modalities))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    console = Console(quiet=rank > 0)
    sources = {
        "train": open_source(recipe.data, modalities, recipe.seed, "train"),
        "val": open_source(recipe.data, modalities, recipe.seed, "held_out"),
    }
    for name, source in sources.items():
        if not len(source):
            continue
        out = Path(options.out) / name if len(sources["val"]) else Path(options.out)
        shown = partial(track, description=f"{name}:", console=console, disable=rank > 0)
        done = pack(source, modalities, out, options.per_shard, options.layout, rank, world, shown)
        have = ", ".join(f"{modality} {share:.1%}" for modality, share in coverage(source).items())
        console.print(
            f"{out}: {len(source)} samples ({have}); {done.written} shards written, {done.kept} were there.",
            highlight=False,
            soft_wrap=True,
        )


def check_command(options: argparse.Namespace) -> int:
    """Check the shards below a root, or below its folders `train` and `val`; return 1 where something is wrong."""
    from rich.console import Console

    from m3.data.check import check, print_report
    from m3.data.shards import split_roots

    root = options.root.rstrip("/") or "/"
    reports = [check(folder) for folder in split_roots(root).values() or [root]]
    for report in reports:
        print_report(report, Console())
    return 0 if all(report.is_sound for report in reports) else 1
