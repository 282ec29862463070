"""The contract of modalities, and of a modality with its tokenizer inside a model.

Letters: B batch, H height, W width, T steps in time.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3.network import build_modalities
from m3.plugins import Crop, Modality, Tokenizer
from m3.testing.claims import attempt, claim, copied, name_of, near, noise, same
from m3.testing.learning import batch_of, check_learning
from m3.testing.tokenizer import check_tokenizer, spread, with_gap
from m3.types import Tokens

SAMPLES = 4
"""Samples that the kit looks at."""

CROP = Crop((0.25, 0.125, 0.5, 0.75), True)


def check_modality(
    modality: dict[str, Any],
    samples: Sequence[Any],
    tokenizer: dict[str, Any],
    tolerance: float | None = None,
    positions: dict[str, Any] | None = None,
) -> None:
    """Check a modality, its tokenizer, and a small model of the two.

    Args:
        modality: its settings, as in a recipe, without tokenizer.
        samples: at least two different ones, as `to_raw` takes them; the first four are used.
        tokenizer: settings of a tokenizer that reads it.
        tolerance: as in `check_tokenizer`.
        positions: settings of the position embedding in the model; None: the tokenizer's own.

    Raises:
        AssertionError: a contract is not kept; the sentence names it and the remedy.
    """
    where = f"modality `{name_of(modality)}`"
    part = build_modalities({"own": modality})["own"]
    _check_facts(part, where)
    claim(len(samples) > 1, f"{where}: the kit needs at least two samples; give it more.")
    samples = samples[:SAMPLES]
    batch = batch_of({"own": part}, {"own": samples})
    for sample in samples:
        _check_sample(part, sample, where)
    raw, times = batch.signals["own"], batch.times.get("own")
    _check_blank(part, raw, where)
    _check_normalised(part, raw, where)
    _check_refusals(part, raw, where)
    twin = copied(part, where)
    claim(
        same(twin.normalise(raw), part.normalise(raw)) and twin.signal == part.signal,
        f"{where}: its pickled copy normalises otherwise; workers must do the same as the main process.",
    )
    signal = part.normalise(raw)
    _check_groups(part, signal, where)
    own = check_tokenizer(tokenizer, part.signal, signal, times, tolerance)
    tokens = own.tokenize(signal, times)
    _check_show(part, own, tokens, signal, where)
    _check_score(part, own, tokens, signal, where)
    entry = {**modality, "tokenizer": tokenizer} | ({} if positions is None else {"positions": positions})
    two = {"own": entry, "other": entry}
    both = batch_of(build_modalities(two), {"own": samples, "other": samples[::-1]})
    check_learning(two, _objectives(tokens), both, where)


def _check_facts(part: Modality, where: str) -> None:
    signal = part.signal
    claim(
        signal.kind in ("values", "classes") and (signal.classes > 0) == (signal.kind == "classes"),
        f"{where}: its signal is {signal.kind!r} with {signal.classes} classes; `kind` is `values` (0 classes) or "
        f"`classes` (at least one).",
    )
    claim(
        signal.channels > 0 and len(signal.size) > 0 and all(isinstance(n, int) and n > 0 for n in signal.size),
        f"{where}: its signal has {signal.channels} channels and size {signal.size}; both must be positive numbers.",
    )
    claim(
        signal.channel_axis in (1, -1),
        f"{where}: `channel_axis` of its signal is {signal.channel_axis}; it must be 1, or -1 for lists.",
    )
    claim(
        isinstance(part.extensions, tuple) and all(e.startswith(".") and e == e.lower() for e in part.extensions),
        f"{where}: `extensions` must be a tuple of endings in lower case with their dot, got {part.extensions!r}.",
    )
    for ending in [] if part.is_inline else part.extensions:
        file = io.BytesIO()
        file.name = f"empty{ending}"
        try:
            part.to_raw(part.load(file))
        except Exception as error:
            claim(
                bool(str(error)),
                f"{where}: an empty {ending} file raises {type(error).__name__} without text; say why.",
            )
        else:
            raise AssertionError(f"{where}: an empty {ending} file is read without complaint; raise an error in load.")


def _check_sample(part: Modality, sample: Any, where: str) -> None:
    """Every part of a recording becomes a tensor that fits, the same every time, and nothing is changed on the way."""
    for moment in (0.0, 0.5, 1.0):
        cut = part.cut(sample, moment)
        raw = part.to_raw(cut)
        claim(
            isinstance(raw, Tensor) and same(raw, part.to_raw(part.cut(sample, moment))),
            f"{where}: cut and to_raw must give the same tensor for the same sample and moment; don't draw at random.",
        )
        before = raw.clone()
        fitted = part.fit(raw, Crop())
        claim(
            same(fitted, part.fit(raw, Crop())) and same(raw, before),
            f"{where}: fit must give the same result twice and leave its input alone; copy before you change it.",
        )
        cropped = part.fit(raw, CROP)
        claim(
            cropped.dtype == fitted.dtype and (cropped.shape == fitted.shape or part.padding is not None),
            f"{where}: fit gives {fitted.dtype} {tuple(fitted.shape)}, but {cropped.dtype} {tuple(cropped.shape)} for "
            f"a crop; every crop must end in the same size.",
        )
        times = part.times(cut)
        claim(
            times is None or (times.ndim == 1 and bool(times.isfinite().all() and (times.diff() >= 0).all())),
            f"{where}: times must be seconds (T,), finite and ascending; correct it or return None.",
        )


def _check_blank(part: Modality, raw: Tensor, where: str) -> None:
    blank = part.blank(3)
    first = 1 if part.padding is None else 2  # padded samples may be shorter than the usual size
    claim(
        len(blank) == 3 and blank.dtype == raw.dtype and blank.shape[first:] == raw.shape[first:],
        f"{where}: blank(3) is {blank.dtype} {tuple(blank.shape)}, but fit returns {raw.dtype} {tuple(raw.shape[1:])}; "
        f"blank must look like three fitted samples.",
    )
    normal = part.normalise(blank)
    claim(
        not bool((normal.isnan() | normal.isinf()).any()),
        f"{where}: normalise makes NaN or infinite values of a blank sample, which stands in for absent ones; keep "
        f"its divisions away from 0.",
    )


def _check_normalised(part: Modality, raw: Tensor, where: str) -> None:
    before, signal, normal = raw.clone(), part.signal, part.normalise(raw)
    claim(same(raw, before), f"{where}: normalise changes its input; work on a copy.")
    wanted = torch.float32 if signal.kind == "values" else torch.int64
    claim(
        normal.dtype == wanted and len(normal) == len(raw),
        f"{where}: normalise must return {wanted} (samples, ...) for {signal.kind}, got {normal.dtype} "
        f"{tuple(normal.shape)}; convert it.",
    )
    if signal.kind == "values":
        there = normal.shape[signal.channel_axis]
        claim(
            there == signal.channels,
            f"{where}: normalise returns {there} channels on axis {signal.channel_axis}, its signal says "
            f"{signal.channels}; correct one of them.",
        )
        is_bad = normal.isinf() if signal.has_gaps else ~normal.isfinite()
    else:
        is_bad = (normal < (-1 if signal.has_gaps else 0)) | (normal >= signal.classes)
    claim(
        not bool(is_bad.any()),
        f"{where}: normalise returns infinite or unknown values (NaN, -1) or classes beyond its signal's; unknown ones "
        f"are allowed with `has_gaps` only.",
    )
    claim(
        part.padding is not None or signal.extent(normal) == signal.size,
        f"{where}: a normalised sample has size {signal.extent(normal)}, its signal says {signal.size}; correct one.",
    )
    for row in range(len(raw)):
        claim(
            near(part.normalise(raw[row : row + 1])[0], normal[row]),
            f"{where}: sample {row} alone is normalised otherwise than in a batch; use its own statistics only.",
        )


def _check_groups(part: Modality, signal: Tensor, where: str) -> None:
    """Every position has a group of its own sample, numbered within the number of positions."""
    group = part.groups(signal)
    if group is None:
        return
    size = part.signal.extent(signal)
    positions = group[0].numel()
    claim(
        group.shape == (len(signal), *size)
        and group.dtype == torch.int64
        and bool(((group >= 0) & (group < positions)).all()),
        f"{where}: groups must be int64 {(len(signal), *size)} with numbers from 0 to {positions - 1}, got "
        f"{group.dtype} {tuple(group.shape)} from {int(group.min())} to {int(group.max())}; number them anew in each "
        f"sample.",
    )
    for row in range(len(signal)):
        alone = part.groups(signal[row : row + 1])
        claim(
            alone is not None and torch.equal(alone, group[row : row + 1]),
            f"{where}: sample {row} alone has other groups than in a batch; they depend on their own sample only.",
        )


def _check_refusals(part: Modality, raw: Tensor, where: str) -> None:
    """Samples that can't be right are refused with one sentence before the model sees them."""
    array = raw[0].numpy()
    wrong: dict[str, Any] = {
        "nothing at all": None,
        "an empty array": np.zeros([0] * array.ndim, array.dtype),
        "an array with three more axes": np.broadcast_to(array, (2, 2, 2, *array.shape)).copy(),
        "an array of objects": np.array([object()] * 2),
    }
    for what, sample in wrong.items():
        fitted = attempt(lambda sample=sample: part.fit(part.to_raw(sample), Crop()), where, what)
        claim(fitted is None, f"{where}: {what} is accepted as a sample; refuse it in to_raw with an M3Error.")
    if array.dtype.kind == "f" and not part.signal.has_gaps:
        holed = array.copy()
        holed.flat[0] = np.nan
        fitted = attempt(lambda: part.fit(part.to_raw(holed), Crop()), where, "an array with NaN")
        claim(
            fitted is None or bool(part.normalise(fitted[None]).isfinite().all()),
            f"{where}: NaN in a sample reaches the model; refuse it in to_raw or set `has_gaps` in its signal.",
        )


