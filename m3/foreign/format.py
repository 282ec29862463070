"""What a published format says of itself: how to know it, what model it holds, and the table of its tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from m3.backbone import BackboneSpec
from m3.config import M3Config
from m3.errors import M3Error, read_settings
from m3.foreign.checkpoint import Foreign
from m3.foreign.rows import Left, Row

PLAIN = {"mlp": "gelu", "bias": True, "qk_norm": False, "layer_scale": None, "norm": "pre", "input_norm": False}
PLAIN |= {"causal": False, "positions_every_block": False, "modality_embedding": False, "class_positions": False}
PLAIN |= {"relative_bias": None}
"""What the blocks of a plain ViT are made of, as settings of the backbone; for `backbone_of`."""

SHOWN = ("layer_scale", "qk_norm", "class_positions", "input_norm")
"""Settings that show in the names of tensors: a table that has no row for them refuses them itself."""

HEADS = {192: 3, 384: 6, 512: 8, 640: 8, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
"""Attention heads of published transformers by their width; no tensor tells."""


class Format(ABC):
    """One layout of names and shapes.

    Attributes:
        title: what people call it.
        left: names that are not needed, with the reason.
        files: what the library calls the weights and the settings in a folder.
    """

    title: ClassVar[str]
    left: ClassVar[tuple[Left, ...]] = ()
    files: ClassVar[tuple[str, str]] = ("model.safetensors", "config.json")

    def tidy(self, foreign: Foreign) -> Foreign:
        """Bring the variants of the format to one: older names, prefixes."""
        return foreign

    @abstractmethod
    def fits(self, foreign: Foreign) -> bool:
        """Return True where the (tidied) names are those of this format."""

    @abstractmethod
    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Return the sections of our config for the model; `given` are the user's settings, for what nothing tells."""

    @abstractmethod
    def rows(self, config: M3Config) -> list[Row]:
        """Return the table for a model of this config, from the config alone.

        Raises:
            M3Error: the format can't hold such a model.
        """

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what the library wants to read in its own file beside the tensors; empty: it reads none."""
        return {}

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Return sentences on what was chosen because nothing in the file tells."""
        return []


def heads_of(width: int, given: Any, key: str) -> int:
    """Return the number of heads that the user gave, or the usual one for a width.

    Raises:
        M3Error: the width is unusual and nothing was given.
    """
    if given is not None:
        return int(given)
    if width not in HEADS:
        raise M3Error(f"no tensor tells the number of heads, and width {width} is not a usual one; give {key}=N.")
    return HEADS[width]


def ratio_of(hidden: int, width: int) -> float:
    """Return the `mlp_ratio` of which int(width * ratio) is `hidden`; the quotient may be rounded down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def square(count: int, what: str) -> int:
    """Return the side of a square grid of `count` tokens.

    Raises:
        M3Error: it is no square.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise M3Error(f"{what}: {count} positions are no square grid; this layout has square pictures only.")
    return side


def get(settings: dict[str, Any], path: str, default: Any = None) -> Any:
    """Read `a.b.c` of nested settings."""
    for key in path.split("."):
        if not isinstance(settings, dict) or settings.get(key) is None:
            return default
        settings = settings[key]
    return settings


def backbone_of(
    config: M3Config, title: str, tower: str = "", free: tuple[str, ...] = (), **wanted: Any
) -> BackboneSpec:
    """Return all settings of the only transformer of a model, or of one of its towers.

    Args:
        config: ours.
        title: what people call the format.
        tower: name of the tower; empty: the backbone, and there may be no towers beside it.
        free: settings that the format can say, by its tensors or in its own settings, of those in `PLAIN`.
        wanted: settings that the format can't say otherwise, beside those of a plain ViT.

    Raises:
        M3Error: a setting is another one, or there are towers.
    """
    where, settings = "backbone", config.backbone or {}
    if tower:
        where = f"towers.{tower}"
        settings = {key: value for key, value in (config.towers or {})[tower].items() if key != "modalities"}
    elif config.towers:
        raise M3Error(f"{title} is one transformer; it has no place for `towers`.")
    spec = read_settings(BackboneSpec, settings, where)
    for name, value in (PLAIN | wanted).items():
        if name not in free and getattr(spec, name) != value:
            raise M3Error(f"{where}.{name} is {getattr(spec, name)}, and {title} knows {value} only.")
    return spec
