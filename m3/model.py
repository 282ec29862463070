"""M3Model: tokenizers, backbone and objectives put together, as a transformers model.

Letters: B batch, N content tokens of a modality, V visible tokens, D width, P values per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from m3 import masking
from m3.backbone import Backbone, BackboneSpec
from m3.config import M3Config
from m3.errors import M3Error, explain, nearest, within
from m3.parts import build_spec
from m3.plugins import Modality, Objective, Predictor, Signal, Tokenizer, View
from m3.positions import Rotary, build_positions
from m3.random import Draws
from m3.types import Batch, Encoded, Loss, MaskPlan, Tokens, take


@dataclass(frozen=True)
class Prepared:
    """A batch after tokenising and masking, ready for the network.

    Attributes:
        tokens: modality -> its tokens, unmasked.
        plans: view -> which tokens are visible and which are targets.
    """

    tokens: dict[str, Tokens]
    plans: dict[View, MaskPlan]


@dataclass
class M3Output(ModelOutput):
    """What `M3Model` returns.

    Attributes:
        loss: () weighted sum of the parts, each divided by its own count.
        parts: the parts as sums and counts, for dividing over several batches or ranks.
    """

    loss: Tensor | None = None
    parts: Loss | None = None


@dataclass(frozen=True)
class Reconstruction:
    """What `M3Model.reconstruct` returns.

    Attributes:
        predicted: target -> the whole predicted signal, as the modality's `normalise` returns it. A target that
            was trained on normalised patches has each patch's true mean and contrast put back.
        output: target -> (B, N, output width) what the decoder itself predicted.
        values: target -> (B, N, P) the same as token values.
        tokens: modality -> the tokens of the batch.
        modality_of: target -> modality.
        plan: what the encoder saw.
        is_visible: modality -> (B, N) bool per token, True where the encoder saw it.
    """

    predicted: dict[str, Tensor]
    output: dict[str, Tensor]
    values: dict[str, Tensor]
    tokens: dict[str, Tokens]
    modality_of: dict[str, str]
    plan: MaskPlan
    is_visible: dict[str, Tensor]


def resolved(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of a modality with the content of files in the place of their paths."""
    own = {key: value for key, value in settings.items() if key not in ("tokenizer", "positions")}
    part, _ = build_spec("modalities", own, where)
    return {**settings, **part.resolve(own)}


def build_modalities(settings: dict[str, Any]) -> dict[str, Modality]:
    """Make the modality objects of a config or recipe: name -> settings to name -> `Modality`."""
    built = {}
    for name, entry in settings.items():
        own = {key: value for key, value in entry.items() if key not in ("tokenizer", "positions")}
        part, spec = build_spec("modalities", own, f"modalities.{name}")
        built[name] = part(spec)
    return built


