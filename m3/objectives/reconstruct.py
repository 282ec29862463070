"""Masked reconstruction: predict hidden tokens of one or several modalities from the visible ones.

MAE is this with one modality and MAE's decoder; MultiMAE with several and one cross-attention decoder each.
Letters: B batch, T targets, P values per token, K classes.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from m3.backbone import BackboneSpec
from m3.errors import M3Error, nearest, within
from m3.overrides import merge
from m3.parts import build_spec
from m3.plugins import Objective, Predictor, Strict, Tokenizer, View
from m3.points import chamfer
from m3.types import Encoded, Loss, MaskPlan, Part, Tokens, take


class TargetSpec(Strict):
    """One thing to predict.

    Attributes:
        of: modality it belongs to; the target's own name if left out.
        at: modality whose hidden tokens it is predicted at, token by token, where that is another one (UNITER: the
            labels of hidden regions); it must have as many tokens.
        target: provider of the true values.
        loss: `mse`, `l1`, `smooth_l1`, `berhu`, `cosine` (values; the last is 1 - cosine of a token's values, for
            features), `cross_entropy` (class ids), `kl` (probabilities), or `chamfer` (groups of points, as sets;
            Point-MAE).
        decoder: overrides the objective's decoder; `same_as: TARGET` shares that of another objective's target.
        weight: factor on this part of the loss.
    """

    of: str | None = None
    at: str | None = None
    target: dict = Field(default={"type": "values"})
    loss: Literal["mse", "l1", "smooth_l1", "berhu", "cosine", "cross_entropy", "kl", "chamfer"] = "mse"
    decoder: dict | None = None
    weight: float = 1.0


class Reconstruct(Predictor):
    """Sum over targets of the mean loss of hidden positions."""

    class Spec(Strict):
        """Settings of `type: reconstruct`.

        Attributes:
            inputs: modalities that the encoder may see; all of the model's if left out.
            masking: selection of visible and target tokens.
            decoder: decoder of every target that has none of its own.
            targets: name -> what to predict.
            average: `token`: mean over all target values of the global batch (MAE); `sample`: mean within
                each sample, then over the samples that have targets (MultiMAE).
            balance: `none`, or `uncertainty`: learned log-variances s weigh the parts,
                exp(-s) L + s (Kendall et al. 2018; MultiMAE's option).
        """

        inputs: tuple[str, ...] | None = None
        masking: dict = Field(default={"type": "fixed", "visible": 0.25})
        decoder: dict = Field(default={"type": "self_decoder"})
        targets: dict[str, TargetSpec] = Field(min_length=1)
        average: Literal["token", "sample"] = "token"
        balance: Literal["none", "uncertainty"] = "none"

    def __init__(self, spec: Spec, tokenizers: dict[str, Tokenizer], backbone: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.inputs = spec.inputs or tuple(tokenizers)
        for name in self.inputs:
            check_modality("inputs", name, tokenizers)
        tower = tokenizers[self.inputs[0]].tower
        self.decoders = nn.ModuleDict()
        self._lenders: dict[str, str] = {}
        self._borrowed: dict[str, nn.Module] = {}  # in a plain dict, out of reach of `parameters`
        self.providers, self.of, self.channels = {}, {}, {}
        self.places: dict[str, str] = {}
        for name, target in spec.targets.items():
            modality = target.of or name
            check_modality(f"targets.{name}", modality, tokenizers)
            place = self.places[name] = target.at or modality
            if place != modality and place not in self.inputs:
                raise M3Error(
                    f"targets.{name}.at: `{place}` is no input of the objective.{nearest(place, self.inputs)}"
                )
            tokenizer = tokenizers[modality]
            part, settings = build_spec("targets", target.target, f"targets.{name}.target")
            provider = self.providers[name] = part(settings, tokenizer)
            if notes := said(provider, "pinned", {}):
                self.pinned = merge(self.pinned, {"targets": {name: {"target": notes}}})
            self._lenders[name] = (target.decoder or spec.decoder).get("same_as", "")
            if not self._lenders[name]:
                decoder, settings = build_spec("decoders", target.decoder or spec.decoder, f"targets.{name}.decoder")
                with within(f"targets.{name}.decoder"):
                    self.decoders[name] = decoder(settings, tower, tokenizers, self.inputs, place, provider.width)
            self.of[name], self.channels[name] = modality, tokenizer.signal.channels
            check_loss(name, target.loss, tokenizer, said(provider, "kind", None))
        layers = sorted({number for decoder in self.decoders.values() for number in getattr(decoder, "layers", ())})
        self.view = View(self.inputs, json.dumps(spec.masking, sort_keys=True), layers=tuple(layers))
        self.views = (self.view,)
        self.log_variance = nn.Parameter(torch.zeros(len(spec.targets))) if spec.balance == "uncertainty" else None
        signals = {name: tokenizers[modality].signal for name, modality in self.of.items()}
        self.classes = {name: said(part, "classes", signals[name].classes) for name, part in self.providers.items()}
        self.has_gaps = {name: said(part, "has_gaps", signals[name].has_gaps) for name, part in self.providers.items()}
        self.is_relative = {name: said(part, "is_relative", False) for name, part in self.providers.items()}
        self.modality_of = {name: m for name, m in self.of.items() if said(self.providers[name], "is_signal", True)}
        self.part_names = (*spec.targets, *(["balance"] if spec.balance == "uncertainty" else []))

    def borrow(self, others: dict[str, Objective]) -> None:
        """Find the decoders that other objectives share with this one.

        Raises:
            M3Error: there is no such target, or its decoder can't predict this one.
        """
        lent = {name: o for o in others.values() if isinstance(o, Reconstruct) and o is not self for name in o.decoders}
        for name, other in self._lenders.items():
            where = f"targets.{name}.decoder.same_as"
            if not other:
                continue
            if other not in lent:
                raise M3Error(f"{where}: no other objective has a decoder for `{other}`.{nearest(other, lent)}")
            decoder, width = lent[other].decoders[other], lent[other].providers[other].width
            if len(self.inputs) > 1 or not getattr(decoder, "reads_any", False) or width != self.providers[name].width:
                raise M3Error(
                    f"{where}: only a `self_decoder` of targets of one width can be shared, by objectives with one "
                    f"input each; give `{name}` a decoder of its own."
                )
            self._borrowed[name] = decoder

    def forward(self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]) -> Loss:
        """Return one part per target, named after it."""
        view = encoded[self.views[0]]
        parts = {}
        for number, (name, target) in enumerate(self.spec.targets.items()):
            modality = self.of[name]
            index, is_target = self._targets(name, view.plan, tokens)
            predicted = self.predict(name, view, tokens, index)
            truth = self.providers[name](tokens[modality], index)
            weights = value_weights(truth, is_target, self.has_gaps[name])
            if self.has_gaps[name]:  # NaN would poison the gradient even where the weight is False
                truth = truth.nan_to_num(0.0)
            if target.loss == "berhu":
                losses = berhu(predicted.float(), truth.float(), weights)
            else:
                classes, channels = self.classes[name], self.channels[name]
                losses = elementwise_losses(target.loss, predicted.float(), truth, classes, channels)
            total, count = reduce(losses, weights, self.spec.average)
            weight = target.weight
            if self.log_variance is not None:
                weight = weight * torch.exp(-self.log_variance[number])
            parts[name] = Part(total, count, weight)
        if self.log_variance is not None:
            samples = torch.tensor(float(len(view.sequence)), device=view.sequence.device)
            parts["balance"] = Part(self.log_variance.sum() * samples, samples)
        return Loss(parts)

    def counts(self, plans: dict[View, MaskPlan], tokens: dict[str, Tokens]) -> dict[str, Tensor]:
        """Return the count of every part that `forward` will return."""
        plan, counts = plans[self.views[0]], {}
        if not any(self._targets(name, plan, tokens)[0].shape[1] for name in self.spec.targets):
            raise M3Error("the masking of `reconstruct` hides nothing that could be predicted; lower `visible`.")
        for name in self.spec.targets:
            index, is_target = self._targets(name, plan, tokens)
            provider, own = self.providers[name], tokens[self.of[name]]
            if self.has_gaps[name] or not hasattr(provider, "count"):
                truth = provider(own, index)
            else:  # nothing but the shape matters, and a teacher need not look
                truth = index.new_zeros((*index.shape, provider.count))
            weights = value_weights(truth, is_target, self.has_gaps[name])
            counts[name] = reduce(torch.zeros_like(truth, dtype=torch.float32), weights, self.spec.average)[1]
        if self.log_variance is not None:
            samples = next(iter(tokens.values())).values
            counts["balance"] = torch.tensor(float(len(samples)), device=samples.device)
        return counts

    def place_of(self, name: str) -> str:
        """Return the modality whose hidden tokens are the places that target `name` is predicted at."""
        return self.places[name]

    def predict(self, name: str, encoded: Encoded, tokens: dict[str, Tokens], index: Tensor) -> Tensor:
        """Predict target `name` at the tokens index (B, T) -> (B, T, output width)."""
        decoder = self._borrowed[name] if name in self._borrowed else self.decoders[name]
        return decoder(encoded, tokens, index)

    def restore(self, name: str, output: Tensor, tokens: Tokens) -> Tensor:
        """Undo the normalisation of target `name`, for pictures (B, N, output width)."""
        return self.providers[name].restore(output, tokens)

    def truth(self, name: str, tokens: Tokens) -> Tensor:
        """Return what target `name` is compared with, for all tokens (B, N, P)."""
        everything = torch.arange(tokens.count, device=tokens.values.device)
        return self.providers[name](tokens, everything.expand(len(tokens.values), -1))

    def _targets(self, name: str, plan: MaskPlan, tokens: dict[str, Tokens]) -> tuple[Tensor, Tensor | None]:
        """Return target indices (B, T) and which of them count; a modality that is no input is predicted whole."""
        modality, place = self.of[name], self.places[name]
        if modality not in tokens:
            raise M3Error(f"the batch has no `{modality}`, which target `{name}` needs; add it to the data.")
        if place in plan.asked:
            raise M3Error(
                f"the masking asks for `{place}` as a sequence with sentinels, which this objective can't predict; "
                f"use `type: translate`, or remove its `sentinels`."
            )
        part = tokens[modality]
        if place in plan.target:
            index, is_target = plan.target[place], plan.is_target.get(place)
            if place != modality:
                _check_counts(name, modality, place, tokens)
            if place != modality and part.is_valid is not None:
                there = take(part.is_valid, index)
                is_target = there if is_target is None else is_target & there
            return index, is_target
        everything = torch.arange(part.count, device=part.values.device)
        return everything.expand(len(part.values), -1), part.is_valid


def _check_counts(name: str, modality: str, place: str, tokens: dict[str, Tokens]) -> None:
    """Raise M3Error when a target can't be predicted token by token at the places of another modality."""
    own, there = tokens[modality].count, tokens[place].count
    if own != there:
        raise M3Error(
            f"target `{name}` can't be predicted at the tokens of {place}: {modality} has {own} of them, {place} "
            f"{there}; make them equal."
        )


def reduce(losses: Tensor, weights: Tensor | None, average: str) -> tuple[Tensor, Tensor]:
    """Add up losses (B, T, P) where weights (B, T, 1 or P) is True -> sum () and count ().

    `token` counts values; `sample` takes the mean within each sample and counts samples that have a target.
    """
    if weights is None:
        if not losses.numel():  # nothing is asked for
            return losses.sum(), losses.new_zeros(())
        if average == "sample":
            return losses.flatten(1).mean(1).sum(), losses.new_tensor(len(losses))
        return losses.sum(), losses.new_tensor(losses.numel())
    weights = weights.expand_as(losses)
    losses = losses * weights
    if average == "token":
        return losses.sum(), weights.sum().to(losses.dtype)
    counts = weights.flatten(1).sum(1)
    return (losses.flatten(1).sum(1) / counts.clamp(min=1)).sum(), (counts > 0).sum().to(losses.dtype)


def elementwise_losses(kind: str, predicted: Tensor, truth: Tensor, classes: int, channels: int) -> Tensor:
    """Return (B, T, P) losses of single values; those of unknown values mean nothing and are not counted."""
    if kind == "cross_entropy":
        scores = predicted.reshape(-1, classes)
        losses = F.cross_entropy(scores, truth.reshape(-1), reduction="none", ignore_index=-1)
        return losses.reshape(truth.shape)
    if kind == "kl":  # one number per token, spread over its classes, so that it counts like others
        losses = F.kl_div(predicted.log_softmax(-1), truth.float(), reduction="none").sum(-1, keepdim=True)
        return losses.expand(truth.shape)
    if kind == "cosine":  # likewise
        losses = 1 - F.cosine_similarity(predicted, truth.float(), dim=-1)
        return losses.unsqueeze(-1).expand(truth.shape)
    if kind == "chamfer":  # one number per group, spread over its values, so that they count like others
        groups = [x.unflatten(-1, (-1, channels)).flatten(0, 1) for x in (predicted, truth.float())]
        return chamfer(*groups).view(*truth.shape[:2], 1).expand(truth.shape)
    measure = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[kind]
    return measure(predicted, truth.float(), reduction="none")


def berhu(predicted: Tensor, truth: Tensor, weights: Tensor | None) -> Tensor:
    """Return (B, T, P) reverse Huber losses: |e| up to c and (e^2 + c^2) / 2 c beyond (Laina et al. 2016, section 3.3).

    c is a fifth of the largest error that counts, as there, but of each sample and not of the whole batch: so the loss
    of a sample does not depend on the others.

    Args:
        predicted: (B, T, P).
        truth: (B, T, P) without NaN.
        weights: (B, T, 1 or P) bool, True for values that count; None: all.
    """
    error = (predicted - truth).abs()
    known = error.detach() if weights is None else error.detach() * weights
    c = (known.flatten(1).amax(1) * 0.2).clamp(min=1e-5)[:, None, None]
    return torch.where(error < c, error, (error.square() + c.square()) / (2 * c))


def value_weights(truth: Tensor, is_target: Tensor | None, has_gaps: bool) -> Tensor | None:
    """Return (B, T, 1 or P) bool, True for values that count; None when all do."""
    weights = None if is_target is None else is_target.unsqueeze(-1)
    if has_gaps:
        is_known = ~truth.isnan() if truth.is_floating_point() else truth >= 0
        weights = is_known if weights is None else weights & is_known
    return weights


def check_modality(where: str, name: str, tokenizers: dict[str, Tokenizer]) -> None:
    """Raise M3Error when a setting names a modality that is not there."""
    if name not in tokenizers:
        raise M3Error(f"{where} names `{name}`, which is no modality of the recipe.{nearest(name, tokenizers)}")


def said(provider: Any, what: str, otherwise: Any) -> Any:
    """Return what a target provider says of itself; those from outside may leave it to the modality."""
    return getattr(provider, what, otherwise)


def check_loss(name: str, loss: str, tokenizer: Tokenizer, kind: str | None = None) -> None:
    """Raise M3Error when a loss can't compare what target `name` holds; `kind` None: what its tokens hold."""
    kind = kind or tokenizer.signal.kind
    if loss == "chamfer" and tokenizer.signal.channel_axis != -1:
        raise M3Error(f"target `{name}` holds no points, which loss `chamfer` compares; use mse, l1 or smooth_l1.")
    fitting = {"cross_entropy": "classes", "kl": "probabilities"}.get(loss, "values")
    if kind != fitting:
        raise M3Error(
            f"target `{name}` holds {kind}, which loss `{loss}` can't compare; "
            f"use cross_entropy for classes, kl for probabilities and mse, l1, smooth_l1, berhu or cosine for values."
        )
