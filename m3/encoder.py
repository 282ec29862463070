"""How the tokens of a view become states: embedded, placed, and passed through the transformer that reads them.

Letters: B batch, N content tokens of a modality, S visible slots of a modality, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers import initialization as init

from m3.backbone import Backbone
from m3.errors import M3Error
from m3.partners import swapped
from m3.plugins import Tokenizer, View
from m3.positions import Marks, Rotary
from m3.relative import RelativeBias
from m3.types import HIDDEN, Encoded, MaskPlan, Tokens, take


class _Encode(nn.Module):
    """`Encoder.encode_tokens` as a module, so that it can be called with other weights."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, tokens: dict[str, Tokens], plan: MaskPlan, layers: tuple[int, ...], keys: Tensor | None
    ) -> Encoded:
        return self.encoder.encode_tokens(tokens, plan, layers, keys)


class Encoder(PreTrainedModel):
    """The encoding half of the network; `m3.network.Network` builds its parts.

    Attributes:
        tokenizers: modality -> what embeds its tokens.
        positions: modality -> embedding of their places.
        modality_embeddings: modality -> (1, D), where its tower has them.
        mask_tokens: modality -> (1, D), where some view replaces hidden tokens and their tokenizer has no
            `mask_values`.
        input_norms: modality -> LayerNorm of its tokens, where its tower has one for each.
        towers: name -> transformer of its own for some modalities.
        backbone: the shared transformer; None: no objective has a view.
        marks: what is added to embedded tokens.
        reader_of: modality -> the one whose tokenizer and positions read it.
        tower_of: modality -> name of its tower, empty for the backbone.
        teacher: name of a parameter -> its moving average, kept by the trainer, or the `encode_tokens` of another
            network that holds them; neither trained nor saved with the model. None: the parameters themselves.
    """

    tokenizers: nn.ModuleDict
    positions: nn.ModuleDict
    modality_embeddings: nn.ParameterDict
    mask_tokens: nn.ParameterDict
    input_norms: nn.ModuleDict
    towers: nn.ModuleDict
    backbone: Backbone | None
    marks: Marks
    reader_of: dict[str, str]
    tower_of: dict[str, str]
    teacher: dict[str, Tensor] | Callable[..., Encoded] | None = None

    def encode_view(self, view: View, tokens: dict[str, Tokens], plan: MaskPlan, keys: Tensor | None = None) -> Encoded:
        """Encode a view, by the model itself or by its teacher; keys as in `Encoded`."""
        given = (tokens, plan, view.layers, keys)
        if not view.is_teacher:
            return self.encode_tokens(*given)
        with torch.no_grad():
            if self.teacher is None:  # nothing has moved yet
                return self.encode_tokens(*given)
            if callable(self.teacher):
                return self.teacher(*given)
            weights = {f"encoder.{name}": weight for name, weight in self.teacher.items()}
            return functional_call(_Encode(self), weights, given)

    def encode_tokens(
        self, tokens: dict[str, Tokens], plan: MaskPlan, layers: tuple[int, ...] = (), keys: Tensor | None = None
    ) -> Encoded:
        """Embed and encode the visible tokens of one view, and only those; layers and keys as in `Encoded`."""
        tower = self._tower(tuple(plan.visible))
        if plan.partners is not None:
            tokens = swapped(tokens, plan.partners)
        slots, angles, places = {}, {}, {}
        for name, index in plan.visible.items():
            x = self._embed(name, take(tokens[name].values, index), plan.shown.get(name))
            place = self.positions[self.reader_of[name]]
            if isinstance(place, Rotary):
                table = place.angles(tokens[name].positions, tower.head_width)
                angles[name] = take(table, plan.place.get(name, index)).expand(len(x), -1, -1)
            elif tower.spec.positions_every_block:
                places[name] = self.marks.place(name, tokens[name], plan)
            x = x + self.marks.of(name, tokens[name], plan)
            x = x.to(self.dtype)
            slots[name] = self.input_norms[name](x) if name in self.input_norms else x
        again = turns = None
        if tower.spec.positions_every_block:
            again = plan.pack({name: places.get(name, torch.zeros_like(x)).to(x.dtype) for name, x in slots.items()})
        if angles:
            still = {name: x.new_zeros(*x.shape[:2], tower.head_width // 2) for name, x in slots.items()}
            turns = plan.pack(still | angles)
        at = _coordinates(tokens, plan) if tower.spec.relative_bias else None
        return tower(plan.pack(slots), plan, layers, turns, again, keys, at)

    def _embed(self, name: str, values: Tensor, shown: Tensor | None) -> Tensor:
        """Embed token values (B, S, P) -> (B, S, D); `shown` (B, S) says where something else stands in for them."""
        if shown is not None and not values.is_floating_point():
            values = torch.where((shown >= 0).unsqueeze(-1), shown.unsqueeze(-1), values)
        tokenizer = self._tokenizer(name)
        values = values.to(self.dtype) if values.is_floating_point() else values
        if shown is not None and tokenizer.mask_values is not None:
            values = torch.where((shown == HIDDEN).unsqueeze(-1), tokenizer.mask_values.to(values.dtype), values)
        x = tokenizer.embed(values)
        if shown is not None and name in self.mask_tokens:
            x = torch.where((shown == HIDDEN).unsqueeze(-1), self.mask_tokens[name].to(x.dtype), x)
        return x

    def _tower(self, names: tuple[str, ...]) -> Backbone:
        """Return the tower that reads these modalities."""
        found = dict.fromkeys(self.tower_of[name] for name in names)
        if len(found) > 1:
            raise M3Error(f"{', '.join(names)} are read by different towers and can't be encoded together; use one.")
        tower = self.towers[next(iter(found))] if any(found) else self.backbone
        if tower is None:
            raise M3Error("the model has no backbone, since none of its objectives has a view; use `M3Tokenizer`.")
        return tower  # type: ignore[return-value]  # ModuleDict forgets the class of its values

    def _check_view(self, view: View) -> None:
        """Raise M3Error for a view that no tower can encode."""
        towers = dict.fromkeys(self.tower_of[name] or "backbone" for name in view.modalities)
        if len(towers) > 1:
            raise M3Error(
                f"{', '.join(view.modalities)} can't be encoded together, since different towers read them "
                f"({', '.join(towers)}); put them into one tower."
            )

    def _freeze(self, towers: set[str]) -> None:
        """Take frozen towers (empty name: the backbone), with all that leads into them, out of training."""
        for name in (name for name, tower in self.tower_of.items() if tower in towers):
            for part in (self.tokenizers, self.positions, self.modality_embeddings, self.mask_tokens, self.input_norms):
                if name in part:
                    part[name].requires_grad_(False)
        for tower, part in {"": self.backbone, **dict(self.towers.items())}.items():
            if tower in towers and part is not None:
                part.requires_grad_(False)

    def _tokenizer(self, name: str) -> Tokenizer:
        return self.tokenizers[self.reader_of[name]]  # type: ignore[return-value]  # ModuleDict forgets the class

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as MAE does: xavier-uniform matrices, zero biases, N(0, 0.02) tokens and embeddings."""
        init_own_weights = getattr(module, "init_own_weights", None)  # of a part whose numbers start elsewhere
        if init_own_weights is not None:
            init_own_weights()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, RelativeBias):
            for parameter in module.parameters():
                init.zeros_(parameter)
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.ndim > 1:
                    init.normal_(parameter, std=0.02)
                else:  # learned log-variances start at 0, weight 1
                    init.zeros_(parameter)


def _coordinates(tokens: dict[str, Tokens], plan: MaskPlan) -> Tensor:
    """Return the coordinates (1 or B, V, 2) of the visible tokens of the only modality; 1 where all are visible."""
    ((name, index),) = plan.visible.items()
    positions = tokens[name].positions
    is_whole = index.shape[1] == tokens[name].count and plan.is_valid is None and plan.order is None
    if is_whole and name not in plan.place:
        return positions
    return plan.pack({name: take(positions, plan.place.get(name, index))})
