"""Broken modalities and tokenizers, each breaking one contract, fail the kit with the sentence that says which."""

import itertools
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from m3.errors import M3Error
from m3.plugins import Crop, Signal
from m3.positions import grid
from m3.samples import numbers
from m3.testing import check_modality
from m3.types import Tokens
from tests.unit.small_plugins import LISTS, Fine, Pairs, broken, plugin


def test_the_smallest_modality_and_tokenizer_pass() -> None:
    check_modality(plugin(Fine), LISTS, plugin(Pairs))


def raising(error: Exception):
    def method(self, *given: Any) -> Any:
        raise error

    return method


def with_open_file(self, spec: Any) -> None:
    Fine.__init__(self, spec)
    self.file = sys.stderr


def picky(self, sample: Any) -> Tensor:
    if np.shape(sample) != (8,):
        raise M3Error("no")
    return Fine.to_raw(self, sample)


def careless(self, sample: Any) -> Tensor:
    return torch.tensor(sample, dtype=torch.float32) if np.shape(sample) == (8,) else Fine.to_raw(self, sample)


BROKEN_MODALITIES = {
    "samples must be cut to one size": (
        {"fit": lambda self, raw, crop: raw if crop == Crop() else raw[:4]},
        r"^modality `.*:Broken`: fit gives torch.float32 \(8,\), but torch.float32 \(4,\) for a crop; every crop",
    ),
    "fit works in place": (
        {"fit": lambda self, raw, crop: raw.add_(1)},
        "fit must give the same result twice and leave",
    ),
    "to_raw draws at random": (
        {"to_raw": lambda self, sample: torch.rand(8)},
        "cut and to_raw must give the same tensor for the same sample and moment; don't draw at random",
    ),
    "blank is smaller": (
        {"blank": lambda self, count: torch.zeros(count, 4)},
        r"blank\(3\) is torch.float32 \(3, 4\), but fit returns torch.float32 \(8,\); blank must look",
    ),
    "blank is of another type": (
        {"blank": lambda self, count: torch.zeros(count, 8, dtype=torch.uint8)},
        r"blank\(3\) is torch.uint8 \(3, 8\), but fit returns torch.float32",
    ),
    "a blank divides by zero": (
        {"normalise": lambda self, raw: (raw / raw.amax(1, keepdim=True)).unsqueeze(1)},
        "normalise makes NaN or infinite values of a blank sample, which stands in for absent ones",
    ),
    "statistics of the batch": (
        {"normalise": lambda self, raw: ((raw - raw.mean()) / 4).unsqueeze(1)},
        "sample 0 alone is normalised otherwise than in a batch; use its own statistics only",
    ),
    "double precision": (
        {"normalise": lambda self, raw: raw.double().unsqueeze(1)},
        r"normalise must return torch.float32 \(samples, ...\) for values, got torch.float64",
    ),
    "another size than it says": (
        {"signal": property(lambda self: Signal("values", 1, (6,)))},
        r"a normalised sample has size \(8,\), its signal says \(6,\)",
    ),
    "a shape that nobody checks": (
        {"to_raw": lambda self, sample: torch.tensor(numbers(sample, "a list"), dtype=torch.float32).view(8)},
        "an array with three more axes ends in RuntimeError .* raise M3Error with one sentence instead",
    ),
    "NaN is let in": (
        {"to_raw": careless},
        "NaN in a sample reaches the model; refuse it in to_raw or set `has_gaps` in its signal",
    ),
    "an exception instead of a sentence": (
        {"to_raw": lambda self, sample: torch.tensor([float(x) for x in sample])},
        "nothing at all ends in TypeError .*; raise M3Error with one sentence instead",
    ),
    "no sentence": (
        {"to_raw": picky},
        "nothing at all is refused with the text 'no'; write one sentence that names place and remedy",
    ),
    "a float picture": (
        {"show": lambda self, signal, is_known=None: np.zeros((4, 8, 3))},
        r"show must return uint8 \(H, W, 3\), got float64 \(4, 8, 3\)",
    ),
    "hidden and known look alike": (
        {"show": lambda self, signal, is_known=None: Fine.show(self, signal)},
        r"show draws hidden positions \(is_known False\) like known ones",
    ),
    "the wrong direction": (
        {"higher_is_better": True},
        r"the truth scores 0 \(L1 error\), a wrong prediction .*; the truth must be the best: correct score or",
    ),
    "hidden positions are measured": (
        {"score": lambda self, p, t, weight: Fine.score(self, p, t, torch.ones_like(weight))},
        "score counts positions whose weight is False",
    ),
    "means instead of sums": (
        {
            "score": lambda self, p, t, w: (p - t).abs().squeeze(1)[w].mean()[None],
            "finish_score": lambda self, sums: float(sums[0]),
        },
        "the scores of single samples add up to .*, the batch to .*; score must return sums",
    ),
    "an open file": (
        {"__init__": with_open_file},
        "it can't be pickled .*, but loaders send it to their workers; keep no open files",
    ),
}


@pytest.mark.parametrize("what", BROKEN_MODALITIES)
def test_a_broken_modality_is_named_with_its_fault(what: str) -> None:
    methods, sentence = BROKEN_MODALITIES[what]
    with pytest.raises(AssertionError, match=sentence):
        check_modality(broken(Fine, **methods), LISTS, plugin(Pairs))


