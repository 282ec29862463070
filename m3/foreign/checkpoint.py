"""A checkpoint of another library: its tensors by name, read when asked for, and its settings. Nothing in it is run."""

from __future__ import annotations

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from m3.errors import M3Error

WRAPPERS = ("model", "module", "state_dict", "model_state_dict", "model_state", "base_model", "net", "target_encoder")
"""Entries of a training checkpoint that hold the tensors: the model's, not the optimizer's."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers put before every name: DataParallel, torch.compile, Lightning."""

NUMPY: Any = getattr(np, "_core", None) or np.core  # NumPy 1 has no `_core`
HARMLESS = [argparse.Namespace, np.dtype, NUMPY.multiarray.scalar]
HARMLESS += [getattr(np.dtypes, f"{name}DType") for name in ("Float32", "Float64", "Int64")]
"""What training checkpoints hold beside tensors and what only holds data."""

FILES = (".safetensors", ".pth", ".pt", ".bin")
"""Endings of files of weights."""

NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
"""What the weights in a folder are called, best first."""


class Lazy(Mapping[str, Tensor]):
    """Tensors of safetensors files, each read when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._stack, self._files = ExitStack(), {}
        for file in files:
            opened = self._stack.enter_context(safe_open(file, "pt"))
            self._files |= dict.fromkeys(opened.keys(), opened)
            self.metadata = opened.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._files)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that need not be read for it."""
        return tuple(self._files[name].get_slice(name).get_shape())


@dataclass(frozen=True)
class Foreign:
    """What was found.

    Attributes:
        where: file or folder, for messages.
        tensors: name -> tensor.
        shapes: name -> its shape.
        settings: of the library's own config file or of the file's metadata; empty where there are none.
        license: what the folder says of it; None: nothing.
    """

    where: str
    tensors: Mapping[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Any] = field(default_factory=dict)
    license: str | None = None

    def renamed(self, *rules: tuple[str, str]) -> Foreign:
        """Return the same with every name changed by regular expressions, one after the other."""
        new = {}
        for name in self.shapes:
            own = name
            for pattern, replacement in rules:
                own = re.sub(pattern, replacement, own)
            new[own] = name
        return self._of(new)

    def without_prefix(self, prefix: str) -> Foreign:
        """Return the tensors whose names begin so, without the beginning."""
        return self._of({name.removeprefix(prefix): name for name in self.shapes if name.startswith(prefix)})

    def with_aliases(self, names: dict[str, str]) -> Foreign:
        """Return the same where some tensors go by a second name too: new name -> the one that is there."""
        return self._of({name: name for name in self.shapes} | names)

    def count(self, pattern: str) -> int:
        """Return how many different things stand at the first group of a regular expression: the number of blocks."""
        found = (re.match(pattern, name) for name in self.shapes)
        return len({match[1] for match in found if match})

    def _of(self, names: dict[str, str]) -> Foreign:
        """Return the same with the tensors of these names: new -> old."""
        shapes = {name: self.shapes[old] for name, old in names.items()}
        return replace(self, tensors=_Renamed(self.tensors, names), shapes=shapes)


