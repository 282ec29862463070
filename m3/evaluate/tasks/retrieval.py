"""Finding a sample's other side among those of all held-out samples.

Letters: N candidates, E width of the shared space, C queries of a chunk.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from m3.errors import M3Error, nearest
from m3.evaluate.bootstrap import of_hits
from m3.evaluate.task import Row, Task
from m3.model import M3Model
from m3.plugins import Embedder, Strict
from m3.types import Batch, Tokens

CHUNK = 1024
"""Queries whose similarities to all candidates are held at once."""


class Retrieval(Task):
    """Recall@k: the share of samples whose other side is among the k candidates that are most alike.

    The candidates are the `evaluate.samples` held-out samples that have both sides. Candidates that are exactly as
    alike count as if they stood in random order, so equal captions help nobody.
    """

    class Spec(Strict):
        """Settings of `type: retrieval`.

        Attributes:
            objective: name of the contrastive objective; the first one if left out.
            sides: two of its sides; every pair of them if left out. Both ways are measured.
            k: number of candidates that are looked at, or several such numbers.
            ties: which candidates are right: `index`: the sample's own alone (as published numbers count); `any`: also
                those of samples that are the same on one of the sides, such as two scenes with one caption.
        """

        objective: str | None = None
        sides: tuple[str, str] | None = None
        k: PositiveInt | tuple[PositiveInt, ...] = Field(default=1)
        ties: Literal["index", "any"] = "index"

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        self.embedder = embedder_of(model, spec.objective, f"evaluate.tasks.{name}")
        sides = list(self.embedder.side_views)
        for side in spec.sides or ():
            if side not in sides:
                raise M3Error(f"evaluate.tasks.{name}.sides: there is no side `{side}`.{nearest(side, sides)}")
        every = [(a, b) for i, a in enumerate(sides) for b in sides[i + 1 :]]
        self.pairs = [spec.sides] if spec.sides else every
        self.counts = (spec.k,) if isinstance(spec.k, int) else spec.k
        self._vectors: dict[str, list[Tensor]] = {}
        self._contents: dict[str, list[bytes]] = {}
        self._keys: dict[str, list[Tensor]] = {}

    def add(self, batch: Batch) -> None:
        """Keep the vectors of held-out samples."""
        found = self.model.embed(batch, self.spec.objective)
        tokens = self.model.tokenise(batch) if self.spec.ties == "any" else {}
        for side, vectors in found.items():
            self._vectors.setdefault(side, []).append(vectors)
            self._keys.setdefault(side, []).append(batch.keys.cpu())
            if tokens:
                own = [tokens[name] for name in self.embedder.side_views[side].modalities if name in tokens]
                self._contents.setdefault(side, []).extend(_contents(own))

    def rows(self) -> list[Row]:
        """Return one row per direction and k."""
        vectors = {side: torch.cat(parts).float() for side, parts in self._vectors.items()}
        contents = {side: _numbered(content, vectors[side].device) for side, content in self._contents.items()}
        keys = {side: torch.cat(parts) for side, parts in self._keys.items()}
        self._vectors, self._contents, self._keys = {}, {}, {}
        rows = []
        for a, b in (pair for pair in self.pairs if pair[0] in vectors and pair[1] in vectors):
            is_there = ~(vectors[a].isnan() | vectors[b].isnan()).any(1)
            both = {side: vectors[side][is_there] for side in (a, b)}
            same = [contents[side][is_there] for side in (a, b)] if contents else []
            for queries, candidates in ((a, b), (b, a)) if int(is_there.sum()) else ():
                for k in self.counts:
                    hits, chance = (x.cpu() for x in recall(both[queries], both[candidates], k, same))
                    scores = of_hits(keys[a][is_there.cpu()], hits, chance)
                    title = f"{self.name}, {queries} to {candidates}" + (f" @{k}" if len(self.counts) > 1 else "")
                    measure = f"recall@{k} of {len(both[a])}"
                    rows.append(Row.of(scores, title, measure, "chance", True, self.seed))
        return rows


@torch.no_grad()
def recall(queries: Tensor, candidates: Tensor, k: int, same: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Return of each query (N,), in [0, 1], whether it finds a right candidate and how likely chance does.

    Their means are recall@k and that of chance.

    Args:
        queries: (N, E) unit vectors.
        candidates: (N, E) unit vectors; row i is right for query i.
        k: candidates that are looked at; equally alike ones are in random order, so a part of a hit may count.
        same: (N,) numbers each; candidates with a number equal to the query's are right, too.
    """
    hits, chances = [], []
    total = len(candidates)
    for first in range(0, total, CHUNK):
        likeness = queries[first : first + CHUNK] @ candidates.T  # (C, N)
        number = torch.arange(first, first + len(likeness), device=likeness.device)
        is_right = torch.zeros_like(likeness, dtype=torch.bool)
        is_right[torch.arange(len(number)), number] = True
        for content in same or ():
            is_right |= content[number].unsqueeze(1) == content
        best = likeness.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
        above = (likeness > best).sum(1)  # certainly before the best right one, all of them wrong
        right_level = ((likeness == best) & is_right).sum(1)
        wrong_level = ((likeness == best) & ~is_right).sum(1)
        hits.append(_hit(k - above, right_level, right_level + wrong_level))
        chances.append(_hit(torch.full_like(above, k), is_right.sum(1), torch.full_like(above, total)))
    return torch.cat(hits), torch.cat(chances)


def _hit(drawn: Tensor, right: Tensor, total: Tensor) -> Tensor:
    """Return the probability that `drawn` of `total` things in random order hold one of the `right` ones, each (C,)."""
    drawn = drawn.clamp(min=0).minimum(total).double()
    miss = torch.ones_like(drawn)
    for i in range(int(right.max())):  # the i-th right one is behind the drawn ones, as are those before it
        left = (total - drawn - i) / (total - i).clamp(min=1)
        miss = torch.where(i < right, miss * left.clamp(min=0), miss)
    return 1 - miss


def embedder_of(model: M3Model, name: str | None, where: str) -> Embedder:
    """Return the contrastive objective of a model, the first or a named one."""
    found = {n: o for n, o in model.objectives.items() if isinstance(o, Embedder)}
    if not found or (name is not None and name not in found):
        wanted = f" `{name}`" if name else ""
        raise M3Error(f"{where}: the model has no contrastive objective{wanted}.{nearest(name or '', found)}")
    return found[name] if name is not None else next(iter(found.values()))


def _contents(parts: list[Tokens]) -> list[bytes]:
    """Return a fingerprint of what each sample holds."""
    return [b"".join(_fingerprint(part, i) for part in parts) for i in range(len(parts[0].values))]


def _fingerprint(part: Tokens, sample: int) -> bytes:
    values = part.values[sample] if part.is_valid is None else part.values[sample, part.is_valid[sample]]
    return hashlib.blake2b(values.cpu().numpy().tobytes(), digest_size=16).digest()


def _numbered(contents: list[bytes], device: torch.device) -> Tensor:
    """Return (N,) int64, equal where the contents are."""
    numbers = {content: i for i, content in enumerate(dict.fromkeys(contents))}
    return torch.tensor([numbers[content] for content in contents], device=device)
