"""Random numbers as a pure function of (seed, sample, stream): no state, no order, no device dependence.

Every draw (mask, crop, noise) belongs to one sample and is computed from that sample's key alone. So a batch
gives the same masks whether it is cut into 1 x 8, 2 x 4 or spread over two processes, a resumed run needs no
random state, and the same seed gives the same masks on a CPU and on a GPU.

The hash is the finaliser of splitmix64 (Steele, Lea, Flood 2014), two rounds; int64 arithmetic wraps.
Letters: B batch, n draws per sample, M parameters.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(x: int) -> int:
    """Read the low 64 bits of a Python integer as a signed int64."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: `>>` on int64 copies the sign bit, so it is cleared."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def stream_number(name: str) -> int:
    """Return a fixed 63-bit number for a stream name, the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Draws:
    """The source of all randomness of a batch.

    Attributes:
        keys: (B,) int64, different for every sample and every use of it.
        seed: the run's seed.
    """

    keys: Tensor
    seed: int = 0

    def uniform(self, stream: str, n: int) -> Tensor:
        """Return (B, n) float32, independent and uniform in [0, 1), 24 bits each, on the device of `keys`."""
        return _shift(self._bits(stream, n), 40).to(torch.float32) * 2.0**-24

    def normal(self, stream: str, n: int) -> Tensor:
        """Return (B, n) float32, independent and normal with mean 0 and deviation 1 (Box and Muller 1958)."""
        radius, angle = self.uniform(stream, 2 * n).chunk(2, dim=1)
        return (-2 * (1 - radius).log()).sqrt() * (2 * math.pi * angle).cos()

    def _bits(self, stream: str, n: int) -> Tensor:
        base = _mix(self.keys * _signed(_GOLDEN) + _signed(stream_number(stream) ^ (self.seed * _MIX_2)))
        column = torch.arange(1, n + 1, device=self.keys.device) * _signed(_GOLDEN)
        return _mix(_mix(base.unsqueeze(1) + column.unsqueeze(0)))

    def numbers(self, stream: str) -> Tensor:
        """Return (B,) int64, one number per sample: keys of further draws that know no seed."""
        return self._bits(stream, 1).squeeze(1)


def log_gamma_variates(alpha: Tensor, draws: Draws, stream: str, tries: int = 12) -> Tensor:
    """Return (B, M) logarithms of Gamma(alpha, 1) variates, alpha (M,) or (B, M) > 0, from the batch's own draws.

    Marsaglia and Tsang (2000) for alpha + 1, then log g(alpha) = log g(alpha + 1) + log(u) / alpha, which
    does not underflow at small alpha. A try is accepted with probability > 0.95, so twelve tries leave a
    chance below 1e-15 to fall back on the mode; that keeps the shape fixed and the host out of it.
    """
    batch, count = len(draws.keys), alpha.shape[-1]
    d = alpha + 1 - 1 / 3
    u = draws.uniform(stream, count * (3 * tries + 1)).reshape(batch, count, -1).clamp(min=2.0**-25)
    u1, u2, u3 = u[..., :tries], u[..., tries : 2 * tries], u[..., 2 * tries : 3 * tries]
    normal = (-2 * u1.log()).sqrt() * (2 * math.pi * u2).cos()
    v = (1 + normal / (3 * d.sqrt()).unsqueeze(-1)) ** 3
    log_v = v.clamp(min=1e-30).log()
    bound = 0.5 * normal**2 + d.unsqueeze(-1) * (1 - v + log_v)
    is_accepted = (v > 0) & (u3.log() < bound)
    first = is_accepted.to(torch.uint8).argmax(-1, keepdim=True)
    chosen = torch.where(is_accepted.any(-1), log_v.gather(-1, first).squeeze(-1), torch.zeros_like(d))
    return d.log() + chosen + u[..., -1].log() / alpha
