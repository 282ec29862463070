"""What is measured on held-out samples: the contract of a task, and a line of the table it fills."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from m3.errors import M3Error, nearest
from m3.evaluate.bootstrap import Scores
from m3.evaluate.encodings import Encodings
from m3.model import M3Model
from m3.parts import build_spec
from m3.plugins import Strict
from m3.signals import Look
from m3.types import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of the table of metrics.

    Attributes:
        task: name in the recipe.
        measure: name and unit of the two numbers.
        model: what the model reaches.
        baseline: what the baseline reaches on the same positions.
        baseline_name: which baseline.
        higher_is_better: direction of the measure.
        interval: 95 % interval of the model's figure over the samples; None: not worked out.
        difference: 95 % interval of model minus baseline on the same samples; None: not worked out.
        notes: what else is worth knowing, for the report.
        scores: what each sample adds to both figures; None: they are no sums over samples.
    """

    task: str
    measure: str
    model: float
    baseline: float
    baseline_name: str
    higher_is_better: bool
    interval: tuple[float, float] | None = None
    difference: tuple[float, float] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    scores: Scores | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        scores: Scores,
        task: str,
        measure: str,
        baseline_name: str,
        higher_is_better: bool,
        seed: int,
        notes: dict[str, Any] | None = None,
    ) -> Row:
        """Make the line of what single samples add; the seed is that of the intervals."""
        own, theirs = scores.figures()
        interval, difference = scores.intervals(seed)
        line = (task, measure, own, theirs, baseline_name, higher_is_better)
        return cls(*line, interval, difference, notes or {}, scores)

    def facts(self) -> dict[str, Any]:
        """Return all but the single samples' scores, for JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "scores"}

    @property
    def remark(self) -> str:
        """A sentence that belongs beside the figure, such as which classes it says nothing of; empty: none."""
        return self.notes.get("remark", "")

    @property
    def is_won(self) -> bool:
        """True when the model is better than the baseline."""
        return (self.model > self.baseline) == self.higher_is_better

    @property
    def is_sure(self) -> bool | None:
        """True when the difference is more than chance among the samples may make; None: not known."""
        return None if self.difference is None else self.difference[0] > 0 or self.difference[1] < 0


def check_classes(where: str, label: str, learned: set[int], asked: set[int]) -> str:
    """Return a sentence about classes that are only in one of the splits; empty where all are in both.

    Args:
        where: of the task in the recipe.
        label: its name.
        learned: classes of the training samples.
        asked: classes of the held-out samples.

    Raises:
        M3Error: there is nothing to tell apart or to learn.
    """
    remedy = "check the labels, and take more samples (data.samples, evaluate.fit_samples)"
    if len(learned | asked) == 1:
        only = next(iter(asked))
        raise M3Error(
            f"{where}: all samples have class {only} of `{label}`, so there is nothing to tell apart; {remedy}, or "
            f"remove this task."
        )
    if len(learned) == 1:
        raise M3Error(
            f"{where}: all training samples have class {next(iter(learned))} of `{label}`, so nothing can be learned "
            f"from them; {remedy}."
        )
    texts = []
    if unasked := learned - asked:
        texts.append(f"no held-out sample has {_numbers(unasked)}; hold out more (data.held_out, evaluate.samples)")
    if unlearned := asked - learned:
        texts.append(f"no training sample has {_numbers(unlearned)}, so it can't be guessed (evaluate.fit_samples)")
    return f"`{label}`: {'; '.join(texts)}" if texts else ""


def _numbers(classes: set[int]) -> str:
    first = sorted(classes)[:5]
    more = f" and {len(classes) - 5} more" if len(classes) > 5 else ""
    return f"class {', '.join(map(str, first))}{more}"


class Task(ABC):
    """One measure on held-out samples. The trainer passes it training samples, then held-out ones, then asks for rows.

    A subclass defines `Spec`, its settings in the recipe, and checks in `__init__` that the model can be measured so.
    """

    Spec: ClassVar[type[Strict]]

    looks: tuple[Look, ...] = (Look(),)
    """What is shown of every held-out sample: all samples come once for each, with the same `Batch.keys`."""

    def __init__(self, spec: Any, name: str, model: M3Model, seed: int) -> None:
        self.spec, self.name, self.model, self.seed = spec, name, model, seed
        self.encodings = Encodings(model, seed)

    @property
    def wants_training_samples(self) -> bool:
        """True when `fit` must be called before this evaluation, for what is learned from training samples."""
        return False

    def fit(self, batch: Batch) -> None:  # noqa: B027 (most tasks learn nothing)
        """Take in training samples, on the model's device."""

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Measure held-out samples, on the model's device."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """Return what was measured since the last call, and begin anew."""

    def figures(self) -> dict[str, Figure]:
        """Return title -> picture of what the last `rows` measured; most tasks have none."""
        return {}


def chosen(where: str, kind: str, wanted: str | None, found: Mapping[str, T]) -> T:
    """Return the objective that a task measures: the one it names, or else the first that is fit for it.

    Args:
        where: name of the task.
        kind: what is fit, for the sentence.
        wanted: name of the objective in the task's settings.
        found: name -> objective, all that are fit.

    Raises:
        M3Error: there is none, or none of this name.
    """
    if found and wanted in (None, *found):
        return found[wanted or next(iter(found))]
    named = f" `{wanted}`" if wanted else ""
    raise M3Error(
        f"evaluate.tasks.{where}: the model has no objective of type {kind}{named}.{nearest(wanted or '', found)}"
    )


def build_tasks(settings: dict[str, dict[str, Any]], model: M3Model, seed: int) -> list[Task]:
    """Make the tasks of a recipe's `evaluate` section; one without a `type` predicts a target.

    Raises:
        M3Error: unknown settings, or a task that can't be measured on this model.
    """
    tasks, shared = [], Encodings(model, seed)
    for name, entry in settings.items():
        part, spec = build_spec("tasks", {"type": "predict", **entry}, f"evaluate.tasks.{name}")
        task = part(spec, name, model, seed)
        task.encodings = shared
        tasks.append(task)
    return tasks
