"""4M (apple/ml-4m): one encoder and one decoder of many modalities: pixels, maps of codes and sequences of words.

    mask_token, encoder_embeddings.M.(mod_emb, pos_emb, proj or token_emb), encoder.N.(norm1, attn, norm2, mlp),
    encoder_norm, decoder_proj_context, decoder_embeddings.M.(mod_emb, pos_emb, token_emb, to_logits),
    decoder.N.(norm1, self_attn, query_norm, context_norm, cross_attn, norm2, mlp), decoder_norm

Its config is `config.json`, or the metadata of the one file, as text. A modality keeps its name, `tok_rgb@224`.
`modalities=rgb,tok_depth` takes some of its modalities alone (what each is: `m3/foreign/fourm.py`). TerraMind, a fork,
has the same names and pixels of more channels. Letters: D width, n places, K codes, h, w patch.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m3.backbone import BackboneSpec
from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import fourm, vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, backbone_of, get
from m3.foreign.rows import Left, Row, computed, one, padded, same, shaped, zeros
from m3.parts import build_spec

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
    is_divisible = True

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
            M3Error: a modality does not fit.
        """
        shapes, theirs = foreign.shapes, {name: _value(x) for name, x in foreign.settings.items()}
        taken = fourm.chosen(foreign, given.get("chosen"))
        outputs = [name for name in fourm.names_of(foreign, "decoder") if name in taken]
        modalities = {name: fourm.modality_of(foreign, name, given) for name in taken}
        if not outputs:
            raise M3Error("none of `modalities` is one that it predicts; add one of its codes or sequences.")
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
        translate = {"type": "translate", "modalities": tuple(taken), "outputs": tuple(outputs), "masking": masking}
        translate["depth"] = foreign.count(r"decoder\.(\d+)\.")
        if any(entry["type"] == "text" for entry in modalities.values()):
            masking["counted"] = True
            heads = [f"decoder_embeddings.{name}" for name in outputs if modalities[name]["type"] == "text"]
            translate["tied"] = all(_is_tied(foreign, head) for head in heads)
        return {"modalities": modalities, "backbone": backbone, "objectives": {"translate": translate}}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of embeddings, encoder and decoder."""
        settings, spec = self._settings(config)
        width = spec.width
        rows = [shaped("mask_token", f"{OBJECTIVE}.mask_token", (1, 1, width), (1, width))]
        if all(_is_text(config, name) for name in settings.outputs):
            rows = [computed("mask_token", torch.zeros(1, 1, width))]
        rows += same("decoder_proj_context", f"{OBJECTIVE}.context")
        for name in config.modalities or {}:
            rows += _input_rows(config, name, spec.width, name in settings.outputs)
        for name in settings.outputs:
            theirs, ours = f"decoder_embeddings.{name}", f"{OBJECTIVE}.places.{name}"
            rows.append(_places(config, f"{theirs}.pos_emb", ours, name, width))
            rows += _head_rows(theirs, name, _is_text(config, name), settings.tied)
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

    def left_out(self, foreign: Foreign, config: M3Config) -> list[Left]:
        """Name the modalities that are not taken."""
        bad, gone = fourm.obstacles(foreign), []
        for name in dict.fromkeys([*fourm.names_of(foreign, "encoder"), *fourm.names_of(foreign, "decoder")]):
            if name not in (config.modalities or {}):
                gone.append(
                    Left(rf"(en|de)coder_embeddings\.{re.escape(name)}\..*", bad.get(name, "it was not chosen"))
                )
        return gone

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells, and what is not read."""
        said, modalities = [], config.modalities or {}
        if "num_heads" not in foreign.settings:
            said.append(f"backbone.heads={(config.backbone or {})['heads']} gives heads of width 64.")
        nameless = [n for n, x in modalities.items() if x["type"] == "text" and x["vocabulary"].startswith("words:")]
        if nameless:
            said.append(
                f"{', '.join(nameless)}: words are numbers of entries, as the file has no vocabulary; give "
                f"modalities.{nameless[0]}.vocabulary=TOKENIZER.json for each."
            )
        said += [
            f"{name}: mean and std of its {x['channels']} channels are not in the file; give them in modalities.{name}."
            for name, x in modalities.items()
            if x["type"] == "image" and x["channels"] != 3
        ]
        for name in get(config.objectives or {}, "translate.outputs", ()):
            theirs = f"decoder_embeddings.{name}"
            if not _is_text(config, name) and not _is_tied(foreign, theirs):
                said.append(f"{theirs}.token_emb is another than its head; no prediction reads it, so it is left out.")
        return said


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


def _is_text(config: M3Config, name: str) -> bool:
    return (config.modalities or {})[name]["type"] == "text"


def _is_tied(foreign: Foreign, theirs: str) -> bool:
    """True where the embedding of words in the decoder is the head."""
    return torch.equal(*(foreign.tensors[f"{theirs}.{part}.weight"] for part in ("token_emb", "to_logits")))


def _ratio(hidden: int, width: int, is_gated: bool) -> float:
    """Return `mlp_ratio`, four wherever that gives the hidden width."""
    for ratio in (4.0, hidden / width * (1.5 if is_gated else 1.0)):
        made = int(width * ratio)
        if (int(2 * made / 3) if is_gated else made) == hidden:
            return ratio
    raise M3Error(f"no mlp_ratio gives the {hidden} hidden channels of the MLP beside a width of {width}.")


def _places(config: M3Config, theirs: str, ours: str, name: str, width: int) -> Row:
    """Row of the positions of a modality."""
    entry = (config.modalities or {})[name]
    if entry["type"] == "text":
        return computed(theirs, fourm.row_table(width))
    if entry["type"] == "image":
        tokens = vision.cut_of(config, name).tokens
    else:
        tokens = (entry["size"],) * 2 if isinstance(entry["size"], int) else tuple(entry["size"])
    if entry.get("positions", {}).get("type") == "learned":
        return vision.learned(theirs, f"{ours}.table", tokens)
    return computed(theirs, fourm.square_table(tokens, width))


def _input_rows(config: M3Config, name: str, width: int, is_output: bool) -> list[Row]:
    theirs, ours = f"encoder_embeddings.{name}", f"tokenizers.{name}"
    embedding = f"modality_embeddings.{name}"
    rows = [_places(config, f"{theirs}.pos_emb", f"positions.{name}", name, width)]
    if is_output:
        rows.append(_shared(f"{theirs}.mod_emb", f"decoder_embeddings.{name}.mod_emb", embedding))
    else:
        rows.append(shaped(f"{theirs}.mod_emb", embedding, (1, 1, width), (1, width)))
    if _is_text(config, name):
        return [*rows, padded(f"{theirs}.token_emb.weight", f"{ours}.table.weight")]
    if (config.modalities or {})[name]["type"] != "image":
        return [*rows, one(f"{theirs}.token_emb.weight", f"{ours}.table.weight")]
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


def _head_rows(theirs: str, name: str, is_text: bool, is_tied: bool) -> list[Row]:
    """Rows of a modality's head, and of its embedding in the decoder, which only sequences look up."""
    names, head = (f"{theirs}.token_emb.weight", f"{theirs}.to_logits.weight"), f"{OBJECTIVE}.heads.{name}.weight"
    words = f"{OBJECTIVE}.words.{name}.weight"
    if is_text and not is_tied:
        return [one(names[0], words), one(names[1], head)]
    return [Row(names, (words if is_text else head,), lambda x: [x[1]], lambda x: [x[0], x[0].clone()])]


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
