"""Motion that is read off frozen features of clips: VideoMAE's, and those of an MAE that sees one frame at a time.

    python tests/recipes/motion.py CLIPS FRAMES

CLIPS is a run of videomae_tiny, FRAMES one of it with modalities.video.frames=1 modalities.video.tokenizer.frames=1
objectives.reconstruct.masking.visible=9, which is MAE on single frames of the same clips. All are read in three ways,
on the same clips: logistic regression, as in the task `probe`, on the mean of all tokens; the same on the means of each
time (of VideoMAE's tubes or of a frame) one after the other; an attentive probe (Bardes et al. 2024, V-JEPA) on all
tokens, to which a code of their time is added, as single frames know none.

Letters: B batch, n samples, C channels, T frames, S times, K tokens of a time, N = S K, F features.
"""

from __future__ import annotations

import sys
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
from m3.evaluate.features import tower_of
from m3.evaluate.linear import Attentive, train_linear
from m3.evaluate.tasks.probe import best_strength, classify
from m3.held_out import AS_THEY_ARE
from m3.positions import sincos
from m3.recipe import Recipe, load_recipe
from m3.types import Batch

Arrays = dict[str, np.ndarray]
LABELS = ("direction", "speed")
COUNTS = {"train": 6144, "held_out": 1024}
READINGS = ("mean", "in order", "attentive")
RATE, EPOCHS, BATCH = 3e-3, 10, 256
"""Of the attentive probe, trained by AdamW."""


@torch.no_grad()
def states_of(model: M3Model, batch: Batch) -> torch.Tensor:
    """Return (B, S, K, F) states of clips; of a model of single frames, each is encoded alone."""
    clips = batch.signals["video"]  # (B, C, T, H, W)
    if model.modalities["video"].signal.size[0] == 1:
        frames = clips.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        batch = Batch({"video": frames}, batch.keys.repeat_interleave(clips.shape[2]))
        return model.encode(batch).states.unflatten(0, (len(clips), -1))
    times = model.tokenizers["video"].reference[0]
    return model.encode(batch).states.unflatten(1, (times, -1))


def collect(models: dict[str, M3Model], recipe: Recipe, split: str) -> tuple[dict[str, torch.Tensor], Arrays]:
    """Return name -> (n, S, K, F) states and label -> (n,) classes of a split, both in the order of the samples."""
    states: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    labels: dict[str, list[torch.Tensor]] = {name: [] for name in LABELS}
    modalities = next(iter(models.values())).modalities
    source = open_source(recipe.data, modalities, recipe.seed, split)
    for batch in first_batches(Samples(source, modalities, recipe.data, recipe.seed), COUNTS[split], 64):
        for name, model in models.items():
            states[name].append(states_of(model, batch))
        for name in LABELS:
            labels[name].append(batch.labels[name])
    classes = {name: torch.cat(parts).numpy() for name, parts in labels.items()}
    return {name: torch.cat(parts) for name, parts in states.items()}, classes


def features(states: torch.Tensor, reading: str) -> np.ndarray:
    """Return what is read off states (n, S, K, F) -> (n, ...)."""
    if reading == "mean":
        return states.mean((1, 2)).numpy()
    if reading == "in order":
        return states.mean(2).flatten(1).numpy()
    code = sincos(torch.arange(float(states.shape[1]))[:, None], states.shape[3])
    return (states + code[:, None]).flatten(1).numpy()


def guess(model: M3Model, train: np.ndarray, known: np.ndarray, test: np.ndarray, reading: str) -> np.ndarray:
    """Learn a label of clips from their features and return that of others."""
    if reading == "attentive":
        pool = Attentive(tower_of(model, ("video",)), seed=0)
        return train_linear({"train": train, "held_out": test}, known, "adamw", RATE, EPOCHS, BATCH, 0, pool)
    return classify(train, known, test, "logistic", best_strength(train, known, "logistic"))


def main(clips: str, frames: str) -> None:
    """Print the table."""
    trained, alone = (M3Model.from_pretrained(Path(run) / "model").eval() for run in (clips, frames))
    recipe = load_recipe(Path(clips) / "recipe.yaml")
    data = recipe.data.model_copy(update={**AS_THEY_ARE, "samples": COUNTS["train"], "held_out": COUNTS["held_out"]})
    recipe = recipe.model_copy(update={"data": data})
    models = {
        "clips": trained,
        "single frames": alone,
        "clips, fresh": Encodings(trained, recipe.seed).fresh,
    }
    (train, known), (test, truth) = (collect(models, recipe, split) for split in COUNTS)
    table = Table(title=f"Read off {COUNTS['train']} clips, told of {COUNTS['held_out']} others (%)")
    for column in ("features of", "read", *LABELS):
        table.add_column(column, justify="right" if column in LABELS else "left")
    for reading in READINGS:
        best: dict[str, torch.Tensor] = {}
        for name, model in models.items():
            own, others = (features(split[name], reading) for split in (train, test))
            shares = []
            for label in LABELS:
                found = guess(model, own, known[label], others, reading)
                hits = torch.from_numpy(found == truth[label])
                shares.append(_share(hits, best.setdefault(label, hits)))
            table.add_row(name, reading, *shares)
    often = (np.full(len(truth[label]), np.bincount(known[label]).argmax()) == truth[label] for label in LABELS)
    table.add_row("most frequent class", "", *(f"{100 * hits.mean():.1f}" for hits in often))
    table.caption = "in brackets: clips, read alike, are better by so much, 95 % interval over the same clips"
    Console().print(table)


def _share(hits: torch.Tensor, best: torch.Tensor) -> str:
    value = f"{100 * hits.double().mean():.1f}"
    if hits is best:
        return value
    low, high = of_hits(torch.arange(len(hits)), best, hits).intervals(0)[1]
    return f"{value} ({100 * low:+.1f} to {100 * high:+.1f})"


if __name__ == "__main__":
    main(*sys.argv[1:])
