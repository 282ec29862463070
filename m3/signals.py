"""What modalities and tokenizers tell each other: the form of a signal, and which part of it a sample shows."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor


class Signal(NamedTuple):
    """What a modality hands to its tokenizer.

    Attributes:
        kind: `values` are floats around 0; `classes` are int64 ids.
        channels: values per position (1 for classes).
        size: extent along each position axis, e.g. (height, width), that the model is built for.
        classes: number of classes, 0 for values.
        has_gaps: some positions may be unknown: NaN in values, -1 in class ids. No loss asks for them.
        channel_axis: of a batch of values: 1, or -1 for lists of points.
        sentinels: how many of the classes stand for hidden spans; they make it a sequence.
        first_sentinel: the class of the first of them, the others follow; None: they are the last classes.
        label: values are shares of the classes of a whole sample, which has `one` of them or `several`; empty: they are
            not.
        is_boxed: the last four channels are a box: left, top, right, bottom.
    """

    kind: Literal["values", "classes"]
    channels: int
    size: tuple[int, ...]
    classes: int = 0
    has_gaps: bool = False
    channel_axis: int = 1
    is_boxed: bool = False
    sentinels: int = 0
    label: Literal["", "one", "several"] = ""
    first_sentinel: int | None = None

    @property
    def sentinel_ids(self) -> range | None:
        """Class ids of the sentinels; None: it is no sequence."""
        first = self.classes - self.sentinels if self.first_sentinel is None else self.first_sentinel
        return range(first, first + self.sentinels) if self.sentinels else None

    def extent(self, signal: Tensor) -> tuple[int, ...]:
        """Return the size along the position axes of a batch (B, ...) of normalised signals."""
        return tuple(self.without_channels(signal).shape[1:])

    def without_channels(self, signal: Tensor) -> Tensor:
        """Take the first channel of a batch of values; classes have none."""
        return signal if self.kind == "classes" else signal.select(self.channel_axis, 0)


class Look(NamedTuple):
    """What is shown of a held-out sample.

    Attributes:
        moment: of recordings the clip: 0 is the first possible one, 1 the last.
        place: of maps the part along the longer side: 0 is its beginning, 1 its end.
        vote: number of the random changes (`data.augment`) that it undergoes as in training; None: it stays as it is.
    """

    moment: float = 0.5
    place: float = 0.5
    vote: int | None = None


class Crop(NamedTuple):
    """One geometric decision, shared by all aligned modalities of a sample.

    Attributes:
        box: top, left, height, width as shares of the map's height and width in [0, 1]; None: the largest
            centred part with the aspect that the model reads.
        is_flipped: mirrored left to right.
    """

    box: tuple[float, float, float, float] | None = None
    is_flipped: bool = False

    def window(self, height: int, width: int, size: tuple[float, float]) -> tuple[float, float, float, float]:
        """Return the box for a map of height x width that is read at `size`: the given one, or the centred part."""
        if self.box is not None:
            return self.box
        scale = min(height / size[0], width / size[1])
        h, w = size[0] * scale / height, size[1] * scale / width
        return (1 - h) / 2, (1 - w) / 2, h, w
