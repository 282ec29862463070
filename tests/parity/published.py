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

from m3 import M3Model, M3Processor, convert
from m3.errors import M3Error
from m3.types import Batch


def randomised(module: nn.Module) -> Any:
    """Every parameter random, so that no bias or scale can be forgotten; norms and temperatures near usual ones."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_norm = ("ln_" in name or "norm" in name.lower()) and name.endswith("weight")
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
