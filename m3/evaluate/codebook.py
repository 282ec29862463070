"""How much of a codebook held-out samples use.

Letters: B batch, M codes of a sample, H heads, K codes of a codebook.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from m3.codebook import codes_used
from m3.evaluate.task import Row
from m3.model import M3Model
from m3.objectives.autoencode import Autoencode
from m3.types import Batch


@torch.no_grad()
def measure_codes(model: M3Model, batches: Iterable[Batch]) -> list[Row]:
    """Measure the codes of every autoencoder of a model: the share that occurs, and their perplexity.

    The baseline is a collapsed codebook: one code for everything.

    Args:
        model: in evaluation mode.
        batches: held-out samples; not read if the model has no codes.
    """
    coders = {name: part for name, part in model.objectives.items() if isinstance(part, Autoencode)}
    if not coders:
        return []
    counts = {
        name: torch.zeros(part.quantiser.heads, part.quantiser.codes, device=model.device)
        for name, part in coders.items()
    }
    for batch in batches:
        tokens = model.tokenise(batch.to(model.device))
        for name, part in coders.items():
            counts[name] += part.count_codes(tokens[part.spec.of])
    rows = []
    for name, part in coders.items():
        used, perplexity = codes_used(counts[name])
        codes = part.quantiser.codes
        rows.append(Row(f"{part.spec.of} codes in use", f"share of {codes}", used, 1 / codes, "one_code", True))
        rows.append(Row(f"{part.spec.of} codes", "perplexity", perplexity, 1.0, "one_code", True))
    return rows
