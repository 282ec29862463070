"""The contracts of scorers, targets and position embeddings.

Letters: B batch, N tokens, T targets, P values per token, A position axes, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m3.parts import build_spec
from m3.plugins import Signal, Strict, Tokenizer
from m3.positions import Rotary, grid
from m3.random import Draws
from m3.testing.claims import claim, copied, name_of, near, noise, same, seeded, without_gradient
from m3.testing.tokenizer import WIDTH, build_tokenizer, rows_of
from m3.types import Tokens, take

HEAD_WIDTH = 24
SAMPLES, PATCH = 4, 6
GRIDS = {"sound": (12,), "picture": (4, 6), "clip": (2, 3, 4)}
"""Reference grids over one, two and three axes."""


def grid_tokens() -> dict[str, Tokens]:
    """Make tokens on grids of one, two and three axes, some of them lacking, for parts that read any tokens."""
    tokens = {}
    for name, counts in GRIDS.items():
        positions = grid(counts, counts, torch.device("cpu"))
        tokens[name] = Tokens(noise((SAMPLES, positions.shape[1], PATCH)), positions, counts=counts)
    lacking = torch.arange(12).unsqueeze(0) < torch.tensor([12, 7, 0, 3]).unsqueeze(1)
    return {**tokens, "sound": Tokens(tokens["sound"].values, tokens["sound"].positions, lacking)}


def check_scorer(scorer: dict[str, Any], tokens: dict[str, Tokens] | None = None) -> None:
    """Check a scorer.

    Args:
        scorer: its settings, as in a recipe.
        tokens: modality -> tokens of at least two samples that it can rank; None: `grid_tokens()`.

    Raises:
        AssertionError: a contract is not kept; the sentence names it and the remedy.
    """
    where = f"scorer `{name_of(scorer)}`"
    tokens = grid_tokens() if tokens is None else tokens
    part, spec = build_spec("scorers", scorer, "scorer")
    rank = part(spec)
    samples = len(next(iter(tokens.values())).values)
    keys = torch.arange(samples) + 11
    scores = rank(tokens, Draws(keys, 5))
    claim(
        list(scores) == list(tokens),
        f"{where}: it scores {', '.join(scores)} of {', '.join(tokens)}; return a score for every modality.",
    )
    for name, value in scores.items():
        wanted = tokens[name].values.shape[:2]
        claim(
            value.shape == wanted and value.is_floating_point() and bool(value.isfinite().all()),
            f"{where}: the scores of `{name}` must be finite floats {tuple(wanted)}, got {value.dtype} "
            f"{tuple(value.shape)}; also tokens that don't exist need a finite one.",
        )
        claim(
            bool((value.diff(dim=1) != 0).any()),
            f"{where}: all tokens of `{name}` have the same score, so the first ones would always be seen; add draws.",
        )
    again = copied(rank, where)(tokens, Draws(keys, 5))
    claim(
        all(same(again[name], scores[name]) for name in scores),
        f"{where}: the same draws give other scores the second time; take random numbers from `draws` only.",
    )
    for row in range(samples):
        one = slice(row, row + 1)
        alone = rank({name: rows_of(part, one) for name, part in tokens.items()}, Draws(keys[one], 5))
        claim(
            all(near(alone[name][0], scores[name][row]) for name in scores),
            f"{where}: sample {row} alone is scored otherwise than in a batch; a score depends on its own sample and "
            f"key only.",
        )


def check_target(target: dict[str, Any], tokenizer: Tokenizer | None = None, batch: Tensor | None = None) -> None:
    """Check a target provider.

    Args:
        target: its settings, as in a recipe.
        tokenizer: the one whose tokens it reads, e.g. as `check_tokenizer` returns it; None: `patch` over noise.
        batch: normalised signals of at least two samples, for that tokenizer.

    Raises:
        AssertionError: a contract is not kept; the sentence names it and the remedy.
    """
    where = f"target `{name_of(target)}`"
    if tokenizer is None or batch is None:
        tokenizer = build_tokenizer({"type": "patch", "size": 4}, Signal("values", 3, (8, 12)))
        batch = noise((SAMPLES, 3, 8, 12))
    tokens = tokenizer.tokenize(batch)
    found, spec = build_spec("targets", target, "target")
    provider = found(spec, tokenizer)
    claim(
        isinstance(getattr(provider, "width", None), int) and isinstance(getattr(provider, "is_relative", None), bool),
        f"{where}: it needs `width` (numbers per token that a decoder predicts) and `is_relative` (True when values "
        f"say nothing of a token's mean and contrast); set both in __init__.",
    )
    everything = torch.arange(tokens.count).expand(len(batch), -1)
    truth = provider(tokens, everything)
    claim(
        truth.shape[:2] == everything.shape and truth.ndim == 3,
        f"{where}: it must return (samples, targets, values) {tuple(everything.shape)} + values, got "
        f"{tuple(truth.shape)}; keep the axes.",
    )
    fits = provider.width == truth.shape[2] if truth.is_floating_point() else provider.width % truth.shape[2] == 0
    claim(
        fits,
        f"{where}: its truth has {truth.shape[2]} values per token, but `width` is {provider.width}; make them equal, "
        f"or for ids a multiple.",
    )
    claim(
        bool((truth.isfinite() if truth.is_floating_point() else truth >= 0).all()) or tokenizer.signal.has_gaps,
        f"{where}: it makes NaN, infinite or negative values of tokens without gaps; keep divisions away from 0.",
    )
    some = torch.tensor([tokens.count - 1, 0]).expand(len(batch), -1)
    claim(
        near(provider(tokens, some), take(truth, some)) and same(provider(tokens, everything), truth),
        f"{where}: the target of a token depends on which tokens are asked for, or on chance; it must be a function of "
        f"the clean tokens.",
    )
    if not getattr(provider, "is_signal", True):
        return
    back = tokenizer.decode(provider.restore(noise((*everything.shape, provider.width)), tokens))
    claim(
        back.shape == tokens.values.shape,
        f"{where}: restore must return what the tokenizer's decode reads, so that predictions can be drawn, got values "
        f"{tuple(back.shape)} instead of {tuple(tokens.values.shape)}; correct it.",
    )


def check_positions(positions: dict[str, Any], counts: tuple[int, ...]) -> None:
    """Check a kind of position embedding on a grid.

    Args:
        positions: its settings, as in a recipe.
        counts: tokens along each axis of the reference grid, e.g. (4, 6).

    Raises:
        AssertionError: a contract is not kept; the sentence names it and the remedy.
    """
    where = f"positions `{name_of(positions)}` over {len(counts)} axes"
    part, spec = build_spec("positions", positions, "positions")
    module = seeded(lambda: part(spec, _Grid(counts), WIDTH, "yx"))
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):  # no two of them alike
            parameter.copy_(noise(parameter.shape).flatten().roll(number).view(parameter.shape))
    width = HEAD_WIDTH // 2 if isinstance(module, Rotary) else WIDTH
    at = grid(counts, counts, torch.device("cpu"))
    table = _places(module, at)
    claim(
        table.shape == (1, at.shape[1], width) and table.dtype == torch.float32,
        f"{where}: coordinates {tuple(at.shape)} must become float32 {(1, at.shape[1], width)}, got {table.dtype} "
        f"{tuple(table.shape)}; correct forward.",
    )
    _check_each_place(module, at, counts, where)
    lacking = without_gradient(module, (_places(module, at) * noise(table.shape)).sum())
    claim(not lacking, f"{where}: the parameters {', '.join(lacking)} get no gradient; remove or use them.")
    claim(
        same(_places(copied(module, where), at), table),
        f"{where}: its pickled copy embeds otherwise; keep its state in parameters and settings.",
    )


def _places(module: nn.Module, at: Tensor) -> Tensor:
    """Embed coordinates, or turn them into the angles of rotary positions."""
    return module.angles(at, HEAD_WIDTH) if isinstance(module, Rotary) else module(at)


def _check_each_place(module: nn.Module, at: Tensor, counts: tuple[int, ...], where: str) -> None:
    """Every place has an embedding of its own, also between and beyond those of the grid."""
    table = _places(module, at)
    apart = torch.cdist(table[0].double(), table[0].double()).fill_diagonal_(1.0)
    claim(
        bool((apart > 1e-6).all()),
        f"{where}: two places of the grid have the same embedding; every place needs its own.",
    )
    finer = grid(tuple(2 * n for n in counts), counts, torch.device("cpu"))
    far = torch.cat([finer, finer + 1000.0, -finer], dim=1)
    claim(
        bool(_places(module, far).isfinite().all()),
        f"{where}: places between and beyond the grid have no finite embedding; finer and longer signals lie there.",
    )
    several = torch.cat([at, at.flip(1), at + 0.25])
    claim(
        all(near(_places(module, several)[i], _places(module, several[i : i + 1])[0]) for i in range(3))
        and near(_places(module, at[:, ::2]), table[:, ::2]),
        f"{where}: a place's embedding depends on the places it is embedded with; each must stand alone.",
    )


class _Grid(Tokenizer):
    """A tokenizer of which only axes and reference are asked."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        super().__init__(Strict(), Signal("values", 1, counts), WIDTH)
        self.axes, self.reference = len(counts), counts
        self.value_width = self.output_width = 1

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Make one token of each position of (B, 1, *counts)."""
        return Tokens(signal.flatten(1).unsqueeze(-1), grid(self.reference, self.reference, signal.device))

    def embed(self, values: Tensor) -> Tensor:
        """Repeat the value D times."""
        return values.expand(*values.shape[:2], WIDTH)

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put the values back."""
        return values.reshape(len(values), 1, *size)

    def decode(self, output: Tensor) -> Tensor:
        """Return the prediction itself."""
        return output
