"""A ViT written a second time, one sample at a time, from its description; shared by the re-derivations of methods.

Letters: N tokens of a sample, D width.
"""

import math

import torch
from torch import Tensor

from m3.model import M3Model
from m3.types import Batch, Tokens

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Slow:
    """The parts of a transformer, read from a model's parameters by name."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.p = weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        return torch.stack([self.p[f"{name}.weight"] @ row + self.p[f"{name}.bias"] for row in x])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return standardised(x) * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def attention(self, name: str, x: Tensor, heads: int) -> Tensor:
        q, k, v = self.linear(f"{name}.qkv", x).chunk(3, dim=-1)
        each = q.shape[1] // heads
        joined = []
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            weights = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(each))
            joined.append(weights @ v[:, part] / weights.sum(1, keepdim=True))
        return self.linear(f"{name}.projection", torch.cat(joined, dim=1))

    def block(self, name: str, x: Tensor, heads: int) -> Tensor:
        x = x + self.attention(f"{name}.attention", self.norm(f"{name}.norm1", x), heads)
        hidden = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return x + self.linear(f"{name}.mlp.fc2", hidden)

    def encode(self, x: Tensor, heads: int, depth: int) -> tuple[list[Tensor], Tensor]:
        """Encode embedded tokens (N, D) behind the class token -> the states after each block, the normed last ones."""
        x = torch.cat([self.p["backbone.prefix"], x])
        states = []
        for number in range(depth):
            x = self.block(f"backbone.blocks.{number}", x, heads)
            states.append(x)
        return states, self.norm("backbone.norm", x)


def standardised(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """Mean 0 and deviation 1 along an axis (biased variance)."""
    mean = x.mean(dim, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim, keepdim=True) + eps).sqrt()


def position(number: int, columns: int, width: int) -> Tensor:
    """MAE's: the column in the first half of the channels, the row in the second."""
    row, column = divmod(number, columns)
    frequencies = [10000 ** (-i / (width // 4)) for i in range(width // 4)]
    x, y = [column * f for f in frequencies], [row * f for f in frequencies]
    channels = [*map(math.sin, x), *map(math.cos, x), *map(math.sin, y), *map(math.cos, y)]
    return torch.tensor(channels, dtype=torch.float64)


def patches(pixels: Tensor, patch: int) -> Tensor:
    """A uint8 image (3, H, W), normalised with ImageNet's statistics and cut -> (N, 3 x patch x patch)."""
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (MEAN, STD))
    x = (pixels.double() / 255 - mean) / std
    rows, columns = x.shape[1] // patch, x.shape[2] // patch
    cut = [
        x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].flatten()
        for i in range(rows)
        for j in range(columns)
    ]
    return torch.stack(cut)


def random_weights(model: M3Model, seed: int = 7) -> M3Model:
    """Make a model one of float64 with every parameter random, so that no bias or scale can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale + is_norm)
    return model


def make_batch(count: int, height: int, width: int) -> Batch:
    """Images of noise."""
    pixels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(11))
    return Batch({"image": pixels.to(torch.uint8)}, keys=torch.arange(count) + 40)


def in_double(tokens: dict[str, Tokens]) -> dict[str, Tokens]:
    """Tokens with values in float64."""
    return {name: Tokens(part.values.double(), part.positions, part.is_valid) for name, part in tokens.items()}


def check(model: M3Model, found: Tensor, expected: Tensor, unused: tuple[str, ...] = ()) -> None:
    """Compare two losses and their gradients with respect to all parameters but those named as unused."""
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if n not in unused], strict=True)
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (found, expected))
    for name, own, wanted in zip(names, ours, theirs, strict=True):
        assert wanted.abs().max() > 1e-6, f"{name} gets no gradient"
        error = (own - wanted).abs().max() / wanted.abs().max()
        assert error < 3e-6, f"{name}: {error}"
