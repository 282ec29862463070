"""M3: multimodal masked modelling. Every modality through a tokenizer into one transformer.

`import m3` is light: the names below are imported when they are first used, and transformers' AutoConfig,
AutoModel and AutoProcessor learn about M3 when they are.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from m3 import auto as _auto

if TYPE_CHECKING:
    from m3.config import M3Config
    from m3.errors import M3Error
    from m3.model import M3Model
    from m3.processor import M3Processor
    from m3.recipe import load_recipe
    from m3.tokenizer_model import M3Tokenizer

__version__ = "0.1.0"
__all__ = ["M3Config", "M3Error", "M3Model", "M3Processor", "M3Tokenizer", "load_recipe"]

_HOMES = {
    "M3Config": "m3.config",
    "M3Error": "m3.errors",
    "M3Model": "m3.model",
    "M3Processor": "m3.processor",
    "M3Tokenizer": "m3.tokenizer_model",
    "load_recipe": "m3.recipe",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'm3' has no attribute {name!r}")


_auto.register()