def changed(**new: Any):
    """Make a `tokenize` that changes some of the right tokens."""

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        tokens = Pairs.tokenize(self, signal, times)
        return replace(tokens, **{key: make(getattr(tokens, key), signal) for key, make in new.items()})

    return tokenize


def with_extra(self, spec: Any, signal: Signal, width: int) -> None:
    Pairs.__init__(self, spec, signal, width)
    self.unused = nn.Linear(2, 2)


def with_secret(self, spec: Any, signal: Signal, width: int) -> None:
    Pairs.__init__(self, spec, signal, width)
    self.secret = next(SECRETS)


def rigid(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
    return Tokens(signal.reshape(len(signal), -1, 2), grid((4,), (4,), signal.device))


SECRETS = itertools.count(1.0)
BROKEN_TOKENIZERS = {
    "a wrong width": (
        {"tokenize": changed(values=lambda x, _: x[..., :1])},
        r"^tokenizer `.*:Broken`: token values must have shape \(samples 4, tokens, value_width 2\), got \(4, 4, 1\)",
    ),
    "positions without an axis": (
        {"tokenize": changed(positions=lambda x, _: x.squeeze(-1))},
        r"positions must have shape \(1 or 4, tokens 4, axes 1\), got \(1, 4\)",
    ),
    "infinite positions": (
        {"tokenize": changed(positions=lambda x, _: x / 0)},
        "positions must be finite floats, also those of tokens that don't exist",
    ),
    "positions counted from one": (
        {"tokenize": changed(positions=lambda x, _: x + 1)},
        r"the coordinates must be 0, 1, 2 ... along each axis of `reference` \(4,\); use `m3.positions.grid`",
    ),
    "validity as numbers": (
        {"tokenize": changed(is_valid=lambda _, x: torch.ones(len(x), x.shape[2] // 2))},
        r"is_valid must be bool of shape \(4, 4\), True for tokens that exist",
    ),
    "noise": ({"tokenize": changed(values=lambda x, _: x + torch.rand_like(x))}, "gives other tokens the second time"),
    "a batch's own scale": (
        {"tokenize": changed(values=lambda x, _: x - x.mean())},
        "sample 0 alone has other tokens than in a batch of 4; each sample must be cut by itself",
    ),
    "something is lost": (
        {"tokenize": changed(values=lambda x, _: x.round())},
        r"detokenize\(tokenize\(x\)\) differs from x by up to 0.5, more than 0; correct it, give the kit a `tolerance`",
    ),
    "odd lengths fail": (
        {"tokenize": rigid},
        "a signal longer by one ends in RuntimeError .*; raise M3Error with one sentence instead",
    ),
    "an idle parameter": (
        {"__init__": with_extra},
        "the parameters unused.weight, unused.bias get no gradient through embed; remove or use them",
    ),
    "neighbours are mixed": (
        {"embed": lambda self, values: self.projection(values - values.mean(1, keepdim=True))},
        "a token's embedding depends on the other tokens it is embedded with; embed sees only the visible",
    ),
    "state that is not saved": (
        {"__init__": with_secret, "embed": lambda self, values: self.projection(values) * self.secret},
        "loaded from state_dict.* embeds otherwise; keep all of its state in parameters and buffers",
    ),
    "decode of a wrong width": (
        {"decode": lambda self, output: output[..., :1]},
        r"decode must turn \(..., output_width 2\) into token values \(..., 2\) of their kind",
    ),
    "marks are added to": (
        {"detokenize": lambda self, values, positions, size: Pairs.detokenize(self, values + 0.0, positions, size)},
        "detokenize must also put token values of True and False together, to mark what was seen, got torch.float32",
    ),
}


@pytest.mark.parametrize("what", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_named_with_its_fault(what: str) -> None:
    methods, sentence = BROKEN_TOKENIZERS[what]
    with pytest.raises(AssertionError, match=sentence):
        check_modality(plugin(Fine), LISTS, broken(Pairs, **methods))


def test_a_declared_loss_is_accepted_up_to_the_tolerance() -> None:
    lossy = {"tokenize": changed(values=lambda x, _: x.round())}
    check_modality(plugin(Fine), LISTS, broken(Pairs, **lossy), tolerance=0.5)
    check_modality(plugin(Fine), LISTS, broken(Pairs, **lossy, is_lossless=False))
    with pytest.raises(AssertionError, match=r"differs from x by up to 0.5, more than 0.4;"):
        check_modality(plugin(Fine), LISTS, broken(Pairs, **lossy), tolerance=0.4)


def test_what_stands_in_for_an_absent_sample_must_not_matter() -> None:
    """A tokenizer may not see it: the model marks absent tokens only after they are cut."""
    centred = {"normalise": lambda self, raw: (raw / 4 - 1 + 0 * raw.nan_to_num(9.0).sum()).unsqueeze(1)}
    check_modality(broken(Fine, **centred), LISTS, plugin(Pairs))
    spilling = {"tokenize": changed(values=lambda x, _: x + 0 * x.sum())}
    with pytest.raises(AssertionError, match="a sample that lacks the modality makes the loss or a gradient NaN"):
        check_modality(plugin(Fine), LISTS, broken(Pairs, **spilling))
