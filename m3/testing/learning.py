"""The contract of what is trained: a small model of the parts, and objectives.

Letters: B batch, D width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3.config import M3Config
from m3.data.loader import Loaded, collate
from m3.model import M3Model
from m3.network import build_modalities
from m3.plugins import Crop, Modality
from m3.testing.claims import claim, name_of, near, same, seeded, without_gradient
from m3.types import Batch

BACKBONE = {"width": 48, "depth": 1, "heads": 2}
STEPS = 3


def check_objective(
    objective: dict[str, Any],
    modalities: dict[str, dict[str, Any]],
    samples: dict[str, Sequence[Any]],
    backbone: dict[str, Any] | None = None,
) -> None:
    """Check an objective in a small model.

    Args:
        objective: its settings, as in a recipe.
        modalities: name -> settings with tokenizer, as in a recipe; at least one that the objective reads.
        samples: modality -> at least two samples, as `Modality.to_raw` takes them.
        backbone: settings that the objective needs the transformer to have.

    Raises:
        AssertionError: a contract is not kept; the sentence names it and the remedy.
    """
    where = f"objective `{name_of(objective)}`"
    batch = batch_of(build_modalities(modalities), samples)
    model = check_learning(modalities, {"own": objective}, batch, where, backbone)
    part = model._objectives()["own"]
    claim(
        isinstance(part.views, tuple),
        f"{where}: `views` must be a tuple of View (empty if it encodes the tokens itself); declare what is encoded.",
    )
    prepared = model.prepare(batch)
    loss = model(prepared).parts
    claim(
        tuple(loss.parts) == tuple(f"own/{name}" for name in part.part_names),
        f"{where}: forward returns the parts {', '.join(loss.parts)}, `part_names` says {', '.join(part.part_names)}; "
        f"use the same names in the same order.",
    )
    counts = model.counts(prepared)
    for name, value in loss.parts.items():
        claim(
            name in counts and float(counts[name]) == float(value.count),
            f"{where}: counts says {counts.get(name)} for the part {name}, forward counts {value.count}; the trainer "
            f"divides by the first before the second is known, so they must be equal.",
        )
        claim(
            value.sum.ndim == 0 and value.count.ndim == 0 and not value.count.requires_grad,
            f"{where}: part {name} must be a sum () with gradient and a count () without; reduce them.",
        )


def check_learning(
    modalities: dict[str, dict[str, Any]],
    objectives: dict[str, dict[str, Any]],
    batch: Batch,
    where: str,
    backbone: dict[str, Any] | None = None,
) -> M3Model:
    """Check a model of these parts on a batch: gradients, absence, single samples, training, saving."""
    config = M3Config(modalities=modalities, backbone=BACKBONE | (backbone or {}), objectives=objectives)
    model = seeded(lambda: M3Model(config))
    lacking = without_gradient(model, _loss(model, batch))
    claim(
        not lacking,
        f"{where}: in a model, the parameters {', '.join(lacking)} get no finite gradient; remove them or use them in "
        f"every forward pass.",
    )
    if len(modalities) > 1:
        _check_absence(model, batch, where)
    if model.views:  # an objective that encodes the tokens itself leaves the model without a backbone
        _check_single_samples(model, batch, where)
    _check_prediction(model, batch, where)
    _check_cost(config, where)
    _check_training(model, batch, where)
    _check_saving(model, batch, where)
    return model


def batch_of(parts: dict[str, Modality], samples: dict[str, Sequence[Any]]) -> Batch:
    """Make a batch of samples as the processor does; None in place of a sample means that it lacks the modality."""
    loaded = []
    for row in range(len(next(iter(samples.values())))):
        there = {name: parts[name].cut(rows[row], 0.5) for name, rows in samples.items() if rows[row] is not None}
        fitted = {name: parts[name].fit(parts[name].to_raw(x), Crop()) for name, x in there.items()}
        known = {name: parts[name].times(x) for name, x in there.items()}
        times = {name: seconds for name, seconds in known.items() if seconds is not None}
        loaded.append(Loaded(fitted, row, str(row), times))
    return collate(loaded, parts)


def _loss(model: M3Model, batch: Batch) -> Tensor:
    loss = model(batch).loss
    assert loss is not None
    return loss


def _check_absence(model: M3Model, batch: Batch, where: str) -> None:
    """What stands in for a modality that a sample lacks must not matter, not even NaN."""
    name = next(iter(model.modalities))
    is_present = torch.ones(len(batch), dtype=torch.bool)
    is_present[-1] = False
    losses = []
    raw = batch.signals[name]
    for filling in (raw[-1], raw[0], torch.full_like(raw[0], torch.nan) if raw.is_floating_point() else raw[0]):
        signals = {**batch.signals, name: torch.cat([raw[:-1], filling.unsqueeze(0)])}
        loss = _loss(model, replace(batch, signals=signals, is_present={name: is_present}))
        model.zero_grad()
        loss.backward()
        claim(
            bool(loss.isfinite()) and all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters()),
            f"{where}: a sample that lacks the modality makes the loss or a gradient NaN; values of absent samples "
            f"must not enter sums, not even times 0.",
        )
        losses.append(loss.detach())
    claim(
        all(same(losses[0], loss) for loss in losses),
        f"{where}: what stands in for a modality that a sample lacks changes the loss; it must not depend on tokens "
        f"with is_valid False or on other samples.",
    )
    nobody = replace(batch, is_present={name: torch.zeros_like(is_present)})
    claim(
        bool(_loss(model, nobody).isfinite()),
        f"{where}: the loss of a batch whose samples all lack the modality is not finite; nothing to count is 0, not "
        f"NaN: divide by no count of your own.",
    )


def _check_single_samples(model: M3Model, batch: Batch, where: str) -> None:
    model.eval()
    together = model.encode(batch).pooled
    for row in range(len(batch)):
        one = slice(row, row + 1)
        alone = Batch(
            {name: x[one] for name, x in batch.signals.items()},
            batch.keys[one],
            {name: x[one] for name, x in batch.is_present.items()},
            times={name: x[one] for name, x in batch.times.items()},
        )
        claim(
            near(model.encode(alone).pooled[0], together[row]),
            f"{where}: sample {row} alone is encoded otherwise than in a batch of {len(batch)}; nothing may depend on "
            f"the other samples (batch statistics, padding, validity).",
        )
    model.train()


def _check_prediction(model: M3Model, batch: Batch, where: str) -> None:
    """Models that predict signals do so also for modalities that the batch lacks."""
    from m3.evaluate.tasks.predict import targets_of

    if not targets_of(model):
        return
    shorter = replace(batch, signals={name: batch.signals[name] for name in list(batch.signals)[:1]}, times={})
    for given in (batch, shorter):
        for name, predicted in model.reconstruct(given, visible=0.5).predicted.items():
            claim(
                len(predicted) == len(batch) and not bool(predicted.isnan().any() | predicted.isinf().any()),
                f"{where}: the prediction of `{name}` has NaN or lacks samples; decode and detokenize must give finite "
                f"signals, also where the batch lacks the modality.",
            )


def _check_cost(config: M3Config, where: str) -> None:
    """`m3 show` works out memory and FLOPs on the meta device, where no tensor has values."""
    try:
        with torch.device("meta"):
            model = M3Model(config)
            signals = {name: part.blank(2) for name, part in model.modalities.items()}
            model(model.prepare(Batch(signals, torch.zeros(2, dtype=torch.long))))
    except (RuntimeError, NotImplementedError) as error:
        raise AssertionError(
            f"{where}: it can't run without values on the meta device, as `m3 show` does ({error}); look at no values "
            f"(.item(), `if x.any()`) in normalise, tokenize or forward, which would also make a GPU wait."
        ) from error


def _check_training(model: M3Model, batch: Batch, where: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = _loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    losses.append(_loss(model, batch).item())
    text = ", ".join(f"{loss:.4g}" for loss in losses)
    claim(
        all(abs(loss) < float("inf") for loss in losses) and min(losses[1:]) < losses[0],
        f"{where}: the loss on one batch goes {text} in {STEPS} steps; it must be finite and fall: look at the "
        f"gradient and the scale of the values.",
    )


def _check_saving(model: M3Model, batch: Batch, where: str) -> None:
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        again = M3Model.from_pretrained(Path(folder)).eval()
    claim(
        same(_loss(again, batch).detach(), _loss(model, batch).detach())
        and (not model.views or same(again.encode(batch).sequence, model.encode(batch).sequence)),
        f"{where}: a saved and loaded model computes something else; keep all state in parameters, persistent buffers "
        f"and settings.",
    )
    model.train()
