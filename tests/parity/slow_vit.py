"""A ViT written a second time, one sample at a time, from its description; shared by the re-derivations of methods.

Letters: N tokens of a sample, D width, H heads.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from m3.build import model_config
from m3.model import M3Model
from m3.recipe import load_recipe
from m3.types import Batch, Tokens

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def gelu(x: Tensor) -> Tensor:
    """x times the share of a normal distribution below x."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


class Slow:
    """The parts of a transformer, read from a model's parameters by name; LayerScale starts at `start`."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        start: float = 1.0,
        activation: Callable[[Tensor], Tensor] = gelu,
        eps: float = 1e-6,
    ) -> None:
        self.p, self.start, self.activation, self.eps = weights, start, activation, eps

    def linear(self, name: str, x: Tensor) -> Tensor:
        return torch.stack([self.p[f"{name}.weight"] @ row + self.p[f"{name}.bias"] for row in x])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return standardised(x, eps=self.eps) * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", self.activation(self.linear(f"{name}.fc1", x)))

    def attention(self, name: str, x: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.linear(f"{name}.qkv", x).chunk(3, dim=-1)
        return self.attend(name, q, k, v, heads, bias)

    def cross_attention(self, name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
        k, v = self.linear(f"{name}.kv", context).chunk(2, dim=-1)
        return self.attend(name, self.linear(f"{name}.q", x), k, v, heads)

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
        each = q.shape[1] // heads
        joined = []
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            scores = q[:, part] @ k[:, part].T / math.sqrt(each)
            weights = torch.exp(scores if bias is None else scores + bias[head])
            joined.append(weights @ v[:, part] / weights.sum(1, keepdim=True))
        return self.linear(f"{name}.projection", torch.cat(joined, dim=1))

    def scaled(self, name: str, x: Tensor) -> Tensor:
        return x * (self.start + self.p[f"{name}.difference"]) if f"{name}.difference" in self.p else x

    def block(self, name: str, x: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
        """Run a block; bias (H, N, N) is added to the scores of attention."""
        attended = self.attention(f"{name}.attention", self.norm(f"{name}.norm1", x), heads, bias)
        x = x + self.scaled(f"{name}.scale1", attended)
        return x + self.scaled(f"{name}.scale2", self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x)))

    def encode(
        self, x: Tensor, heads: int, depth: int, bias: Tensor | None = None, tower: str = "backbone"
    ) -> tuple[list[Tensor], Tensor]:
        """Encode embedded tokens (N, D) -> the states after each block, and the last ones once more, normed.

        A class token in front and the norms before and after the blocks are there if the model has them.
        """
        if f"{tower}.prefix" in self.p:
            x = torch.cat([self.p[f"{tower}.prefix"], x])
        if f"{tower}.input_norm.weight" in self.p:
            x = self.norm(f"{tower}.input_norm", x)
        states = []
        for number in range(depth):
            x = self.block(f"{tower}.blocks.{number}", x, heads, bias)
            states.append(x)
        return states, self.norm(f"{tower}.norm", x) if f"{tower}.norm.weight" in self.p else x


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


def patches(pixels: Tensor, patch: int, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """A uint8 image (3, H, W), normalised (with ImageNet's statistics) and cut -> (N, 3 x patch x patch)."""
    centre, scale = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (mean, std))
    x = (pixels.double() / 255 - centre) / scale
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
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim else 1.0
            is_norm = name.endswith("weight") and "norm" in name.split(".")[-2]
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale + is_norm)
    return model


def recipe_model(name: str, overrides: list[str]) -> M3Model:
    """Build the model of a recipe, made small by overrides, with random weights."""
    return random_weights(M3Model(model_config(load_recipe(name, overrides))))


def make_batch(count: int, height: int, width: int) -> Batch:
    """Images of noise."""
    pixels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(11))
    return Batch({"image": pixels.to(torch.uint8)}, keys=torch.arange(count) + 40)


def in_double(tokens: dict[str, Tokens]) -> dict[str, Tokens]:
    """Tokens with values in float64."""
    return {name: Tokens(part.values.double(), part.positions, part.is_valid) for name, part in tokens.items()}


def check(model: M3Model, found: Tensor, expected: Tensor, unused: tuple[str, ...] = (), near: float = 3e-6) -> None:
    """Compare two losses and their gradients with respect to all parameters but those named as unused.

    Losses, teachers and tables of positions are float32 within M3; `near` is what that may do to a gradient.
    """
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if n not in unused], strict=True)
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (found, expected))
    for name, own, wanted in zip(names, ours, theirs, strict=True):
        assert wanted.abs().max() > 1e-6, f"{name} gets no gradient"
        error = (own - wanted).abs().max() / wanted.abs().max()
        assert error < near, f"{name}: {error}"
