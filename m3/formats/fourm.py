"""4M (apple/ml-4m): one encoder and one decoder of many modalities; what is read are pixels and maps of codes.

    mask_token, encoder_embeddings.M.(mod_emb, pos_emb, proj or token_emb), encoder.N.(norm1, attn, norm2, mlp),
    encoder_norm, decoder_proj_context, decoder_embeddings.M.(mod_emb, pos_emb, token_emb, to_logits),
    decoder.N.(norm1, self_attn, query_norm, context_norm, cross_attn, norm2, mlp), decoder_norm

Its config is `config.json`, or the metadata of the one file, as text. A modality keeps its name, `tok_rgb@224`.
Sequences (captions, boxes ...) share a vocabulary with the sentinels in its midst, which ours can't say: they stay
behind, and the rest is the model without them. Letters: D width, n places, K codes, h, w patch.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from m3.backbone import BackboneSpec
from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, backbone_of, get
from m3.foreign.rows import Left, Row, computed, same, shaped, zeros
from m3.parts import build_spec

SEQUENCES = r"(?:caption|det|metadata|human_poses|color_palette|sam_instance|t5_caption)(?:@\d+)?"
OBJECTIVE = "objectives.translate"
ENCODER = {"attn.qkv": "attention.qkv", "attn.proj": "attention.projection"}
DECODER = {
    "self_attn.qkv": "self_attention.qkv",
    "self_attn.proj": "self_attention.projection",
    "cross_attn.q": "cross_attention.q",
    "cross_attn.kv": "cross_attention.kv",
    "cross_attn.proj": "cross_attention.projection",
}


class Fourm(Format):
    """4M's own code."""

    title = "4M"
    left = (Left(rf"(encoder|decoder)_embeddings\.{SEQUENCES}\..*", "a sequence, whose vocabulary ours can't say"),)

    def tidy(self, foreign: Foreign) -> Foreign:
        """Give shared tensors, which are saved once, both names."""
        pairs = []
        for name in foreign.shapes:
            if match := re.fullmatch(r"(en|de)coder_embeddings\.(.+)\.mod_emb", name):
                other = {"en": "de", "de": "en"}[match[1]]
                if any(n.startswith(f"{other}coder_embeddings.{match[2]}.") for n in foreign.shapes):
                    pairs.append((f"{other}coder_embeddings.{match[2]}.mod_emb", name))
            if match := re.fullmatch(r"(decoder_embeddings\..+)\.(token_emb|to_logits)\.weight", name):
                other = {"token_emb": "to_logits", "to_logits": "token_emb"}[match[2]]
                pairs.append((f"{match[1]}.{other}.weight", name))
        missing = {new: old for new, old in pairs if new not in foreign.shapes}
        return foreign.with_aliases(missing) if missing else foreign

    def fits(self, foreign: Foreign) -> bool:
        """Know it by the layer between encoder and decoder, and the norm behind the encoder."""
        return {"decoder_proj_context.weight", "encoder_norm.weight", "mask_token"} <= foreign.shapes.keys()

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read its config and the sizes off the shapes; budgets and mixture are those of the paper.

        Raises:
            M3Error: it predicts what it does not read.
        """
        shapes, theirs = foreign.shapes, {name: _value(x) for name, x in foreign.settings.items()}
        inputs, outputs = (_modalities(foreign, f"{part}_embeddings") for part in ("encoder", "decoder"))
        if strange := [name for name in outputs if name not in inputs]:
            raise M3Error(f"it predicts `{strange[0]}`, which it does not read; ours reads all that it predicts.")
        modalities = {name: _modality(foreign, name) for name in inputs}
        width = shapes["mask_token"][2]
        hidden, is_gated = shapes["encoder.0.mlp.fc1.weight"][0], "encoder.0.mlp.fc3.weight" in shapes
        backbone = {
            "width": width,
            "depth": foreign.count(r"encoder\.(\d+)\."),
            "heads": get(given, "backbone.heads", theirs.get("num_heads", width // 64)),
            "mlp_ratio": _ratio(hidden, width, is_gated),
            "class_tokens": 0,
            "axis_order": "yx",
            "modality_embedding": True,
            "mlp": "swiglu" if is_gated else "gelu",
            "bias": "encoder.0.attn.qkv.bias" in shapes,
            "qk_norm": "encoder.0.attn.q_norm.weight" in shapes,
        }
        component = {"inputs": 0.5, "targets": dict.fromkeys(outputs, 0.5)}
        masking = {"type": "budget", "visible": 128, "targets": 128, "mixture": [component]}
        translate = {"type": "translate", "modalities": tuple(inputs), "outputs": tuple(outputs), "masking": masking}
        translate["depth"] = foreign.count(r"decoder\.(\d+)\.")
        return {"modalities": modalities, "backbone": backbone, "objectives": {"translate": translate}}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of embeddings, encoder and decoder."""
        settings, spec = self._settings(config)
        width = spec.width
        rows = [shaped("mask_token", f"{OBJECTIVE}.mask_token", (1, 1, width), (1, width))]
        rows += same("decoder_proj_context", f"{OBJECTIVE}.context")
        for name in config.modalities or {}:
            rows += _input_rows(config, name, spec.width, name in settings.outputs)
        for name in settings.outputs:
            theirs, ours = f"decoder_embeddings.{name}", f"{OBJECTIVE}.places.{name}"
            rows += [
                _places(config, f"{theirs}.pos_emb", ours, name, width),
                _tied(theirs, f"{OBJECTIVE}.heads.{name}"),
            ]
        norms = _norms(spec)
        for n in range(spec.depth):
            rows += _block(f"encoder.{n}", f"backbone.blocks.{n}", ENCODER, spec)
        rows += norms("encoder_norm", "backbone.norm")
        for n in range(settings.depth or spec.depth):
            theirs, ours = f"decoder.{n}", f"{OBJECTIVE}.decoder.blocks.{n}"
            rows += _block(theirs, ours, DECODER, spec)
            rows += norms(f"{theirs}.query_norm", f"{ours}.query_norm")
            rows += norms(f"{theirs}.context_norm", f"{ours}.context_norm")
        return rows + norms("decoder_norm", f"{OBJECTIVE}.decoder.norm")

    def _settings(self, config: M3Config) -> tuple[Any, BackboneSpec]:
        """Return the objective's settings, with its outputs, and the backbone's.

        Raises:
            M3Error: the model is not one of 4M's.
        """
        entry = get(config.objectives or {}, "translate", {})
        if list(config.objectives or {}) != ["translate"] or not entry.get("outputs"):
            raise M3Error(f"{self.title} is one objective `translate` that names its `outputs`.")
        backbone = config.backbone or {}
        free = {name: backbone.get(name, default) for name, default in (("bias", True), ("qk_norm", False))}
        mlp = backbone.get("mlp", "gelu")
        if mlp not in ("gelu", "swiglu"):
            raise M3Error(f"backbone.mlp is {mlp}, and {self.title} knows gelu and swiglu.")
        wanted = {"class_tokens": 0, "axis_order": "yx", "modality_embedding": True, "final_norm": True, "mlp": mlp}
        spec = backbone_of(config, self.title, **wanted, **free)
        return build_spec("objectives", entry, OBJECTIVE)[1], spec

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return its `config.json`."""
        settings, spec = self._settings(config)
        return {
            "domains_in": list(config.modalities or {}),
            "domains_out": list(settings.outputs),
            "image_size": 224,
            "patch_size": 16,
            "norm_bias": spec.bias,
            "act_layer": "SiLU" if spec.mlp == "swiglu" else "GELU",
            "dim": spec.width,
            "encoder_depth": spec.depth,
            "decoder_depth": settings.depth or spec.depth,
            "num_heads": spec.heads,
            "mlp_ratio": spec.mlp_ratio,
            "qkv_bias": spec.bias,
            "proj_bias": spec.bias,
            "mlp_bias": spec.bias,
            "gated_mlp": spec.mlp == "swiglu",
            "qk_norm": spec.qk_norm,
            "share_modality_embeddings": True,
        }

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what stays behind, and what no tensor tells."""
        heads = (config.backbone or {})["heads"]
        said = ["sequences (captions, boxes ...) are left out; predictions are those of the model without them."]
        return said if "num_heads" in foreign.settings else [*said, f"backbone.heads={heads} gives heads of width 64."]