def _check_show(part: Modality, own: Tokenizer, tokens: Tokens, signal: Tensor, where: str) -> None:
    size = part.signal.extent(signal)
    drawn = own.detokenize(tokens.values, tokens.positions, size)
    hidden = spread(own, torch.zeros(tokens.values.shape[:2], dtype=torch.bool), tokens, size)
    plain = [part.show(x) for x in (*signal, *drawn)]
    covered = [part.show(x, is_known) for x, is_known in zip(drawn, hidden, strict=True)]
    for picture in (*plain, *covered):
        claim(
            isinstance(picture, np.ndarray)
            and picture.dtype == np.uint8
            and picture.ndim == 3
            and picture.shape[2] == 3
            and picture.size > 0,
            f"{where}: show must return uint8 (H, W, 3), got {getattr(picture, 'dtype', type(picture).__name__)} "
            f"{np.shape(picture)}; convert the picture.",
        )
    pairs = zip(plain[len(signal) :], covered, strict=True)
    claim(
        any(a.shape != b.shape or bool((a != b).any()) for a, b in pairs),
        f"{where}: show draws hidden positions (is_known False) like known ones; mark them.",
    )


def _check_score(part: Modality, own: Tokenizer, tokens: Tokens, signal: Tensor, where: str) -> None:
    """The truth is the best prediction, what does not count changes nothing, and sums add up."""
    size = part.signal.extent(signal)
    truth = own.detokenize(tokens.values, tokens.positions, size)
    is_there = torch.ones(tokens.values.shape[:2], dtype=torch.bool) if tokens.is_valid is None else tokens.is_valid
    weight = spread(own, is_there, tokens, size)
    if truth.is_floating_point():
        worse = truth.nan_to_num(0.0) + noise(truth.shape)
    else:
        worse = (truth + 1) % max(2, part.signal.classes)
    best = part.finish_score(part.score(truth.nan_to_num(0.0), truth, weight))
    other = part.finish_score(part.score(worse, truth, weight))
    claim(
        isinstance(best, float) and np.isfinite(best),
        f"{where}: finish_score of the truth against itself is {best!r}; it must be a finite float.",
    )
    claim(
        best > other if part.higher_is_better else best < other,
        f"{where}: the truth scores {best:g} ({part.measure}), a wrong prediction {other:g}; the truth must be the "
        f"best: correct score or `higher_is_better`.",
    )
    counted = weight.clone()
    counted[-1] = False
    partly = torch.cat([truth[:-1].nan_to_num(0.0), worse[-1:]])
    hidden = part.finish_score(part.score(partly, truth, counted))
    claim(
        abs(hidden - part.finish_score(part.score(truth.nan_to_num(0.0), truth, counted))) < 1e-6,
        f"{where}: score counts positions whose weight is False; leave them out of sums and counts.",
    )
    rows = [part.score(worse[i : i + 1], truth[i : i + 1], weight[i : i + 1]) for i in range(len(truth))]
    added = part.finish_score(torch.stack(rows).sum(0))
    claim(
        abs(added - other) <= 1e-3 * max(1.0, abs(other)),
        f"{where}: the scores of single samples add up to {added:g}, the batch to {other:g}; score must return "
        f"sums, and finish_score divide them.",
    )
    if part.signal.has_gaps and own.is_lossless:
        holed = with_gap(part.signal, truth)
        claim(
            bool(np.isfinite(part.finish_score(part.score(worse, holed, weight)))),
            f"{where}: one unknown position (NaN, -1) makes the score NaN; count known positions only.",
        )


def _objectives(tokens: Tokens) -> dict[str, Any]:
    """Settings of a masked reconstruction of both modalities, with the loss that such tokens have.

    Of a single token no half can be seen, so each modality is then predicted from the other one.
    """
    common = {"type": "reconstruct", "decoder": {"type": "cross_decoder", "width": 48, "depth": 1, "heads": 2}}
    target = {"loss": "mse" if tokens.values.is_floating_point() else "cross_entropy"}
    if tokens.count > 1:
        masking = {"type": "fixed", "visible": 0.5}
        return {"reconstruct": {**common, "masking": masking, "targets": {"own": target, "other": target}}}
    seen = {**common, "masking": {"type": "fixed", "visible": 1.0}}
    return {
        "there": {**seen, "inputs": ["own"], "targets": {"other": target}},
        "back": {**seen, "inputs": ["other"], "targets": {"own": target}},
    }