class M3Model(PreTrainedModel):
    """One transformer over all modalities of its config, with the decoders of its objectives."""

    config_class = M3Config
    base_model_prefix = "m3"
    main_input_name = "batch"
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own form)

    def __init__(self, config: M3Config) -> None:
        super().__init__(config)
        if not config.modalities or not config.objectives:
            raise M3Error("the config names no modalities or no objectives; build it from a recipe.")
        spec = _backbone_spec(config)
        self.modalities = build_modalities(config.modalities)
        self.tokenizers = nn.ModuleDict()
        self.positions = nn.ModuleDict()
        for name, modality in self.modalities.items():
            where = f"modalities.{name}.tokenizer"
            if "tokenizer" not in config.modalities[name]:
                raise M3Error(f"{where}: this key is required; add it, e.g. `tokenizer: {{type: patch, size: 16}}`.")
            part, settings = build_spec("tokenizers", config.modalities[name]["tokenizer"], where)
            tokenizer = self.tokenizers[name] = part(settings, modality.signal, spec.width)
            config.modalities[name]["tokenizer"] |= tokenizer.pinned
            tokenizer.positions = config.modalities[name].get("positions", tokenizer.positions)
        objectives = {}
        for name, entry in config.objectives.items():
            part, settings = build_spec("objectives", entry, f"objectives.{name}")
            with within(f"objectives.{name}"):
                objectives[name] = part(settings, dict(self.tokenizers.items()), spec)
        self.views: dict[View, Any] = {}
        for name, objective in objectives.items():
            for view in objective.views:
                with within(f"objectives.{name}"):
                    self.views[view] = masking.build(view)
        self.modality_embeddings = nn.ParameterDict()
        self.backbone = None  # objectives without views bring their own network
        if self.views:
            for name in self.modalities:
                self.positions[name] = build_positions(self._tokenizer(name), spec.width, spec.axis_order)
                if spec.modality_embedding:
                    self.modality_embeddings[name] = nn.Parameter(torch.empty(1, spec.width))
            self.backbone = Backbone(spec)
        self.objectives = nn.ModuleDict(objectives)
        self.post_init()

    # -- training: a batch passes prepare, encode, the objectives ---------------------------------------

    @torch.no_grad()
    def prepare(self, batch: Batch, seed: int | None = None) -> Prepared:
        """Tokenise a batch and draw its masks.

        Args:
            batch: raw signals on the model's device.
            seed: of the masks; the config's if left out.
        """
        tokens = self.tokenise(batch)
        draws = Draws(batch.keys, self.config.seed if seed is None else seed)
        plans = {}
        for view, selection in self.views.items():
            seen = {name: tokens[name] for name in view.modalities if name in tokens}
            if not seen:
                raise M3Error(f"the batch has none of {', '.join(view.modalities)}; give at least one of them.")
            plans[view] = selection(seen, draws)
        return Prepared(tokens, plans)

    @torch.no_grad()
    def tokenise(self, batch: Batch) -> dict[str, Tokens]:
        """Normalise the raw signals of a batch and cut them into tokens."""
        tokens = {}
        for name, raw in batch.signals.items():
            if name not in self.modalities:
                raise M3Error(f"the model has no modality `{name}`.{nearest(name, self.modalities)}")
            signal = self.modalities[name].normalise(raw)
            part = self._tokenizer(name).tokenize(signal, batch.times.get(name))
            part = replace(part, group=self._groups(name, signal, part.count))
            if name in batch.is_present:
                there = batch.is_present[name].unsqueeze(1).expand(-1, part.count)
                is_valid = there if part.is_valid is None else there & part.is_valid
                # What stands in for an absent signal must not matter, not even if it is NaN.
                values = part.values.masked_fill(~there.unsqueeze(-1), 0)
                part = replace(part, values=values, is_valid=is_valid)
            tokens[name] = part
        return {name: tokens[name] for name in self.modalities if name in tokens}

    def _groups(self, name: str, signal: Tensor, count: int) -> Tensor | None:
        """Return which of a modality's tokens belong together: (B, N), where each token is one position."""
        group = self.modalities[name].groups(signal)
        if group is not None and group[0].numel() != count:
            raise M3Error(
                f"modalities.{name}: its groups are of positions ({group[0].numel()}), but its tokenizer makes "
                f"{count} tokens of them; use one that makes a token of each position."
            )
        return None if group is None else group.flatten(1)

    def counts(self, prepared: Prepared) -> dict[str, Tensor]:
        """Return the count of every part of the loss that `forward` will return, without running the network."""
        counts = {}
        for name, objective in self._objectives().items():
            for part, count in objective.counts(prepared.plans, prepared.tokens).items():
                counts[f"{name}/{part}"] = count
        return counts

    @property
    def part_names(self) -> list[str]:
        """Names of all parts of the loss, in the order in which `forward` returns them."""
        return [f"{name}/{part}" for name, objective in self._objectives().items() for part in objective.part_names]

    def forward(self, batch: Batch | Prepared) -> M3Output:
        """Compute the losses of all objectives.

        Args:
            batch: raw signals, or what `prepare` made of them.
        """
        prepared = self.prepare(batch) if isinstance(batch, Batch) else batch
        encoded = {view: self.encode_tokens(prepared.tokens, plan) for view, plan in prepared.plans.items()}
        parts = {}
        for name, objective in self._objectives().items():
            for part, value in objective(encoded, prepared.tokens).parts.items():
                parts[f"{name}/{part}"] = value
        loss = Loss(parts)
        return M3Output(loss=loss.total(), parts=loss)

    def after_step(self) -> None:
        """Move what learns without gradients, e.g. codebooks; the trainer calls it after each optimizer step."""
        for objective in self._objectives().values():
            objective.after_step()

    def encode_tokens(self, tokens: dict[str, Tokens], plan: MaskPlan, layers: tuple[int, ...] = ()) -> Encoded:
        """Embed and encode the visible tokens of one view, and only those."""
        if self.backbone is None:
            raise M3Error("the model has no backbone, since none of its objectives has a view; use `M3Tokenizer`.")
        slots, angles = {}, {}
        for name, index in plan.visible.items():
            values = take(tokens[name].values, index)
            x = self._tokenizer(name).embed(values.to(self.dtype) if values.is_floating_point() else values)
            place = self.positions[name]
            if isinstance(place, Rotary):
                table = place.angles(tokens[name].positions, self.backbone.head_width)
                angles[name] = take(table, index).expand(len(x), -1, -1)
            else:
                x = x + take(place(tokens[name].positions), index)
            if name in self.modality_embeddings:
                x = x + self.modality_embeddings[name]
            slots[name] = x.to(self.dtype)
        if not angles:
            return self.backbone(plan.pack(slots), plan, layers)
        still = {name: x.new_zeros(*x.shape[:2], self.backbone.head_width // 2) for name, x in slots.items()}
        return self.backbone(plan.pack(slots), plan, layers, plan.pack(still | angles))

    # -- using a trained model --------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, batch: Batch, layers: tuple[int, ...] = ()) -> Encoded:
        """Encode everything in a batch, nothing hidden.

        Args:
            batch: raw signals of any subset of the modalities.
            layers: numbers of blocks whose output is kept in `Encoded.layers`.
        """
        tokens = self.tokenise(batch.to(self.device))
        return self.encode_tokens(tokens, masking.everything(tokens), layers)

    @torch.no_grad()
    def reconstruct(
        self,
        batch: Batch,
        visible: float | Mapping[str, float | Tensor] | None = None,
        seed: int = 0,
        objective: str | None = None,
    ) -> Reconstruction:
        """Show a part of the batch to the encoder and predict every target of one objective from it.

        Args:
            batch: raw signals. A modality that is not in it is predicted all the same, at its usual size.
            visible: share (a float in [0, 1]) or number (an int) of visible tokens for all modalities or for
                each by name, or a mask (B, N) bool, True where visible; unnamed modalities are hidden. None:
                the masking of the recipe.
            seed: of the masks.
            objective: name of the objective that predicts; the first one that can if left out.
        """
        batch = batch.to(self.device)
        tokens = self.tokenise(batch)
        predictor = self._predictor(objective)
        draws = Draws(batch.keys, seed)
        view = predictor.view
        seen = {name: tokens[name] for name in view.modalities if name in tokens} if view else {}
        if view is None:
            encoded = Encoded(torch.empty(len(batch), 0, 0), 0, MaskPlan({}, {}))
        elif visible is None:
            encoded = self.encode_tokens(tokens, self.views[view](seen, draws))
        else:
            encoded = self.encode_tokens(tokens, masking.explicit(seen, masking.masks(seen, visible, draws)))
        plan = encoded.plan
        predicted, outputs, guesses = {}, {}, {}
        for name, modality in predictor.modality_of.items():
            part = self._askable(modality, tokens, batch)
            everything = torch.arange(part.count, device=self.device).expand(len(batch), -1)
            output = outputs[name] = predictor.predict(name, encoded, {**tokens, modality: part}, everything)
            values = self._tokenizer(modality).decode(predictor.restore(name, output, part))
            guesses[name] = values
            predicted[name] = self._tokenizer(modality).detokenize(values, part.positions, self._size(batch, modality))
        is_visible = {name: _seen_tokens(tokens[name], plan, name) for name in seen}
        return Reconstruction(predicted, outputs, guesses, tokens, predictor.modality_of, plan, is_visible)

    def _predictor(self, name: str | None) -> Predictor:
        found = {n: o for n, o in self.objectives.items() if isinstance(o, Predictor)}
        if not found:
            raise M3Error("the model has no objective that predicts signals; reconstruct needs `type: reconstruct`.")
        if name is not None and name not in found:
            raise M3Error(f"the model has no objective `{name}` that predicts signals.{nearest(name, found)}")
        return found[name] if name is not None else next(iter(found.values()))

    def _askable(self, name: str, tokens: dict[str, Tokens], batch: Batch) -> Tokens:
        """Return the tokens of `name` with a place for everything that is to be predicted, also where it is absent."""
        if name not in tokens:
            return self.blank_tokens(name, len(batch))
        part = tokens[name]
        if name not in batch.is_present or part.is_valid is None:
            return part
        return replace(part, is_valid=part.is_valid | ~batch.is_present[name].unsqueeze(1))

    def spread(self, name: str, is_token: Tensor, tokens: Tokens, size: tuple[int, ...]) -> Tensor:
        """Return (B, *size) bool per position of the signal from (B, N) bool per token of modality `name`."""
        values = is_token.unsqueeze(-1).expand(tokens.values.shape)
        x = self._tokenizer(name).detokenize(values, tokens.positions, size)
        return self.modalities[name].signal.without_channels(x)

    def _size(self, batch: Batch, name: str) -> tuple[int, ...]:
        modality = self.modalities[name]
        if name not in batch.signals:
            return modality.signal.size
        return modality.signal.extent(modality.normalise(batch.signals[name][:1]))

    def tokens_hold(self, name: str) -> Signal:
        """Return what the tokens of a modality hold: its signal, or the classes that a codebook makes of it."""
        return self._tokenizer(name).signal

    def blank_tokens(self, name: str, count: int) -> Tokens:
        """Return tokens of an absent modality: places without content, for decoders that predict it."""
        raw = self.modalities[name].blank(count).to(self.device)
        return self._tokenizer(name).tokenize(self.modalities[name].normalise(raw))

    def _tokenizer(self, name: str) -> Tokenizer:
        return self.tokenizers[name]  # type: ignore[return-value]  # ModuleDict forgets the class of its values

    def _objectives(self) -> dict[str, Objective]:
        return dict(self.objectives.items())  # type: ignore[arg-type]  # as above

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as MAE does: xavier-uniform matrices, zero biases, N(0, 0.02) tokens and embeddings."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.ndim > 1:
                    init.normal_(parameter, std=0.02)
                else:  # learned log-variances start at 0, weight 1
                    init.zeros_(parameter)


def _seen_tokens(tokens: Tokens, plan: MaskPlan, name: str) -> Tensor:
    """Return (B, N) bool, True where the encoder saw the token."""
    is_seen = torch.zeros(tokens.values.shape[:2], dtype=torch.bool, device=tokens.values.device)
    is_own = plan.packed_modality() == list(plan.visible).index(name)
    if plan.is_valid is not None:
        is_own &= plan.is_valid
    sample, place = is_own.nonzero(as_tuple=True)
    is_seen[sample, plan.packed_index()[sample, place]] = True
    return is_seen


def _backbone_spec(config: M3Config) -> BackboneSpec:
    from pydantic import ValidationError

    try:
        return BackboneSpec(**(config.backbone or {}))
    except ValidationError as error:
        raise explain(error, BackboneSpec, "backbone") from error
