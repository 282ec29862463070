"""`m3 doctor`: versions, devices, which optional parts load and what to do about those that don't."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table

from m3 import __version__
from m3.machine import use_bf16
from m3.parts import HOMES, available, find

REQUIRED = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "pydantic", "numpy", "pillow")
OPTIONAL = {
    "torchvision": ("torchvision", "random crops and resizing of images", "vision"),
    "timm": ("timm", "teachers, augmentation", "vision"),
    "open_clip": ("open-clip-torch", "CLIP teachers and text tokenizers", "vision"),
    "torchaudio": ("torchaudio", "audio", "audio"),
    "av": ("av", "video files", "video"),
    "datasets": ("datasets", "data sets of the Hugging Face hub", "hub"),
    "sentencepiece": ("sentencepiece", "sentencepiece vocabularies", "all"),
    "webdataset": ("webdataset", "tar shards", "all"),
    "tensorboard": ("tensorboard", "the default tracker", "all"),
}


def print_report() -> None:
    """Print the report."""
    console = Console()
    console.print(f"M3 {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    console.print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in REQUIRED))
    console.print(_devices())
    console.print(_optional())
    console.print(_plugins())


def _devices() -> str:
    lines = [f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            lines.append(f"GPU {number}: {card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    else:
        lines.append("GPU: none that torch can use; everything runs on the CPU")
    lines.append(f"precision `auto` means {'bf16' if use_bf16('auto') else 'fp32'} here")
    return "\n".join(lines)


def _optional() -> Table:
    table = Table(title="Optional parts", title_justify="left")
    for column in ("package", "for", "state", "what to do"):
        table.add_column(column)
    for module, (package, purpose, extra) in OPTIONAL.items():
        try:
            importlib.import_module(module)
            state, advice = f"[green]{importlib.metadata.version(package)}[/]", ""
        except ImportError as error:
            state, advice = f"[yellow]{error}[/]", f"pip install 'm3-multimodal[{extra}]'"
        except (OSError, RuntimeError) as error:  # a wheel built for another torch or CUDA
            state, advice = f"[red]{error}[/]", f"install the {package} built for torch {torch.__version__}"
        table.add_row(package, purpose, state, advice.replace("[", "\\["))
    return table


def _plugins() -> Table:
    table = Table(title="Parts that recipes can name", title_justify="left")
    table.add_column("kind")
    table.add_column("types")
    for kind in HOMES:
        names = available(kind)
        for name in names:
            find(kind, name)
        table.add_row(kind, ", ".join(names))
    return table
