"""Naming what a sample shows by the sentence that is most like it, without a label in training.

Letters: B batch, K classes, T templates, E width of the shared space.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from m3.errors import M3Error, nearest
from m3.evaluate.bootstrap import of_hits
from m3.evaluate.task import Row, Task
from m3.evaluate.tasks.retrieval import embedder_of
from m3.model import M3Model
from m3.plugins import Strict
from m3.processor import M3Processor
from m3.types import Batch


class ZeroShot(Task):
    """Accuracy of the nearest class, whose vector is the mean over sentences about it (Radford et al. 2021, 3.1.4)."""

    class Spec(Strict):
        """Settings of `type: zero_shot`.

        Attributes:
            label: name of the label that the data give.
            classes: what sentences call its classes, in the order of their numbers; `imagenet`: open_clip's 1000 names.
            templates: sentences with `{}` where the class stands; `openai` (80) or `simple` (7): those that open_clip
                holds for ImageNet.
            of: side that is named.
            text: side that reads the sentences, a modality of type `text`.
            objective: name of the contrastive objective; the first one if left out.
        """

        label: str
        classes: Literal["imagenet"] | Annotated[tuple[str, ...], Field(min_length=2)]
        templates: Literal["openai", "simple"] | Annotated[tuple[str, ...], Field(min_length=1)] = ("{}",)
        of: str = "image"
        text: str = "text"
        objective: str | None = None

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        where = f"evaluate.tasks.{name}"
        views = embedder_of(model, spec.objective, where).side_views
        for side in (spec.of, spec.text):
            if side not in views:
                raise M3Error(f"{where}: there is no side `{side}` in the contrast.{nearest(side, views)}")
        self.class_names, self.templates = classes_of(spec.classes), templates_of(spec.templates)
        if wrong := next((text for text in self.templates if "{}" not in text), None):
            raise M3Error(f"{where}.templates: `{wrong}` has no place for the class; write {{}} where it stands.")
        (self.modality,) = views[spec.text].modalities[:1]
        self.processor = M3Processor(model.config.modalities)
        self._classes: Tensor | None = None
        self._guesses: list[Tensor] = []
        self._truths: list[Tensor] = []
        self._keys: list[Tensor] = []

    def add(self, batch: Batch) -> None:
        """Guess the classes of held-out samples; those without a label or the side don't count."""
        label = self.spec.label
        if label not in batch.labels:
            where = f"evaluate.tasks.{self.name}.label"
            raise M3Error(f"{where}: the data give no `{label}`.{nearest(label, batch.labels)}")
        if self._classes is None:
            self._classes = self._class_vectors()
        vectors = self.model.embed(batch, self.spec.objective)[self.spec.of]
        counts = (batch.labels[label] >= 0) & ~vectors.isnan().any(1)
        self._guesses.append((vectors @ self._classes.T).argmax(1)[counts])
        self._truths.append(batch.labels[label][counts])
        self._keys.append(batch.keys[counts])

    def rows(self) -> list[Row]:
        """Return one row."""
        kept = (self._guesses, self._truths, self._keys)
        guesses, truths, keys = (torch.cat(x).cpu() if x else torch.empty(0, dtype=torch.int64) for x in kept)
        self._classes, self._guesses, self._truths, self._keys = None, [], [], []
        if not len(truths):
            return []
        if (most := int(truths.max())) >= len(self.class_names):
            raise M3Error(
                f"evaluate.tasks.{self.name}.classes: a sample has class {most} of `{self.spec.label}`, but "
                f"{len(self.class_names)} classes are named (0 to {len(self.class_names) - 1}); name them all."
            )
        scores = of_hits(keys, guesses == truths, truths == truths.bincount().argmax())
        return [Row.of(scores, self.name, f"accuracy of {len(self.class_names)}", "majority", True, self.seed)]

    def _class_vectors(self) -> Tensor:
        """Return (K, E) unit vectors: the mean over templates, on the sphere again."""
        sentences = [template.replace("{}", name) for name in self.class_names for template in self.templates]
        inputs: dict[str, Any] = {self.modality: sentences}
        vectors = self.model.embed(self.processor(**inputs), self.spec.objective)[self.spec.text]
        return F.normalize(vectors.unflatten(0, (len(self.class_names), -1)).mean(1), dim=-1)


def classes_of(classes: tuple[str, ...] | Literal["imagenet"]) -> tuple[str, ...]:
    """Return the names of classes, those of ImageNet as open_clip tells them apart (two cranes, two maillots)."""
    return tuple(_open_clip().IMAGENET_CLASSNAMES) if classes == "imagenet" else tuple(classes)


def templates_of(templates: tuple[str, ...] | Literal["openai", "simple"]) -> tuple[str, ...]:
    """Return sentences with `{}` where the class stands."""
    if not isinstance(templates, str):
        return templates
    held = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}[templates]
    return tuple(template("{}") for template in getattr(_open_clip(), held))


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise M3Error("ImageNet's names and templates come from open_clip: pip install open-clip-torch.") from error
    return open_clip
