"""Quantisers: vectors to code numbers and back. A code number is an index into a finite set of vectors.

Both kinds are used alike: `forward(z) -> (quantised, indices, losses)`, `decode(indices) -> quantised`. Gradients
pass straight through the rounding (Bengio et al. 2013): the encoder gets the gradient of the quantised vector.

Letters: B batch, N tokens, d width of a vector, H heads (parts of a vector with a codebook each), E = d / H, K codes
of a codebook, M = B N vectors, S vectors of the pool, L levels of one dimension.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from m3.codebook import Seen, assigned
from m3.plugins import Strict


class Quantiser(Protocol):
    """What every quantiser of this file provides.

    Attributes:
        width: d.
        codes: K.
        heads: H, code numbers per vector.
        commitment: weight of its loss; 0: it has none.
    """

    width: int
    codes: int
    heads: int
    commitment: float

    def __call__(self, z: Tensor, is_valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise z (B, N, d) -> vectors (B, N, d), indices (B, N * H) int64 in [0, K), losses (B, N)."""
        ...

    def decode(self, indices: Tensor) -> Tensor:
        """Return the vectors (B, N, d) of indices (B, N * H)."""
        ...

    def update(self) -> None:
        """Learn from the vectors of a whole optimizer step; called once after it by every process."""
        ...


