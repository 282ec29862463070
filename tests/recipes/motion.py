"""Motion that is read off frozen features of clips: VideoMAE's, and those of an MAE that sees one frame at a time.

    python tests/recipes/motion.py CLIPS FRAMES

CLIPS is a run of videomae_tiny, FRAMES one of it with modalities.video.frames=1 modalities.video.tokenizer.frames=1
objectives.reconstruct.masking.visible=9, which is MAE on single frames of the same clips. The protocol is that of the
task `probe`, on the same clips for all; of the frames' features once the mean, once all of them in their order.

Letters: B batch, C channels, T frames, H W size, F features.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from m3 import M3Model
from m3.data.loader import Samples, first_batches
from m3.data.source import open_source
from m3.evaluate.bootstrap import of_hits
from m3.evaluate.encodings import Encodings
from m3.evaluate.tasks.probe import best_strength, classify
from m3.held_out import AS_THEY_ARE
from m3.recipe import Recipe, load_recipe
from m3.types import Batch

Arrays = dict[str, np.ndarray]
LABELS = ("direction", "speed")
COUNTS = {"train": 6144, "held_out": 1024}


@torch.no_grad()
def of_frames(model: M3Model, batch: Batch) -> torch.Tensor:
    """Return (B, T, F) features of the frames of clips, each encoded alone."""
    clips = batch.signals["video"]  # (B, C, T, H, W)
    frames = clips.transpose(1, 2).flatten(0, 1).unsqueeze(2)
    alone = replace(batch, signals={"video": frames}, keys=batch.keys.repeat_interleave(clips.shape[2]), times={})
    return model.encode(replace(alone, labels={}, ids=())).pooled.unflatten(0, (len(clips), -1))


def features(clips: M3Model, frames: M3Model, recipe: Recipe, split: str) -> tuple[Arrays, Arrays]:
    """Return name -> (n, F) features and label -> (n,) classes of a split, both in the order of the samples."""
    found: dict[str, list[torch.Tensor]] = {}
    labels: dict[str, list[torch.Tensor]] = {}
    own, alone = ({"trained": model, "fresh": Encodings(model, recipe.seed).fresh} for model in (clips, frames))
    source = open_source(recipe.data, clips.modalities, recipe.seed, split)
    for batch in first_batches(Samples(source, clips.modalities, recipe.data, recipe.seed), COUNTS[split], 64):
        for state in own:
            with torch.no_grad():
                found.setdefault(f"clips, {state}", []).append(own[state].encode(batch).pooled)
            each = of_frames(alone[state], batch)
            found.setdefault(f"frames, mean, {state}", []).append(each.mean(1))
            found.setdefault(f"frames in order, {state}", []).append(each.flatten(1))
        for name in LABELS:
            labels.setdefault(name, []).append(batch.labels[name])
    joined = {name: torch.cat(parts).float().numpy() for name, parts in found.items()}
    return joined, {name: torch.cat(parts).numpy() for name, parts in labels.items()}


def main(clips: str, frames: str) -> None:
    """Print the table."""
    models = [M3Model.from_pretrained(Path(run) / "model").eval() for run in (clips, frames)]
    recipe = load_recipe(Path(clips) / "recipe.yaml")
    data = recipe.data.model_copy(update={**AS_THEY_ARE, "samples": COUNTS["train"], "held_out": COUNTS["held_out"]})
    recipe = recipe.model_copy(update={"data": data})
    (train, known), (test, truth) = (features(*models, recipe, split) for split in COUNTS)
    table = Table(title=f"Read off {COUNTS['train']} clips, told of {COUNTS['held_out']} others (%)")
    for column in ("features", *LABELS):
        table.add_column(column, justify="left" if column == "features" else "right")
    right: dict[tuple[str, str], torch.Tensor] = {}
    for name in train:
        for label in LABELS:
            strength = best_strength(train[name], known[label], "logistic")
            guesses = classify(train[name], known[label], test[name], "logistic", strength)
            right[name, label] = torch.from_numpy(guesses == truth[label])
        table.add_row(name, *(_share(right[name, label], right["clips, trained", label]) for label in LABELS))
    often = (np.full(len(truth[label]), np.bincount(known[label]).argmax()) == truth[label] for label in LABELS)
    table.add_row("most frequent class", *(f"{100 * hits.mean():.1f}" for hits in often))
    table.caption = "in brackets: the clips' features are better by so much, 95 % interval over the same clips"
    Console().print(table)


def _share(hits: torch.Tensor, best: torch.Tensor) -> str:
    value = f"{100 * hits.double().mean():.1f}"
    if hits is best:
        return value
    low, high = of_hits(torch.arange(len(hits)), best, hits).intervals(0)[1]
    return f"{value} ({100 * low:+.1f} to {100 * high:+.1f})"


if __name__ == "__main__":
    main(*sys.argv[1:])
