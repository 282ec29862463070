"""MultiMAE (EPFL-VILAB/MultiMAE): several kinds of maps, one encoder, a decoder for each target.

    global_tokens,
    input_adapters.(rgb, depth, semseg).(pos_emb, class_emb, proj), encoder.N.(as timm's blocks),
    output_adapters.(rgb, depth, semseg, norm_rgb).(mask_token, pos_emb, task_embeddings.(rgb, depth, semseg),
    proj_context, query_norm, context_norm, decoder.(q, kv, proj), out_norm, mlp, decoder_transformer.N, out_proj)

Its twin in timm's names, of the pictures alone, is read by the format `vit`.
Letters: D width, E width of a class embedding, h, w patch, K classes, N tokens.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, backbone_of, get, heads_of, ratio_of
from m3.foreign.rows import Left, Row, computed, one, permuted, same, shaped, zeros
from m3.heads import CrossDecoder
from m3.parts import build_spec

NAMES = {"rgb": "image", "depth": "depth", "semseg": "semantic"}
"""Their modalities -> ours; the same names for targets, beside `norm_rgb`."""
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "rgb": ("image", {"loss": "mse"}),
    "norm_rgb": ("image_normalised", {"of": "image", "target": {"type": "values", "normalise": True}, "loss": "mse"}),
    "depth": ("depth", {"loss": "l1"}),
    "semseg": ("semantic", {"loss": "cross_entropy"}),
}
INNER = {
    "proj_context": "context",
    "query_norm": "query_norm",
    "context_norm": "context_norm",
    "decoder.q": "attention.q",
    "decoder.kv": "attention.kv",
    "decoder.proj": "attention.projection",
    "out_norm": "norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
UNIT = 2.0**-16
"""Of its depth files."""


class Multimae(Format):
    """MultiMAE's own code."""

    title = "MultiMAE"
    left = (Left(r"output_adapters\.cls\..*", "a classifier of the task it was tuned for"),)

    def fits(self, foreign: Foreign) -> bool:
        """Know it by the adapters and the blocks right under `encoder`."""
        is_fed = any(name.startswith("input_adapters.") for name in foreign.shapes)
        return is_fed and {"global_tokens", "encoder.0.attn.qkv.weight"} <= foreign.shapes.keys()

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes; heads, masks and losses are those of the paper.

        Raises:
            M3Error: it has a modality that is none of the paper's, or learned positions.
        """
        shapes = foreign.shapes
        inputs = _names(foreign, "input_adapters", "proj.weight", tuple(NAMES))
        outputs = _names(foreign, "output_adapters", "mask_token", tuple(TARGETS))
        modalities = {NAMES[name]: self._modality(foreign, name) for name in NAMES if name in inputs}
        _, count, width = shapes["global_tokens"]
        backbone = {
            "width": width,
            "depth": foreign.count(r"encoder\.(\d+)\."),
            "heads": heads_of(width, get(given, "backbone.heads"), "backbone.heads"),
            "mlp_ratio": ratio_of(shapes["encoder.0.mlp.fc1.weight"][0], width),
            "class_tokens": count,
            "final_norm": False,
            "axis_order": "yx",
        }
        sections = {"modalities": modalities, "backbone": backbone, "objectives": {}}
        if not outputs:
            return sections
        if not {NAMES.get(name, "image") for name in outputs} <= modalities.keys():
            raise M3Error("it predicts a modality that it does not read, of which nothing tells the size.")
        theirs = f"output_adapters.{outputs[0]}."
        decoder: dict[str, Any] = {"type": "cross_decoder", "width": shapes[f"{theirs}mask_token"][2]}
        decoder["depth"] = foreign.count(rf"{theirs}decoder_transformer\.(\d+)\.")
        decoder["heads"] = get(given, "objectives.reconstruct.decoder.heads", 8)
        tokens = sum(prod(shapes[f"input_adapters.{name}.pos_emb"][2:]) for name in inputs)
        reconstruct: dict[str, Any] = {"type": "reconstruct", "decoder": decoder, "average": "sample"}
        reconstruct["masking"] = {"type": "dirichlet", "visible": max(1, tokens // 6), "alpha": 1.0}
        reconstruct["targets"] = dict(TARGETS[name] for name in TARGETS if name in outputs)
        return sections | {"objectives": {"reconstruct": reconstruct}}

    def _modality(self, foreign: Foreign, name: str) -> dict[str, Any]:
        """Return our settings of one of their inputs."""
        theirs = f"input_adapters.{name}."
        width, channels, *patch = foreign.shapes[f"{theirs}proj.weight"]
        _, _, *tokens = foreign.shapes[f"{theirs}pos_emb"]
        fixed = _table((tokens[0], tokens[1]), width)
        if not torch.allclose(foreign.tensors[f"{theirs}pos_emb"].float(), fixed, rtol=0, atol=1e-5):
            raise M3Error(f"`{theirs}pos_emb` is not the fixed sin-cos table of a square grid; it can't be read.")
        size = (tokens[0] * patch[0], tokens[1] * patch[1])
        tokenizer: dict[str, Any] = {"type": "patch", "size": tuple(patch)}
        if name == "rgb":
            return {"type": "image", "size": size, "channels": channels, "tokenizer": tokenizer}
        if name == "depth":
            return {"type": "depth", "size": size, "unit": UNIT, "normalise": "truncated", "tokenizer": tokenizer}
        tokenizer |= {"type": "class_patch", "class_width": channels}
        classes = foreign.shapes[f"{theirs}class_emb.weight"][0]
        return {"type": "semantic_map", "size": size, "classes": classes, "tokenizer": tokenizer}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of encoder and decoders."""
        prefix = (config.backbone or {}).get("class_tokens", 1)
        spec = backbone_of(config, self.title, final_norm=False, axis_order="yx")
        if not prefix or not set(config.modalities or {}) <= set(NAMES.values()):
            raise M3Error(f"{self.title} has global tokens and reads {', '.join(NAMES.values())} under these names.")
        cuts = {name: cut for name in NAMES if (cut := _cut(config, name))}
        rows = [shaped("global_tokens", "backbone.prefix", (1, prefix, spec.width), (prefix, spec.width))]
        for name, cut in cuts.items():
            rows += _input_rows(config, name, cut, spec.width)
        rows += _blocks("encoder.{}", "backbone.blocks.{}", spec.depth)
        if not config.objectives:
            return rows
        settings = get(config.objectives, "reconstruct", {})
        targets = settings.get("targets", {})
        if list(config.objectives) != ["reconstruct"] or not set(targets) <= {own for own, _ in TARGETS.values()}:
            wanted = ", ".join(own for own, _ in TARGETS.values())
            raise M3Error(f"{self.title} is one objective `reconstruct` of the targets {wanted}.")
        inputs = settings.get("inputs") or list(config.modalities or {})
        for name, (own, _) in TARGETS.items():
            if own in targets:
                decoder = targets[own].get("decoder") or settings.get("decoder", {})
                rows += _output_rows(config, name, cuts[_source(name)], _decoder_spec(decoder, own), inputs)
        return rows

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        return [
            f"backbone.heads={(config.backbone or {})['heads']} and 8 heads in the decoders are the usual ones; the "
            f"masks, losses and the unit of depth files (2^-16) are those of the paper."
        ]


