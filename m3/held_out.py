"""Measures and pictures of the model on samples that it was never trained on, during a run and at its end."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from m3.data.loader import Samples, first_batches
from m3.data.source import Source
from m3.ema import Average
from m3.errors import Unlabelled
from m3.evaluate.attention_maps import attention_figures
from m3.evaluate.codebook import measure_codes
from m3.evaluate.task import Row, Task
from m3.evaluate.tasks.predict import predictors
from m3.metrics import duration, read_lines
from m3.model import M3Model
from m3.plot import plot
from m3.progress import BASELINE, HELD_OUT, Lines, Skipped
from m3.recipe import Recipe, dump_recipe
from m3.report import Report
from m3.show import count_parameters, metrics_table, preview
from m3.signals import Look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 32
AS_THEY_ARE = {"augment": {}, "mixup": None, "crop": None, "flip": 0.0, "drop": 0.0, "repeats": 1, "bucket": None}
"""What training does to samples, and probes and baselines should not see."""


class HeldOut:
    """The held-out samples of a run. Without any, nothing is measured and training samples are drawn."""

    def __init__(
        self,
        recipe: Recipe,
        model: M3Model,
        tasks: list[Task],
        train: Source,
        unseen: Source,
        skipped: Skipped,
        console: Console,
        metrics: Lines,
    ) -> None:
        """Keep what every evaluation needs.

        Args:
            recipe: of the run.
            model: the plain model.
            tasks: what is measured.
            train: the training split, for baselines and probes.
            unseen: the held-out split.
            skipped: counter of unreadable training samples.
            console: where to say what is missing.
            metrics: where a line is written after each.
        """
        self.console, self.metrics = console, metrics
        self.recipe, self.model, self.tasks = recipe, model, tasks
        plain = recipe.data.model_copy(update=AS_THEY_ARE)
        self.train, self.train_skipped = Samples(train, model.modalities, plain, recipe.seed), skipped
        self.samples, self.skipped = self.train, skipped
        self.has_picture = bool(predictors(model))
        self.drawn: Path | None = None
        self.is_there = len(unseen) > 0
        if self.is_there:
            self.samples = Samples(unseen, model.modalities, recipe.data, recipe.seed)
            self.skipped = Skipped(console, "held-out samples", len(unseen), recipe.data.max_unreadable)
            return
        why = "at most a tenth of the data is held out" if recipe.data.held_out else "data.held_out is 0"
        console.print(
            f"[yellow]no held-out samples[/] ({why}): nothing is measured, and the picture shows training samples",
            soft_wrap=True,
        )

    def evaluate(self, step: int, average: Average | None = None, picture: str | None = None) -> list[Row]:
        """Measure the recipe's tasks, append a line of metrics and draw the picture; runs in one process.

        Args:
            step: steps that are done.
            average: of the weights, which is measured instead of them where the recipe says so; None: there is none.
            picture: its name in the run folder; None: after the step, in `previews`.
        """
        with average.lent_to(self.model) if average and self.is_of_average else nullcontext():
            return self._evaluate(step, picture)

    def _evaluate(self, step: int, picture: str | None) -> list[Row]:
        self.model.eval()
        rows = self.measure(is_training=True)
        if rows:
            line: dict[str, float] = {"step": step}
            for row in rows:
                line |= {f"{HELD_OUT}{row.task}": row.model, f"{BASELINE}{row.task}": row.baseline}
            self.metrics.append(line)
        self.draw(self.recipe.folder / (picture or f"previews/step-{step:08d}.png"))
        self.model.train()
        return rows

    def draw(self, file: Path) -> None:
        """Draw what the model predicts, with the model in evaluation mode; nothing where it predicts no signal."""
        spec = self.recipe.evaluate
        if not self.has_picture:
            return
        shown = [task["visible"] for task in spec.tasks.values() if task.get("visible")]
        views = {"masked": None} | {f"from {', '.join(visible)}": visible for visible in shown}
        batch = self.skipped.count(next(first_batches(self.samples, spec.preview_rows, spec.preview_rows)))
        self.drawn = file
        preview(self.model, batch.to(self.model.device), views, file, self.recipe.seed)

    def measure(self, *, is_training: bool = False) -> list[Row]:
        """Measure the recipe's tasks with the model in evaluation mode; nothing without held-out samples.

        Args:
            is_training: a task whose label the data don't have is left out with a sentence: no reason to end a run.
        """
        if not self.is_there:
            return []
        spec = self.recipe.evaluate
        if learning := [task for task in self.tasks if task.wants_training_samples]:
            for batch in first_batches(self.train, spec.fit_samples, BATCH):
                self.train_skipped.count(batch, is_trained_on=False)
                shown = batch.to(self.model.device)
                for task in learning:
                    task.fit(shown)
        looks: dict[Look, list[Task]] = {}
        for task in self.tasks:
            for look in task.looks:
                looks.setdefault(look, []).append(task)
        for number, (look, tasks) in enumerate(looks.items()):
            for batch in first_batches(self.samples.seen(look), spec.samples, BATCH):
                shown = (batch if number else self.skipped.count(batch)).to(self.model.device)
                for task in tasks:
                    task.add(shown)
        rows = []
        for task in list(self.tasks):
            try:
                rows += task.rows()
            except Unlabelled as error:
                if not is_training:
                    raise
                self.console.print(f"[yellow]left out[/]: {error}", soft_wrap=True)
                self.tasks.remove(task)
        return rows + measure_codes(self.model, first_batches(self.samples, spec.samples, BATCH))

    def figures(self) -> dict[str, Figure]:
        """Return title -> picture of what was measured last."""
        return {title: figure for task in self.tasks for title, figure in task.figures().items()}

    def attention(self) -> dict[str, Figure]:
        """Return title -> picture of where the model looks on the first held-out samples."""
        if not self.is_there:
            return {}
        return attention_figures(self.model, first_batches(self.samples, self.recipe.evaluate.preview_rows, 1))

    def pictures(self) -> dict[str, Figure | Path]:
        """Return title -> what was drawn last, predictions first."""
        drawn: dict[str, Figure | Path] = {"predictions": self.drawn} if self.drawn and self.drawn.is_file() else {}
        return drawn | self.figures()

    @property
    def is_of_average(self) -> bool:
        """True when the average of the weights is measured."""
        return self.recipe.evaluate.weights == "ema"

    def conclude(self, rows: list[Row], console: Console) -> None:
        """Print what there is to see at the end of a run."""
        run = self.recipe.folder
        model = run / ("model_ema" if self.is_of_average else "model")
        if rows:
            console.print(metrics_table(rows))
            self.model.describe(model, metrics=[row.facts() for row in rows])
            self._report(rows)
        for skipped in {id(s): s for s in (self.train_skipped, self.skipped)}.values():
            skipped.report()
        note = "" if self.is_there else " (of training samples)"
        picture = f"Picture{note}: {run / 'preview.png'}    metrics" if self.has_picture else "Metrics"
        report = f"    report: {run / 'report.html'}" if rows else ""
        console.print(
            f"{picture}: {run / 'metrics.jsonl'}{report}\nLoad it:\n"
            f'  from m3 import M3Model, M3Processor\n  model = M3Model.from_pretrained("{model}")\n'
            f'  processor = M3Processor.from_pretrained("{model}")',
            highlight=False,
            soft_wrap=True,
        )

    def _report(self, rows: list[Row]) -> None:
        """Write the report of the run."""
        run, recipe = self.recipe.folder, self.recipe
        self.model.eval()
        plot([run], run / "curves.png", [])
        pictures: dict[str, Figure | Path] = {"Predictions": run / "preview.png", "Curves": run / "curves.png"}
        facts = {
            "recipe": recipe.name,
            "data": f"{recipe.data.source} {recipe.data.root or ''}".strip(),
            "samples": f"{min(len(self.samples.source), recipe.evaluate.samples)} held out",
            "parameters": f"{count_parameters(self.model) / 1e6:.2f} M",
            "training time": duration(read_lines(run)[-1].seconds),
        }
        if self.is_of_average:
            facts["weights"] = "the average (train.ema)"
        pictures |= self.figures() | self.attention()
        Report(f"{recipe.name}: held-out samples", facts, rows, pictures, dump_recipe(recipe)).write(run)
