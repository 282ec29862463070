"""The contracts that parts fulfil: what a modality, a tokenizer, an objective is. `m3.parts` finds them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from m3.errors import M3Error
from m3.signals import Crop, Signal
from m3.types import Encoded, Loss, MaskPlan, Tokens

File = Path | BinaryIO
"""A file on disk, or one in an archive: anything readable whose `name` has the ending."""


def ending(file: File) -> str:
    """Return a file's ending in lower case, with the dot."""
    return Path(file.name).suffix.lower()


class Strict(BaseModel):
    """A settings model that refuses unknown keys and wrong types, and does not change after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True)


class Modality(ABC):
    """What a signal is: how to load, fit, normalise, show and measure it. Holds no parameters.

    A subclass defines `Spec`, the settings of the recipe, and the methods below. "Raw" is the form in which
    a sample travels to the device: compact and in the signal's own unit. What is said of the class below may be
    said of an object instead, where it depends on the settings.
    """

    Spec: ClassVar[type[Strict]]
    """The settings of the modality in the recipe; a nested class in the subclass."""

    extensions: tuple[str, ...] = ()
    """File endings that `load` reads, lower case, with the dot."""

    measure: str = "error"
    """Name and unit of what `score` returns, e.g. `PSNR dB`."""

    higher_is_better: bool = False

    centre: Literal["mean", "median"] = "mean"
    """Which constant is best under the measure, for baselines: the median under absolute errors."""

    is_map: ClassVar[bool] = False
    """True where the last two axes of a raw sample are height and width, which the random crop is drawn for."""

    @property
    def follows(self) -> frozenset[str]:
        """Random decisions about the pictures of a sample, `crop` and `flip`, after which `fit` still says the truth.

        A crop that does not concern a signal leaves it true; a flip makes all wrong that tells left from right and
        can't be mirrored, as a sentence.
        """
        return frozenset({"crop", "flip"} if self.is_map else {"crop"})

    padding: ClassVar[float | None] = None
    """What fills up shorter samples of a batch (NaN for values, -1 for ids); None: all have the same size."""

    is_inline: ClassVar[bool] = False
    """True where a manifest may hold the sample itself (a sentence) instead of a path."""

    is_structured: ClassVar[bool] = False
    """True where a manifest in .jsonl may hold the sample as a list or an object of JSON."""

    reads: str = ""
    """Type of the signal that a source gives it, where that is not its own: features are made of images."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    @classmethod
    def resolve(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Put the content of files in the place of their paths, so that a model's config needs no file."""
        return settings

    @property
    def from_label(self) -> str | None:
        """Name of the data's label (`Sample.labels`) that its samples are made of; None: they are signals."""
        return None

    @property
    @abstractmethod
    def signal(self) -> Signal:
        """What `normalise` returns, for the tokenizer."""

    @abstractmethod
    def blank(self, count: int) -> Tensor:
        """Return a raw batch of zeros of the usual size: the shape and type of what `fit` returns, stacked."""

    @abstractmethod
    def load(self, file: File) -> Any:
        """Read one file, given by path or as a binary file with a name, into a sample.

        Raises any exception whose text says what is wrong with the file.
        """

    def example_samples(self) -> list[Any]:
        """Return a few different samples that `cut` takes, for `m3 plugin check`; none: random ones are tried."""
        return []

    def cut(self, sample: Any, moment: float) -> Any:
        """Take the part of a recording that the model reads: `moment` 0 is the first possible one, 1 the last.

        All modalities of a sample share the moment, so that sound stays with its video.
        """
        return sample

    def times(self, sample: Any) -> Tensor | None:
        """Return seconds (T,) of the steps along the first axis of `signal.size`, where they are known."""
        return None

    @abstractmethod
    def to_raw(self, sample: Any) -> Tensor:
        """Check one sample (array, tensor, PIL image, sentence) and make it a tensor without batch axis."""

    @abstractmethod
    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Bring a raw sample to the size the model reads: this crop of it."""

    @abstractmethod
    def normalise(self, raw: Tensor) -> Tensor:
        """Turn a raw batch (B, ...) into what the tokenizer reads, on the tensor's own device."""

    def pixels(self, signal: Tensor) -> Tensor:
        """Undo `normalise` for networks that look at pictures: (B, C, H, W) -> (B, 3, H, W) in [0, 1].

        Raises:
            M3Error: it is no picture.
        """
        raise M3Error(f"`{type(self).__name__}` holds no pictures that a teacher could look at; use `image`.")

    def groups(self, signal: Tensor) -> Tensor | None:
        """Return which positions only make sense together (the pieces of a word), for masks that hide them whole.

        Args:
            signal: (B, ...) as `normalise` returns it.

        Returns:
            (B, *size) int64 in [0, positions), equal numbers of a sample belong together; a position that does
            not exist is never together with one that does. None: every position stands alone.
        """
        return None

    def statistics(self, raw: Tensor) -> Tensor | None:
        """Return count, sum and sum of squares (3, C) of a raw batch in the unit of `mean` and `std`, if there are."""
        return None

    @abstractmethod
    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw one normalised or predicted signal as uint8 (H, W, 3).

        Args:
            signal: as `normalise` returns it, no batch axis.
            is_known: (*size) bool, False for positions to be drawn as hidden; None: all are known.
        """

    @abstractmethod
    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Return sums over the batch that add up over batches; `finish_score` turns them into the measure.

        Args:
            predicted: (B, ...) as the tokenizer's `detokenize` returns it.
            truth: the same shape.
            weight: (B, *size) bool, True where the prediction counts.
        """

    @abstractmethod
    def finish_score(self, sums: Tensor) -> float:
        """Turn the added sums of `score` into the measure."""


class Tokenizer(nn.Module, ABC):
    """Raw tensor to tokens and back. `tokenize` has no parameters; `embed` holds the learned projection."""

    Spec: ClassVar[type[Strict]]
    """The settings of the tokenizer in the recipe; a nested class in the subclass."""

    value_width: int
    """P, the values per token that `tokenize` returns."""

    output_width: int
    """Numbers per token that a head must predict (P, or P times the number of classes)."""

    axes: int
    """A, the number of position axes."""

    reference: tuple[int, ...] = ()
    """Tokens along each position axis at the size the model is built for; empty for free coordinates."""

    is_lossless: ClassVar[bool] = True
    """True where `detokenize` gives back exactly what `tokenize` cut; False where tokens keep less (a codebook)."""

    def __init__(self, spec: Any, signal: Signal, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.signal = signal
        self.width = width
        self.positions: dict[str, Any] = {"type": "sincos"}
        """The `positions` of the modality's recipe entry; set by the model before anything is built on them."""
        self.tower: Any = None
        """The `BackboneSpec` of the transformer that reads the modality; set by the model like `positions`."""
        self.modality: Any = None
        """The `Modality` whose signals it cuts; set by the model like `positions`."""
        self.mask_values: nn.Parameter | None = None
        """(1, P) learned values that stand in for those of hidden tokens; None: a learned vector (1, D) does."""
        self.pinned: dict[str, Any] = {}
        """Settings that are known only once it is built, e.g. the hash of frozen weights; saved in the config."""

    def reads(self, signal: Signal) -> bool:
        """Return True if it can read another modality's signal too, for `tokenizer: {same_as: ...}`."""
        return signal._replace(size=()) == self.signal._replace(size=()) and len(signal.size) == len(self.signal.size)

    @abstractmethod
    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Cut a normalised signal (B, ...) into tokens with values (B, N, P).

        Args:
            signal: as `Modality.normalise` returns it.
            times: (B, T) seconds of the steps along the first axis of the size, where they are known.
        """

    @abstractmethod
    def embed(self, values: Tensor) -> Tensor:
        """Project token values (B, S, P) to the model's width (B, S, D)."""

    @abstractmethod
    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put token values (B, N, P) at positions (1 or B, N, A) together to a signal of `size`."""

    @abstractmethod
    def decode(self, output: Tensor) -> Tensor:
        """Turn what a head predicts (B, N, output_width) into token values (B, N, P)."""

    def tied_weight(self) -> Tensor:
        """Return the embedding's weight (output_width, D) for a head that shares it."""
        raise M3Error(
            f"tokenizer `{type(self).__name__.lower()}` has no single weight that a head could share; remove `tied`."
        )


class View(NamedTuple):
    """These modalities, under this mask, encoded together. Equal views are encoded once per step.

    Attributes:
        modalities: names, in the order in which their tokens are joined.
        masking: the settings of the selection, as canonical JSON so that views can be compared.
        swap: the settings of `m3.partners.Swap` as JSON where some samples borrow a modality from another; else empty.
        layers: numbers of blocks whose outputs are kept in `Encoded.layers`.
        is_teacher: encoded by the moving average of the model that `train.ema` keeps, without gradient.
    """

    modalities: tuple[str, ...]
    masking: str
    swap: str = ""
    layers: tuple[int, ...] = ()
    is_teacher: bool = False


class Objective(nn.Module, ABC):
    """Turns encoded views into a loss. It declares the views; the model encodes each distinct one once.

    Fresh weights are the network's business: matrices xavier-uniform, tokens and embeddings N(0, 0.02), biases and
    other vectors 0. A module whose numbers start elsewhere sets its own in a method `init_own_weights`.
    """

    Spec: ClassVar[type[Strict]]
    """The settings of the objective in the recipe; a nested class in the subclass."""

    views: tuple[View, ...]

    part_names: tuple[str, ...]
    """Names of the parts of the loss, in the order in which `forward` returns them."""
    marks: Any = None  # the `m3.positions.Marks` that the network adds to tokens; set by the model

    def __init__(self) -> None:
        super().__init__()
        self.pinned: dict[str, Any] = {}
        """Settings that are known only once it is built, as those of `Tokenizer`; saved in the config."""

    @property
    def predicts(self) -> str:
        """What it learns to say, in a few words, for tables."""
        return ", ".join(self.part_names)

    def borrow(self, others: dict[str, Objective]) -> None:
        """Take over parts of other objectives; called once, when all of the model's are built.

        A part that is lent stays the lender's: it must not be registered a second time.
        """

    @abstractmethod
    def forward(self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]) -> Loss:
        """Compute the loss. Every parameter of the objective takes part in the graph, also where nothing counts."""

    @abstractmethod
    def counts(self, plans: dict[View, MaskPlan], tokens: dict[str, Tokens]) -> dict[str, Tensor]:
        """Return the `count` of every part that `forward` will return, from the plans alone.

        The trainer adds them over all micro-batches and ranks before the first backward pass.
        """

    def after_step(self) -> None:
        """Move what learns without gradients; called by every process after each optimizer step."""


class Coupled(Objective):
    """An objective whose loss joins the samples of the whole step, also those of other micro-batches and processes.

    The gradient of a sample's own rows, summed over all samples, is the gradient of the whole; so a process needs the
    rows of the others only as numbers.
    """

    @abstractmethod
    def rows(self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]) -> dict[str, Tensor]:
        """Return what the other samples must know of each sample of the batch: name -> (B, ...)."""

    @abstractmethod
    def forward(  # type: ignore[override]  # the whole step's rows come on top
        self, encoded: dict[View, Encoded], tokens: dict[str, Tokens], pool: Pool | None = None
    ) -> Loss:
        """Compute this batch's share of the loss.

        Args:
            encoded: as for any objective.
            tokens: as for any objective.
            pool: the rows of all samples of the step; None: the batch is all there is, on every process.
        """