def _value(text: Any) -> Any:
    """Read a setting that is kept as text: a literal of Python or JSON, as data; what is neither stays text."""
    if not isinstance(text, str):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _modalities(foreign: Foreign, part: str) -> list[str]:
    """Return the names of one side's modalities that are no sequences."""
    names = dict.fromkeys(name.split(".")[1] for name in foreign.shapes if name.startswith(f"{part}."))
    return [name for name in names if not re.fullmatch(SEQUENCES, name)]


def _modality(foreign: Foreign, name: str) -> dict[str, Any]:
    """Return our settings of one of its inputs: pixels, or codes on a grid."""
    theirs = f"encoder_embeddings.{name}"
    table = foreign.tensors[f"{theirs}.pos_emb"]
    count, width = table.shape[1:]
    side = isqrt(count)
    fixed = side * side == count and width % 4 == 0
    fixed = fixed and torch.allclose(table.float(), _table((side, side), width), rtol=0, atol=1e-5)
    tokens = (side, side) if fixed else (count, 1)
    learned = {} if fixed else {"positions": {"type": "learned"}}
    values = foreign.shapes.get(f"{theirs}.proj.weight")
    if values is None:
        classes = foreign.shapes[f"{theirs}.token_emb.weight"][0]
        codes = {"type": "semantic_map", "size": tokens, "classes": classes, "tokenizer": {"type": "embedding"}}
        return codes | learned
    patch = isqrt(values[1] // 3)
    if patch * patch * 3 != values[1] or not fixed:
        raise M3Error(f"`{theirs}` is not of square patches of three channels with fixed positions; it can't be read.")
    return {"type": "image", "size": side * patch, "channels": 3, "tokenizer": {"type": "patch", "size": patch}}


def _ratio(hidden: int, width: int, is_gated: bool) -> float:
    """Return `mlp_ratio`, four wherever that gives the hidden width."""
    for ratio in (4.0, hidden / width * (1.5 if is_gated else 1.0)):
        made = int(width * ratio)
        if (int(2 * made / 3) if is_gated else made) == hidden:
            return ratio
    raise M3Error(f"no mlp_ratio gives the {hidden} hidden channels of the MLP beside a width of {width}.")


def _table(tokens: tuple[int, ...], width: int) -> Tensor:
    return vision.table_of({"axis_order": "yx"}, tokens, width, 0)


def _places(config: M3Config, theirs: str, ours: str, name: str, width: int) -> Row:
    """Row of the positions of a modality."""
    entry = (config.modalities or {})[name]
    if entry["type"] == "image":
        tokens = vision.cut_of(config, name).tokens
    else:
        tokens = (entry["size"],) * 2 if isinstance(entry["size"], int) else tuple(entry["size"])
    if entry.get("positions", {}).get("type") == "learned":
        return vision.learned(theirs, f"{ours}.table", tokens)
    return computed(theirs, _table(tokens, width))


def _input_rows(config: M3Config, name: str, width: int, is_output: bool) -> list[Row]:
    theirs, ours = f"encoder_embeddings.{name}", f"tokenizers.{name}"
    embedding = f"modality_embeddings.{name}"
    rows = [_places(config, f"{theirs}.pos_emb", f"positions.{name}", name, width)]
    if is_output:
        rows.append(_shared(f"{theirs}.mod_emb", f"decoder_embeddings.{name}.mod_emb", embedding))
    else:
        rows.append(shaped(f"{theirs}.mod_emb", embedding, (1, 1, width), (1, width)))
    if (config.modalities or {})[name]["type"] != "image":
        return [*rows, Row((f"{theirs}.token_emb.weight",), (f"{ours}.table.weight",))]
    cut = vision.cut_of(config, name)
    order = vision.values_order(cut.patch, cut.channels)

    def columns(index: Tensor) -> Callable[[list[Tensor]], list[Tensor]]:
        return lambda x: [x[0][:, index]]

    weight = Row(
        (f"{theirs}.proj.weight",), (f"{ours}.projection.weight",), columns(order), columns(torch.argsort(order))
    )
    return [*rows, weight, zeros(f"{ours}.projection.bias", (width,))]


def _both(names: tuple[str, str], x: list[Tensor]) -> Tensor:
    """Return the one tensor that goes by two names."""
    if not torch.equal(x[0], x[1]):
        raise M3Error(f"`{names[0]}` and `{names[1]}` are different, and one tensor here.")
    return x[0]


def _shared(one: str, two: str, ours: str) -> Row:
    """Row of the embedding of a modality, which encoder and decoder share."""
    return Row((one, two), (ours,), lambda x: [_both((one, two), x)[0]], lambda x: [x[0][None], x[0][None].clone()])


def _tied(theirs: str, ours: str) -> Row:
    """Row of a modality's head; its embedding in the decoder, which maps of codes never look up, is the same."""
    names = (f"{theirs}.token_emb.weight", f"{theirs}.to_logits.weight")
    return Row(names, (f"{ours}.weight",), lambda x: [_both(names, x)], lambda x: [x[0], x[0].clone()])


def _norms(spec: BackboneSpec) -> Callable[[str, str], list[Row]]:
    """Return what makes the rows of a norm; without a bias theirs saves zeros in its place."""

    def rows(theirs: str, ours: str, width: int = spec.width) -> list[Row]:
        if spec.bias:
            return same(theirs, ours)

        def read(x: list[Tensor]) -> list[Tensor]:
            if x[0].any():
                raise M3Error(f"`{theirs}.bias` is not 0, in a model without biases.")
            return []

        return [*same(theirs, ours, ("weight",)), Row((f"{theirs}.bias",), (), read, lambda x: [torch.zeros(width)])]

    return rows


def _block(theirs: str, ours: str, attention: dict[str, str], spec: BackboneSpec) -> list[Row]:
    parts = ("weight", "bias") if spec.bias else ("weight",)
    norms: Any = _norms(spec)
    layers = {f"mlp.{n}": f"mlp.{n}" for n in ("fc1", "fc2", *(["fc3"] if spec.mlp == "swiglu" else []))}
    rows = [row for one, two in (attention | layers).items() for row in same(f"{theirs}.{one}", f"{ours}.{two}", parts)]
    rows += norms(f"{theirs}.norm1", f"{ours}.norm1") + norms(f"{theirs}.norm2", f"{ours}.norm2")
    if spec.qk_norm:
        for one, two in ((a.split(".")[0], b.split(".")[0]) for a, b in attention.items() if a.endswith("proj")):
            for norm in ("q_norm", "k_norm"):
                rows += norms(f"{theirs}.{one}.{norm}", f"{ours}.{two}.{norm}", spec.width // spec.heads)
    return rows
