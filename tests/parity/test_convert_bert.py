"""transformers' BERT becomes ours with the same states and predictions, and goes back with the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from m3 import M3Model, M3Processor, convert
from m3.errors import M3Error
from tests.parity.published import assert_equal, assert_refuses, quietly, randomised, word_pieces

SENTENCES = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w0 w1"]
SMALL: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 17, "max_position_embeddings": 8}
OTHER = {**SMALL, "layer_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh", "num_attention_heads": 2}
OTHER |= {"hidden_size": 36, "intermediate_size": 80, "num_hidden_layers": 3}
# [CLS] = 2, [SEP] = 3, w0 = 5; cut to 8.
IDS = [[2, 6, 7, 8, 3, 0, 0, 0], [2, 9, 3, 0, 0, 0, 0, 0], [2, 10, 11, 12, 13, 14, 15, 3]]
LENGTHS = [5, 3, 8]
TYPES = "bert.embeddings.token_type_embeddings.weight"


def saved(model: Any, folder: Path) -> Path:
    with quietly():
        model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(word_pieces(17))
    return folder


def their_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(IDS), torch.arange(8) < torch.tensor(LENGTHS).unsqueeze(1)


@pytest.mark.parametrize("settings", [SMALL, OTHER], ids=["small", "another eps and width"])
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForPreTraining])
def test_states_are_the_same_and_transformers_opens_what_is_written(tmp_path: Path, kind: Any, settings: dict) -> None:
    if kind is not BertModel:  # heads have GELU
        settings = {**settings, "hidden_act": "gelu"}
    peer = randomised(kind(BertConfig(**settings)))
    found = convert.convert(saved(peer, tmp_path / "in"))
    assert found.format == "bert"
    assert "the mark of second sentences is left out" in found.notes[0]
    assert all("pooler" in name or "seq_relationship" in name for name in found.left)
    convert.save(found.model, tmp_path / "out", "bert")
    given = {f"bert.{n.removeprefix('bert.')}" if "cls." not in n else n: x
             for n, x in load_file(tmp_path / "in/model.safetensors").items()}  # fmt: skip
    given[TYPES][1] = 0.0
    assert_equal(load_file(tmp_path / "out/model.safetensors"), {n: x for n, x in given.items() if n not in found.left})
    with quietly():
        again = AutoModel.from_pretrained(tmp_path / "out")
    ids, is_valid = their_inputs()
    own = getattr(peer, "bert", peer)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model: Any = found.model.to(dtype=dtype)  # type: ignore[call-arg]
        batch = M3Processor(model.config.modalities)(text=SENTENCES)
        states = model.encode(batch).sequence[is_valid]
        for other in (own.to(dtype=dtype), again.to(dtype=dtype)):
            with torch.no_grad():
                expected = other(input_ids=ids, attention_mask=is_valid).last_hidden_state[is_valid]
            torch.testing.assert_close(states, expected, rtol=0, atol=tolerance)


def test_half_the_precision_gives_nearly_the_same_states(tmp_path: Path) -> None:
    """The sum with positions is float32, the norm behind it is not."""
    model = convert.load(saved(randomised(BertModel(BertConfig(**SMALL))), tmp_path / "in"))
    model.save_pretrained(tmp_path / "ours")
    with quietly():
        half = M3Model.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    batch = M3Processor(model.config.modalities)(text=SENTENCES)
    states = half.encode(batch).sequence
    assert states.dtype == torch.bfloat16
    torch.testing.assert_close(states.float(), model.encode(batch).sequence, rtol=0, atol=0.15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_predictions_of_hidden_words_are_the_same(tmp_path: Path, eps: float, dtype, tolerance: float) -> None:
    peer: Any = randomised(BertForMaskedLM(BertConfig(**SMALL, layer_norm_eps=eps)))
    model = convert.load(saved(peer, tmp_path / "in"))
    convert.save(model, tmp_path / "out", "bert")
    with quietly():
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    ids, is_valid = their_inputs()
    is_hidden = is_valid & (torch.arange(8) % 3 == 1)
    model, batch = model.to(dtype=dtype), M3Processor(model.config.modalities)(text=SENTENCES)  # type: ignore[call-arg]
    found = model.reconstruct(batch, visible={"text": ~is_hidden}).output["text"]
    with torch.no_grad():
        hidden = again.to(dtype)(input_ids=ids.masked_fill(is_hidden, 4), attention_mask=is_valid).logits
    torch.testing.assert_close(found[is_valid], hidden[is_valid], rtol=0, atol=tolerance)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = saved(BertForMaskedLM(BertConfig(**SMALL)), tmp_path)
    assert_refuses(folder, "model.safetensors", "cls.predictions.transform.LayerNorm.bias")
    with pytest.raises(M3Error, match=r"its head has `gelu_pytorch_tanh`, but ours has GELU"):
        convert.convert(saved(BertForMaskedLM(BertConfig(**OTHER)), tmp_path))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(M3Error, match=r"which words the 17 ids are; give modalities\.text\.vocabulary"):
        convert.convert(folder)
