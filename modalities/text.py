"""Sentences, as ids of a vocabulary.

Letters: B batch, L tokens, K entries of the vocabulary.
"""

from __future__ import annotations

from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from m3.data.words import describe, open_vocabulary
from m3.drawing import written
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict

LINE, LINES = 24, 6
"""Letters of a line and lines of a picture."""


class Text(Modality):
    """Raw: int32 (L,) ids, as many as the sentence has. Normalised: int64 (B, L), -1 behind the end."""

    class Spec(Strict):
        """Settings of `type: text`.

        Attributes:
            vocabulary: a list of whole words; the path of a `tokenizer.json` (WordPiece, BPE, Unigram) or of a
                sentencepiece `.model`; or `open_clip:` for CLIP's. A file's content goes into the config.
            length: L that the model is built for; longer sentences are cut.
            sentinels: ids that stand for hidden spans, further ones behind those of the vocabulary (T5: 100).
            first_sentinel: id of the first where they are entries of the vocabulary itself, one behind the other (4M:
                199 from 5 on); null: they are none.
            start: token in front of every sentence, e.g. CLIP's `<start_of_text>`; null: none.
            end: token behind every sentence, also behind one that is cut, e.g. CLIP's `<end_of_text>`.
            fill: token that fills every sentence up to `length` and is read like any other (FLIP's `[PAD]`, SigLIP's
                `</s>`); null: sentences keep their own lengths.
            mirrors: sentences still hold when their picture is mirrored, so `data.flip` is allowed (FLIP's captions).
        """

        vocabulary: str | list[str]
        length: PositiveInt = 64
        sentinels: NonNegativeInt = 0
        first_sentinel: NonNegativeInt | None = None
        start: str | None = None
        end: str | None = None
        fill: str | None = None
        mirrors: bool = False

    extensions = (".txt",)
    measure = "accuracy"
    higher_is_better = True
    padding = -1
    is_inline = True

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.vocabulary = open_vocabulary(describe(spec.vocabulary))
        self._start, self._end = self._numbers("start"), self._numbers("end")
        self._fill = self._numbers("fill")
        self._further = spec.sentinels if spec.first_sentinel is None else 0
        if spec.first_sentinel is not None and spec.first_sentinel + spec.sentinels > self.vocabulary.size:
            raise M3Error(
                f"text.first_sentinel: {spec.sentinels} sentinels from id {spec.first_sentinel} on do not lie in a "
                f"vocabulary of {self.vocabulary.size} entries; lower one of them."
            )
        if spec.length <= len(self._start + self._end):
            raise M3Error(f"text.length: {spec.length} leaves no room beside `start` and `end`; raise it.")

    @classmethod
    def resolve(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Put the content of the vocabulary's file in the place of its path."""
        return {**settings, "vocabulary": describe(settings["vocabulary"])}

    def _numbers(self, key: str) -> list[int]:
        """Return the id of the token that a setting names, as a list; an empty one where it names none."""
        token = getattr(self.spec, key)
        if token is None:
            return []
        number = self.vocabulary.number(token)
        if number is None:
            raise M3Error(f"text.{key}: `{token}` is no token of the vocabulary; write one as the vocabulary does.")
        return [number]

    @property
    def follows(self) -> frozenset[str]:
        """A sentence tells left from right, if `mirrors` does not say otherwise."""
        return frozenset({"crop", "flip"} if self.spec.mirrors else {"crop"})

    @property
    def signal(self) -> Signal:
        """Ids (B, L)."""
        sentinels = {"sentinels": self.spec.sentinels, "first_sentinel": self.spec.first_sentinel}
        return Signal(
            "classes", 1, (self.spec.length,), self.vocabulary.size + self._further, has_gaps=True, **sentinels
        )

    @property
    def _sentinels(self) -> range:
        """Ids of the sentinels, perhaps none."""
        return self.signal.sentinel_ids or range(0)

    def sentinel(self, number: int) -> int:
        """Return the id of a sentinel, numbered from 0.

        Raises:
            M3Error: there are fewer.
        """
        if not 0 <= number < self.spec.sentinels:
            raise M3Error(
                f"a text has no sentinel {number}: there are {self.spec.sentinels}, numbered from 0; raise "
                f"`sentinels` in its settings."
            )
        return self._sentinels[number]

    def decode(self, ids: list[int]) -> str:
        """Write ids out as a sentence; sentinels are <S0>, <S1> ..., and -1 is left out."""
        written, sentinels = [], self._sentinels
        for is_sentinel, run in groupby((i for i in ids if i >= 0), key=lambda i: i in sentinels):
            part = list(run)
            written += [f"<S{i - sentinels.start}>" for i in part] if is_sentinel else [self.vocabulary.decode(part)]
        return " ".join(part.strip() for part in written)

    def blank(self, count: int) -> Tensor:
        """Return sentences of the first word, int32 (B, L)."""
        return torch.zeros(count, self.spec.length, dtype=torch.int32)

    def load(self, file: File) -> str:
        """Read a text file in UTF-8."""
        data = file.read_bytes() if isinstance(file, Path) else file.read()
        try:
            return data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise M3Error(f"a text must be in UTF-8, but its byte {error.start} is not.") from error

    def to_raw(self, sample: Any) -> Tensor:
        """Read a sentence, or ids (L,) -> int32 (L,), cut to `length`; only sentences get `start`, `end` and `fill`.

        Sentinels are for masking to set, not here.
        """
        ids = np.asarray(self.vocabulary.encode(sample) if isinstance(sample, str) else sample)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise M3Error(
                f"a text must be a sentence or integer ids of shape (length,), got {ids.dtype} of shape {ids.shape}."
            )
        if not ids.size:
            raise M3Error("a text holds no words; leave the sample out.")
        if ids.min() < 0 or ids.max() >= self.vocabulary.size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise M3Error(f"a text holds id {wrong}, but the vocabulary has {self.vocabulary.size} entries.")
        if isinstance(sample, str):
            ids = np.asarray(self._framed(ids.tolist()))
        return torch.from_numpy(ids[: self.spec.length].astype(np.int32))

    def _framed(self, words: list[int]) -> list[int]:
        """Cut a sentence so that there is room for `start` and `end`, put them to it and fill it up."""
        ids = self._start + words[: self.spec.length - len(self._start + self._end)] + self._end
        return ids + self._fill * (self.spec.length - len(ids))

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Keep a sentence as it is."""
        return raw

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn ids (B, L) into int64."""
        return raw.long()

    @cached_property
    def _edges(self) -> tuple[Tensor, Tensor]:
        """Which ids begin and which end a word, bool (K + 1,); the last entry is that of -1.

        Further sentinels and padding stand alone; of the vocabulary's own entries it says so itself.
        """
        begins, ends = self.vocabulary.word_edges()
        alone = [True] * (self._further + 1)
        return torch.tensor([*begins, *alone]), torch.tensor([*ends, *alone])

    def groups(self, signal: Tensor) -> Tensor:
        """Number the words of (B, L) ids, the pieces of a word alike -> int64 (B, L)."""
        begins, ends = (edges.to(signal.device)[signal] for edges in self._edges)
        is_first = begins[:, 1:] | ends[:, :-1]
        return torch.cat([torch.zeros_like(signal[:, :1]), is_first.long()], dim=1).cumsum(1)

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Write (L,) ids out; hidden words are dots."""
        ids = signal.cpu().tolist()
        known = [True] * len(ids) if is_known is None else is_known.cpu().tolist()
        words = [self.decode([i]) if k else "..." for i, k in zip(ids, known, strict=True) if i >= 0]
        lines = [""]
        for word in words:
            if lines[-1] and len(lines[-1]) + 1 + len(word) > LINE:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        return written(lines, LINE, LINES)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Count right words and words -> (2,)."""
        counts = weight.bool() & (truth >= 0)
        return torch.stack([((predicted == truth) & counts).sum(), counts.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Share of words that are right, in [0, 1]."""
        return float(sums[0] / sums[1])
