"""The model card: what a folder of weights says of itself on the Hub."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from m3.config import M3Config

OURS = "<!-- Written by save_pretrained and written anew each time; remove this line to keep a card of your own. -->"
EMPTY = "pushed on the Hub. This model card has been automatically generated."
"""Part of the sentence that transformers puts into a card without content."""


class Facts(NamedTuple):
    """What a model is.

    Attributes:
        config: of the model; its `about` says where the weights come from and what they reach.
        parameters: number of them.
        seen: modalities that it encodes; none: it is a tokenizer, which makes them codes.
        predicted: modalities that it predicts.
    """

    config: M3Config
    parameters: int
    seen: Collection[str]
    predicted: Collection[str]


def write_card(folder: str | Path, facts: Facts) -> None:
    """Write `README.md` beside a saved model, unless somebody's own stands there."""
    path = Path(folder) / "README.md"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if OURS not in text and EMPTY not in text:
            return
    path.write_text(card(facts), encoding="utf-8")


def card(facts: Facts) -> str:
    """Return the card in Markdown."""
    config = facts.config
    about: dict[str, Any] = config.about or {}
    modalities = config.modalities or {}
    lines = ["---", "library_name: m3", f"license: {about.get('license', 'other')}", "tags:", "- m3", "- multimodal"]
    lines += [*(f"- {name}" for name in modalities), "---", OURS, ""]
    lines += [f"# {about.get('recipe', about.get('weights', 'M3 model'))}", "", _origin(about), ""]
    lines += ["| modality | type | size | tokens from | seen or predicted |", "|---|---|---|---|---|"]
    lines += [_modality(name, entry, facts) for name, entry in modalities.items()]
    lines += ["", f"{facts.parameters / 1e6:.2f} M parameters; {_transformers(config)}. Objectives: "]
    lines[-1] += (", ".join(f"{name} ({o['type']})" for name, o in (config.objectives or {}).items()) or "none") + "."
    if about.get("metrics"):
        lines += ["", "## Held-out samples", "", "| task | measure | model | baseline | |", "|---|---|---:|---:|---|"]
        lines += [
            f"| {m['task']} | {m['measure']} | {m['model']:.4g} | {m['baseline']:.4g} | {m['baseline_name']} |"
            for m in about["metrics"]
        ]
    given = f"processor({_argument(next(iter(modalities), 'image'))})"
    lines += ["", "## Use", "", "```python", *loading("FOLDER OR HUB ID", bool(facts.seen))]
    lines += [f"states = model.encode({given}).sequence" if facts.seen else f"codes = tokenizer.encode({given})"]
    lines += ["```", "", "## Licence", "", _licence(about), ""]
    return "\n".join(lines)


def loading(place: str, is_model: bool) -> list[str]:
    """Return the three lines that load a model, or a tokenizer, from a folder or the Hub."""
    kind, name = ("M3Model", "model") if is_model else ("M3Tokenizer", "tokenizer")
    return [
        f"from m3 import {', '.join(sorted((kind, 'M3Processor')))}",
        f'{name} = {kind}.from_pretrained("{place}")',
        f'processor = M3Processor.from_pretrained("{place}")',
    ]


def _origin(about: dict[str, Any]) -> str:
    if "source" in about:
        weights = f"`{about['weights']}`, " if "weights" in about else ""
        return f"Converted by `m3 convert` from {weights}weights in the format of {about['source']}."
    if "steps" in about:
        start = f", starting from `{about['init']}`" if "init" in about else ""
        command = f"`m3 train {about['recipe']}`"
        return f"Trained by {command} for {about['steps']} steps{start}; `recipe.yaml` beside it is the whole recipe."
    return "Nothing is recorded of how these weights were trained."


def _transformers(config: M3Config) -> str:
    """Say the sizes of the towers, and of the backbone where it reads any modality."""
    towers = config.towers or {}
    apart = {name for tower in towers.values() for name in tower["modalities"]}
    every = {} if apart and apart >= set(config.modalities or {}) else {"transformer": config.backbone or {}}
    every |= {f"tower `{name}`": tower for name, tower in towers.items()}
    return ", ".join(
        f"{name} of width {spec.get('width', 768)}, {spec.get('depth', 12)} blocks, {spec.get('heads', 12)} heads"
        for name, spec in every.items()
    )


def _argument(name: str) -> str:
    return f"{name}=[...]" if name.isidentifier() else f'**{{"{name}": [...]}}'


def _modality(name: str, entry: dict[str, Any], facts: Facts) -> str:
    size = entry.get("size", entry.get("length", entry.get("count", entry.get("frames", ""))))
    text = " x ".join(map(str, size)) if isinstance(size, list | tuple) else str(size)
    role = " and ".join(word for word in ("seen", "predicted") if name in getattr(facts, word))
    role = role if facts.seen else "made codes"
    tokenizer = entry["tokenizer"].get("type") or f"as {entry['tokenizer'].get('same_as')}"
    return f"| {name} | {entry['type']} | {text} | {tokenizer} | {role} |"


def _licence(about: dict[str, Any]) -> str:
    converted = (
        "of the weights it was converted from; converting changes nothing about it." if "source" in about else ""
    )
    if "license" in about:
        return f"{about['license']}, that {converted}" if converted else f"{about['license']}."
    if converted:
        return f"That {converted} The files did not state it."
    data = "the weights they started from and the data" if "init" in about else "the data"
    return f"Not stated. The code is Apache-2.0; the weights may be bound by {data} they were trained on."
