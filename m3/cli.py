"""The `m3` command."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from m3 import plugin_commands
from m3.data import commands as data_commands
from m3.errors import M3Error
from m3.preemption import EXIT_CODE, Preempted


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a mistake of the user ends with one sentence and exit code 2, a run asked to stop with 75."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no more positional arguments after an option: collect the overrides that follow one.
    late = [word for word in rest if "=" in word and not word.startswith("-") and hasattr(options, "overrides")]
    if len(late) < len(rest):
        parser.error(f"unknown argument {next(word for word in rest if word not in late)}")
    if late:
        options.overrides += late
    warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
    try:
        return options.run(options) or 0
    except M3Error as error:
        print(f"m3 {options.command}: {error}", file=sys.stderr)
        return 2
    except Preempted as stopped:
        print(f"m3 {options.command}: {stopped}", file=sys.stderr)
        return EXIT_CODE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="m3", description="Multimodal masked modelling from recipes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, text: str, recipe: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        if recipe:
            command.add_argument("recipe", help="YAML file or name of a packaged recipe")
            command.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to the recipe")
        command.set_defaults(run=run)
        return command

    command = add("train", _train, "train a recipe")
    command.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run")
    command = add("show", _show, "print the resolved recipe, parameters, tokens, FLOPs and memory")
    command.add_argument("--world", type=int, help="also memory and communication of each of so many processes")
    add("check", _check, "build a recipe tiny, run three steps, save and reload")
    text = "measure training speed, utilisation and memory, of further recipes in the same run; `data RECIPE`: reading"
    command = add("bench", _bench, text)
    command.add_argument("--batch", type=int, help="samples of a step (default the micro-batch, at most 8 on a CPU)")
    command.add_argument("--samples", type=int, default=512, help="with `data`: samples that are read (default 512)")
    command.add_argument("--against", choices=["transformers"], help="measure this peer in the same run")
    command.add_argument("--overhead", action="store_true", help="measure the trainer's own share of a step instead")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--steps", type=int, default=5, help="timed steps, the median counts (default 5)")
    command.add_argument("--rounds", type=int, default=3, help="how often each is measured, in turn (default 3)")
    _add_model_commands(add)
    _add_run_commands(add)
    data_commands.add_arguments(commands)
    command = add("tokenize", _tokenize, "turn a data source into shards of code numbers", recipe=False)
    command.add_argument("tokenizer", help="model folder of a run with an `autoencode` objective")
    command.add_argument("recipe", help="recipe whose `data` section says where the samples come from")
    command.add_argument("out", help="folder for the shards")
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to the recipe")
    command.add_argument("--per-shard", type=int, default=1000, help="samples in a shard (default 1000)")
    command.add_argument(
        "--copy",
        action="append",
        default=[],
        metavar="NAME",
        help="modality of the recipe to store as it is (captions)",
    )
    add("doctor", _doctor, "print versions, devices and which optional parts load", recipe=False)
    plugin_commands.add_arguments(commands)
    return parser


def _add_run_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that look at run folders."""
    command = add("runs", _runs, "list runs, how far they are and what they last reached", recipe=False)
    command.add_argument("folder", nargs="?", default="runs", help="folder that holds them (default runs)")
    command = add("export", _export, "write the model of a checkpoint as from_pretrained reads it", recipe=False)
    command.add_argument("source", help="folder of a run (its newest undamaged checkpoint) or of a checkpoint")
    command.add_argument("out", help="new folder for the model")
    command.add_argument("--ema", action="store_true", help="the averaged weights instead of the trained ones")
    command = add("plot", _plot, "draw the curves of runs", recipe=False)
    command.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    command.add_argument("--out", default="curves.png", help="PNG file (default curves.png)")
    command.add_argument("--metric", action="append", default=[], metavar="NAME", help="default: losses and held-out")
    command.add_argument("--by", choices=["step", "time"], default="step", help="horizontal axis (default step)")
    command = add("table", _table, "print finished runs side by side, in Markdown", recipe=False)
    command.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    text = "labels that `m3 eval` read off the features of these runs or models, with their baselines"
    command.add_argument("--features", action="store_true", help=text)
    command.add_argument("--first", type=int, default=None, metavar="N", help="only the first N figures of each")
    text = (
        "what runs had reached at equal steps and at equal training time (from their metrics); of models, or with "
        "--task, --data or a.b=c: measure them on the same samples"
    )
    command = add("compare", _compare, text, recipe=False)
    command.add_argument("runs", nargs="+", metavar="RUN", help="runs or models; with --revisions: RECIPE [a.b=c ...]")
    command.add_argument("--task", action="append", default=[], metavar="TYPE[:LABEL]", help="measure, as `m3 eval`")
    command.add_argument("--data", default=None, metavar="SOURCE", help="measure on these data, as `m3 eval`")
    command.set_defaults(overrides=[])  # those that follow an option
    command.add_argument("--out", default="comparison", help="folder for what is measured (default comparison)")
    command.add_argument("--by-step", action="store_true", help="compare the losses of two runs step by step")
    command.add_argument("--revisions", nargs=2, metavar="REV", help="two git revisions of M3 to train the recipe with")
    command.add_argument("--steps", type=int, default=20, help="with --revisions: steps to train (default 20)")
    command.add_argument("--tolerance", type=float, default=0.0, help="allowed relative difference (default 0: none)")


