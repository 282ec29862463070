"""UNITER (ChenRocks/UNITER), pretrained with all its heads or its encoder alone.

    uniter.embeddings.(BERT's), uniter.img_embeddings.(img_linear, img_layer_norm, pos_linear, pos_layer_norm,
    mask_embedding, LayerNorm), uniter.encoder.layer.N.(BERT's), uniter.pooler.dense, cls.predictions.(BERT's),
    feat_regress.(net.0, net.2, weight, bias), region_classifier.(net.0, net.2, net.3), itm_output

Texts and regions have a norm each before the first block; hidden regions are learned features, projected like others.

Letters: D width, F features of a region, K classes of regions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import pairs
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, backbone_of, get, heads_of, ratio_of
from m3.foreign.rows import Left, Row, one, same
from m3.formats.bert import STYLE, bert_text, block_rows, head_rows, text_rows

TITLE = "UNITER"
IMAGES = "uniter.img_embeddings"
HEADS = ("itm_output.weight", "cls.predictions.bias", "feat_regress.bias", "region_classifier.net.3.weight")
EPS = 1e-12
"""Of every norm."""


class Uniter(Format):
    """UNITER's own code."""

    title = TITLE
    left = (
        Left(
            r"(uniter\.pooler|cls|feat_regress|region_classifier|\w+_output|\w+_classifier)\..*",
            "a head, which is read only where all of the pretraining's are there",
        ),
    )

    def tidy(self, foreign: Foreign) -> Foreign:
        """Bring old names to the later ones."""
        return foreign.renamed((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

    def fits(self, foreign: Foreign) -> bool:
        """Know it by both embeddings."""
        return {"uniter.embeddings.word_embeddings.weight", f"{IMAGES}.img_linear.weight"} <= foreign.shapes.keys()

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes; 100 regions and the losses are the paper's."""
        shapes = foreign.shapes
        width, features = shapes[f"{IMAGES}.img_linear.weight"]
        hidden = shapes["uniter.encoder.layer.0.intermediate.dense.weight"][0]
        backbone = {
            "width": width,
            "depth": foreign.count(r"uniter\.encoder\.layer\.(\d+)\."),
            "heads": heads_of(width, get(given, "backbone.heads"), "backbone.heads"),
            "mlp_ratio": ratio_of(hidden, width),
            "norm_eps": EPS,
            **STYLE,
        }
        region = {"type": "region", "mask_values": True}
        modalities = {
            "text": bert_text(foreign, given, "uniter"),
            "regions": {"type": "regions", "features": features, "count": 100, "tokenizer": region},
        }
        if not all(name in shapes for name in HEADS):
            return {"modalities": modalities, "backbone": backbone, "objectives": {}}
        classes = shapes["region_classifier.net.3.weight"][0]
        labels = {"type": "region_labels", "classes": classes, "count": 100, "tokenizer": {"type": "region"}}
        return {
            "modalities": modalities | {"region_labels": labels},
            "backbone": backbone,
            "objectives": _objectives(width),
        }

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder, and of the heads where there are some."""
        backbone = _check(config)
        text, has_heads = (config.modalities or {})["text"], bool(config.objectives)
        rows = [
            *_words(text, has_heads),
            _types(),
            *same("uniter.embeddings.LayerNorm", "input_norms.text"),
            *_projection(has_heads),
            *same(f"{IMAGES}.img_layer_norm", "tokenizers.regions.norm"),
            *same(f"{IMAGES}.pos_linear", "positions.regions.projection"),
            *same(f"{IMAGES}.pos_layer_norm", "positions.regions.norm"),
            *same(f"{IMAGES}.LayerNorm", "input_norms.regions"),
            _mask(),
            *block_rows("uniter.encoder.layer.{}", backbone["depth"]),
        ]
        if not has_heads:
            return rows
        features, labels = "objectives.features.decoders.regions", "objectives.labels.decoders.region_labels"
        classes = (config.modalities or {})["region_labels"]["classes"]
        return [
            *rows,
            *head_rows(),
            *same("uniter.pooler.dense", "objectives.match.pooler"),
            *same("itm_output", "objectives.match.output"),
            *same("feat_regress.net.0", f"{features}.hidden.0"),
            *same("feat_regress.net.2", f"{features}.hidden.2"),
            one("feat_regress.bias", f"{features}.output.bias"),
            *same("region_classifier.net.0", f"{labels}.hidden.0"),
            *same("region_classifier.net.2", f"{labels}.hidden.2"),
            *same("region_classifier.net.3", f"{labels}.output"),
            *_unused("tokenizers.region_labels", backbone["width"], classes),
        ]

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what UNITER's `UniterConfig` reads."""
        backbone, text = _check(config), (config.modalities or {})["text"]
        return {
            "hidden_size": backbone["width"],
            "num_hidden_layers": backbone["depth"],
            "num_attention_heads": backbone["heads"],
            "intermediate_size": int(backbone["width"] * backbone["mlp_ratio"]),
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "initializer_range": 0.02,
            "max_position_embeddings": text["length"],
            "type_vocab_size": 2,
            "vocab_size": pairs.vocabulary_size(text),
        }

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        heads = (config.backbone or {})["heads"]
        return [f"backbone.heads={heads} is the usual one; change it if the model was made otherwise."]


def _objectives(width: int) -> dict[str, Any]:
    """Return the paper's four losses, see `recipes/uniter_base.yaml`."""
    own, tied = {"type": "head", "hidden": width}, {"type": "head", "hidden": width, "tied": True}
    see_regions = {"type": "fixed", "visible": {"text": 0.85, "regions": 1.0}, "hidden": "mix"}
    see_text = {"type": "fixed", "visible": {"text": 1.0, "regions": 0.85}, "hidden": "replace"}
    labels = {"at": "regions", "target": {"type": "soft_labels"}, "loss": "kl"}
    told = {"type": "reconstruct", "inputs": ["text", "regions"]}
    swap = {"of": "regions", "group": 8, "share": 0.5}
    return {
        "match": {
            "type": "match",
            "modalities": ["text", "regions"],
            "swap": swap,
            "pool": "first",
            "alignment": 0.1,
        },
        "words": {**told, "masking": see_regions, "decoder": tied, "targets": {"text": {"loss": "cross_entropy"}}},
        "features": {**told, "masking": see_text, "decoder": tied, "targets": {"regions": {"loss": "mse"}}},
        "labels": {**told, "masking": see_text, "decoder": own, "targets": {"region_labels": labels}},
    }


def _check(config: M3Config) -> dict[str, Any]:
    """Return the backbone with its defaults.

    Raises:
        M3Error: the model is no UNITER as its code has it.
    """
    objectives, modalities = config.objectives or {}, config.modalities or {}
    backbone = backbone_of(config, TITLE, free=(*STYLE, "mlp")).model_dump()
    is_known = all(backbone[name] == value for name, value in STYLE.items())
    is_known = is_known and backbone["mlp"] == "gelu" and backbone["norm_eps"] == EPS
    is_known = is_known and list(modalities)[:2] == ["text", "regions"]
    has_heads = set(objectives) == {"match", "words", "features", "labels"}
    is_known = is_known and (not objectives or (has_heads and objectives["match"].get("pool") == "first"))
    if not is_known or not modalities["regions"]["tokenizer"].get("mask_values"):
        raise M3Error(
            f"{TITLE} is one post-norm transformer of text, whose first token is [CLS], and regions with mask_values, "
            f"with class_tokens: 0, input_norm: modality, modality_embedding, and all four losses or none; this model "
            f"is another."
        )
    return backbone


def _words(text: dict[str, Any], has_heads: bool) -> list[Row]:
    """Rows of words and positions; the head that predicts words has the table a second time."""
    words, *rest = text_rows("uniter.embeddings", text, has_heads)
    return [_twice(words, "cls.predictions.decoder.weight") if has_heads else words, *rest]


def _projection(has_heads: bool) -> list[Row]:
    """Rows of the projection of features, which the head that predicts them has a second time."""
    weight, bias = same(f"{IMAGES}.img_linear", "tokenizers.regions.projection")
    return [_twice(weight, "feat_regress.weight") if has_heads else weight, bias]


def _twice(row: Row, again: str) -> Row:
    """Return a row of a tensor that they save under a second name too."""

    def read(x: list[Tensor]) -> list[Tensor]:
        if not torch.equal(x[0], x[1]):
            raise M3Error(f"`{again}` is not `{row.theirs[0]}`, to which it is tied; the file is damaged.")
        return row.read(x[:1])

    def write(x: list[Tensor]) -> list[Tensor]:
        (found,) = row.write(x)
        return [found, found]

    return Row((*row.theirs, again), row.ours, read, write)


def _types() -> Row:
    """Row of the marks of texts and regions."""
    ours = ("modality_embeddings.text", "modality_embeddings.regions")
    theirs = ("uniter.embeddings.token_type_embeddings.weight",)
    return Row(theirs, ours, lambda x: [x[0][:1].clone(), x[0][1:].clone()], lambda x: [torch.cat(x)])


def _mask() -> Row:
    """Row of the features of hidden regions; their first row is zero, for those that are seen."""

    def write(x: list[Tensor]) -> list[Tensor]:
        return [torch.cat([torch.zeros_like(x[0]), x[0]])]

    ours = ("tokenizers.regions.mask_values",)
    return Row((f"{IMAGES}.mask_embedding.weight",), ours, lambda x: [x[0][1:].clone()], write)


def _unused(ours: str, width: int, values: int) -> list[Row]:
    """Rows of a tokenizer that only cuts targets and embeds nothing."""
    shapes = {"projection.weight": (width, values), "projection.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}

    def row(name: str, shape: tuple[int, ...]) -> Row:
        return Row((), (f"{ours}.{name}",), lambda x: [torch.zeros(shape)], lambda x: [])

    return [row(name, shape) for name, shape in shapes.items()]