class Fsq(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2023): every dimension is bounded and rounded to a few levels.

    Nothing is learned here. With L levels a dimension is tanh(z + s) h - o, rounded, where
    h = (L - 1) (1 + 0.001) / 2, and o = 1/2 for even L, else 0; s = artanh(o / h) lets z = 0 stay at 0 (the paper's
    listing has tan where this inverse of tanh is meant). Divided by floor(L / 2), levels lie in [-1, 1].
    """

    class Spec(Strict):
        """Settings of `type: fsq`.

        Attributes:
            levels: L of each dimension; K is their product (8 x 5 x 5 x 5 = 1000, 8 x 8 x 8 x 6 x 5 = 15360).
            commitment: weight of a loss that brings numbers back from where the bound is flat and passes no gradient:
                there a dimension can be stuck on one level for good. 0: none, as in the paper.
        """

        levels: tuple[int, ...] = Field(default=(8, 5, 5, 5), min_length=1)
        commitment: NonNegativeFloat = 0.0

        @model_validator(mode="after")
        def _at_least_two(self) -> Fsq.Spec:
            if min(self.levels) < 2:
                raise ValueError(f"levels must be 2 or more in every dimension, got {list(self.levels)}")
            return self

    heads = 1
    FLAT = 2.0
    """|x| from which tanh(x) is called flat: it is 0.964 there, with a slope of 0.07."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.width, self.codes, self.commitment = len(spec.levels), math.prod(spec.levels), spec.commitment
        # Saved with the weights: a model that is loaded gets no other values for its buffers.
        self.register_buffer("levels", torch.tensor(spec.levels))
        self.levels: Tensor

    def forward(self, z: Tensor, is_valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise z (B, N, d) -> levels in [-1, 1] (B, N, d), indices (B, N), losses (B, N).

        A loss is the squared distance to where the bound is not flat, mean over d.
        """
        centred = z.float() + torch.atanh(self._offset / self._reach)
        bounded = torch.tanh(centred) * self._reach - self._offset
        rounded = bounded.round()
        quantised = (bounded + (rounded - bounded).detach()) / self._half
        places = rounded.detach().long() + self._half
        losses = (centred.abs() - self.FLAT).relu().square().mean(-1)
        return quantised, (places * self._basis).sum(-1), losses

    def decode(self, indices: Tensor) -> Tensor:
        """Return the levels (B, N, d) in [-1, 1] of indices (B, N); the first dimension counts fastest."""
        places = indices.unsqueeze(-1) // self._basis % self.levels
        return (places - self._half) / self._half

    def update(self) -> None:
        """Do nothing: there is nothing to learn."""

    @property
    def _reach(self) -> Tensor:
        return (self.levels - 1) * (1 + 1e-3) / 2

    @property
    def _offset(self) -> Tensor:
        return (1 - self.levels % 2) / 2

    @property
    def _half(self) -> Tensor:
        return self.levels // 2

    @property
    def _basis(self) -> Tensor:
        return torch.cat([self.levels.new_ones(1), self.levels.cumprod(0)[:-1]])


class Vq(nn.Module):
    """Vector quantisation (van den Oord et al. 2017) with a codebook that follows its vectors by moving averages.

    - The first step's vectors pass unquantised; k-means over a sample of them starts the codebook.
    - Every later step moves each code to the moving average of the vectors assigned to it (van den Oord et al. 2017,
      appendix A.1), counts smoothed after Laplace.
    - A code whose average count falls below a 32nd of the mean (4M's threshold) becomes a random vector of the step,
      at most `REVIVED` codes per step.
    - With H > 1 a vector is cut into H parts with a codebook each, for global vectors (4M's "memcodes").

    Statistics are gathered over all micro-batches of a step, added over processes, and applied once by `update`. The
    sample for k-means and dead codes is drawn by a hash of each vector's number in the global batch. So 1 x 8,
    2 x 4 and two processes choose the same vectors and reach the same codebook, up to the rounding of sums;
    micro-batches and processes must be of equal size, as the trainer's are.
    """

    class Spec(Strict):
        """Settings of `type: vq`.

        Attributes:
            codes: K.
            width: d.
            heads: H; divides `width`.
            cosine: vectors and codes have length 1 (ViT-VQGAN, Yu et al. 2021), so the nearest is by angle.
            decay: of the moving averages per step.
            commitment: weight of the loss that keeps vectors near their codes.
        """

        codes: PositiveInt = 1024
        width: PositiveInt = 32
        heads: PositiveInt = 1
        cosine: bool = True
        decay: float = Field(default=0.99, gt=0, lt=1)
        commitment: NonNegativeFloat = 1.0

        @model_validator(mode="after")
        def _heads_divide_width(self) -> Vq.Spec:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is not divisible by heads {self.heads}; change one of them")
            return self

    REVIVED = 256
    DEAD = 1 / 32
    SMOOTHING = 1e-5
    LLOYD_ITERATIONS = 10
    SAMPLES_PER_CODE = 4

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.width, self.codes, self.heads, self.commitment = spec.width, spec.codes, spec.heads, spec.commitment
        book = self._fitted(torch.randn(spec.heads, spec.codes, spec.width // spec.heads))
        self.register_buffer("book", book)
        self.register_buffer("sums", torch.zeros_like(book))
        self.register_buffer("counts", torch.zeros(spec.heads, spec.codes))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.book: Tensor
        self.sums: Tensor
        self.counts: Tensor
        self.steps: Tensor
        # Of the step that is under way. No buffers: DDP would overwrite them with those of the first process.
        self._seen: Seen | None = None
        self._is_started = False

    def forward(self, z: Tensor, is_valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise z (B, N, d); tokens where is_valid (B, N) is False don't move the codebook.

        Returns:
            Codes (B, N, d), indices (B, N * H) int64, and squared distances to the codes (B, N), mean over d.
        """
        batch, count, width = z.shape
        with torch.autocast("cuda" if z.is_cuda else "cpu", enabled=False):
            full = z.to(torch.promote_types(z.dtype, torch.float32))
            rows = self._fitted(full.reshape(batch * count, self.heads, -1).transpose(0, 1))  # (H, M, E)
            indices = self._nearest(rows.detach(), self.book)
            codes = torch.where(self.steps > 0, _look_up(self.book, indices), rows.detach())
            losses = (rows - codes).square().mean((0, 2)).view(batch, count)
            quantised = rows + (codes - rows).detach()
        if self.training:
            self._record(rows.detach(), indices, is_valid)
        quantised = quantised.transpose(0, 1).reshape(batch, count, width)
        return quantised, indices.t().reshape(batch, count * self.heads), losses

    def decode(self, indices: Tensor) -> Tensor:
        """Return the codes (B, N, d) of indices (B, N * H)."""
        codes = _look_up(self.book, indices.reshape(-1, self.heads).t())
        return codes.transpose(0, 1).reshape(len(indices), -1, self.width)

    @torch.no_grad()
    def update(self) -> None:
        """Start or move the codebook by all vectors since the last call; every process of a run calls it."""
        if self._seen is None:
            return
        seen, self._seen = self._seen.over_processes(), None
        self._is_started = self._is_started or int(self.steps) > 0
        if self._is_started:
            self._move(seen)
            self._revive(seen)
        else:
            self._start(seen)
        self.steps += 1

    def _fitted(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.spec.cosine else x

    def _nearest(self, rows: Tensor, book: Tensor) -> Tensor:
        """Return (H, M) the number of the nearest code: rows (H, M, E), book (H, K, E)."""
        book = self._fitted(book)  # published codes are means of unit vectors, and shorter
        return (rows @ book.transpose(1, 2) - book.square().sum(-1).unsqueeze(1) / 2).argmax(-1)

    @torch.compiler.disable()
    def _record(self, rows: Tensor, indices: Tensor, is_valid: Tensor | None) -> None:
        """Add the vectors of one micro-batch to what the step has seen."""
        if self._seen is None:
            pool = self.codes * self.SAMPLES_PER_CODE if not self._is_started else min(self.codes, self.REVIVED)
            self._seen = Seen(self.counts, self.sums, pool)
        self._seen.add(rows, indices, None if is_valid is None else is_valid.flatten(), self.steps)

    def _start(self, seen: Seen) -> None:
        """Run k-means (Lloyd 1982) over the pool, on every process the same."""
        pool = seen.pool[seen.keys >= 0].transpose(0, 1)  # (H, S, E)
        book = pool[:, torch.arange(self.codes, device=pool.device) % pool.shape[1]]
        counts = torch.zeros_like(self.counts)
        for _ in range(self.LLOYD_ITERATIONS):
            counts, sums = assigned(pool, self._nearest(pool, book), None, self.codes)
            mean = self._fitted(sums / counts.clamp(min=1).unsqueeze(-1))
            book = torch.where(counts.unsqueeze(-1) > 0, mean, book)
        # As if all vectors of the step had been assigned, not only those of the pool.
        counts = counts * (seen.counts.sum(-1, keepdim=True) / pool.shape[1])
        self.book.copy_(book)
        self.counts.copy_(counts)
        self.sums.copy_(book * counts.unsqueeze(-1))

    def _move(self, seen: Seen) -> None:
        """Follow the moving averages of counts and sums."""
        self.counts.lerp_(seen.counts, 1 - self.spec.decay)
        self.sums.lerp_(seen.sums, 1 - self.spec.decay)
        total = self.counts.sum(-1, keepdim=True)
        smoothed = (self.counts + self.SMOOTHING) / (total + self.codes * self.SMOOTHING) * total
        # A code that k-means left without vectors has no mean.
        mean = self._fitted(self.sums / smoothed.unsqueeze(-1))
        self.book.copy_(torch.where(self.counts.unsqueeze(-1) > 0, mean, self.book))

    def _revive(self, seen: Seen) -> None:
        """Put random vectors of the step in the place of dead codes, as if used as often as the mean code.

        The pool of a run's first step after resuming is that for k-means, larger than the others: it is cut to theirs.
        """
        mean = self.counts.mean(-1, keepdim=True)
        is_dead = self.counts < mean * self.DEAD
        turn = is_dead.cumsum(-1) - 1
        is_revived = is_dead & (turn < (seen.keys[: self.REVIVED] >= 0).sum())
        heads = torch.arange(self.heads, device=turn.device).unsqueeze(1)
        vectors = seen.pool[turn.clamp(0, len(seen.pool) - 1), heads]
        self.book.copy_(torch.where(is_revived.unsqueeze(-1), vectors, self.book))
        self.counts.copy_(torch.where(is_revived, mean, self.counts))
        self.sums.copy_(torch.where(is_revived.unsqueeze(-1), vectors * mean.unsqueeze(-1), self.sums))


def _look_up(book: Tensor, indices: Tensor) -> Tensor:
    """Return (H, M, E): book (H, K, E) at indices (H, M)."""
    heads = torch.arange(len(book), device=book.device).unsqueeze(1)
    return book[heads, indices]
