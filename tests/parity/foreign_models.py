"""What the tests of converters share: random weights in every tensor, batches of pictures and clips, comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from m3 import masking
from m3.model import M3Model
from m3.types import Batch, Encoded, Tokens


def randomise(model: Any, seed: int) -> Any:
    """Draw every parameter, scales of norms around 1, and go to evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.requires_grad:
                is_scale = x.ndim == 1 and name.endswith("weight")
                x.copy_(torch.randn(x.shape, generator=generator) * x.shape[-1] ** -0.5 + is_scale)
    return model.eval()


def pixels(count: int, size: tuple[int, ...], seed: int = 3) -> Tensor:
    """uint8 (B, 3, *size)."""
    return torch.randint(0, 256, (count, 3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def normalised(model: M3Model, signals: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model's tokenizers and the published models read: fp32 values, in both precisions the same."""
    return {name: model.modalities[name].normalise(raw).to(dtype) for name, raw in signals.items()}


def tokens_of(model: M3Model, signals: dict[str, Tensor]) -> dict[str, Tokens]:
    return {name: model.tokenizers[name].tokenize(x) for name, x in signals.items()}


def encode_all(model: M3Model, signals: dict[str, Tensor]) -> Tensor:
    """Prefix tokens, then all tokens, from normalised signals."""
    tokens = tokens_of(model, signals)
    with torch.no_grad():
        return model.encode_tokens(tokens, masking.everything(tokens)).sequence


def drawn_plan(model: M3Model, signals: dict[str, Tensor]) -> masking.MaskPlan:
    """The masks of the model's only view."""
    count = len(next(iter(signals.values())))
    (plan,) = model.prepare(Batch(signals, keys=torch.arange(count) + 5)).plans.values()
    return plan


def encoded_view(model: M3Model, signals: dict[str, Tensor], plan: masking.MaskPlan) -> Encoded:
    with torch.no_grad():
        return model.encode_tokens(tokens_of(model, signals), plan)


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, or of the folder that holds one."""
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        return load_file(path)
    found = torch.load(path, weights_only=True)
    return found.get("model", found)


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a part of the largest value."""
    assert found.shape == expected.shape
    assert expected.std() > 0.05
    return float((found.detach() - expected.detach()).abs().max() / expected.abs().max())
