"""M3Model: what a user does with a model. How it is built and trained stands in `m3.network`.

Letters: B batch, N content tokens of a modality, P values per token, E width of a shared space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3 import masking
from m3.card import Facts, write_card
from m3.errors import M3Error, nearest
from m3.network import Network
from m3.objectives.classify import Classify
from m3.objectives.match import Match
from m3.objectives.translate import Translate
from m3.plugins import Embedder, Predictor, Signal, View
from m3.random import Draws
from m3.types import Batch, Encoded, Loss, MaskPlan, Tokens


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


class M3Model(Network):
    """One transformer over all modalities of its config: encode, embed, match, reconstruct."""

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """Save config, weights (safetensors) and a model card; arguments as in transformers."""
        super().save_pretrained(save_directory, *arguments, **options)
        self._write_card(save_directory)

    def describe(self, folder: str | Path, **facts: Any) -> None:
        """Add to what is known of the weights (`M3Config.about`), also in a folder where they are saved already."""
        self.config.about = {**(self.config.about or {}), **facts}
        self.config.save_pretrained(folder)
        self._write_card(folder)

    def _upload_modified_files(self, working_dir: str | Path, *arguments: Any, **options: Any) -> Any:
        """Upload, as `push_to_hub` does, which has put a card without content over ours."""
        self._write_card(working_dir)
        return super()._upload_modified_files(working_dir, *arguments, **options)

    def _write_card(self, folder: str | Path) -> None:
        config: Any = self.config
        parts = [part for part in self.objectives.values() if isinstance(part, Predictor)]
        predicted = {name for part in parts for name in part.modality_of.values()}
        write_card(folder, Facts(config, sum(p.numel() for p in self.parameters()), self.inputs, predicted))

    @torch.no_grad()
    def encode(self, batch: Batch, layers: tuple[int, ...] = ()) -> Encoded:
        """Encode everything in a batch, nothing hidden.

        Args:
            batch: raw signals of any subset of the modalities; those that are only predicted are left out.
            layers: numbers of blocks whose output is kept in `Encoded.layers`.
        """
        tokens = self.tokenise(batch.to(self.device))
        seen = {name: part for name, part in tokens.items() if name in self.inputs or not self.inputs}
        if not seen:
            raise M3Error(f"the batch has none of {', '.join(self.inputs)}, which the model reads; give one of them.")
        return self.encode_tokens(seen, masking.everything(seen), layers)

    @torch.no_grad()
    def embed(self, batch: Batch, objective: str | None = None) -> dict[str, Tensor]:
        """Bring the sides of a contrast into their shared space, nothing hidden.

        Args:
            batch: raw signals of any subset of the modalities.
            objective: name of the contrastive objective; the first one if left out.

        Returns:
            Side -> unit vectors (B, E) float32, NaN in samples that have nothing of the side; a side of which the
            batch has no modality is left out. The dot product of two vectors is their similarity in [-1, 1].

        Raises:
            M3Error: the model has no such objective, or the batch has no modality of any side.
        """
        batch = batch.to(self.device)
        embedder = self._embedder(objective)
        tokens = self.tokenise(batch)
        found: dict[str, Tensor] = {}
        for side, view in embedder.side_views.items():
            own = {name: tokens[name] for name in view.modalities if name in tokens}
            if own:
                encoded = self.encode_tokens(own, masking.everything(own))
                vectors = embedder.embed(side, encoded)
                is_there = encoded.plan.is_valid
                found[side] = vectors if is_there is None else vectors.where(is_there.any(1, keepdim=True), torch.nan)
        if not found:
            names = dict.fromkeys(name for view in embedder.side_views.values() for name in view.modalities)
            raise M3Error(f"the batch has none of {', '.join(names)}; give at least one of them.")
        return found

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
        predictor = self._predictor(objective)
        tokens, encoded = self._look(batch, visible, seed, predictor.view)
        plan = encoded.plan
        predicted, outputs, guesses = {}, {}, {}
        for name, modality in predictor.modality_of.items():
            part = self._askable(modality, tokens, batch)
            everything = torch.arange(part.count, device=self.device).expand(len(batch), -1)
            output = outputs[name] = predictor.predict(name, encoded, {**tokens, modality: part}, everything)
            values = self._tokenizer(modality).decode(predictor.restore(name, output, part))
            guesses[name] = values
            predicted[name] = self._tokenizer(modality).detokenize(values, part.positions, self._size(batch, modality))
        is_visible = {name: plan.is_seen(name, tokens[name].count) for name in plan.visible}
        return Reconstruction(predicted, outputs, guesses, tokens, predictor.modality_of, plan, is_visible)

    @torch.no_grad()
    def losses(
        self, batch: Batch, visible: float | Mapping[str, float | Tensor] | None, seed: int, objective: str
    ) -> tuple[Loss, dict[str, Tokens], MaskPlan]:
        """Show a part of the batch to the encoder and measure the losses of one objective on the rest.

        Args:
            batch: raw signals.
            visible: as in `reconstruct`.
            seed: of the masks.
            objective: name of an objective with one view.

        Returns:
            The losses, the tokens, and what was seen and asked for.
        """
        part = self._predictor(objective)
        tokens, encoded = self._look(batch.to(self.device), visible, seed, part.view)
        return part(dict.fromkeys(part.views, encoded), tokens), tokens, encoded.plan

    @torch.no_grad()
    def sample_losses(
        self, batch: Batch, visible: float | Mapping[str, float | Tensor] | None, seed: int, objective: str
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tokens], MaskPlan]:
        """Do what `losses` does, but return output -> what each sample adds: sums of losses and counts, (B,) each.

        Args:
            batch: raw signals.
            visible: as in `reconstruct`.
            seed: of the masks.
            objective: name of an objective of type `translate`.
        """
        part = self._predictor(objective)
        assert isinstance(part, Translate), "only this objective tells its samples apart"
        tokens, encoded = self._look(batch.to(self.device), visible, seed, part.view)
        return part.sample_losses(dict.fromkeys(part.views, encoded), tokens), tokens, encoded.plan

    def _look(
        self, batch: Batch, visible: float | Mapping[str, float | Tensor] | None, seed: int, view: View | None
    ) -> tuple[dict[str, Tokens], Encoded]:
        """Return the tokens of a batch and what the encoder makes of the visible ones of a view."""
        tokens, draws = self.tokenise(batch), Draws(batch.keys, seed)
        if view is None:
            return tokens, Encoded(torch.empty(len(batch), 0, 0), 0, MaskPlan({}, {}))
        seen = {name: tokens[name] for name in view.modalities if name in tokens}
        mask = self.views[view]
        plan = mask(seen, draws) if visible is None else mask.explicit(seen, visible, draws)
        return tokens, self.encode_tokens(tokens, plan, view.layers)

    def _embedder(self, name: str | None) -> Embedder:
        found = {n: o for n, o in self.objectives.items() if isinstance(o, Embedder)}
        if not found:
            raise M3Error("the model has no shared space; embed needs an objective of `type: contrast`.")
        if name is not None and name not in found:
            raise M3Error(f"the model has no contrastive objective `{name}`.{nearest(name, found)}")
        return found[name] if name is not None else next(iter(found.values()))

    @torch.no_grad()
    def classify(self, batch: Batch, objective: str | None = None) -> Tensor:
        """Return logits (B, K) of the classes, from all that the batch has of the objective's inputs.

        Their softmax(-1), or where a sample may have several classes their sigmoid(), are probabilities.

        Args:
            batch: raw signals; NaN comes out for a sample that has none of the inputs.
            objective: name of the objective of type `classify`; the first one if left out.
        """
        part = self.classifier(objective)
        tokens = self.tokenise(batch.to(self.device))
        seen = {name: tokens[name] for name in part.inputs if name in tokens}
        if not seen:
            raise M3Error(f"the batch has none of {', '.join(part.inputs)}; give at least one of them.")
        encoded = self.encode_tokens(seen, masking.everything(seen))
        is_there = encoded.plan.is_valid
        logits = part.logits(encoded)
        return logits if is_there is None else logits.where(is_there.any(1, keepdim=True), torch.nan)

    def classifier(self, name: str | None = None) -> Classify:
        """Return the objective of type `classify`, the first one if no name is given."""
        found = {n: o for n, o in self.objectives.items() if isinstance(o, Classify)}
        if not found:
            raise M3Error("the model has no objective of type `classify`; fine-tune it with one.")
        if name is not None and name not in found:
            raise M3Error(f"the model has no objective `{name}` of type `classify`.{nearest(name, found)}")
        return found[name] if name is not None else next(iter(found.values()))

    @torch.no_grad()
    def match(self, batch: Batch, objective: str | None = None) -> Tensor:
        """Return (B,) the probability in [0, 1] that the two modalities of each sample belong together.

        Args:
            batch: raw signals; NaN comes out for a sample that lacks one of the two.
            objective: name of the objective of type `match`; the first one if left out.
        """
        part = self.matcher(objective)
        return self.match_tokens(self.tokenise(batch.to(self.device)), part)

    @torch.no_grad()
    def match_tokens(self, tokens: dict[str, Tokens], part: Match) -> Tensor:
        """Do what `match` does, from tokens."""
        lacking = [name for name in part.spec.modalities if name not in tokens]
        if lacking:
            raise M3Error(f"the batch has no `{lacking[0]}`, which is to be matched; add it.")
        seen = {name: tokens[name] for name in part.spec.modalities}
        found = part.probability(self.encode_tokens(seen, masking.everything(seen)))
        for tokens_of_one in seen.values():
            if tokens_of_one.is_valid is not None:
                found = found.masked_fill(~tokens_of_one.is_valid.any(1), torch.nan)
        return found

    def matcher(self, name: str | None = None) -> Match:
        """Return the objective of type `match`, the first one if no name is given."""
        found = {n: o for n, o in self.objectives.items() if isinstance(o, Match)}
        if not found:
            raise M3Error("the model has no objective of type `match`; train it with one.")
        if name is not None and name not in found:
            raise M3Error(f"the model has no objective `{name}` of type `match`.{nearest(name, found)}")
        return found[name] if name is not None else next(iter(found.values()))

    def _predictor(self, name: str | None) -> Predictor:
        found = {n: o for n, o in self.objectives.items() if isinstance(o, Predictor) and o.modality_of}
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

    def detokenize(self, name: str, values: Tensor, tokens: Tokens, size: tuple[int, ...]) -> Tensor:
        """Put values (B, N, P) at the places of `tokens` of modality `name` together to signals of `size`."""
        return self._tokenizer(name).detokenize(values, tokens.positions, size)

    def spread(self, name: str, is_token: Tensor, tokens: Tokens, size: tuple[int, ...]) -> Tensor:
        """Return (B, *size) bool per position of the signal from (B, N) bool per token of modality `name`."""
        values = is_token.unsqueeze(-1).expand(tokens.values.shape)
        return self.modalities[name].signal.without_channels(self.detokenize(name, values, tokens, size))

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
