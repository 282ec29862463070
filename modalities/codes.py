"""Codes of a trained tokenizer as a signal of their own, as `m3 tokenize` stores them (4M, Mizrahi et al. 2023).

Letters: B batch, K codes of the codebook, *grid code numbers along each axis of a sample.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3.codebook import spread_codes
from m3.drawing import hide
from m3.errors import M3Error
from m3.parts import type_name
from m3.plugins import Crop, File, Modality, Signal, Strict, ending

if TYPE_CHECKING:
    from m3.tokenizer_model import M3Tokenizer

DRAWN = 8
"""Pixels of one code in a picture of code numbers."""


class Codes(Modality):
    """Raw: int32 (*grid) in [0, K), -1 behind the end of a recording. Normalised: the same, int64 (B, *grid).

    A sample is an array of code numbers, or a signal that the tokenizer reads (a picture, a sound), which is then
    encoded, whole, when it is loaded. So a model that trained on shards of codes reads pictures too.
    Pictures and scores are those of the decoded signals; the truth is what the true codes stand for. Of a tokenizer
    without a decoder they are of the code numbers: a colour for each, and the share of right ones.
    """

    class Spec(Strict):
        """Settings of `type: codes`; its tokenizer is `embedding`.

        Attributes:
            path: model folder of the tokenizer's run.
            hash: of its weights, filled in when the model is built, so that a later change is noticed.
            config: the tokenizer's, filled in likewise: a model that is given code numbers needs no tokenizer.
        """

        path: str
        hash: str | None = None
        config: dict[str, Any] | None = None

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        from m3.tokenizer_model import pin

        described, notes = pin(spec.path, spec.hash, spec.config)
        self._stamp: str = notes["hash"]
        self.inner, self.codes, self.grid = described.modality, described.codes, described.grid
        self.extensions = tuple(dict.fromkeys((".npy", *self.inner.extensions)))
        self.is_two_way = described.is_two_way
        self.measure, self.higher_is_better = self.inner.measure, self.inner.higher_is_better
        if not self.is_two_way:
            self.measure, self.higher_is_better = "accuracy of codes", True
        self.reads = self.inner.reads or type_name(type(self.inner).__name__)

    @classmethod
    def resolve(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Fill in the tokenizer's config and the hash of its weights."""
        from m3.tokenizer_model import pin

        return {**settings, **pin(settings["path"], settings.get("hash"), settings.get("config"))[1]}

    @property
    def signal(self) -> Signal:
        """Code numbers (B, *grid)."""
        return Signal("classes", 1, self.grid, self.codes, has_gaps=self.inner.padding is not None)

    @property
    def follows(self) -> frozenset[str]:
        """Codes of a whole signal can be neither cut nor mirrored."""
        return frozenset()

    def blank(self, count: int) -> Tensor:
        """Return code 0 everywhere, int32 (B, *grid)."""
        return torch.zeros(count, *self.grid, dtype=torch.int32)

    def load(self, file: File) -> Any:
        """Read a .npy array, or a file that the tokenizer's modality reads."""
        return np.load(file, allow_pickle=False) if ending(file) == ".npy" else self.inner.load(file)

    def cut(self, sample: Any, moment: float) -> Any:
        """Take the part of a recording that the tokenizer reads; codes are that part already."""
        return sample if self._are_codes(sample) else self.inner.cut(sample, moment)

    def to_raw(self, sample: Any) -> Tensor:
        """Check code numbers, or encode a signal -> int32 (*grid)."""
        if self._are_codes(sample):
            codes = torch.as_tensor(np.asarray(sample).astype(np.int64))
        else:
            signal = self.inner.normalise(self.inner.fit(self.inner.to_raw(sample), Crop()).unsqueeze(0))
            codes = self._frozen("cpu").encode(signal).view(-1, *self.grid[1:])
        if codes.min() < 0 or codes.max() >= self.codes:
            raise M3Error(
                f"codes must lie in 0 ... {self.codes - 1}, got {int(codes.min())} to {int(codes.max())}; "
                f"they were made by another tokenizer than `{self.spec.path}`."
            )
        missing = [0, 0] * (codes.ndim - 1) + [0, self.grid[0] - len(codes)]
        return F.pad(codes, missing, value=-1).int()

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Keep codes as they are: they stand for a whole signal."""
        return raw

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn (B, *grid) into int64."""
        return raw.long()

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw what (*grid) codes stand for; places of hidden codes are marked as the tokenizer's modality does."""
        if not self.is_two_way:
            return _coloured(signal.flatten(1), None if is_known is None else is_known.flatten(1))
        hidden = None if is_known is None else spread_codes(is_known.unsqueeze(0), self._size(signal.shape))[0]
        return self.inner.show(self._decoded(signal.unsqueeze(0))[0], hidden)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Compare what (B, *grid) codes stand for, in the measure of the tokenizer's modality."""
        if not self.is_two_way:
            counts = weight.bool() & (truth >= 0)
            return torch.stack([((predicted == truth) & counts).sum(), counts.sum()]).double()
        counts = spread_codes(weight.bool() & (truth >= 0), self._size(truth.shape[1:]))
        return self.inner.score(self._decoded(predicted), self._decoded(truth), counts)

    def finish_score(self, sums: Tensor) -> float:
        """Return the measure of the tokenizer's modality."""
        return self.inner.finish_score(sums) if self.is_two_way else float(sums[0] / sums[1])

    def _decoded(self, codes: Tensor) -> Tensor:
        """Return the signals (B, ...) of codes (B, *grid); where there is none, code 0 stands in."""
        tokenizer = self._frozen(codes.device)
        return tokenizer.decode(codes.flatten(1).clamp(min=0), self._size(codes.shape[1:]))

    def _size(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of the signal that a grid of codes stands for."""
        usual = self.inner.signal.size
        return tuple(n * full // own for n, full, own in zip(grid, usual, self.grid, strict=False))

    def _are_codes(self, sample: Any) -> bool:
        """Tell code numbers from signals: whole numbers on the grid; recordings may be shorter."""
        if not isinstance(sample, np.ndarray | Tensor) or sample.ndim != len(self.grid):
            return False
        is_whole = np.asarray(sample[:0]).dtype.kind in "iu"
        is_as_long = sample.shape[0] == self.grid[0]
        is_shorter = self.inner.padding is not None and 0 < sample.shape[0] < self.grid[0]
        return is_whole and tuple(sample.shape[1:]) == self.grid[1:] and (is_as_long or is_shorter)

    def _frozen(self, device: torch.device | str) -> M3Tokenizer:
        return _load(self.spec.path, self._stamp).to(device)


def _coloured(codes: Tensor, is_known: Tensor | None) -> np.ndarray:
    """Draw code numbers (rows, columns), each in a colour of its own that says nothing more."""
    colours = np.random.default_rng(0).integers(0, 256, (int(codes.max()) + 2, 3), dtype=np.uint8)
    picture = hide(colours[codes.cpu().numpy()], is_known)
    return picture.repeat(DRAWN, 0).repeat(DRAWN, 1)


@cache
def _load(path: str, stamp: str) -> M3Tokenizer:
    """Load a tokenizer once per process; `stamp`, its hash, tells apart what was in the folder one after the other."""
    from m3.tokenizer_model import load_pinned

    return load_pinned(path, stamp)
