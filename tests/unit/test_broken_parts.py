"""Broken scorers, targets, positions and objectives fail the kit with the sentence that says which contract."""

from typing import Any

import pytest
import torch
from torch import Tensor

from m3.objectives.reconstruct import Reconstruct
from m3.plugins import Tokenizer
from m3.positions import Sincos
from m3.random import Draws
from m3.scorers import Uniform
from m3.targets import Values
from m3.testing import check_objective, check_positions, check_scorer, check_target
from m3.types import Loss, Part, Tokens
from tests.unit.small_plugins import LISTS, Fine, Pairs, broken, plugin


def uniform(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
    return Uniform.__call__(self, tokens, draws)


BROKEN_SCORERS = {
    "its own random numbers": (
        lambda self, tokens, draws: {n: torch.rand(p.values.shape[:2]) for n, p in tokens.items()},
        "the same draws give other scores the second time; take random numbers from `draws` only",
    ),
    "a modality is left out": (
        lambda self, tokens, draws: dict(list(uniform(self, tokens, draws).items())[1:]),
        "it scores picture, clip of sound, picture, clip; return a score for every modality",
    ),
    "no order": (
        lambda self, tokens, draws: {n: torch.zeros(p.values.shape[:2]) for n, p in tokens.items()},
        "all tokens of `sound` have the same score, so the first ones would always be seen",
    ),
    "no score for padding": (
        lambda self, tokens, draws: {
            n: x if tokens[n].is_valid is None else x.masked_fill(~tokens[n].is_valid, torch.nan)
            for n, x in uniform(self, tokens, draws).items()
        },
        "the scores of `sound` must be finite floats .* also tokens that don't exist need a finite one",
    ),
    "the place in the batch": (
        lambda self, tokens, draws: {
            n: x + torch.arange(len(x)).unsqueeze(1) for n, x in uniform(self, tokens, draws).items()
        },
        "sample 1 alone is scored otherwise than in a batch; a score depends on its own sample and key only",
    ),
}


@pytest.mark.parametrize("what", BROKEN_SCORERS)
def test_a_broken_scorer_is_named_with_its_fault(what: str) -> None:
    call, sentence = BROKEN_SCORERS[what]
    with pytest.raises(AssertionError, match=sentence):
        check_scorer(broken(Uniform, __call__=call))


def without_width(self, spec: Any, tokenizer: Tokenizer) -> None:
    self.spec = spec


BROKEN_TARGETS = {
    "no width": ({"__init__": without_width}, "it needs `width` .* and `is_relative`"),
    "half of the values": (
        {"__call__": lambda self, tokens, index: Values.__call__(self, tokens, index)[..., ::2]},
        "its truth has 24 values per token, but `width` is 48; make them equal",
    ),
    "compared with the others": (
        {"__call__": lambda self, tokens, index: (x := Values.__call__(self, tokens, index)) - x.mean(1, keepdim=True)},
        "the target of a token depends on which tokens are asked for",
    ),
    "a division by zero": (
        {"__call__": lambda self, tokens, index: Values.__call__(self, tokens, index) / 0},
        "it makes NaN, infinite or negative values of tokens without gaps",
    ),
    "no way back": (
        {"restore": lambda self, predicted, tokens: predicted[..., :3]},
        "restore must return what the tokenizer's decode reads, so that predictions can be drawn",
    ),
}


@pytest.mark.parametrize("what", BROKEN_TARGETS)
def test_a_broken_target_is_named_with_its_fault(what: str) -> None:
    methods, sentence = BROKEN_TARGETS[what]
    with pytest.raises(AssertionError, match=sentence):
        check_target(broken(Values, **methods))


BROKEN_POSITIONS = {
    "a wrong width": (lambda self, at: Sincos.forward(self, at)[..., 1:], "must become float32 .1, 24, 48., got"),
    "one place for all": (
        lambda self, at: Sincos.forward(self, at * 0),
        "two places of the grid have the same embedding",
    ),
    "nothing beyond the grid": (
        lambda self, at: Sincos.forward(self, at.masked_fill(at > 100, torch.nan)),
        "places between and beyond the grid have no finite embedding",
    ),
    "measured from the first": (
        lambda self, at: Sincos.forward(self, at - at[:1, :1]),
        "a place's embedding depends on the places it is embedded with",
    ),
}


@pytest.mark.parametrize("what", BROKEN_POSITIONS)
def test_broken_positions_are_named_with_their_fault(what: str) -> None:
    forward, sentence = BROKEN_POSITIONS[what]
    with pytest.raises(AssertionError, match=sentence):
        check_positions(broken(Sincos, forward=forward), (4, 6))


def scaled(self, encoded: Any, tokens: Any) -> Loss:
    parts = Reconstruct.forward(self, encoded, tokens).parts
    return Loss({name: Part(part.sum, part.count * 2, part.weight) for name, part in parts.items()})


def flat(self, encoded: Any, tokens: Any) -> Loss:
    parts = Reconstruct.forward(self, encoded, tokens).parts
    return Loss({name: Part(part.sum.detach(), part.count) for name, part in parts.items()})


def upwards(self, encoded: Any, tokens: Any) -> Loss:
    parts = Reconstruct.forward(self, encoded, tokens).parts
    return Loss({name: Part(3 * part.sum.detach() - part.sum, part.count) for name, part in parts.items()})


BROKEN_OBJECTIVES = {
    "other counts": ({"forward": scaled}, "counts says .* for the part own/own, forward counts .* they must be equal"),
    "no gradient": ({"forward": flat}, "in a model, the parameters .* get no finite gradient"),
    "it climbs": ({"forward": upwards}, "the loss on one batch goes .* in 3 steps; it must be finite and fall"),
    "other names": (
        {"part_names": property(lambda self: ("x",), lambda self, value: None)},
        "`part_names` says x; use the",
    ),
}


@pytest.mark.parametrize("what", BROKEN_OBJECTIVES)
def test_a_broken_objective_is_named_with_its_fault(what: str) -> None:
    methods, sentence = BROKEN_OBJECTIVES[what]
    settings = broken(Reconstruct, **methods) | {"targets": {"own": {}}, "masking": {"type": "fixed", "visible": 0.5}}
    settings |= {"decoder": {"type": "self_decoder", "width": 48, "depth": 1, "heads": 2}}
    with pytest.raises(AssertionError, match=sentence):
        check_objective(settings, {"own": {**plugin(Fine), "tokenizer": plugin(Pairs)}}, {"own": LISTS})
