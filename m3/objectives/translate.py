"""Any modality into any other: one decoder predicts the hidden tokens of all modalities from the visible ones.

4M (Mizrahi et al. 2023) and 4M-21 (Bachmann et al. 2024) with the masking `type: budget`. Tokens without order are
predicted at once, from one mask token and their place; sequences, which are the modalities with sentinels, word by
word. So one decoder fills in images and writes captions.

Letters: B batch, N tokens of a modality, T tokens of the decoder, L words said so far, C tokens of the encoder,
D width, K classes, M modalities.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from m3.attention import key_mask
from m3.backbone import BackboneSpec
from m3.decoder import Decoder
from m3.errors import M3Error, nearest
from m3.linear import Linear, linear
from m3.objectives.reconstruct import check_modality
from m3.plugins import Predictor, Strict, Tokenizer, View
from m3.positions import additive
from m3.spans import find_runs
from m3.types import OWN, Encoded, Loss, MaskPlan, Part, Tokens, take


class Translate(Predictor):
    """Cross-entropy of hidden tokens, one part for each modality."""

    class Spec(Strict):
        """Settings of `type: translate`.

        Attributes:
            modalities: those that are seen or predicted; all of the model's if left out.
            outputs: those that are predicted; all whose tokens hold class ids if left out.
            masking: selection of visible and target tokens.
            depth: blocks of the decoder; as many as the backbone has if left out (4M).
            tied: the scores of a sequence's words are products with their embeddings in the decoder (4M); False: with
                a matrix of their own.
            apart: targets of different modalities don't see each other in the decoder (4M's `decoder_sep_mask`);
                False: they see those of modalities before them.
            average: `modality`: mean over the modalities that have a target in the step (4M divides by all, also by
                absent ones); `token`: mean over all targets (4M weighs them by the size of their vocabulary as well).
            weights: modality -> factor on its part of the loss; 1 if left out.
        """

        modalities: tuple[str, ...] | None = None
        outputs: tuple[str, ...] | None = None
        masking: dict
        depth: PositiveInt | None = None
        tied: bool = True
        apart: bool = True
        average: Literal["modality", "token"] = "modality"
        weights: dict[str, NonNegativeFloat] = Field(default={})

    def __init__(self, spec: Spec, tokenizers: dict[str, Tokenizer], backbone: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        modalities = spec.modalities or tuple(tokenizers)
        for name in modalities:
            check_modality("modalities", name, tokenizers)
        self.outputs = spec.outputs or tuple(n for n in modalities if _holds_ids(tokenizers[n]))
        _check(spec, tokenizers, modalities, self.outputs)
        self.view = View(modalities, json.dumps(spec.masking, sort_keys=True))
        self.views, self.part_names = (self.view,), self.outputs
        self.modality_of = {name: name for name in self.outputs}
        self.is_relative = dict.fromkeys(self.outputs, False)
        tower = tokenizers[modalities[0]].tower
        width = tower.width
        self.sequences = [name for name in self.outputs if tokenizers[name].signal.sentinels]
        self.classes = {name: tokenizers[name].signal.classes for name in self.outputs}
        self.context = Linear(width, width)
        self.decoder = Decoder(tower, spec.depth or tower.depth)
        is_any_free = len(self.sequences) < len(self.outputs)
        self.mask_token = nn.Parameter(torch.empty(1, width)) if is_any_free else None
        self.places = nn.ModuleDict({n: additive(tokenizers[n], width, tower.axis_order) for n in self.outputs})
        self.words = nn.ModuleDict({name: nn.Embedding(self.classes[name], width) for name in self.sequences})
        own = [name for name in self.outputs if not (spec.tied and name in self.sequences)]
        self.heads = nn.ModuleDict({name: Linear(width, self.classes[name], bias=False) for name in own})

    def forward(self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]) -> Loss:
        """Return one part per output, named after it."""
        parts = {}
        for name, scores, truth, count, _ in self._asked_scores(encoded, tokens):
            loss = F.cross_entropy(scores, truth, reduction="sum")
            average = "parts" if self.spec.average == "modality" else "elements"
            parts[name] = Part(loss, count, self.spec.weights.get(name, 1.0), average)
        return Loss({name: parts[name] for name in self.outputs})

    def sample_losses(
        self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return for every output what each sample adds to its part: sums of losses and their counts, (B,) each."""
        found = {}
        for name, scores, truth, _, sample in self._asked_scores(encoded, tokens):
            losses = F.cross_entropy(scores, truth, reduction="none")
            empty = losses.new_zeros(len(encoded[self.views[0]].sequence))
            added = (empty.index_add(0, sample, x) for x in (losses, torch.ones_like(losses)))
            found[name] = tuple(added)
        return found

    def _asked_scores(
        self, encoded: dict[View, Encoded], tokens: dict[str, Tokens]
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
        """Yield output, scores (n, K) and ids (n,) of what is asked for, n as a tensor, and the sample (n,) of each."""
        view = encoded[self.views[0]]
        plan = self._own(view.plan, tokens)
        number = plan.pack_targets({name: torch.full_like(t, i) for i, (name, t) in enumerate(plan.target.items())})
        asked = {name: self.asked(name, plan, tokens) for name in plan.target}
        truth = plan.pack_targets({name: truth for name, (truth, _) in asked.items()})
        is_asked = plan.pack_targets({name: counts for name, (_, counts) in asked.items()})
        x = plan.pack_targets({name: self._slots(name, plan, tokens) for name in plan.target})
        mask = attention_mask(number, is_asked, [name in self.sequences for name in plan.target], self.spec.apart)
        x = self.decoder(x, self._read(view, tokens), mask, key_mask(view.is_valid))
        # Each modality has its own head, so the rows of each are brought together.
        length = number.shape[1]
        number = number.masked_fill(~is_asked, len(plan.target)).flatten()
        counts = (number.unsqueeze(1) == torch.arange(len(plan.target), device=x.device)).sum(0)
        sizes = _sizes(counts, len(number))
        rows = number.argsort(stable=True)[: sum(sizes)].split(sizes)
        for i, (name, row) in enumerate(zip(plan.target, rows, strict=True)):
            scores = self._scores(name, x.flatten(0, 1).index_select(0, row)).float()
            yield name, scores, truth.flatten().index_select(0, row), counts[i].float(), row // length

    def counts(self, plans: dict[View, MaskPlan], tokens: dict[str, Tokens]) -> dict[str, Tensor]:
        """Return the count of every part that `forward` will return."""
        plan = self._own(plans[self.views[0]], tokens)
        return {name: self.asked(name, plan, tokens)[1].sum().float() for name in self.outputs}

    def asked(self, name: str, plan: MaskPlan, tokens: dict[str, Tokens]) -> tuple[Tensor, Tensor]:
        """Return what is said in the target slots of a modality, (B, T) int64, and which slots count, (B, T) bool."""
        truth = take(tokens[name].values, plan.target[name]).squeeze(-1)
        if name in plan.asked:
            truth = torch.where(plan.asked[name] == OWN, truth, plan.asked[name])
        return truth, plan.asks(name) & (truth >= 0)

    def predict(self, name: str, encoded: Encoded, tokens: dict[str, Tokens], index: Tensor) -> Tensor:
        """Predict output `name` at the tokens index (B, T) -> scores (B, T, K); sequences greedily, word by word."""
        own, plan = tokens[name], encoded.plan
        is_hidden = torch.ones(own.values.shape[:2], dtype=torch.bool, device=index.device)
        if own.is_valid is not None:
            is_hidden = own.is_valid
        if name in plan.visible:
            is_hidden = is_hidden & ~plan.is_seen(name, own.count)
        context, context_mask = self._read(encoded, tokens), key_mask(encoded.is_valid)
        if name in self.sequences:
            return take(self._say(name, own, is_hidden, context, context_mask), index)
        x = self._free(name, own, index)
        mask = attention_mask(torch.zeros_like(index), is_hidden.gather(1, index), [False], apart=True)
        return self._scores(name, self.decoder(x, context, mask, context_mask))

    def restore(self, name: str, output: Tensor, tokens: Tokens) -> Tensor:
        """Return the scores themselves."""
        return output

    def truth(self, name: str, tokens: Tokens) -> Tensor:
        """Return the ids of the tokens (B, N, 1)."""
        return tokens.values

    # -- what the decoder reads ---------------------------------------------------------------------------

    def _read(self, encoded: Encoded, tokens: dict[str, Tokens]) -> Tensor:
        """Return the context (B, C, D): projected states, with places and modalities of their tokens once more."""
        plan, count = encoded.plan, encoded.prefix_count
        x = self.context(encoded.sequence)
        marks = plan.pack({name: self.marks.of(name, tokens[name], plan) for name in plan.visible})
        return torch.cat([x[:, :count], x[:, count:] + marks.to(x.dtype)], dim=1)

    def _slots(self, name: str, plan: MaskPlan, tokens: dict[str, Tokens]) -> Tensor:
        """Return what stands in the target slots of a modality (B, T, D): mask tokens, or the words said before."""
        if name not in self.sequences:
            return self._free(name, tokens[name], plan.target[name])
        return self._words(name, self.asked(name, plan, tokens)[0].roll(1, dims=1), start=-1)

    def _free(self, name: str, tokens: Tokens, index: Tensor) -> Tensor:
        """Return mask tokens (B, T, D) with the places of the tokens at index (B, T)."""
        assert self.mask_token is not None, "there are no outputs without order"
        return self._marked(name, self.mask_token, take(self.places[name](tokens.positions), index))

    def _words(self, name: str, said: Tensor, start: int = 0) -> Tensor:
        """Return words (B, L) of a sequence as (B, L, D), with their places in it counted from `start`."""
        place = torch.arange(start, start + said.shape[1], device=said.device).clamp(min=0).float()
        return self._marked(name, self.words[name](said.clamp(min=0)), self.places[name](place.view(1, -1, 1)))

    def _marked(self, name: str, content: Tensor, place: Tensor) -> Tensor:
        mark = place + self.marks.modalities[name] if name in self.marks.modalities else place
        return (content + mark).to(self.context.weight.dtype)

    def _say(
        self, name: str, tokens: Tokens, is_hidden: Tensor, context: Tensor, context_mask: Tensor | None
    ) -> Tensor:
        """Say a sequence word by word, the likeliest each time, and put the words into its hidden places.

        Returns:
            (B, N, K): the scores from which each hidden place got its word; where the words of its run were fewer, the
            sentinel that says so; elsewhere the token's own id.
        """
        assert tokens.sentinels is not None, "only sequences are said"
        first, stop = tokens.sentinels.start, tokens.sentinels.stop
        runs, scores = find_runs(is_hidden), []
        said = torch.full_like(runs.total, first)
        for _ in range(tokens.count + 1):
            step = torch.arange(said.shape[1], device=said.device)
            is_before = (step <= step.unsqueeze(1))[None, None]
            x = self.decoder(self._words(name, said), context, is_before, context_mask)
            scores.append(self._scores(name, x[:, -1]).float())
            said = torch.cat([said, scores[-1].argmax(-1, keepdim=True)], dim=1)
            if bool((said == first + runs.total).any(1).all()):
                break
        is_sentinel, step = (said >= first) & (said < stop), torch.arange(said.shape[1], device=said.device)
        begin = torch.where(is_sentinel, step, 0).cummax(dim=1).values
        run, offset = said.gather(1, begin) - first, step - begin - 1
        fits = (runs.number.unsqueeze(2) == run.unsqueeze(1)) & (runs.offset.unsqueeze(2) == offset.unsqueeze(1))
        fits = fits & ~is_sentinel.unsqueeze(1) & is_hidden.unsqueeze(2)  # (B, N, 1 + L)
        found = take(torch.stack(scores, dim=1), (fits.to(torch.uint8).argmax(-1) - 1).clamp(min=0))
        own = torch.where(is_hidden, first, tokens.values.squeeze(-1).clamp(min=0))
        return torch.where(fits.any(-1, keepdim=True), found, F.one_hot(own, self.classes[name]).float())

    def _scores(self, name: str, x: Tensor) -> Tensor:
        """Return the scores (..., K) of states (..., D)."""
        return self.heads[name](x) if name in self.heads else linear(x, self.words[name].weight)  # type: ignore[arg-type]

    def _own(self, plan: MaskPlan, tokens: dict[str, Tokens]) -> MaskPlan:
        """Return the plan with the targets of the outputs alone.

        Raises:
            M3Error: an output is missing, or the masking does not suit the outputs.
        """
        for name in self.outputs:
            if name not in tokens:
                raise M3Error(f"the batch has no `{name}`, which `translate` predicts; add it to the data.")
            if name in self.sequences and name not in plan.asked:
                raise M3Error(
                    f"`{name}` is a sequence with sentinels, whose hidden runs only the masking `budget` writes down; "
                    f"use it, or remove the `sentinels`."
                )
        others = [name for name, index in plan.target.items() if name not in self.outputs and index.shape[1]]
        if others and plan.target_order is not None:
            raise M3Error(f"the masking has targets in `{others[0]}`, which is not in `outputs`; take it out of one.")
        target = {name: index for name, index in plan.target.items() if name in self.outputs}
        if not any(index.shape[1] for index in target.values()):
            raise M3Error("the masking of `translate` hides nothing that could be predicted; lower `visible`.")
        return replace(plan, target=target)


def attention_mask(number: Tensor, is_asked: Tensor, is_sequence: list[bool], apart: bool) -> Tensor:
    """Return (B, 1, T, T) bool, True where a token of the decoder attends to another.

    Tokens attend to those of their modality, in sequences only to themselves and those before. Filling and what is not
    asked for is seen by itself alone.

    Args:
        number: (B, T) int64, of the token's modality.
        is_asked: (B, T) bool.
        is_sequence: of each modality.
        apart: False: they also attend to all modalities of lower number.
    """
    step = torch.arange(number.shape[1], device=number.device)
    own, other = number.unsqueeze(2), number.unsqueeze(1)
    in_order = torch.tensor(is_sequence, device=number.device)[number].unsqueeze(2)
    sees = (own == other) & (~in_order | (step <= step.unsqueeze(1)))
    if not apart:
        sees = sees | (other < own)
    return ((sees & is_asked.unsqueeze(1)) | (step == step.unsqueeze(1))).unsqueeze(1)


def _holds_ids(tokenizer: Tokenizer) -> bool:
    """True for tokens of one class id each."""
    return tokenizer.signal.kind == "classes" and tokenizer.value_width == 1


def _sizes(counts: Tensor, most: int) -> list[int]:
    """Return the targets of each modality as numbers, the only ones that the host waits for in a step.

    On the meta device, where costs are worked out, they share the decoder's tokens evenly.
    """
    return [most // len(counts)] * len(counts) if counts.is_meta else counts.tolist()


def _check(
    spec: Translate.Spec, tokenizers: dict[str, Tokenizer], modalities: tuple[str, ...], outputs: tuple[str, ...]
) -> None:
    """Raise M3Error for settings that contradict each other or the modalities."""
    for name in outputs:
        check_modality("outputs", name, dict.fromkeys(modalities))  # type: ignore[arg-type]  # only names are read
        if not _holds_ids(tokenizers[name]):
            raise M3Error(f"outputs names `{name}`, whose tokens hold no single class id; turn it into codes first.")
    if not outputs:
        raise M3Error("no modality holds class ids, which `translate` predicts; use `type: reconstruct` for values.")
    for name in spec.weights:
        if name not in outputs:
            raise M3Error(f"weights names `{name}`, which is not in `outputs`.{nearest(name, outputs)}")
    for name in modalities:
        kind = tokenizers[name].positions["type"]
        if kind in ("rotary", "relative"):
            raise M3Error(
                f"`translate` adds positions to what it reads, so `{name}` can't have {kind} ones; use sincos."
            )
    if tokenizers[modalities[0]].tower.norm == "post":
        raise M3Error("the decoder of `translate` has its norms before the branches; set backbone.norm=pre.")
    if len(modalities) > 1 and not tokenizers[modalities[0]].tower.modality_embedding:
        raise M3Error("`translate` tells modalities apart by their embeddings; set backbone.modality_embedding=true.")
