"""What the tables of image-text models share: two towers, `photo` and `words`, and the space where they meet.

Letters: D width of a tower, E of the shared space, K ids of the vocabulary, L length of a sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3.config import M3Config
from m3.data.words import describe, open_vocabulary
from m3.errors import M3Error, read_settings
from m3.foreign import vision
from m3.foreign.format import SHOWN, backbone_of
from m3.foreign.rows import Row, one, padded, shaped
from m3.foreign.vision import pair
from m3.objectives.contrast import Contrast

CONTRAST = "objectives.contrast"
TEMPERATURE = {"softmax": 0.07, "sigmoid": 0.1}
"""Published starts: what is learned is kept as the difference from them, so that recipes can start from it."""
BIAS = -10.0
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Side = tuple[str, str]
"""Pooling and projection."""
CLIP_IDS = 49408
"""Ids of CLIP's byte-pair encoding."""


def image_of(size: Any, patch: int, mean: Any, std: Any, channels: int = 3) -> dict[str, Any]:
    """Return our settings of the modality `image` with learned positions."""
    image: dict[str, Any] = {"type": "image", "size": size, "channels": channels, "mean": tuple(mean)}
    image |= {"std": tuple(std), "tokenizer": {"type": "patch", "size": patch}, "positions": {"type": "learned"}}
    return image


def text_of(vocabulary: str, length: int, **marks: str) -> dict[str, Any]:
    """Return our settings of the modality `text` with learned positions; `marks` are `start`, `end`, `fill`."""
    text: dict[str, Any] = {"type": "text", "vocabulary": vocabulary, "length": length, **marks}
    return text | {"tokenizer": {"type": "embedding"}, "positions": {"type": "learned"}}


def clip_text(count: int, length: int, given: str | None) -> dict[str, Any]:
    """Return `text_of` with CLIP's vocabulary between its marks, or with the one that the user gave.

    Raises:
        M3Error: the table has other than CLIP's ids, and nothing was given.
    """
    if given is None and count != CLIP_IDS:
        raise M3Error(_unknown_words(count))
    marks = {"start": "<start_of_text>", "end": "<end_of_text>"} if given is None else {}
    return text_of(given or "open_clip:", length, **marks)


def siglip_text(count: int, length: int, given: str | None, where: str) -> dict[str, Any]:
    """Return `text_of` with the vocabulary of `vocabulary_in`, filled up with its mark."""
    vocabulary = vocabulary_in(where, given, count)
    words = open_vocabulary(describe(vocabulary))
    for end, fill in (("</s>", "</s>"), ("<eos>", "<pad>")):  # the first version's words, the second's
        if words.number(end) is not None:
            return text_of(vocabulary, length, end=end, fill=fill)
    return text_of(vocabulary, length)


def vocabulary_in(where: str, given: str | None, count: int) -> str:
    """Return the vocabulary that the user gave, or the path of that in the folder.

    Raises:
        M3Error: there is neither.
    """
    names = ("tokenizer.json", "spiece.model")
    found = given or next((str(Path(where, name)) for name in names if Path(where, name).is_file()), None)
    if found is None:
        raise M3Error(_unknown_words(count))
    return found


def _unknown_words(count: int) -> str:
    return (
        f"no tensor tells which words the {count} ids are; give modalities.text.vocabulary=tokenizer.json, and "
        f"modalities.text.start, modalities.text.end or modalities.text.fill where the model reads them."
    )


def sections(
    image: dict[str, Any], text: dict[str, Any], photo: dict[str, Any], words: dict[str, Any], contrast: dict[str, Any]
) -> dict[str, Any]:
    """Return the sections of a model of two towers and their contrast."""
    loss = contrast["loss"]
    contrast = {"type": "contrast", "temperature": TEMPERATURE[loss], "bias": BIAS, **contrast}
    return {
        "modalities": {"image": image, "text": text},
        "towers": {"photo": {"modalities": ["image"], **photo}, "words": {"modalities": ["text"], **words}},
        "objectives": {"contrast": contrast},
    }


Parts = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def parts_of(config: M3Config, title: str, image: Side, text: Side, is_causal: bool) -> Parts:
    """Return modalities, towers and contrast of a model that `sections` makes, with what is left to defaults.

    Raises:
        M3Error: it has another form, or other sides than these.
    """
    objectives, towers = config.objectives or {}, config.towers or {}
    contrast = objectives.get("contrast", {})
    is_known = list(objectives) == ["contrast"] and set(towers) == {"photo", "words"}
    if is_known:
        spec = read_settings(Contrast.Spec, {k: v for k, v in contrast.items() if k != "type"}, "contrast")
        found = {name: (side.pool, side.projection) for name, side in spec.sides.items()}
        is_known = found == {"image": image, "text": text}
        contrast = spec.model_dump()
    if not is_known:
        raise M3Error(
            f"{title} is the towers `photo` and `words` with one objective `contrast` of the sides image (pool: "
            f"{image[0]}, projection: {image[1]}) and text (pool: {text[0]}, projection: {text[1]}); this model is "
            f"another."
        )
    free = (*SHOWN, "mlp")
    whole = {
        "photo": backbone_of(config, title, "photo", free).model_dump(),
        "words": backbone_of(config, title, "words", free, causal=is_causal).model_dump(),
    }
    return config.modalities or {}, whole, contrast


