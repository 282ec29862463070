"""What the tests of converted weights share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from m3 import M3Model, M3Processor, convert, masking
from m3.errors import M3Error
from m3.types import Batch, Encoded, Tokens


def randomised(module: nn.Module, seed: int = 7) -> Any:
    """Every learned parameter random, so that none can be forgotten; norms and temperatures near usual ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:  # fixed tables of positions
                continue
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim else 0.1
            start = 3.0 if name == "logit_scale" else -9.0 if name == "logit_bias" else float(is_norm)
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale + start)
    return module.eval()


def pictures(model: M3Model, count: int = 3, **others: Any) -> Batch:
    """Random pictures of the model's size, with what else a batch shall have."""
    signal, generator = model.modalities["image"].signal, torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, *signal.size, signal.channels), dtype=torch.uint8, generator=generator)
    return M3Processor(model.config.modalities)(image=list(pixels.numpy()), **others)


def normalised(model: M3Model, batch: Batch) -> Tensor:
    """The pixels as the model sees them."""
    return model.modalities["image"].normalise(batch.signals["image"])


def saved(kind: Any, config: Any, folder: Path) -> Any:
    """A model of transformers with random weights, which it saved into the folder itself."""
    peer = randomised(kind(config))
    with quietly():
        peer.save_pretrained(folder)
    return peer


def assert_same_states(model: M3Model, *peers: Any) -> None:
    """In both precisions the states of pictures are those of transformers' models, with or without a head."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model = model.to(dtype=dtype)  # type: ignore[call-arg]
        batch = pictures(model)
        pixels, states = normalised(model, batch).to(dtype), model.encode(batch).sequence
        for peer in peers:
            own = peer.to(dtype=dtype)
            with torch.no_grad():
                expected = getattr(own, own.base_model_prefix, own)(pixels).last_hidden_state
            torch.testing.assert_close(states, expected, rtol=0, atol=tolerance)


def pixels(count: int, size: tuple[int, ...], seed: int = 3) -> Tensor:
    """uint8 (B, 3, *size)."""
    return torch.randint(0, 256, (count, 3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def signals_of(model: M3Model, signals: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
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


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a part of the largest value."""
    assert found.shape == expected.shape
    assert expected.std() > 0.05
    return float((found.detach() - expected.detach()).abs().max() / expected.abs().max())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, the same values, bit by bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_refuses(folder: Path, weights: str, missing: str, given: Sequence[str] = ()) -> None:
    """A checkpoint that lacks a tensor, and one with a strange one, is refused by the tensor's name."""
    state = load_file(folder / weights)
    save_file({**state, "something.strange": torch.zeros(1)}, folder / weights)
    with pytest.raises(M3Error, match=r"no place for `something\.strange`"):
        convert.convert(folder, given)
    left = {name: x for name, x in state.items() if not missing.endswith(name)}
    assert len(left) == len(state) - 1
    save_file(left, folder / weights)
    with pytest.raises(M3Error, match=f"`{missing}` is missing"):
        convert.convert(folder, given)
    save_file(state, folder / weights)


def word_pieces(count: int) -> str:
    """Return the tokenizer.json of a vocabulary with BERT's marks and the words w0, w1 ..., `count` in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(count - 5))]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    return tokenizer.to_str()


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out transformers' progress bars and reports."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