def _names(foreign: Foreign, part: str, sign: str, known: tuple[str, ...]) -> list[str]:
    """Return the adapters that have a tensor of this name."""
    found = [n.split(".")[1] for n in foreign.shapes if n.startswith(f"{part}.") and n.endswith(f".{sign}")]
    found = [name for name in dict.fromkeys(found) if f"{part}.{name}.{sign}" in foreign.shapes]
    strange = [name for name in found if name not in known]
    if strange:
        raise M3Error(f"`{part}.{strange[0]}` is of a modality that is not one of {', '.join(known)}.")
    return found


def _source(name: str) -> str:
    """Return the input that a target of theirs belongs to."""
    return "rgb" if name == "norm_rgb" else name


def _cut(config: M3Config, name: str) -> vision.Cut | None:
    if NAMES[name] not in (config.modalities or {}):
        return None
    cut = vision.cut_of(config, NAMES[name], "class_patch" if name == "semseg" else "patch")
    if cut.positions != "sincos" or cut.tokens[0] != cut.tokens[1]:
        raise M3Error("MultiMAE has fixed sin-cos positions, and square grids.")
    return cut


def _table(tokens: tuple[int, ...], width: int) -> Tensor:
    """Return its positions (1, D, rows, columns); the first channels encode the row."""
    flat = vision.table_of({"axis_order": "yx"}, tokens, width, 0)
    return flat.transpose(1, 2).reshape(1, width, *tokens)


