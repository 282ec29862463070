"""`m3 data`: look at data, measure it, pack it."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from m3.errors import M3Error


def add_arguments(commands: argparse._SubParsersAction) -> None:
    """Define `m3 data ...` among the commands of `m3`."""
    text = "look at data, measure it, pack it into shards and check them"
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
    text = "draw scenes of the embedded world with all their signals, and write their sounds"
    show = actions.add_parser("show", help=text, description=text)
    show.add_argument("source", choices=["world"])
    show.add_argument("--out", default="world.png", help="PNG file; the sounds go beside it (default world.png)")
    show.add_argument("--count", type=int, default=6, help="scenes (default 6)")
    show.add_argument("--seed", type=int, default=0)
    show.add_argument("--split", choices=["train", "held_out"], default="train")
    show.set_defaults(run=show_command)
    text = "measure mean and deviation of a recipe's data, for `mean` and `std` of its modalities"
    stats = actions.add_parser("stats", help=text, description=text)
    stats.add_argument("recipe", help="YAML file or name of a packaged recipe")
    stats.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to the recipe")
    stats.add_argument("--samples", type=int, default=1000, help="training samples that are read (default 1000)")
    stats.set_defaults(run=stats_command)
    text = "learn a small vocabulary from text files, for `type: text`"
    vocabulary = actions.add_parser("vocabulary", help=text, description=text)
    vocabulary.add_argument("files", nargs="+", metavar="FILE", help="text in UTF-8, one sentence a line")
    vocabulary.add_argument("--out", default="vocabulary.json", help="tokenizer.json to write")
    vocabulary.add_argument("--size", type=int, default=8000, help="largest number of tokens (default 8000)")
    vocabulary.add_argument("--kind", choices=["wordpiece", "bpe"], default="wordpiece")
    vocabulary.set_defaults(run=vocabulary_command)


def pack_command(options: argparse.Namespace) -> None:
    """Pack both splits of a recipe's data: OUT/train and OUT/val, or OUT itself where nothing is held out."""
    from rich.console import Console
    from rich.progress import track

    from m3.data.pack import pack
    from m3.data.source import coverage, open_source
    from m3.network import build_modalities
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


def show_command(options: argparse.Namespace) -> None:
    """Draw scenes of the embedded world and write their sounds."""
    from m3.data.world.sheet import contact_sheet

    out = Path(options.out)
    contact_sheet(options.seed, options.split, options.count, out)
    print(f"Pictures: {out}    sounds: {out.parent / out.stem}_*.wav")


def stats_command(options: argparse.Namespace) -> None:
    """Measure mean and deviation of every modality that is normalised by fixed numbers."""
    import torch
    from rich.console import Console

    from m3.data.loader import Samples, first_batches
    from m3.data.source import open_source
    from m3.network import build_modalities
    from m3.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    modalities = build_modalities(recipe.modalities)
    source = open_source(recipe.data, modalities, recipe.seed, "train")
    samples = Samples(source, modalities, recipe.data, recipe.seed)
    sums: dict[str, torch.Tensor] = {}
    for batch in first_batches(samples, options.samples, 16):
        for name, raw in batch.signals.items():
            statistics = modalities[name].statistics(raw)
            if statistics is not None:
                sums[name] = sums.get(name, 0) + statistics
    if not sums:
        raise M3Error(f"{recipe.name}: no modality of it is normalised by a mean and a deviation of the data.")
    console = Console()
    for name, (count, total, squares) in ((n, s.unbind(0)) for n, s in sums.items()):
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        shown = [", ".join(f"{float(v):.5g}" for v in x.flatten()) for x in (mean, std)]
        if not isinstance(modalities[name].spec.mean, float):  # one number per channel
            shown = [f"[{numbers}]" for numbers in shown]
        console.print(f"modalities.{name}: mean: {shown[0]}, std: {shown[1]}", markup=False, soft_wrap=True)


def vocabulary_command(options: argparse.Namespace) -> None:
    """Learn a small vocabulary from text files."""
    from m3.data.words import open_vocabulary, train_vocabulary

    sentences = []
    for name in options.files:
        try:
            sentences += Path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise M3Error(f"{name} is no text in UTF-8 ({error}); give text files with one sentence a line.") from error
    content = train_vocabulary(sentences, options.size, options.kind)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(content, encoding="utf-8")
    size = open_vocabulary(f"tokenizers:{content}").size
    print(f"{out}: {size} tokens from {len(sentences)} lines. In a recipe: vocabulary: {out}")
