"""Decoders: from encoder states to predictions at the asked-for positions of one modality.

Letters: B batch, N content tokens of the target modality, V visible tokens, R prefix tokens, T asked-for
tokens, D width of the encoder, d width of the decoder, P numbers predicted per token.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from m3.attention import CrossAttention, key_mask
from m3.backbone import MLP, BackboneSpec, Block, path_factors
from m3.errors import M3Error
from m3.linear import Linear, linear
from m3.plugins import Strict, Tokenizer
from m3.positions import additive
from m3.types import Encoded, MaskPlan, Tokens, take
from m3.windows import WindowBlock, Windows, cut_windows


def restore_index(plan: MaskPlan, modality: str, count: int) -> Tensor:
    """Return (B, N) int64: for each token of `modality` its place among the V visible ones, or V if hidden."""
    index = plan.packed_index()
    if len(plan.visible) > 1:  # tokens of other modalities fall on a place behind the last one
        is_own = plan.packed_modality() == list(plan.visible).index(modality)
        index = index.masked_fill(~is_own, count)
    if plan.is_valid is not None:
        index = index.masked_fill(~plan.is_valid, count)
    batch, visible = index.shape
    place = torch.arange(visible, device=index.device).expand(batch, visible)
    return index.new_full((batch, count + 1), visible).scatter_(1, index, place)[:, :count]


class SelfDecoder(nn.Module):
    """MAE's decoder (He et al. 2021, section 3): blocks over the full set of visible and mask tokens.

    Reads one modality. The prefix tokens are part of the sequence; only asked-for positions are predicted. Attention
    knows no order, so VideoMAE's decoder, which appends the mask tokens to the visible ones instead of putting them
    between, is this one with `embed_bias: false` and no class token.
    """

    class Spec(Strict):
        """Settings of `type: self_decoder`.

        Attributes:
            width: d.
            depth: number of blocks.
            heads: attention heads; divides `width`.
            embed: a layer brings the encoder's states to `width`; without, that is the encoder's (Point-MAE).
            embed_bias: bias of this layer (VideoMAE: no).
            queries: `all`: the sequence holds all N tokens, each hidden one as a mask token (MAE, VideoMAE); `asked`:
                the visible tokens, and a mask token for each one that is asked for (VideoMAE V2; for a masking with
                `decode`).
            norm_eps: epsilon of the norm behind the blocks; null: the backbone's (transformers' VideoMAE: 1e-5).
            own_class: class tokens of its own stand in the place of the encoder's states of them (MAE-ST).
        """

        width: PositiveInt = 512
        depth: PositiveInt = 8
        heads: PositiveInt = 16
        embed: bool = True
        embed_bias: bool = True
        queries: Literal["all", "asked"] = "all"
        norm_eps: PositiveFloat | None = None
        own_class: bool = False

    reads_any = True
    """It can predict another modality of the same tokenizer, where a target has `decoder: {same_as: ...}`."""

    def __init__(
        self,
        spec: Spec,
        backbone: BackboneSpec,
        tokenizers: dict[str, Tokenizer],
        inputs: tuple[str, ...],
        modality: str,
        outputs: int,
    ) -> None:
        super().__init__()
        if inputs != (modality,):
            raise M3Error(
                f"decoder `self_decoder` reads one modality, but the objective sees {', '.join(inputs)} and predicts "
                f"{modality}; use `cross_decoder`."
            )
        self.spec, self.modality, self.backbone = spec, modality, backbone
        self.positions = additive(tokenizers[modality], spec.width, backbone.axis_order)
        if not spec.embed and spec.width != backbone.width:
            raise M3Error(
                f"decoder `self_decoder` without `embed` is as wide as the encoder, {backbone.width}, got {spec.width}."
            )
        embed = Linear(backbone.width, spec.width, bias=spec.embed_bias)
        self.embed = embed if spec.embed else nn.Identity()
        self.mask_token = nn.Parameter(torch.empty(1, spec.width))
        self.class_tokens = self.class_positions = None
        if spec.own_class and backbone.class_tokens:
            self.class_tokens = nn.Parameter(torch.empty(backbone.class_tokens, spec.width))
            if backbone.class_positions:
                self.class_positions = nn.Parameter(torch.empty(backbone.class_tokens, spec.width))
        self.blocks = nn.ModuleList(
            [
                Block(spec.width, spec.heads, backbone.mlp_ratio, backbone.norm_eps, backbone.style)
                for _ in range(spec.depth)
            ]
        )
        self.norm = nn.LayerNorm(spec.width, eps=spec.norm_eps or backbone.norm_eps)
        self.output = Linear(spec.width, outputs)

    def forward(self, encoded: Encoded, tokens: dict[str, Tokens], index: Tensor) -> Tensor:
        """Predict the tokens at index (B, T) -> (B, T, P)."""
        name = next(iter(encoded.plan.visible), self.modality)  # another one's where the decoder is shared
        sequence = self._asked if self.spec.queries == "asked" else self._all
        x, place, mask, keep = sequence(encoded, tokens[name], name, index)
        paths = path_factors(encoded.keys, self.backbone.drop_path, self.spec.depth, f"decoder/{self.modality}/paths")
        for number, block in enumerate(self.blocks):
            if number and self.backbone.positions_every_block:
                x = x + place
            x = block(x, mask, keep if number == self.spec.depth - 1 else None, paths=paths[number])
        return self.output(self.norm(x))

    def _states(self, encoded: Encoded) -> Tensor:
        """Bring the encoder's states to (B, R + V, d), with class tokens of its own where it has them."""
        if self.class_tokens is None:
            return self.embed(encoded.sequence)
        x, own = self.embed(encoded.states), self.class_tokens
        own = own if self.class_positions is None else own + self.class_positions
        return torch.cat([own.expand(len(x), -1, -1).to(x.dtype), x], dim=1)

    def _all(
        self, encoded: Encoded, own: Tokens, name: str, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return the sequence (B, R + N, d), its positions, the mask of keys, and where the asked-for tokens are."""
        x, count = self._states(encoded), encoded.prefix_count
        rows = torch.cat([x[:, count:], self.mask_token.expand(len(x), 1, -1).to(x.dtype)], dim=1)
        full = take(rows, restore_index(encoded.plan, name, own.count))
        place = self.positions(own.positions).to(self.mask_token.dtype)
        full = full + place
        x = torch.cat([x[:, :count].to(full.dtype), full], dim=1)
        mask = None
        if own.is_valid is not None:
            mask = key_mask(torch.cat([own.is_valid.new_ones(len(x), count), own.is_valid], dim=1))
        return x, F.pad(place, (0, 0, count, 0)), mask, index + count

    def _asked(
        self, encoded: Encoded, own: Tokens, name: str, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """As `_all`, with a sequence (B, R + V + T, d)."""
        x, count = self._states(encoded), encoded.prefix_count
        place = self.positions(own.positions).to(self.mask_token.dtype)
        place = torch.cat([take(place, encoded.plan.packed_index()), take(place, index)], dim=1)
        seen, asked = x[:, count:], self.mask_token.expand(len(x), index.shape[1], -1).to(x.dtype)
        x = torch.cat([x[:, :count], torch.cat([seen, asked], dim=1) + place], dim=1)
        mask = None
        if own.is_valid is not None or encoded.is_valid is not None:
            known = encoded.sequence.new_ones(encoded.sequence.shape[:2], dtype=torch.bool)
            asked_for = known.new_ones(index.shape) if own.is_valid is None else take(own.is_valid, index)
            mask = key_mask(torch.cat([known if encoded.is_valid is None else encoded.is_valid, asked_for], dim=1))
        keep = torch.arange(x.shape[1] - index.shape[1], x.shape[1], device=x.device)
        return x, F.pad(place, (0, 0, count, 0)), mask, keep.expand(len(x), -1)


class CrossDecoder(nn.Module):
    """MultiMAE's decoder of one modality (Bachmann et al. 2022, section 3.3).

    The modality's own slots (visible tokens and mask tokens) attend once, without a residual, to the visible
    tokens of all modalities; an MLP and a few self-attention blocks follow.
    """

    class Spec(Strict):
        """Settings of `type: cross_decoder`.

        Attributes:
            width: d.
            depth: number of self-attention blocks after the cross-attention.
            heads: attention heads; divides `width`.
        """

        width: PositiveInt = 256
        depth: NonNegativeInt = 2
        heads: PositiveInt = 8

    def __init__(
        self,
        spec: Spec,
        backbone: BackboneSpec,
        tokenizers: dict[str, Tokenizer],
        inputs: tuple[str, ...],
        modality: str,
        outputs: int,
    ) -> None:
        super().__init__()
        width, eps = spec.width, backbone.norm_eps
        self.modality = modality
        self.context = Linear(backbone.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, width))
        names = dict.fromkeys([*inputs, modality])
        self.modality_embeddings = nn.ParameterDict({name: nn.Parameter(torch.empty(1, width)) for name in names})
        self.positions = nn.ModuleDict({name: additive(tokenizers[name], width, backbone.axis_order) for name in names})
        self.query_norm = nn.LayerNorm(width, eps=eps)
        self.context_norm = nn.LayerNorm(width, eps=eps)
        self.attention = CrossAttention(width, spec.heads)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, int(width * backbone.mlp_ratio))
        self.blocks = nn.ModuleList(
            [Block(width, spec.heads, backbone.mlp_ratio, eps, backbone.style) for _ in range(spec.depth)]
        )
        self.output = Linear(width, outputs)

    def forward(self, encoded: Encoded, tokens: dict[str, Tokens], index: Tensor) -> Tensor:
        """Predict the tokens at index (B, T) -> (B, T, P)."""
        own, plan, count = tokens[self.modality], encoded.plan, encoded.prefix_count
        x = self.context(encoded.sequence)
        rows = torch.cat([x[:, count:], self.mask_token.expand(len(x), 1, -1).to(x.dtype)], dim=1)
        if self.modality in plan.visible:
            queries = take(rows, restore_index(plan, self.modality, own.count))
        else:
            queries = self.mask_token.expand(len(x), own.count, -1)
        queries = queries + self._marks(tokens, self.modality)
        marks = plan.pack({name: take(self._marks(tokens, name), slots) for name, slots in plan.visible.items()})
        context = torch.cat([x[:, :count].to(marks.dtype), x[:, count:] + marks], dim=1)
        x = self.attention(self.query_norm(queries), self.context_norm(context), key_mask(encoded.is_valid))
        x = x + self.mlp(self.norm(x))
        mask = key_mask(own.is_valid)
        for block in self.blocks:
            x = block(x, mask)
        return self.output(take(x, index))

    def _marks(self, tokens: dict[str, Tokens], name: str) -> Tensor:
        """Return (1 or B, N, d): where and of which modality each token of `name` is."""
        mark = self.modality_embeddings[name]
        return self.positions[name](tokens[name].positions).to(mark.dtype) + mark


class Head(nn.Module):
    """The encoder's own states at hidden tokens, read by a layer or two: SimMIM, BEiT, BERT and UNITER.

    Needs a masking that replaces hidden tokens (`hidden: replace` or `mix`).
    """

    class Spec(Strict):
        """Settings of `type: head`.

        Attributes:
            hidden: width of a layer before the output, with GELU and a norm (BERT); null: none (SimMIM, BEiT).
            tied: the output's weight is that of the modality's embedding (BERT's words), or its transpose (UNITER's
                regions); only the bias is its own.
        """

        hidden: PositiveInt | None = None
        tied: bool = False

    def __init__(
        self,
        spec: Spec,
        backbone: BackboneSpec,
        tokenizers: dict[str, Tokenizer],
        inputs: tuple[str, ...],
        modality: str,
        outputs: int,
    ) -> None:
        super().__init__()
        if modality not in inputs:
            raise M3Error(
                f"decoder `head` can't predict {modality}, which the encoder never sees; use `cross_decoder`."
            )
        self.modality = modality
        width = spec.hidden or backbone.width
        self.hidden = nn.Identity()
        if spec.hidden:
            norm = nn.LayerNorm(width, eps=backbone.norm_eps)
            self.hidden = nn.Sequential(Linear(backbone.width, width), nn.GELU(), norm)
        if not spec.tied:
            self.output = Linear(width, outputs)
            return
        embedding = tokenizers[modality]
        if embedding.tied_weight().shape != (outputs, width):
            raise M3Error(
                f"decoder `head` can't be tied: the embedding of {modality} is {tuple(embedding.tied_weight().shape)}, "
                f"but the output needs {(outputs, width)}; make `hidden` the tower's width, or remove `tied`."
            )
        self.output = Tied(embedding, outputs)

    def forward(self, encoded: Encoded, tokens: dict[str, Tokens], index: Tensor) -> Tensor:
        """Predict the tokens at index (B, T) -> (B, T, P)."""
        if self.modality not in encoded.plan.visible:
            raise M3Error(
                f"decoder `head` reads the encoder's states of {self.modality}, which the batch lacks; give it."
            )
        count = tokens[self.modality].count
        if encoded.plan.visible[self.modality].shape[1] < count:
            raise M3Error(
                f"decoder `head` reads the encoder's states of hidden tokens, but those of {self.modality} are "
                f"dropped; add `hidden: replace` to the masking."
            )
        places = restore_index(encoded.plan, self.modality, count).clamp(max=encoded.states.shape[1] - 1)
        return self.output(self.hidden(take(take(encoded.states, places), index)))


class Tied(nn.Module):
    """A linear layer with the weight of an embedding and a bias of its own."""

    def __init__(self, embedding: Tokenizer, outputs: int) -> None:
        super().__init__()
        self.embedding = (embedding,)  # in a tuple, so that its weights belong to the tokenizer alone
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., P)."""
        return linear(x, self.embedding[0].tied_weight(), self.bias)


class WindowDecoder(nn.Module):
    """AudioMAE's decoder (Huang et al. 2022, section 3): attention within windows of the grid of all tokens.

    Sound is local in time and frequency, unlike what a patch of a picture shows. Every second block has its windows
    shifted. Reads one modality on a grid of two axes, without the encoder's prefix tokens, which are nowhere.
    """

    class Spec(Strict):
        """Settings of `type: window_decoder`.

        Attributes:
            width: d.
            depth: number of blocks.
            heads: attention heads; divides `width`.
            window: tokens of a window along both axes of the grid (time, frequency).
            shift: of the windows in every second block, along both axes.
        """

        width: PositiveInt = 512
        depth: PositiveInt = 16
        heads: PositiveInt = 16
        window: tuple[PositiveInt, PositiveInt] = (4, 4)
        shift: tuple[NonNegativeInt, NonNegativeInt] = (2, 0)

    def __init__(
        self,
        spec: Spec,
        backbone: BackboneSpec,
        tokenizers: dict[str, Tokenizer],
        inputs: tuple[str, ...],
        modality: str,
        outputs: int,
    ) -> None:
        super().__init__()
        if inputs != (modality,):
            raise M3Error(
                f"decoder `window_decoder` reads one modality, but the objective sees {', '.join(inputs)} and predicts "
                f"{modality}; use `cross_decoder`."
            )
        if tokenizers[modality].axes != 2:
            raise M3Error(
                f"decoder `window_decoder` reads tokens on a grid of two axes, but those of {modality} have "
                f"{tokenizers[modality].axes}; use `self_decoder`."
            )
        self.spec, self.modality, eps = spec, modality, backbone.norm_eps
        self.positions = additive(tokenizers[modality], spec.width, backbone.axis_order)
        self.embed = Linear(backbone.width, spec.width)
        self.mask_token = nn.Parameter(torch.empty(1, spec.width))
        self.blocks = nn.ModuleList(
            [WindowBlock(spec.width, spec.heads, spec.window, backbone.mlp_ratio, eps) for _ in range(spec.depth)]
        )
        self.norm = nn.LayerNorm(spec.width, eps=eps)
        self.output = Linear(spec.width, outputs)

    def forward(self, encoded: Encoded, tokens: dict[str, Tokens], index: Tensor) -> Tensor:
        """Predict the tokens at index (B, T) -> (B, T, P)."""
        own = tokens[self.modality]
        x = self.embed(encoded.states)
        rows = torch.cat([x, self.mask_token.expand(len(x), 1, -1).to(x.dtype)], dim=1)
        x = take(rows, restore_index(encoded.plan, self.modality, own.count))
        x = x + self.positions(own.positions).to(self.mask_token.dtype)
        layouts = [self._windows(own, shift) for shift in ((0, 0), self.spec.shift)]
        for number, block in enumerate(self.blocks):
            x = block(x, layouts[number % 2])
        return self.output(self.norm(take(x, index)))

    def _windows(self, own: Tokens, shift: tuple[int, int]) -> Windows:
        if own.counts is None or len(own.counts) != 2:
            raise M3Error(
                f"decoder `window_decoder` needs tokens that fill a grid, and the tokenizer of {self.modality} doesn't "
                f"say that its tokens do; use `self_decoder`."
            )
        return cut_windows((own.counts[0], own.counts[1]), self.spec.window, shift, own.is_valid, own.values.device)
