"""transformers' BERT, `BertModel` and `BertForMaskedLM`.

    bert.embeddings.(word_embeddings, position_embeddings, token_type_embeddings, LayerNorm),
    bert.encoder.layer.N.(attention.self.(query, key, value), attention.output.(dense, LayerNorm), intermediate.dense,
    output.(dense, LayerNorm)), cls.predictions.(transform.(dense, LayerNorm), bias)

Its class token is a word of the text here too, [CLS], and so is [SEP].

Letters: D width, K words, L length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import hugging, pairs, vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, backbone_of, get
from m3.foreign.rows import Left, Row, one, padded, same

TITLE = "transformers' BERT"
LAYERS = {
    "attention.output.dense": "attention.projection",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}
SELF = ("query", "key", "value")
WORDS = "tokenizers.text.table.weight"
HEAD = "objectives.words.decoders.text"
MASK = "[MASK]"
OBJECTIVE = {
    "type": "reconstruct",
    "inputs": ["text"],
    "masking": {"type": "fixed", "visible": 0.85, "hidden": "mix"},
    "targets": {"text": {"loss": "cross_entropy"}},
}
"""BERT's own pretraining (Devlin et al. 2018, section 3.1); the decoder comes on top."""


class Bert(Format):
    """transformers' BERT."""

    title = TITLE
    left = (
        Left(r"cls\.predictions\.decoder\.(weight|bias)", "the table of words, and the bias, a second time"),
        Left(r"(bert\.pooler|cls\.seq_relationship|classifier)\..*", "a layer of a task"),
        Left(r"bert\.embeddings\.position_ids", "numbers of places, which are computed"),
    )

    def tidy(self, foreign: Foreign) -> Foreign:
        """Bring old names and the model without head to one."""
        found = foreign.renamed((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
        if "embeddings.word_embeddings.weight" not in found.shapes:
            return found
        return found.renamed((r"^(embeddings|encoder|pooler)\.", r"bert.\1."))

    def fits(self, foreign: Foreign) -> bool:
        """Know it by its embeddings."""
        needed = {"bert.embeddings.word_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"}
        return needed <= foreign.shapes.keys() and foreign.settings.get("model_type", "bert") == "bert"

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Translate its config."""
        theirs = hugging.settings_of(foreign)
        tower = hugging.tower_of(theirs)
        text = bert_text(foreign, given)
        objectives: dict[str, Any] = {}
        if "cls.predictions.bias" in foreign.shapes:
            if tower["mlp"] != "gelu":
                raise M3Error(f"its head has `{theirs['hidden_act']}`, but ours has GELU; take a `BertModel` alone.")
            decoder = {"type": "head", "hidden": tower["width"], "tied": True}
            objectives = {"words": {**OBJECTIVE, "decoder": decoder}}
        return {"modalities": {"text": text}, "backbone": tower | STYLE, "objectives": objectives}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder, and of the head where there is one."""
        text, backbone = _parts(config)
        has_head = bool(config.objectives)
        rows = [
            *text_rows("bert.embeddings", text, has_head),
            _types(backbone["width"]),
            *same("bert.embeddings.LayerNorm", "input_norms.text"),
            *block_rows("bert.encoder.layer.{}", backbone["depth"]),
        ]
        return [*rows, *head_rows()] if has_head else rows

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what `AutoModel` opens."""
        text, backbone = _parts(config)
        return {
            "model_type": "bert",
            "architectures": ["BertForMaskedLM" if config.objectives else "BertModel"],
            **hugging.tower_settings(backbone),
            "vocab_size": pairs.vocabulary_size(text),
            "max_position_embeddings": text["length"],
            "type_vocab_size": 2,
        }

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what is not kept."""
        return ["the mark of second sentences is left out, as texts are one sentence here; it is written as zeros."]


STYLE = {
    "class_tokens": 0,
    "norm": "post",
    "input_norm": "modality",
    "final_norm": False,
    "modality_embedding": True,
}
"""What BERT's transformer is."""


def bert_text(foreign: Foreign, given: dict[str, Any], prefix: str = "bert") -> dict[str, Any]:
    """Return our settings of the text, framed by [CLS] and [SEP]."""
    count, _ = foreign.shapes[f"{prefix}.embeddings.word_embeddings.weight"]
    vocabulary = pairs.vocabulary_in(foreign.where, get(given, "modalities.text.vocabulary"), count)
    length = foreign.shapes[f"{prefix}.embeddings.position_embeddings.weight"][0]
    return pairs.text_of(vocabulary, length, start="[CLS]", end="[SEP]")


def text_rows(theirs: str, text: dict[str, Any], has_head: bool) -> list[Row]:
    """Rows of words and positions; where there is a head, [MASK] is our mask token too."""
    positions = vision.learned(
        f"{theirs}.position_embeddings.weight", "positions.text.table", (text["length"],), batch=()
    )
    words = f"{theirs}.word_embeddings.weight"
    if not has_head:
        return [padded(words, WORDS), positions]
    number = pairs.number_of(text, MASK)

    def read(x: list[Tensor]) -> list[Tensor]:
        return [torch.cat([x[0], torch.zeros_like(x[0][:1])]), x[0][number : number + 1].clone()]

    def write(x: list[Tensor]) -> list[Tensor]:
        table = x[0][:-1].clone()
        table[number] = x[1][0]
        return [table]

    return [Row((words,), (WORDS, "mask_tokens.text"), read, write), positions]


def block_rows(theirs: str, depth: int) -> list[Row]:
    """Rows of the blocks; `{}` is the block's number."""
    qkv = tuple(f"{theirs}.attention.self.{name}" for name in SELF)
    return [
        *vision.blocks(theirs, "backbone.blocks.{}", depth, LAYERS),
        *vision.split(qkv, "backbone.blocks.{}", depth),
    ]


def head_rows() -> list[Row]:
    """Rows of the head that predicts words."""
    return [
        *same("cls.predictions.transform.dense", f"{HEAD}.hidden.0"),
        *same("cls.predictions.transform.LayerNorm", f"{HEAD}.hidden.2"),
        one("cls.predictions.bias", f"{HEAD}.output.bias"),
    ]


def _types(width: int) -> Row:
    """Row of the marks of first and second sentences, of which ours has the first."""
    theirs, ours = "bert.embeddings.token_type_embeddings.weight", "modality_embeddings.text"
    return Row(
        (theirs,), (ours,), lambda x: [x[0][:1].clone()], lambda x: [torch.cat([x[0], x[0].new_zeros(1, width)])]
    )


def _parts(config: M3Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return text and backbone.

    Raises:
        M3Error: the model is another.
    """
    objectives, modalities = config.objectives or {}, config.modalities or {}
    backbone = backbone_of(config, TITLE, free=(*STYLE, "mlp")).model_dump()
    decoder = get(objectives, "words.decoder", {})
    is_known = list(modalities) == ["text"] and list(objectives) in ([], ["words"])
    is_known = is_known and all(backbone[name] == value for name, value in STYLE.items())
    is_tied = decoder.get("tied") and decoder.get("hidden") == backbone["width"] and backbone["mlp"] == "gelu"
    if not is_known or (objectives and not is_tied):
        raise M3Error(
            f"{TITLE} is one post-norm transformer of `text` with class_tokens: 0, input_norm: modality and "
            f"modality_embedding, without objectives or with one `words` whose head is tied and as wide; this model is "
            f"another."
        )
    return modalities["text"], backbone
