"""Several sources as one, each drawn as often as its weight says.

Letters: n draws of one part, t draws of all parts before some point.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

from pydantic import Field, PositiveFloat

from m3.data.loader import far_away
from m3.data.source import Sample, Source, Split, StoredSample, coverage, open_source, refuse_stream
from m3.errors import M3Error, nearest, read_settings
from m3.plugins import Modality, Strict
from m3.recipe import DataSpec

OWN = ("source", "root", "options", "missing", "samples", "held_out")
"""Keys of `data` that every part has of its own; the others belong to the mixture."""


class Part(Strict):
    """What a part of a mixture says besides the keys of `data`.

    Attributes:
        weight: how often it is drawn, relative to the others.
        modalities: those it has; null: all of the recipe.
    """

    weight: PositiveFloat = 1.0
    modalities: tuple[str, ...] | None = None


class Options(Strict):
    """`data.options` of source `mixture`.

    Attributes:
        sources: name -> `Part` and `data` settings.
    """

    sources: dict[str, dict[str, Any]] = Field(min_length=1)


class Mixture(Source):
    """Draws from its parts in proportion to their weights, spread evenly; ids are <part>/<id of the part>.

    An epoch has `samples` draws, or as many as the parts have samples together. Each part gets its share of
    them, exact to one sample. Every part goes through its own samples round by round, over the ends of epochs: none
    comes again before all have come, and what an epoch draws of a part lies spread over it.
    """

    def __init__(self, spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> None:
        super().__init__(spec, modalities, seed, split)
        options = read_settings(Options, spec.options, "data.options")
        parts = {name: self._open(name, settings) for name, settings in options.sources.items()}
        for name, (_, source) in parts.items():
            if split == "train" and not len(source):
                raise M3Error(f"data.options.sources.{name}: there are no samples in it; add data or remove it.")
        parts = {name: part for name, part in parts.items() if len(part[1])}
        total = sum(len(source) for _, source in parts.values())
        self.length = (spec.samples or total) if split == "train" else min(spec.held_out, total)
        self.parts = {name: source for name, (_, source) in parts.items()}
        self.draws = shares([weight for weight, _ in parts.values()], self.length)

    def __len__(self) -> int:
        return self.length

    def at(self, epoch: int, index: int) -> int:
        """Count the draws through all epochs."""
        return epoch * self.length + index

    def read(self, index: int) -> Sample:
        """Read from the part that this draw belongs to."""
        name, number = self.place(index)
        sample = self.parts[name].read(number)
        return replace(sample, id=f"{name}/{sample.id}")

    def stored(self, index: int) -> StoredSample:
        """Return the files of the sample of this draw."""
        name, number = self.place(index)
        sample = self.parts[name].stored(number)
        return replace(sample, id=f"{name}/{sample.id}")

    def name(self, index: int) -> str:
        """Return <part>/<id of the part>."""
        name, number = self.place(index)
        return f"{name}/{self.parts[name].name(number)}"

    def origin(self, index: int) -> str:
        """Return <part>/<origin in the part>."""
        name, number = self.place(index)
        return f"{name}/{self.parts[name].origin(number)}"

    def coverage(self) -> dict[str, float]:
        """Weigh the parts' own shares by how often they are drawn."""
        known = [(n, coverage(source)) for n, source in zip(self.draws, self.parts.values(), strict=True)]
        return {
            name: sum(n * share.get(name, 0.0) for n, share in known) / max(1, self.length) for name in self.modalities
        }

    def lengths(self, name: str) -> list[int] | None:
        """Ask the parts that have the modality."""
        parts = {n: source.lengths(name) if name in source.modalities else [] for n, source in self.parts.items()}
        known = {n: lengths for n, lengths in parts.items() if lengths is not None}
        if len(known) < len(parts):
            return None
        places = [self.place(index) for index in range(self.length)]
        return [known[part][number % len(known[part])] if known[part] else 0 for part, number in places]

    def place(self, index: int) -> tuple[str, int]:
        """Return the part of draw `index`, counted through all epochs, and the number of its sample there."""
        epoch, index = divmod(index, self.length)
        part, draw = interleave(index, self.draws)
        name = list(self.parts)[part]
        source = self.parts[name]
        number, turn = divmod(epoch * self.draws[part] + draw, len(source))
        return name, source.at(number, spread(turn, len(source)))

    def _open(self, name: str, settings: dict[str, Any]) -> tuple[float, Source]:
        where = f"data.options.sources.{name}"
        own = {key: value for key, value in settings.items() if key not in Part.model_fields}
        for key in own:
            if key in DataSpec.model_fields and key not in OWN:
                raise M3Error(f"{where}.{key}: this belongs to the whole mixture; set data.{key}.")
        part = read_settings(Part, {k: value for k, value in settings.items() if k in Part.model_fields}, where)
        spec = read_settings(DataSpec, own, where)
        names = self.modalities if part.modalities is None else part.modalities
        for modality in names:
            if modality not in self.modalities:
                raise M3Error(
                    f"{where}.modalities: the recipe has no `{modality}`.{nearest(modality, self.modalities)}"
                )
        chosen = {modality: self.modalities[modality] for modality in self.modalities if modality in names}
        try:
            source = open_source(spec, chosen, self.seed, self.split)
            refuse_stream(source, "a mixture")
            return part.weight, source
        except M3Error as error:
            raise M3Error(f"{where}: {error}") from error


def shares(weights: list[float], total: int) -> list[int]:
    """Divide `total` in proportion to the weights: each share rounded down, the rest to the largest remainders."""
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def spread(turn: int, size: int) -> int:
    """Return a permutation of range(size) at `turn`, whose beginnings, however long, lie spread over it.

    Steps of the golden section (Weyl's sequence), rounded to a number that has no divisor in common with `size`.
    """
    return far_away(size // 2, turn, size)


def interleave(index: int, draws: list[int]) -> tuple[int, int]:
    """Return which part draw `index` belongs to and how many draws of that part came before it.

    The first part takes its n of N draws as evenly as whole numbers allow: round(t n / N) of the first t
    (Bresenham's line); the other parts share what it leaves in the same way. No table is needed.

    Args:
        index: 0 <= index < sum of `draws`.
        draws: n of each part.
    """
    left = sum(draws)
    for part, n in enumerate(draws):
        before = (2 * index * n + left) // (2 * left)
        if (2 * (index + 1) * n + left) // (2 * left) > before:
            return part, before
        index, left = index - before, left - n
    raise IndexError("there are not that many draws")
