"""`m3 runs`: the runs below a folder, how far they are and what they last reached."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from m3.errors import M3Error
from m3.metrics import Line, duration, read_lines
from m3.provenance import is_running, read_starts
from m3.recipe import load_recipe


def print_runs(folder: Path) -> None:
    """Print one line for each run in a folder, the newest last.

    Raises:
        M3Error: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise M3Error(f"runs: there is no folder {folder}; give the one that holds your runs.")
    found = [
        path for path in folder.iterdir() if (path / "metrics.jsonl").is_file() and (path / "recipe.yaml").is_file()
    ]
    if not found:
        raise M3Error(f"runs: {folder} holds no runs; train a recipe first (m3 train RECIPE).")
    table = Table(title=f"Runs in {folder}", title_justify="left", show_lines=True)
    table.add_column("run\nstarted (UTC)", no_wrap=True)
    table.add_column("state\ntime", no_wrap=True)
    table.add_column("step", no_wrap=True, justify="right")
    table.add_column("last losses and held-out figures", overflow="fold")
    for run in sorted(found, key=lambda path: (path / "metrics.jsonl").stat().st_mtime):
        table.add_row(*_row(run))
    Console().print(table)


def _row(run: Path) -> tuple[str, ...]:
    recipe, lines, starts = load_recipe(run / "recipe.yaml"), read_lines(run), read_starts(run)
    trained = [line for line in lines if line.values]
    measured = [line for line in lines if line.held_out]
    step = trained[-1].step if trained else 0
    started = starts[0]["time"][:16].replace("T", " ") if starts else ""
    figures = (trained[-1].losses if trained else {}) | (measured[-1].held_out if measured else {})
    return (
        f"[bold]{run.name}[/]\n{started}",
        f"{_state(run, lines)}\n{duration(lines[-1].seconds) if lines else ''}",
        f"{step}\nof {recipe.train.steps}" if recipe.train.steps else str(step),
        "\n".join(f"{name} {value:.4g}" for name, value in figures.items()),
    )


def _state(run: Path, lines: list[Line]) -> str:
    if (run / "model" / "config.json").is_file() and lines:
        return "[green]finished[/]"
    running = is_running(run)
    if running is None:
        return "unfinished"
    return "[blue]running[/]" if running else "[yellow]stopped[/]"