def _decoder_spec(settings: dict[str, Any], target: str) -> CrossDecoder.Spec:
    if settings.get("type") != "cross_decoder":
        raise M3Error(f"the decoder of `{target}` must be a `cross_decoder`.")
    return build_spec("decoders", settings, f"objectives.reconstruct.targets.{target}.decoder")[1]  # type: ignore[return-value]


def _input_rows(config: M3Config, name: str, cut: vision.Cut, width: int) -> list[Row]:
    theirs, ours = f"input_adapters.{name}", f"tokenizers.{NAMES[name]}"
    rows = [computed(f"{theirs}.pos_emb", _table(cut.tokens, width))]
    if name != "semseg":
        return rows + vision.patches(f"{theirs}.proj", f"{ours}.projection", width, (cut.channels, *cut.patch))
    inner = get(config.modalities or {}, "semantic.tokenizer.class_width", 64)
    kernel = (*cut.patch, inner)

    def read(x: list[Tensor]) -> list[Tensor]:  # (D, E, h, w) -> (D, h w E)
        return [x[0].permute(0, 2, 3, 1).reshape(width, -1)]

    def write(x: list[Tensor]) -> list[Tensor]:
        return [x[0].reshape(width, *kernel).permute(0, 3, 1, 2)]

    return [
        *rows,
        one(f"{theirs}.class_emb.weight", f"{ours}.class_embedding.weight"),
        Row((f"{theirs}.proj.weight",), (f"{ours}.projection.weight",), read, write),
        one(f"{theirs}.proj.bias", f"{ours}.projection.bias"),
    ]


def _output_rows(
    config: M3Config, name: str, cut: vision.Cut, decoder: CrossDecoder.Spec, inputs: list[str]
) -> list[Row]:
    theirs, ours = f"output_adapters.{name}", f"objectives.reconstruct.decoders.{TARGETS[name][0]}"
    width, source = decoder.width, _source(name)
    rows = [
        shaped(f"{theirs}.mask_token", f"{ours}.mask_token", (1, 1, width), (1, width)),
        computed(f"{theirs}.pos_emb", _table(cut.tokens, width)),
    ]
    for task, own in NAMES.items():
        place = f"{ours}.modality_embeddings.{own}"
        if own in inputs:
            rows.append(shaped(f"{theirs}.task_embeddings.{task}", place, (1, 1, width), (1, width)))
        elif task == source:
            rows.append(zeros(place, (1, width)))
    for their_name, our_name in INNER.items():
        rows += same(f"{theirs}.{their_name}", f"{ours}.{our_name}")
    rows += _blocks(f"{theirs}.decoder_transformer.{{}}", f"{ours}.blocks.{{}}", decoder.depth)
    if name != "semseg":  # (channel, row, column) in both
        return rows + same(f"{theirs}.out_proj", f"{ours}.output")
    classes = (config.modalities or {})["semantic"]["classes"]
    order = torch.arange(classes * prod(cut.patch)).reshape(classes, -1).t().flatten()  # theirs: class first
    return rows + [permuted(f"{theirs}.out_proj.{part}", f"{ours}.output.{part}", order) for part in ("weight", "bias")]


def _blocks(theirs: str, ours: str, depth: int) -> list[Row]:
    return [*vision.blocks(theirs, ours, depth, vision.TIMM), *vision.fused(f"{theirs}.attn.qkv", ours, depth)]