def clip_parts(config: M3Config, title: str) -> Parts:
    """Return `parts_of` a CLIP."""
    return parts_of(config, title, ("class", "linear"), ("last", "linear"), is_causal=True)


def siglip_parts(config: M3Config, title: str) -> Parts:
    """Return `parts_of` a SigLIP."""
    return parts_of(config, title, ("attention", "none"), ("last", "affine"), is_causal=False)


def tokens_of(image: dict[str, Any]) -> tuple[int, int]:
    """Return the rows and columns of patches."""
    size, patch = pair(image["size"]), pair(image["tokenizer"]["size"])
    return size[0] // patch[0], size[1] // patch[1]


def kernel_of(image: dict[str, Any]) -> tuple[int, ...]:
    """Return channels, height and width of a patch."""
    return image.get("channels", 3), *pair(image["tokenizer"]["size"])


def word_rows(words: str, places: str, text: dict[str, Any]) -> list[Row]:
    """Rows of the table of words (K, D) and of their positions (L, D)."""
    positions = vision.learned(places, "positions.text.table", (text["length"],), batch=())
    return [padded(words, "tokenizers.text.table.weight"), positions]


def place_row(theirs: str, ours: str, image: dict[str, Any], photo: dict[str, Any]) -> Row:
    """Row of the positions (1 + N, D) of a class token and of patches that are projected without bias.

    A bias of ours is the same for all patches, and so a part of their positions in theirs.
    """
    tokens, width = tokens_of(image), photo["width"]
    names = ("positions.image.table", "tokenizers.image.projection.bias")
    has_place = bool(photo["class_positions"])

    def read(x: list[Tensor]) -> list[Tensor]:
        grid = x[0][1:].t().reshape(-1, *tokens).contiguous()
        return [grid, torch.zeros_like(x[0][0]), *([x[0][:1].clone()] if has_place else [])]

    def write(x: list[Tensor]) -> list[Tensor]:
        first = x[2] if has_place else x[0].new_zeros(1, width)
        return [torch.cat([first, x[0].flatten(1).t() + x[1]])]

    return Row((theirs,), (*names, f"{ours}.prefix_positions") if has_place else names, read, write)


def scale_rows(contrast: dict[str, Any], shape: tuple[int, ...] = ()) -> list[Row]:
    """Rows of the temperature and of the sigmoid loss's bias; `shape` is that of theirs."""
    names = ("logit_scale", *(["logit_bias"] if contrast["loss"] == "sigmoid" else []))
    return [shaped(name, f"{CONTRAST}.{name}", shape, ()) for name in names]


def vocabulary_size(text: dict[str, Any]) -> int:
    """Return K."""
    return open_vocabulary(describe(text["vocabulary"])).size


def number_of(text: dict[str, Any], token: str) -> int:
    """Return the id of a token.

    Raises:
        M3Error: the vocabulary has none.
    """
    number = open_vocabulary(describe(text["vocabulary"])).number(token)
    if number is None:
        raise M3Error(f"the vocabulary has no `{token}`; give the model's own by modalities.text.vocabulary.")
    return number


def mark_ids(text: dict[str, Any], **marks: str) -> dict[str, int]:
    """Return the ids of the tokens that a text's settings name: `eos_token_id="end"` -> {"eos_token_id": 49407}."""
    vocabulary = open_vocabulary(describe(text["vocabulary"]))
    ids = {key: vocabulary.number(text[mark]) for key, mark in marks.items() if text.get(mark)}
    return {key: number for key, number in ids.items() if number is not None}


def siglip_sections(
    image: dict[str, Any], text: dict[str, Any], photo: dict[str, Any], words: dict[str, Any]
) -> dict[str, Any]:
    """Return `sections` of a SigLIP."""
    sides = {
        "image": {"pool": "attention", "projection": "none"},
        "text": {"pool": "last", "projection": "affine"},
    }
    no_class = {"class_tokens": 0}
    shared = {"width": photo["width"], "loss": "sigmoid", "sides": sides}
    return sections(image, text, photo | no_class, words | no_class, shared)


def packed(theirs: str, ours: str) -> list[Row]:
    """Rows of torch's own attention, whose queries, keys and values are one matrix."""
    return [one(f"{theirs}.in_proj_{part}", f"{ours}.{part}") for part in ("weight", "bias")]


def class_token(theirs: str, ours: str, width: int) -> Row:
    """Row of a class token (D,)."""
    return shaped(theirs, f"{ours}.prefix", (width,), (1, width))
