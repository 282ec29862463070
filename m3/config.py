"""The complete description of a model, as saved in `config.json`: no recipe and no global table is needed."""

from __future__ import annotations

import json
from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class M3Config(PreTrainedConfig):
    """What `M3Model` is built from; the same sections as in a recipe.

    Attributes:
        modalities: name -> settings of the modality (`type`, ...) with its `tokenizer`.
        backbone: settings of the shared transformer.
        towers: name -> settings of a transformer of its own for some modalities.
        objectives: name -> settings of the objective (`type`, masking, targets, decoders ...).
        seed: default seed of masks.
        about: what is known of the weights, for the model card: `recipe` and `steps` that trained them, with `init`
            that they started from; or `source`, the format that they were converted from, and `weights`, what that
            file was called; `metrics`; `license`, where somebody has said one.
    """

    model_type = "m3"

    modalities: dict[str, Any] | None = None
    backbone: dict[str, Any] | None = None
    towers: dict[str, Any] | None = None
    objectives: dict[str, Any] | None = None
    seed: int = 0
    about: dict[str, Any] | None = None

    @property
    def hidden_size(self) -> int:
        """D, the width of the backbone, under transformers' name."""
        return (self.backbone or {}).get("width", 768)

    def to_json_string(self, use_diff: bool = True) -> str:
        """Write the sections in the recipe's order: it is the order of the tokens, which sorting would change."""
        data = json.loads(super().to_json_string(use_diff))
        data |= {name: getattr(self, name) for name in ("modalities", "backbone", "towers", "objectives")}
        return json.dumps(data, indent=2) + "\n"
