"""The model card: what a folder of weights says of itself on the Hub, written from the config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m3.config import M3Config

OURS = "<!-- Written by save_pretrained and written anew each time; remove this line to keep a card of your own. -->"
EMPTY = "pushed on the Hub. This model card has been automatically generated."
"""Part of the sentence that transformers puts into a card without content."""


def write_card(folder: str | Path, config: M3Config, parameters: int) -> None:
    """Write `README.md`, unless somebody's own stands there.

    Args:
        folder: of the saved model.
        config: of the model; its `about` says where the weights come from and what they reach.
        parameters: number of them.
    """
    path = Path(folder) / "README.md"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if OURS not in text and EMPTY not in text:
            return
    path.write_text(card(config, parameters), encoding="utf-8")


def card(config: M3Config, parameters: int) -> str:
    """Return the card in Markdown."""
    about: dict[str, Any] = config.about or {}
    modalities = config.modalities or {}
    lines = ["---", "library_name: m3", f"license: {about.get('license', 'other')}", "tags:", "- m3", "- multimodal"]
    lines += [*(f"- {name}" for name in modalities), "---", OURS, ""]
    lines += [f"# {about.get('recipe', 'M3 model')}", "", _origin(about), ""]
    lines += ["| modality | type | size | tokens from | seen or predicted |", "|---|---|---|---|---|"]
    lines += [_modality(name, entry, config) for name, entry in modalities.items()]
    backbone = config.backbone or {}
    lines += ["", f"{parameters / 1e6:.2f} M parameters; transformer of width {backbone.get('width', 768)}, "]
    lines[-1] += f"{backbone.get('depth', 12)} blocks, {backbone.get('heads', 12)} heads. Objectives: "
    lines[-1] += (", ".join(f"{name} ({o['type']})" for name, o in (config.objectives or {}).items()) or "none") + "."
    if about.get("metrics"):
        lines += ["", "## Held-out samples", "", "| task | measure | model | baseline | |", "|---|---|---:|---:|---|"]
        lines += [
            f"| {m['task']} | {m['measure']} | {m['model']:.4g} | {m['baseline']:.4g} | {m['baseline_name']} |"
            for m in about["metrics"]
        ]
    lines += ["", "## Use", "", "```python", "from m3 import M3Model, M3Processor", ""]
    lines += ['model = M3Model.from_pretrained("FOLDER OR HUB ID")']
    lines += ['processor = M3Processor.from_pretrained("FOLDER OR HUB ID")']
    lines += [f"states = model.encode(processor({next(iter(modalities), 'image')}=[...])).sequence", "```", ""]
    lines += ["## Licence", "", _licence(about), ""]
    return "\n".join(lines)


def _origin(about: dict[str, Any]) -> str:
    if "source" in about:
        return f"Converted by `m3 convert` from weights in the format of {about['source']}."
    if "steps" in about:
        command = f"`m3 train {about['recipe']}`"
        return f"Trained by {command} for {about['steps']} steps; `recipe.yaml` beside it is the whole recipe."
    return "Nothing is recorded of how these weights were trained."


def _modality(name: str, entry: dict[str, Any], config: M3Config) -> str:
    size = entry.get("size", entry.get("length", entry.get("count", entry.get("frames", ""))))
    text = " x ".join(map(str, size)) if isinstance(size, list | tuple) else str(size)
    targets = [
        t.get("of", key) for o in (config.objectives or {}).values() for key, t in (o.get("targets") or {}).items()
    ]
    seen = [o.get("inputs") or list(config.modalities or {}) for o in (config.objectives or {}).values()] or [[name]]
    is_seen, is_predicted = any(name in names for names in seen), name in targets
    role = " and ".join(word for word, is_so in (("seen", is_seen), ("predicted", is_predicted)) if is_so)
    tokenizer = entry["tokenizer"].get("type") or f"as {entry['tokenizer'].get('same_as')}"
    return f"| {name} | {entry['type']} | {text} | {tokenizer} | {role} |"


def _licence(about: dict[str, Any]) -> str:
    if "license" in about:
        return f"{about['license']}."
    if "source" in about:
        return "That of the weights it was converted from; converting changes nothing about it."
    return "Not stated. The code is Apache-2.0; the weights may be bound by the data they were trained on."