class _Renamed(Mapping[str, Tensor]):
    def __init__(self, tensors: Mapping[str, Tensor], names: dict[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_foreign(path: str | Path) -> Foreign:
    """Open a checkpoint: a .safetensors, .pth, .pt or .bin file, or a folder with one and a `config.json`.

    What is no file and looks like `owner/name` is a repository of the Hugging Face hub, e.g. `timm/NAME` for every
    model of timm, and is downloaded (weights, settings and card alone).

    Raises:
        M3Error: there is no such file, it is damaged, it is no checkpoint, or reading it would run code.
    """
    is_file_name = Path(path).suffix in FILES
    if not Path(path).exists() and not is_file_name and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        path = _downloaded(str(path))
    path = Path(path)
    if not path.exists():
        raise M3Error(f"{path} is not there; give a file (.safetensors, .pth, .bin) or a folder that holds one.")
    settings = {}
    file = path
    if path.is_dir():
        file = next((path / name for name in NAMES if (path / name).exists()), None)
        found = sorted(p for p in path.iterdir() if p.suffix in FILES)
        file = file or (found[0] if len(found) == 1 else None)
        if file is None:
            count = len(found) or "no"
            raise M3Error(
                f"{path} holds {count} files of weights; give a file of weights, or a folder with {NAMES[1]}."
            )
        settings = _settings(path)
    return replace(_opened(path, file, settings), license=_license(path, settings))


def _opened(path: Path, file: Path, settings: dict[str, Any]) -> Foreign:
    """Open the file of weights that a path leads to."""
    if file.suffix == ".json":
        parts = _json(file).get("weight_map")
        if not isinstance(parts, dict):
            raise M3Error(f"{file} tells no `weight_map`, the names of the files of weights; fetch it again.")
        names = sorted(set(parts.values()))
        return _safetensors(str(path), [path / name for name in names], settings)
    with open(file, "rb") as opened:
        begin = opened.read(9)
    if file.suffix == ".safetensors" or begin[8:9] == b"{":
        return _safetensors(str(path), [file], settings)
    return _pickled(str(path), file, settings)


def named(path: str | Path) -> str:
    """Return what a checkpoint is called elsewhere too: the name of a file or folder, or that of a repository."""
    return Path(path).resolve().name if Path(path).exists() else str(path)


def _downloaded(repository: str) -> str:
    """Return the folder of a repository of the Hub: its settings, and its safetensors or, without any, its pickles."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        files = HfApi().list_repo_files(repository)
        kinds = (
            ["*.safetensors"] if any(name.endswith(".safetensors") for name in files) else ["*.bin", "*.pth", "*.pt"]
        )
        return snapshot_download(repository, allow_patterns=["*.json", "README.md", *kinds])
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise M3Error(
            f"`{repository}` is no file here, and the Hub gives nothing of that name ({str(error).splitlines()[0]}); "
            f"check the path or the name."
        ) from error


def _settings(folder: Path) -> dict[str, Any]:
    """Read the library's own description, with that of the preprocessor under its own name."""
    settings = {}
    for name in ("config.json", "open_clip_config.json"):
        if (folder / name).exists():
            settings |= _json(folder / name)
    if (folder / "preprocessor_config.json").exists():
        settings["preprocessor"] = _json(folder / "preprocessor_config.json")
    return settings


def _json(file: Path) -> dict[str, Any]:
    """Read a file of settings."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise M3Error(f"{file} is no JSON ({error}); it is damaged: fetch it again.") from error
    if not isinstance(found, dict):
        raise M3Error(f"{file} is JSON, but holds no settings by name; fetch it again.")
    return found


def _license(path: Path, settings: dict[str, Any]) -> str | None:
    """Return the licence that the card in a folder or its settings (timm's) state."""
    card = path / "README.md"
    if card.is_file():
        found = re.match(r"---\n(?:(?!---).*\n)*?license: *(\S+)", card.read_text(encoding="utf-8", errors="replace"))
        if found:
            return found[1].strip("'\"")
    stated = settings.get("license") or (settings.get("pretrained_cfg") or {}).get("license")
    return str(stated) if stated else None


def _safetensors(where: str, files: list[Path], settings: dict[str, Any]) -> Foreign:
    try:
        tensors = Lazy(files)
    except (SafetensorError, OSError) as error:
        raise M3Error(
            f"{where} can't be read as safetensors ({error}); it is damaged or cut: fetch it again."
        ) from error
    if not tensors:
        raise M3Error(f"{where} is empty: it holds no tensors; give another file.")
    return Foreign(where, tensors, {name: tensors.shape(name) for name in tensors}, settings or dict(tensors.metadata))


def _pickled(where: str, file: Path, settings: dict[str, Any]) -> Foreign:
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles; what is wrong with them is said below
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # the reader fails on damaged files in many ways
        text = str(error)
        name = re.search(r"(?:GLOBAL|class|function) `?([\w.]+)`? (?:was not|is not|whose module)", text)
        with open(file, "rb") as opened:
            is_pickle = opened.read(1) == b"\x80"
        if "Weights only load failed" in text and (name or is_pickle):
            what = f"the Python object {name[1]}" if name else "Python objects"
            raise M3Error(
                f"{where} holds {what}, and reading it could run code: only tensors, numbers and text are read; save "
                f"its `state_dict()` where you trust it, and give that."
            ) from error
        raise M3Error(
            f"{where} is no checkpoint that PyTorch can read, or it is damaged; give another file."
        ) from error
    tensors = _tensors_of(found)
    if not tensors:
        raise M3Error(f"{where} holds no tensors under names; give a `state_dict` or a training checkpoint with one.")
    return Foreign(where, tensors, {name: tuple(x.shape) for name, x in tensors.items()}, settings)


def _tensors_of(found: Any) -> dict[str, Tensor]:
    """Find the model's tensors in what a file holds, and take wrappers' prefixes off."""
    if not isinstance(found, Mapping):
        return {}
    for name in WRAPPERS:
        if isinstance(found.get(name), Mapping):
            return _tensors_of(found[name])
    tensors = {str(name): x for name, x in found.items() if isinstance(x, Tensor)}
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors
