"""Selections, tokens and slow readings of plans, for the tests of masks."""

import itertools
import json

import torch

from m3 import masking
from m3.plugins import View
from m3.random import Draws
from m3.types import MaskPlan, Tokens

SIZES = {"image": 16, "depth": 9, "semantic": 25}

SELECTIONS = {
    "share": {"type": "fixed", "visible": 0.25},
    "number": {"type": "fixed", "visible": 5},
    "each": {"type": "fixed", "visible": {"image": 3, "depth": 0.5, "semantic": 1.0}},
    "symmetric": {"type": "dirichlet", "visible": 12},
    "symmetric share": {"type": "dirichlet", "visible": 0.5, "alpha": 0.3},
    "alphas": {"type": "dirichlet", "visible": 12, "alpha": {"image": 0.2, "depth": 3.0, "semantic": 1.0}},
    "subsets": {"type": "dirichlet", "visible": 12, "alpha": 1.0, "subsets": True},
}


def build(settings: dict, names=tuple(SIZES)) -> masking.Selection:
    return masking.build(View(tuple(names), json.dumps(settings)))


def make_tokens(batch: int, sizes: dict[str, int], is_valid: dict[str, torch.Tensor] | None = None):
    """Tokens whose values tell sample and place apart."""
    tokens = {}
    for name, count in sizes.items():
        values = torch.arange(batch * count * 2, dtype=torch.float32).reshape(batch, count, 2)
        positions = torch.arange(count * 2, dtype=torch.float32).reshape(1, count, 2)
        tokens[name] = Tokens(values, positions, (is_valid or {}).get(name))
    return tokens


def select(settings: dict, tokens: dict[str, Tokens], keys: torch.Tensor, seed: int = 0) -> MaskPlan:
    return build(settings, tokens)(tokens, Draws(keys, seed))


def visible_sets(plan: MaskPlan) -> list[set[tuple[str, int]]]:
    """Slow: what the encoder of each sample sees, read token by token; fails if it sees one twice."""
    names = list(plan.visible)
    index, modality = plan.packed_index().tolist(), plan.packed_modality().tolist()
    result = []
    for sample in range(len(index)):
        seen = [
            (names[m], i)
            for v, (i, m) in enumerate(zip(index[sample], modality[sample], strict=True))
            if plan.is_valid is None or plan.is_valid[sample, v]
        ]
        assert len(seen) == len(set(seen))
        result.append(set(seen))
    return result


def target_sets(plan: MaskPlan) -> list[set[tuple[str, int]]]:
    """Slow: what a loss asks for in each sample; fails if it asks twice."""
    result = [set() for _ in range(len(next(iter(plan.target.values()))))]
    for name, index in plan.target.items():
        for sample, row in enumerate(index.tolist()):
            is_target = plan.is_target[name][sample].tolist() if name in plan.is_target else [True] * len(row)
            wanted = [(name, i) for i, counts in zip(row, is_target, strict=True) if counts]
            assert len(wanted) == len(set(wanted))
            result[sample] |= set(wanted)
    return result


def valid_sets(tokens: dict[str, Tokens]) -> list[set[tuple[str, int]]]:
    batch = len(next(iter(tokens.values())).values)
    return [
        {
            (name, i)
            for name, part in tokens.items()
            for i in range(part.count)
            if part.is_valid is None or part.is_valid[sample, i]
        }
        for sample in range(batch)
    ]


def budget(settings: dict, tokens: dict[str, Tokens], valid: set[tuple[str, int]]) -> int | dict[str, int]:
    """What the settings promise for a sample whose valid tokens are given."""
    there = {name: sum(n == name for n, _ in valid) for name in tokens}

    def share(visible, count, of):
        if isinstance(visible, int):
            return min(visible, count)
        return min(count, max(1, int(of * visible + 1e-9)))

    if settings["type"] == "dirichlet":
        return share(settings["visible"], len(valid), sum(part.count for part in tokens.values()))
    each = settings["visible"] if isinstance(settings["visible"], dict) else dict.fromkeys(tokens, settings["visible"])
    return {name: share(each[name], there[name], there[name]) for name in tokens}


def presence(kind: str, repeats: int = 4) -> tuple[int, dict[str, torch.Tensor]]:
    """Validity of all combinations of present and missing modalities, `repeats` samples each."""
    if kind == "all present":
        return 8 * repeats, {}
    combinations = torch.tensor(list(itertools.product([True, False], repeat=3))).repeat(repeats, 1)
    batch = len(combinations)
    is_valid = {
        name: combinations[:, i : i + 1].expand(batch, size).clone() for i, (name, size) in enumerate(SIZES.items())
    }
    if kind == "padded":
        is_valid["semantic"] &= Draws(torch.arange(batch), 5).uniform("padding", 25) < 0.5
    if kind == "one never missing":
        del is_valid["depth"]
    return batch, is_valid


# -- budgets -------------------------------------------------------------------------------------------------
