"""Tokenizers, towers and objectives put together: what a batch passes through in training.

Letters: B batch, N content tokens of a modality, S visible slots of a modality, V visible tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from m3.backbone import Backbone, BackboneSpec, TowerSpec
from m3.config import M3Config
from m3.encoder import Encoder
from m3.errors import M3Error, nearest, read_settings, within
from m3.layer import Layer
from m3.masker import Masker
from m3.overrides import merge
from m3.partners import check_swap, draw_partners, swap_of, swapped
from m3.parts import build_spec
from m3.plugins import Coupled, Modality, Objective, Pool, Tokenizer, View
from m3.positions import Marks, build_positions
from m3.random import Draws
from m3.sharing import check_readers, only_targets, readers, towers_of
from m3.types import Batch, Encoded, Loss, MaskPlan, Tokens


@dataclass(frozen=True)
class Prepared:
    """A batch after tokenising and masking, ready for the network.

    Attributes:
        tokens: modality -> its tokens, unmasked.
        plans: view -> which tokens are visible and which are targets; only of the objectives that take part.
        draws: the batch's random numbers.
        active: names of the objectives that take part; None: all.
    """

    tokens: dict[str, Tokens]
    plans: dict[View, MaskPlan]
    draws: Draws | None = None
    active: tuple[str, ...] | None = None

    @property
    def samples(self) -> int:
        """B, the number of samples."""
        return len(next(iter(self.tokens.values())).values)


@dataclass
class M3Output(ModelOutput):
    """What `M3Model` returns.

    Attributes:
        loss: () weighted sum of the parts, each divided by its own count.
        parts: the parts as sums and counts, for dividing over several batches or ranks.
        rows: objective -> what the other samples of the step must know of these, where only that was asked for.
    """

    loss: Tensor | None = None
    parts: Loss | None = None
    rows: dict[str, dict[str, Tensor]] | None = None


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


class Network(Encoder):
    """One transformer, or several towers, over all modalities of a config, with the heads of its objectives."""

    config_class = M3Config
    base_model_prefix = "m3"
    main_input_name = "batch"

    def __init__(self, config: M3Config) -> None:
        super().__init__(config)
        if not config.modalities:
            raise M3Error("the config names no modalities; build it from a recipe.")
        spec = read_settings(BackboneSpec, config.backbone or {}, "backbone")
        self.modalities = build_modalities(config.modalities)
        towers = {
            name: read_settings(TowerSpec, tower, f"towers.{name}") for name, tower in (config.towers or {}).items()
        }
        self.tower_of = towers_of(towers, self.modalities)
        self.reader_of = readers(config.modalities)
        self.tokenizers = nn.ModuleDict()
        self._build_tokenizers(towers, spec)
        tokenizers = {name: self._tokenizer(name) for name in self.modalities}
        check_readers(self.reader_of, tokenizers, self.modalities, self.tower_of)
        self.positions = nn.ModuleDict()
        objectives = {}
        settled = {}
        for name, entry in (config.objectives or {}).items():
            part, settings = build_spec("objectives", entry, f"objectives.{name}")
            with within(f"objectives.{name}"):
                objectives[name] = part(settings, tokenizers, spec)
            settled[name] = merge(entry, objectives[name].pinned)
        config.objectives = settled
        for name, objective in objectives.items():
            with within(f"objectives.{name}"):
                objective.borrow(objectives)
        self.views: dict[View, Masker] = {}
        for name, objective in objectives.items():
            for view in objective.views:
                with within(f"objectives.{name}"):
                    self._check_view(view)
                    own = {name: tokenizers[name] for name in view.modalities}
                    self.views[view] = Masker(view, {name: _classes(part) for name, part in own.items()})
                    self.views[view].bind(own)
        seen = self._build_towers(spec, towers)
        places = {n: self.positions[own] for n, own in self.reader_of.items() if own in self.positions}
        self.marks = Marks(places, self.modality_embeddings)
        for objective in objectives.values():
            objective.marks = self.marks
        self.objectives = nn.ModuleDict(objectives)
        able = [name for name, part in objectives.items() if hasattr(part, "similarity")]
        for view in self.views:
            check_swap(view, able)
        self.post_init()
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.layers()})  # what FSDP cuts up by
        self._freeze({name for name, tower in {"": spec, **towers}.items() if tower.frozen})
        for name in only_targets(objectives, seen):  # they are never embedded
            self.tokenizers[name].requires_grad_(False)

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """Return None, for libraries that ask (Accelerate's FSDP): every modality has an embedding of its own."""

    def layers(self) -> list[Layer]:
        """Return the blocks of all transformers: of the backbone, towers and decoders."""
        return [module for module in self.modules() if isinstance(module, Layer)]

    def recompute(self) -> None:
        """Compute what is in each block again in the backward pass instead of keeping it."""
        for layer in self.layers():
            layer.is_recomputed = True

    def _build_towers(self, spec: BackboneSpec, towers: dict[str, TowerSpec]) -> dict[str, None]:
        """Make the transformers that the views need, with what is added to tokens; return what the views read."""
        self.modality_embeddings = nn.ParameterDict()
        self.mask_tokens = nn.ParameterDict()
        self.input_norms = nn.ModuleDict()
        self.towers = nn.ModuleDict()
        self.backbone = None  # objectives without views bring their own network
        seen = dict.fromkeys(name for view in self.views for name in view.modalities)
        if not self.config.objectives:  # a model that only encodes
            seen = dict.fromkeys(self.modalities)
        hidden = {name for view, mask in self.views.items() for name in view.modalities if mask.hides(name)}
        self.inputs = tuple(name for name in self.modalities if name in seen)
        for name in self.inputs:
            tower = towers.get(self.tower_of[name], spec)
            if self.reader_of[name] == name:
                self.positions[name] = build_positions(self._tokenizer(name), tower.width, tower.axis_order)
            if tower.modality_embedding:
                self.modality_embeddings[name] = nn.Parameter(torch.empty(1, tower.width))
            if tower.input_norm == "modality":
                self.input_norms[name] = nn.LayerNorm(tower.width, eps=tower.norm_eps, bias=tower.bias)
            if name in hidden and self._tokenizer(name).mask_values is None:
                self.mask_tokens[name] = nn.Parameter(torch.empty(1, tower.width))
        for tower in dict.fromkeys(self.tower_of[name] for name in seen):
            own = [name for name in self.inputs if self.tower_of[name] == tower]
            grid = self._tokenizer(own[0]).reference if len(own) == 1 else None
            with within(f"towers.{tower}" if tower else "backbone"):
                if tower:
                    self.towers[tower] = Backbone(towers[tower], grid)
                else:
                    self.backbone = Backbone(spec, grid)
        return seen

    def _build_tokenizers(self, towers: dict[str, TowerSpec], backbone: BackboneSpec) -> None:
        """Make the tokenizers and tell each what it needs to know; pinned settings join the config."""
        for name in dict.fromkeys(self.reader_of.values()):
            tower, signal = towers.get(self.tower_of[name], backbone), self.modalities[name].signal
            entry = self.config.modalities[name]["tokenizer"]
            part, settings = build_spec("tokenizers", entry, f"modalities.{name}.tokenizer")
            tokenizer = self.tokenizers[name] = part(settings, signal, tower.width)
            self.config.modalities[name]["tokenizer"] |= tokenizer.pinned
            tokenizer.positions = self.config.modalities[name].get("positions", tokenizer.positions)
            tokenizer.tower, tokenizer.modality = tower, self.modalities[name]

    # -- training: a batch passes prepare, encode, the objectives ---------------------------------------

    @torch.no_grad()
    def prepare(self, batch: Batch, seed: int | None = None, active: tuple[str, ...] | None = None) -> Prepared:
        """Tokenise a batch and draw its masks.

        Args:
            batch: raw signals on the model's device.
            seed: of the masks; the config's if left out.
            active: names of the objectives that take part; None: all.
        """
        tokens = self.tokenise(batch)
        draws = Draws(batch.keys, self.config.seed if seed is None else seed)
        views = dict.fromkeys(view for objective in self._active(active).values() for view in objective.views)
        views |= dict.fromkeys(needed for view in views for needed in self._needed(view))
        return Prepared(tokens, {view: self._plan(view, tokens, draws) for view in views}, draws, active)

    def _plan(self, view: View, tokens: dict[str, Tokens], draws: Draws, similarity: Tensor | None = None) -> MaskPlan:
        """Draw the mask of a view, and who borrows from whom where it mismatches samples."""
        seen = {name: tokens[name] for name in view.modalities if name in tokens}
        if not seen:
            raise M3Error(f"the batch has none of {', '.join(view.modalities)}; give at least one of them.")
        swap = swap_of(view)
        if swap is None:
            return self.views[view](seen, draws)
        partners = draw_partners(swap, seen, draws, similarity)
        return replace(self.views[view](swapped(seen, partners), draws), partners=partners)

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
        for name, objective in self._active(prepared.active).items():
            for part, count in objective.counts(prepared.plans, prepared.tokens).items():
                counts[f"{name}/{part}"] = count
        return counts

    @property
    def is_coupled(self) -> bool:
        """True when a loss joins the samples of a whole step."""
        return any(isinstance(objective, Coupled) for objective in self._objectives().values())

    @property
    def has_teacher(self) -> bool:
        """True when an objective learns from a moving average of the model."""
        return any(view.is_teacher for view in self.views)

    @property
    def part_names(self) -> list[str]:
        """Names of all parts of the loss, in the order in which `forward` returns them."""
        return [f"{name}/{part}" for name, objective in self._objectives().items() for part in objective.part_names]

    def forward(
        self, batch: Batch | Prepared, pools: dict[str, Pool] | None = None, is_only_rows: bool = False
    ) -> M3Output:
        """Compute the losses of the objectives.

        Args:
            batch: raw signals, or what `prepare` made of them.
            pools: coupled objective -> the rows of all samples of the step; None: the batch is all of the step.
            is_only_rows: return the coupled objectives' rows of this batch instead of losses.
        """
        if not len(self.objectives):
            raise M3Error(
                "the model has no objectives, so there is no loss; call `encode`, or start a recipe with `init:`."
            )
        prepared = self.prepare(batch) if isinstance(batch, Batch) else batch
        tokens, objectives = prepared.tokens, self._active(prepared.active)
        if is_only_rows:
            objectives = {name: o for name, o in objectives.items() if isinstance(o, Coupled)}
        encoded = self.encode_views(prepared, dict.fromkeys(view for o in objectives.values() for view in o.views))
        if is_only_rows:
            return M3Output(rows={n: o.rows(encoded, tokens) for n, o in objectives.items() if isinstance(o, Coupled)})
        parts, watched = {}, {}
        for name, objective in objectives.items():
            if isinstance(objective, Coupled):
                loss = objective(encoded, tokens, (pools or {}).get(name))
            else:
                loss = objective(encoded, tokens)
            parts |= {f"{name}/{part}": value for part, value in loss.parts.items()}
            watched |= {f"{name}/{key}": value for key, value in loss.watched.items()}
        loss = Loss(parts, watched)
        return M3Output(loss=loss.total(), parts=loss)

    def encode_views(self, prepared: Prepared, views: Iterable[View]) -> dict[View, Encoded]:
        """Encode every view once; views whose mismatches depend on similarities come last."""
        encoded, waiting = {}, []
        keys = prepared.draws.numbers("network") if self.training and prepared.draws is not None else None
        for view in views:
            swap = swap_of(view)
            if swap and swap.by != "random":
                waiting.append((view, swap))
            else:
                encoded[view] = self.encode_view(view, prepared.tokens, prepared.plans[view], keys)
        for view, swap in waiting:
            assert prepared.draws is not None, "a view with mismatches by similarity needs the draws of `prepare`"
            with torch.no_grad():
                for needed in self._needed(view):  # of an objective that does not take part in this step
                    if needed not in encoded:
                        encoded[needed] = self.encode_view(needed, prepared.tokens, prepared.plans[needed])
                similarity = self.objectives[swap.by].similarity(encoded, swap.of)  # type: ignore[operator]
            plan = self._plan(view, prepared.tokens, prepared.draws, similarity)
            encoded[view] = self.encode_view(view, prepared.tokens, plan, keys)
        return encoded

    def _needed(self, view: View) -> tuple[View, ...]:
        """Return the views whose similarities say who borrows from whom in this one."""
        by = swap.by if (swap := swap_of(view)) else "random"
        return () if by == "random" else self._objectives()[by].views

    def after_step(self) -> None:
        """Move what learns without gradients, e.g. codebooks; the trainer calls it after each optimizer step."""
        for objective in self._objectives().values():
            objective.after_step()

    def _objectives(self) -> dict[str, Objective]:
        return dict(self.objectives.items())  # type: ignore[arg-type]  # as above

    def _active(self, names: tuple[str, ...] | None) -> dict[str, Objective]:
        return {name: o for name, o in self._objectives().items() if names is None or name in names}


def _classes(tokenizer: Tokenizer) -> int:
    """Return how many classes a token may have by itself; 0 where it holds values or several classes."""
    return tokenizer.signal.classes if tokenizer.value_width == 1 else 0
