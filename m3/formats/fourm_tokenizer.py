"""4M's tokenizers: a ViT, a codebook of unit vectors, and a ViT or a diffusion model back (VQ, VQVAE, DiVAE).

    cls_emb, encoder.(pos_emb, proj, blocks.N, norm_mlp, post_mlp), quant_proj, quantize._codebook.(initted,
    cluster_size, embed, embed_avg), post_quant_proj, decoder.(pos_emb, blocks.N, norm_mlp, post_mlp, out_proj)

Of a diffusion model, and of any decoder that is not the encoder's mirror, nothing is taken: codes can be made, not
decoded. No norm stands behind the blocks; `norm_mlp` belongs to the MLP with tanh. Codes are moving averages of unit
vectors: the nearest is found by angle, and they enter the decoder as they are, shorter than 1.
Letters: D width, C channels, E width of a class embedding, K codes, d their width, h, w patch.
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
from m3.foreign.rows import Left, Row, computed, one, permuted, same, shaped
from m3.parts import build_spec

OURS = "objectives.autoencode"
BOOK = "quantize._codebook"
MLP = {"norm_mlp": "norm", "post_mlp.fc1": "mlp.fc1", "post_mlp.fc2": "mlp.fc2"}
NAMES = {1: "depth", 3: "image"}
"""Channels -> type and name of the modality; of others `features`, a map of numbers that are given as they are."""


class FourmTokenizer(Format):
    """4M's VQ, VQVAE and DiVAE with a ViT as encoder."""

    title = "4M's tokenizer"

    def fits(self, foreign: Foreign) -> bool:
        """Know it by its codebook or, to say that they are not read, by the keys and values of "memcodes"."""
        names = foreign.shapes.keys()
        return {"quant_proj.weight", f"{BOOK}.embed"} <= names or {"quantize.codes", "quantize.to_k.weight"} <= names

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Read the sizes off the shapes; what kind of picture it is, only the channels tell.

        Raises:
            M3Error: its encoder is no ViT, or the parts do not go together.
        """
        shapes, settings = foreign.shapes, foreign.settings
        if "encoder.pos_emb" not in shapes or f"{BOOK}.embed" not in shapes:
            raise M3Error(
                "its codes are made by an MLP (poses, global features: memcodes), for which there is no tokenizer "
                "here; take one with a ViT, or give the codes themselves as a map."
            )
        width, *grid = shapes["encoder.pos_emb"][1:]
        name, modality = _modality(foreign, given, tuple(grid))
        backbone = {
            "width": width,
            "depth": foreign.count(r"encoder\.blocks\.(\d+)\."),
            "heads": heads_of(width, get(given, "backbone.heads"), "backbone.heads"),
            "mlp_ratio": ratio_of(shapes["encoder.blocks.0.mlp.fc1.weight"][0], width),
            "class_tokens": 0,
            "axis_order": "yx",
            "final_norm": False,
        }
        codes, latent = shapes[f"{BOOK}.embed"]
        quantiser = {"type": "vq", "codes": codes, "width": latent, "cosine": f"{BOOK}.embed_avg" not in shapes}
        for key, theirs in (("decay", "ema_decay"), ("commitment", "commitment_weight")):
            if settings.get(theirs) is not None:
                quantiser[key] = settings[theirs]
        tail = "mlp" if "encoder.norm_mlp.weight" in shapes else "none"
        depth = foreign.count(r"decoder\.blocks\.(\d+)\.") if _is_mirror(foreign, modality) else None
        coder = {"type": "vit", "depth": depth, "tail": tail}
        losses = {"semantic_map": "cross_entropy", "depth": "smooth_l1"}
        loss = losses.get(modality["type"], "smooth_l1" if name == "features" else "mse")
        objective = {"type": "autoencode", "of": name, "coder": coder, "quantiser": quantiser, "loss": loss}
        return {"modalities": {name: modality}, "backbone": backbone, "objectives": {"autoencode": objective}}

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of both sides and the codebook."""
        name, coder, quantiser = self._parts(config)
        spec = backbone_of(config, self.title, class_tokens=0, axis_order="yx", final_norm=False)
        is_map = _entry(config, name)["type"] == "semantic_map"
        cut = vision.cut_of(config, name, "class_patch" if is_map else "patch")
        table = _places(cut, "encoder.pos_emb", f"{OURS}.coder.positions.table", spec.width)
        rows = [table, *_input_rows(config, name, cut, spec.width)]
        rows += _blocks("encoder.blocks.{}", f"{OURS}.coder.encoder.blocks.{{}}", spec.depth)
        rows += _tail("encoder", f"{OURS}.coder.tail", coder.tail)
        kernel = (1, 1)
        rows += vision.patches("quant_proj", f"{OURS}.to_code", quantiser.width, (spec.width, *kernel))
        rows += _book_rows(quantiser.cosine)
        if coder.depth is None:
            return rows
        rows += vision.patches("post_quant_proj", f"{OURS}.from_code", spec.width, (quantiser.width, *kernel))
        rows.append(_places(cut, "decoder.pos_emb", f"{OURS}.coder.decoder_positions.table", spec.width))
        rows += _blocks("decoder.blocks.{}", f"{OURS}.coder.blocks.{{}}", coder.depth)
        rows += _tail("decoder", f"{OURS}.coder.norm", coder.tail)
        if not is_map:  # (channel, row, column) in both
            return rows + same("decoder.out_proj", f"{OURS}.output")
        classes = _entry(config, name)["classes"]
        order = torch.arange(classes * prod(cut.patch)).reshape(classes, -1).t().flatten()  # theirs: class first
        return rows + [permuted(f"decoder.out_proj.{x}", f"{OURS}.output.{x}", order) for x in ("weight", "bias")]

    def _parts(self, config: M3Config) -> tuple[str, Any, Any]:
        """Return the modality's name and the settings of coder and quantiser.

        Raises:
            M3Error: the model is no tokenizer of this kind.
        """
        entry = get(config.objectives or {}, "autoencode", {})
        coder, quantiser = entry.get("coder", {"type": "vit"}), entry.get("quantiser", {})
        if list(config.objectives or {}) != ["autoencode"] or (coder["type"], quantiser.get("type")) != ("vit", "vq"):
            raise M3Error(f"{self.title} is one objective `autoencode` with the coder `vit` and the quantiser `vq`.")
        coder = build_spec("coders", coder, f"{OURS}.coder")[1]
        quantiser = build_spec("quantisers", quantiser, f"{OURS}.quantiser")[1]
        if coder.tail == "norm" or quantiser.heads != 1:
            raise M3Error(
                f"{self.title} has no norm behind its blocks and one head; set coder.tail and quantiser.heads."
            )
        return entry["of"], coder, quantiser

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return its `config.json`, but for the names of its encoder and decoder where the size is not published."""
        name, coder, quantiser = self._parts(config)
        entry, spec = (
            _entry(config, name),
            backbone_of(config, self.title, class_tokens=0, axis_order="yx", final_norm=False),
        )
        is_map = entry["type"] == "semantic_map"
        cut = vision.cut_of(config, name, "class_patch" if is_map else "patch")
        has_patches = name != "features"
        sizes = {512: "s", 768: "b", 1024: "l"}
        letter = sizes.get(spec.width, "b")
        return {
            "image_size": cut.size[0] if has_patches else cut.size[0] * 16,
            "n_channels": entry["tokenizer"].get("class_width", 64) if is_map else cut.channels,
            "n_labels": entry["classes"] if is_map else None,
            "enc_type": f"vit_{letter}_enc",
            "dec_type": None if coder.depth is None else f"vit_{letter}_dec",
            "patch_proj": has_patches,
            "post_mlp": coder.tail == "mlp",
            "patch_size": cut.patch[0] if has_patches else 16,
            "quant_type": "lucid",
            "codebook_size": quantiser.codes,
            "latent_dim": quantiser.width,
            "norm_codes": quantiser.cosine,
            "ema_decay": quantiser.decay,
            "commitment_weight": quantiser.commitment,
        }

    def left_out(self, foreign: Foreign, config: M3Config) -> list[Left]:
        """Leave a decoder that ours can't hold."""
        if self._parts(config)[1].depth is not None:
            return []
        why = "a decoder that is not the encoder's mirror (a diffusion model); codes are made without it"
        return [Left(r"(decoder|post_quant_proj)\..*", why)]

    def notes(self, foreign: Foreign, config: M3Config) -> list[str]:
        """Say what no tensor tells."""
        name, coder, _ = self._parts(config)
        kind = _entry(config, name)["type"]
        said = (
            []
            if coder.depth is not None
            else ["it has no decoder here: `m3 tokenize` works, pictures of codes do not."]
        )
        if name == "features":
            said.append(
                "features: maps of numbers, which `M3Tokenizer.encode` takes as a tensor (B, C, rows, columns)."
            )
        elif kind != "semantic_map":
            more = " of -1 to 1" if kind == "image" else ""
            said.append(f"its channels are taken for `{kind}`{more}; for another give modalities.{name}.type=normals.")
        return said


