"""What several people answered to a question, as the score that visual question answering gives each answer.

Letters: B batch, K answers.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from m3.errors import M3Error
from m3.modalities.label import Label, said
from m3.plugins import Signal, Strict

AGREE = 3
"""People who must give an answer for it to be wholly right."""


class Answers(Label):
    """Raw: float32 (K,), the score of each known answer in [0, 1]. Normalised: (B, K, 1).

    A sample is an object of answers and how many people gave them ({"red": 9, "dark red": 1}) or the list of what
    everyone said; in a .csv both as JSON. Answers that are not among the known ones count nothing, and a sample that
    has only such answers is one that nobody can get right.
    """

    class Spec(Strict):  # type: ignore[reportIncompatibleVariableOverride]  # always several, of no label
        """Settings of `type: answers`.

        Attributes:
            classes: K, the number of answers that are known.
            names: what they are, in the order of their numbers: a list, or a text file with one in each line, whose
                content goes into the config; null: samples name answers by their numbers. Letters count as small.
            given: `counts`: people who gave each answer; `scores`: the scores themselves.
        """

        classes: int = Field(ge=2)
        names: str | list[str] | None = None
        given: Literal["counts", "scores"] = "counts"

    is_structured = True
    measure = "VQA accuracy"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        names = _names(spec.names) if spec.names is not None else [str(number) for number in range(spec.classes)]
        self.numbers = {_clean(name): number for number, name in enumerate(names)}
        if len(names) != spec.classes or len(self.numbers) != len(names):
            raise M3Error(
                f"answers.names: {len(names)} names, {len(self.numbers)} of them different, stand for {spec.classes} "
                f"classes; give each answer one name and set `classes` to their number."
            )

    @classmethod
    def resolve(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Put the names in the place of the path of their file."""
        return {**settings, "names": _names(settings["names"])} if settings.get("names") else settings

    @property
    def from_label(self) -> None:
        """None: answers are a signal of their own."""
        return None

    @property
    def signal(self) -> Signal:
        """Values (B, K, 1)."""
        return Signal("values", self.spec.classes, (1,), label="several")

    def example_samples(self) -> list[Any]:
        """Return what ten people said: all the same, two answers, and one that is not known."""
        first, *_, last = self.numbers
        one = 1.0 if self.spec.given == "scores" else 10
        return [{first: one}, {last: one, first: one}, {"not an answer at all": one}]

    def to_raw(self, sample: Any) -> Tensor:
        """Turn answers (an object, a list, either as JSON) into float32 (K,)."""
        if isinstance(sample, str):
            try:
                sample = json.loads(sample)
            except json.JSONDecodeError as error:
                raise M3Error(
                    f'answers are an object or a list in JSON, got {said(sample)}; write {{"red": 9}}.'
                ) from error
        given = Counter(map(str, sample)) if isinstance(sample, list | tuple) else sample
        if not isinstance(given, dict) or not all(isinstance(x, int | float) and x >= 0 for x in given.values()):
            raise M3Error(f"answers are names with numbers of people, got {said(sample)}; write e.g. {{'red': 10}}.")
        counts: Counter[str] = Counter()
        for name, count in given.items():
            counts[_clean(str(name))] += count
        people = counts.total()
        if self.spec.given == "counts" and people <= AGREE:
            raise M3Error(
                f"{people} answers are too few for this score, in which {AGREE} of all but one must agree; set "
                f"`given: scores`, or use `type: label` where there is one answer."
            )
        raw = torch.zeros(self.spec.classes)
        for name in counts.keys() & self.numbers.keys():
            count = counts[name]
            raw[self.numbers[name]] = vqa_score(count, people) if self.spec.given == "counts" else min(count, 1.0)
        return raw

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Add up the scores of the most likely answers, and count the samples -> (2,)."""
        counts = weight.bool()[:, 0]
        predicted, truth = predicted[counts, :, 0], truth[counts, :, 0]
        reached = truth.gather(1, predicted.argmax(1, keepdim=True)).sum()
        return torch.stack([reached, counts.sum()]).double()


def vqa_score(count: int, people: int) -> float:
    """Return the accuracy of an answer that `count` of `people` gave (Antol et al. 2015, and the evaluation's code).

    It is min(n / 3, 1), where n of all people but one gave the answer, averaged over who is left out.
    """
    others, less = min(count / AGREE, 1.0), min((count - 1) / AGREE, 1.0)
    return ((people - count) * others + count * less) / people


def _clean(name: str) -> str:
    return name.strip().lower()


def _names(names: str | list[str]) -> list[str]:
    """Return a list of names, or the lines of the file that a path names."""
    if isinstance(names, list):
        return names
    path = Path(names).expanduser()
    if not path.is_file():
        raise M3Error(f"answers.names: there is no file {names}; write one answer in each line.")
    return path.read_text(encoding="utf-8").splitlines()