def _add_model_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that are given a model instead of a recipe."""
    command = add("reconstruct", _reconstruct, "draw what a model predicts for files", recipe=False)
    command.add_argument("model", help="folder of a model or of its run, or Hub id")
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="files, or modality=file for models of several")
    command.add_argument("--visible", default=None, help="share of visible tokens, e.g. 0.25; default: the recipe's")
    command.add_argument("--out", default="reconstruction.png", help="PNG file (default reconstruction.png)")
    command.add_argument("--seed", type=int, default=0, help="seed of the mask (default 0)")
    command = add("embed", _embed, "compare files and sentences in a model's shared space", recipe=False)
    command.add_argument("model", help="folder of a model or of its run, or Hub id")
    command.add_argument("inputs", nargs="+", metavar="INPUT", help='modality=file, or e.g. text="a red cube"')
    command.add_argument("--out", default=None, help="NPZ file for the vectors, one array for each side")
    command.add_argument("--objective", default=None, help="name of the contrastive objective (default: the first)")
    text = "measure a model on held-out samples and write report.html and report.json"
    command = add("eval", _eval, text, recipe=False)
    command.add_argument("model", help="folder of a model or of its run, or Hub id")
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to `data`, `evaluate` or `seed`")
    text = "e.g. spread, knn:shape, or with baselines probe:shape:random,raw,pca,majority"
    command.add_argument("--task", action="append", default=[], metavar="TYPE[:LABEL]", help=text)
    command.add_argument("--data", default=None, metavar="SOURCE", help="world, digits, or a folder or manifest")
    command.add_argument("--out", default=None, help="folder for the report (default: eval in the model's folder)")
    text = "fine-tune with few and with many labels, from a model and from scratch, and draw the curve"
    command = add("labels", _labels, text, recipe=False)
    command.add_argument("model", help="folder of a model, or a published checkpoint")
    command.add_argument("recipe", help="YAML file or name of a recipe that fine-tunes")
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="of the recipe; init:a.b=c only from the model")
    command.add_argument("--shares", default="0.01,0.1,1", help="of the labels (default 0.01,0.1,1)")
    command.add_argument("--seeds", type=int, default=1, help="runs of each kind (default 1)")
    command.add_argument("--out", default=None, help="folder for runs and report (default runs/RECIPE_labels)")
    text = "read the weights of another library, or write ours in its format"
    command = add("convert", _convert, text, recipe=False)
    command.add_argument("source", help="file, folder or Hub id; with --to: our model or its run")
    command.add_argument("out", help="folder for our model; with --to: folder, .safetensors or .pth file")
    command.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="changes to the config, modalities.image.size=384"
    )
    command.add_argument("--format", default=None, help="of the source (default: found from its names)")
    command.add_argument("--to", default=None, metavar="FORMAT", help="write our model in this format")


def _train(options: argparse.Namespace) -> None:
    from m3.recipe import load_recipe
    from m3.train import train

    train(load_recipe(options.recipe, options.overrides), resume=options.resume)


def _show(options: argparse.Namespace) -> None:
    from m3.recipe import load_recipe
    from m3.summary import print_summary

    if options.world is not None and options.world < 1:
        raise M3Error("--world is a number of processes, 1 or more.")
    print_summary(load_recipe(options.recipe, options.overrides), options.world)


def _check(options: argparse.Namespace) -> None:
    from m3.check import check
    from m3.recipe import load_recipe

    check(load_recipe(options.recipe, options.overrides))


def _bench(options: argparse.Namespace) -> None:
    from m3.bench import bench
    from m3.bench_data import bench_data
    from m3.overhead import overhead
    from m3.recipe import load_recipe

    if options.recipe == "data":
        if not options.overrides:
            raise M3Error("bench data: name the recipe whose data are to be read, e.g. m3 bench data mae_tiny.")
        recipe = load_recipe(options.overrides[0], options.overrides[1:])
        bench_data(recipe, options.samples, options.rounds, options.json)
        return
    others = [word for word in options.overrides if "=" not in word]
    overrides = [word for word in options.overrides if "=" in word]
    recipes = [load_recipe(name, overrides) for name in (options.recipe, *others)]
    if options.overhead:
        overhead(recipes[0], options.steps, options.json, options.batch)
        return
    bench(recipes, options.against, options.json, options.steps, options.rounds, options.batch)


def _compare(options: argparse.Namespace) -> None:
    from m3.compare import compare, is_to_measure
    from m3.side_by_side import compare_models
    from m3.step_compare import compare_revisions, compare_steps

    overrides = [*(word for word in options.runs if "=" in word), *options.overrides]
    models = [word for word in options.runs if "=" not in word]
    if (options.by_step or options.revisions) and (options.task or options.data):
        raise M3Error("--by-step and --revisions compare losses; leave out --task and --data, or leave out these.")
    if options.revisions:
        recipe, *_ = models
        compare_revisions(options.revisions, recipe, overrides, options.steps, options.tolerance)
    elif options.by_step:
        if len(models) != 2:
            raise M3Error("--by-step compares two runs, no more and no fewer.")
        compare_steps(Path(models[0]), Path(models[1]), options.tolerance)
    elif options.task or options.data or overrides or is_to_measure(models):
        compare_models(models, overrides, options.task, options.data, Path(options.out))
    else:
        compare([Path(run) for run in models])


def _runs(options: argparse.Namespace) -> None:
    from m3.runs import print_runs

    print_runs(Path(options.folder))


def _export(options: argparse.Namespace) -> None:
    from m3.export import export

    export(Path(options.source), Path(options.out), options.ema)


def _plot(options: argparse.Namespace) -> None:
    from m3.plot import plot

    drawn = plot([Path(run) for run in options.runs], Path(options.out), options.metric, options.by)
    print(f"{options.out}: {', '.join(drawn)}")


def _reconstruct(options: argparse.Namespace) -> None:
    from m3.reconstruct import reconstruct_files

    visible = None if options.visible is None else _share(options.visible)
    reconstruct_files(options.model, options.inputs, Path(options.out), visible, options.seed)


def _embed(options: argparse.Namespace) -> None:
    from m3.embed import embed_files

    embed_files(options.model, options.inputs, Path(options.out) if options.out else None, options.objective)


def _eval(options: argparse.Namespace) -> None:
    from m3.measure import measure

    measure(options.model, options.overrides, options.task, options.data, Path(options.out) if options.out else None)


def _labels(options: argparse.Namespace) -> None:
    from m3.label_efficiency import label_efficiency

    shares = [_share(text, "--shares") for text in options.shares.split(",")]
    out = Path(options.out) if options.out else None
    label_efficiency(options.model, options.recipe, options.overrides, shares, options.seeds, out)


def _convert(options: argparse.Namespace) -> None:
    from m3 import convert
    from m3.inputs import open_model

    if options.to is None:
        convert.print_conversion(options.source, options.out, options.overrides, options.format)
        return
    if options.overrides or options.format:
        raise M3Error("--to writes a model as it is; leave out --format and the overrides.")
    print(f"written to {convert.save(open_model(options.source)[0], options.out, options.to)}")


def _share(text: str, option: str = "--visible") -> float:
    try:
        return float(text)
    except ValueError as error:
        raise M3Error(f"{option} must be a share such as 0.25, got `{text}`.") from error


def _table(options: argparse.Namespace) -> None:
    from m3.table import print_feature_table, print_table

    if options.features:
        print_feature_table(options.runs)
    else:
        print_table(options.runs, options.first)


def _tokenize(options: argparse.Namespace) -> None:
    from m3.recipe import load_recipe
    from m3.tokenize_data import tokenize

    recipe = load_recipe(options.recipe, options.overrides)
    tokenize(options.tokenizer, recipe, Path(options.out), options.per_shard, options.copy)


def _doctor(options: argparse.Namespace) -> None:
    from m3.doctor import print_report

    print_report()


if __name__ == "__main__":
    sys.exit(main())