def _entry(config: M3Config, name: str) -> dict[str, Any]:
    return (config.modalities or {})[name]


def _modality(foreign: Foreign, given: dict[str, Any], grid: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of what it reads."""
    _, channels, *patch = foreign.shapes["encoder.proj.weight"]
    size = tuple(count * extent for count, extent in zip(grid, patch, strict=True))
    places = foreign.tensors["encoder.pos_emb"]
    is_fixed = places.shape[1] % 4 == 0 and torch.allclose(
        places.float(), _table(grid, places.shape[1]), rtol=0, atol=1e-5
    )
    common: dict[str, Any] = {"size": size} | ({} if is_fixed else {"positions": {"type": "learned"}})
    if "cls_emb.weight" in foreign.shapes:
        labels, inner = foreign.shapes["cls_emb.weight"]
        tokenizer = {"type": "class_patch", "size": tuple(patch), "class_width": inner}
        return "semantic", {"type": "semantic_map", "classes": labels, "tokenizer": tokenizer} | common
    common["tokenizer"] = {"type": "patch", "size": tuple(patch)}
    name = "features" if prod(patch) == 1 else NAMES.get(channels, "image")
    kind = get(given, f"modalities.{name}.type", "image" if name == "features" else name)
    if kind != "image":
        return name, {"type": kind} | common
    scale = {"mean": (0.0,), "std": (1 / 255,)} if name == "features" else {"mean": (0.5,), "std": (0.5,)}
    scale = {key: value * channels for key, value in scale.items()}
    return name, {"type": "image", "channels": channels} | scale | common


def _is_mirror(foreign: Foreign, modality: dict[str, Any]) -> bool:
    """True for a decoder that is a ViT like the encoder and nothing more."""
    theirs = {name.removeprefix("decoder."): x for name, x in foreign.shapes.items() if name.startswith("decoder.")}
    own = {name.removeprefix("encoder."): x for name, x in foreign.shapes.items() if name.startswith("encoder.")}
    has_end = theirs.pop("out_proj.weight", None) and theirs.pop("out_proj.bias", None)
    if not has_end or "post_quant_proj.weight" not in foreign.shapes:
        return False
    first, second = (
        {n: x for n, x in side.items() if not n.startswith(("blocks.", "proj."))} for side in (theirs, own)
    )
    blocks = {name.split(".", 2)[2]: x for name, x in own.items() if name.startswith("blocks.")}
    is_like = all(blocks.get(n.split(".", 2)[2]) == x for n, x in theirs.items() if n.startswith("blocks."))
    if first != second or not is_like:
        return False
    both = (foreign.tensors[f"{side}.pos_emb"] for side in ("encoder", "decoder"))
    return "positions" in modality or torch.equal(*both)


def _table(tokens: tuple[int, ...], width: int) -> Tensor:
    """Return its positions (1, D, rows, columns); the first channels encode the row."""
    return vision.table_of({"axis_order": "yx"}, tokens, width, 0).transpose(1, 2).reshape(1, width, *tokens)


def _places(cut: vision.Cut, theirs: str, ours: str, width: int) -> Row:
    if cut.positions == "sincos":
        return computed(theirs, _table(cut.tokens, width))
    return shaped(theirs, ours, (1, width, *cut.tokens), (width, *cut.tokens))


def _input_rows(config: M3Config, name: str, cut: vision.Cut, width: int) -> list[Row]:
    ours = f"tokenizers.{name}"
    if _entry(config, name)["type"] != "semantic_map":
        return vision.patches("encoder.proj", f"{ours}.projection", width, (cut.channels, *cut.patch))
    kernel = (*cut.patch, _entry(config, name)["tokenizer"].get("class_width", 64))

    def read(x: list[Tensor]) -> list[Tensor]:  # (D, E, h, w) -> (D, h w E)
        return [x[0].permute(0, 2, 3, 1).reshape(width, -1)]

    def write(x: list[Tensor]) -> list[Tensor]:
        return [x[0].reshape(width, *kernel).permute(0, 3, 1, 2)]

    return [
        one("cls_emb.weight", f"{ours}.class_embedding.weight"),
        Row(("encoder.proj.weight",), (f"{ours}.projection.weight",), read, write),
        one("encoder.proj.bias", f"{ours}.projection.bias"),
    ]


def _blocks(theirs: str, ours: str, depth: int) -> list[Row]:
    return [*vision.blocks(theirs, ours, depth, vision.TIMM), *vision.fused(f"{theirs}.attn.qkv", ours, depth)]


def _tail(theirs: str, ours: str, tail: str) -> list[Row]:
    if tail == "none":
        return []
    return [row for name, own in MLP.items() for row in same(f"{theirs}.{name}", f"{ours}.{own}")]


def _book_rows(is_cosine: bool) -> list[Row]:
    """Rows of the codebook and its moving averages; with unit vectors theirs keeps no sums, which are made anew."""
    ours = tuple(f"{OURS}.quantiser.{part}" for part in ("book", "counts", "sums"))

    def read(x: list[Tensor]) -> list[Tensor]:
        sums = x[0] * x[1].unsqueeze(-1) if is_cosine else x[2]
        return [x[0].unsqueeze(0), x[1].unsqueeze(0), sums.unsqueeze(0)]

    def write(x: list[Tensor]) -> list[Tensor]:
        return [y[0] for y in (x[:2] if is_cosine else x)]

    started = Row(
        (f"{BOOK}.initted",),
        (f"{OURS}.quantiser.steps",),
        lambda x: [(x[0] > 0).long().reshape(())],
        lambda x: [(x[0] > 0).float().reshape(1)],
    )
    parts = ("embed", "cluster_size") if is_cosine else ("embed", "cluster_size", "embed_avg")
    return [started, Row(tuple(f"{BOOK}.{part}" for part in parts), ours, read, write)]
