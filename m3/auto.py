"""Make transformers' Auto classes know M3 after `import m3`, without importing transformers' heavy parts.

Importing `AutoProcessor` or `PreTrainedModel` loads torchvision and torchaudio where they are installed (two
seconds), so registration waits until the program itself imports the Auto class: a finder in front of
`sys.meta_path` lets the ordinary import happen and registers right after it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType


def _config(module: ModuleType) -> None:
    from m3.config import M3Config

    module.AutoConfig.register("m3", M3Config, exist_ok=True)


def _model(module: ModuleType) -> None:
    from m3.config import M3Config
    from m3.model import M3Model

    module.AutoModel.register(M3Config, M3Model, exist_ok=True)
    module.AutoModelForPreTraining.register(M3Config, M3Model, exist_ok=True)


def _processor(module: ModuleType) -> None:
    from m3.config import M3Config
    from m3.processor import M3Processor

    module.AutoProcessor.register(M3Config, M3Processor, exist_ok=True)


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _config,
    "transformers.models.auto.modeling_auto": _model,
    "transformers.models.auto.processing_auto": _processor,
}


class _After(Loader):
    """Runs a module's own loader, then the hook."""

    def __init__(self, loader: Loader, hook: Callable[[ModuleType], None]) -> None:
        self.loader, self.hook = loader, hook

    def create_module(self, spec):  # type: ignore[override]
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.hook(module)


class _Finder(MetaPathFinder):
    """Finds only the modules of `HOOKS`, once each."""

    def __init__(self) -> None:
        self.waiting = dict(HOOKS)

    def find_spec(self, fullname: str, path=None, target=None):  # type: ignore[override]
        hook = self.waiting.pop(fullname, None)
        if hook is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _After(spec.loader, hook)
        return spec


def register() -> None:
    """Register M3 with the Auto classes that are loaded, and with the others as soon as they are."""
    finder = _Finder()
    for name, hook in HOOKS.items():
        if name in sys.modules:
            finder.waiting.pop(name)
            hook(sys.modules[name])
    sys.meta_path.insert(0, finder)