class Embedder(Objective):
    """An objective that brings several sides of a sample into one space, where they can be compared."""

    side_views: dict[str, View]
    """Side -> what its encoder sees in training."""

    @abstractmethod
    def embed(self, side: str, encoded: Encoded) -> Tensor:
        """Return unit vectors (B, E) of one side."""


class Pool(NamedTuple):
    """The rows of all samples of a step, without gradient.

    Attributes:
        rows: name -> (G, ...) in the order of the run.
        start: place of this batch's first sample among the G.
    """

    rows: dict[str, Tensor]
    start: int


class Predictor(Objective):
    """An objective that predicts signals, so that they can be drawn and measured."""

    view: View | None
    """What its encoder sees; None: it reads the tokens itself, all of them."""

    modality_of: dict[str, str]
    """Target -> the modality it is a prediction of; targets that are no signals (a teacher's features) are left out."""

    is_relative: dict[str, bool]
    """Target -> True when its values say nothing about a token's mean and contrast (normalised patches)."""

    @abstractmethod
    def predict(self, name: str, encoded: Encoded, tokens: dict[str, Tokens], index: Tensor) -> Tensor:
        """Predict target `name` at the tokens index (B, T) -> (B, T, output width)."""

    def place_of(self, name: str) -> str:
        """Return the modality whose hidden tokens are the places that target `name` is predicted at."""
        return self.modality_of[name]

    @abstractmethod
    def restore(self, name: str, output: Tensor, tokens: Tokens) -> Tensor:
        """Turn predictions (B, N, output width) for all tokens into what `decode` reads; for a relative target
        with mean and contrast of the true tokens.
        """

    @abstractmethod
    def truth(self, name: str, tokens: Tokens) -> Tensor:
        """Return what target `name` is compared with, for all tokens of its modality (B, N, P)."""
