"""M3Tokenizer: a trained autoencoder as a tokenizer, from signals to code numbers and back.

Letters: B batch, M codes, H heads, n = M H code numbers of a sample, K codes of a codebook.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.model import M3Model
from m3.objectives.autoencode import Autoencode
from m3.plugins import Modality, Tokenizer
from m3.types import Batch, Tokens

WEIGHTS = "model.safetensors"


class M3Tokenizer:
    """The codes of one modality, learned by a recipe with an `autoencode` objective.

    It is no `nn.Module`: a model that holds one neither trains nor saves it.

    Attributes:
        model: the autoencoder, in evaluation mode, without gradients.
        name: of the modality in the model.
        modality: it.
        codes: K.
        grid: codes along each axis at the size the model was built for; with H > 1 heads the last axis is H.
        is_two_way: False: it only makes codes, and `decode` raises M3Error.
    """

    def __init__(self, model: M3Model) -> None:
        coders = [part for part in model.objectives.values() if isinstance(part, Autoencode)]
        if len(coders) != 1:
            raise M3Error(
                f"a tokenizer is a model with one `autoencode` objective, this one has {len(coders)}; "
                f"train one, e.g. with the recipe tokenizer_image_fsq."
            )
        self.model = model.eval().requires_grad_(False)
        self._coder = coders[0]
        self.name = self._coder.spec.of
        self.modality: Modality = model.modalities[self.name]
        quantiser = self._coder.quantiser
        self.codes, self.is_two_way = quantiser.codes, self._coder.is_two_way
        self.grid = (*self._coder.coder.reference, *([quantiser.heads] if quantiser.heads > 1 else []))

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> M3Tokenizer:
        """Load a tokenizer from the model folder of a run or from the Hub, in float32 unless `dtype` says otherwise.

        Raises:
            M3Error: there is no model, or it is no tokenizer.
        """
        kwargs.setdefault("dtype", torch.float32)
        try:
            return cls(M3Model.from_pretrained(path, **kwargs))
        except OSError as error:
            raise missing(path, error) from error

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        """Save config and weights; what is loaded again gives the same code numbers."""
        self.model.save_pretrained(path, **kwargs)

    def to(self, device: torch.device | str) -> M3Tokenizer:
        """Move the model."""
        torch.nn.Module.to(self.model, device)
        return self

    @torch.no_grad()
    def encode(self, given: Batch | Tensor) -> Tensor:
        """Return the code numbers (B, n) int64 in [0, K); row by row, the heads of a code side by side.

        Args:
            given: a batch of raw signals, as `M3Processor` makes it, or a batch (B, ...) of signals as the
                modality's `normalise` returns them.
        """
        if isinstance(given, Batch):
            if self.name not in given.signals:
                raise M3Error(f"the batch has no `{self.name}`, which the tokenizer reads; add it.")
            tokens = self.model.tokenise(given.to(self.model.device))[self.name]
        else:
            kind = self.model.dtype if given.is_floating_point() else given.dtype
            tokens = self._tokenizer.tokenize(given.to(self.model.device, kind))
        return self._coder.indices(tokens)

    @torch.no_grad()
    def decode(self, indices: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Turn code numbers (B, n) into signals (B, ...), as the modality's `normalise` returns them.

        Args:
            indices: int64 in [0, K).
            size: of the signal along its position axes; the one the model was built for if left out.
        """
        size = size or self.modality.signal.size
        places = self._places(size)
        values = self._coder.reconstruct(indices.to(self.model.device), places)
        return self._tokenizer.detokenize(values, places.positions, size)

    def _places(self, size: tuple[int, ...]) -> Tokens:
        """Return the tokens of an empty signal: their positions and number."""
        signal = self.modality.signal
        if signal.kind == "classes":
            empty = torch.zeros(1, *size, dtype=torch.long, device=self.model.device)
        else:
            empty = torch.zeros(1, *size, device=self.model.device).unsqueeze(signal.channel_axis)
            empty = empty.repeat_interleave(signal.channels, signal.channel_axis)
        return self._tokenizer.tokenize(empty)

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.model.tokenizers[self.name]  # type: ignore[return-value]  # ModuleDict forgets the class


def describe(path: str | Path, config: dict[str, Any] | None = None) -> M3Tokenizer:
    """Return the tokenizer of a folder without memory for its weights, for its shape.

    Args:
        path: model folder of the tokenizer's run.
        config: the tokenizer's, as a model that uses it has noted it; it stands in where the folder is gone.

    Raises:
        M3Error: there is none.
    """
    if config is not None and not (Path(path) / WEIGHTS).is_file():
        described = M3Config.from_dict(config)
    else:
        try:
            described = M3Config.from_pretrained(path)
        except OSError as error:
            raise missing(path, error) from None
    with torch.device("meta"):
        return M3Tokenizer(M3Model(described))


def pin(
    path: str | Path, expected: str | None = None, config: dict[str, Any] | None = None
) -> tuple[M3Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a folder without memory for its weights, and what a model notes of it in its config.

    A model that has both notes is built without the folder; what has to encode or decode then says that it lacks it.

    Args:
        path: model folder of the tokenizer's run.
        expected: the noted hash of its weights, so that a later change is noticed; None: any.
        config: the tokenizer's noted config.

    Raises:
        M3Error: there is none, or it is another one.
    """
    described = describe(path, config)
    is_gone = config is not None and expected is not None and not (Path(path) / WEIGHTS).is_file()
    found = expected if is_gone else check_fingerprint(path, expected)
    return described, {"hash": found, "config": described.model.config.to_diff_dict()}


def load_pinned(path: str | Path, expected: str) -> M3Tokenizer:
    """Load the tokenizer whose hash a model has noted.

    Raises:
        M3Error: there is none, or it is another one.
    """
    check_fingerprint(path, expected)
    return M3Tokenizer.from_pretrained(path)


def fingerprint(path: str | Path) -> str:
    """Return a hash of the weights in a model folder.

    Raises:
        M3Error: there are none.
    """
    weights = Path(path) / WEIGHTS
    if not weights.is_file():
        raise missing(path)
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def check_fingerprint(path: str | Path, expected: str | None) -> str:
    """Return the hash of the weights in a model folder.

    Raises:
        M3Error: there are none, or they have another hash than the `expected` one.
    """
    found = fingerprint(path)
    if expected not in (None, found):
        raise M3Error(
            f"the tokenizer in `{path}` is not the one this model was built with (hash {found}, not "
            f"{expected}); put the right one there or remove `hash` to start anew."
        )
    return found


def missing(path: str | Path, error: OSError | None = None) -> M3Error:
    """Say that there is no tokenizer at a path."""
    cause = f" ({str(error).splitlines()[0]})" if error else ""
    return M3Error(
        f"there is no tokenizer in `{path}`{cause}; give the model folder of a run with an `autoencode` objective, "
        f"e.g. runs/tokenizer_image_fsq/model after `m3 train tokenizer_image_fsq`; a relative path starts at the "
        f"current folder."
    )
