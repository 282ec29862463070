"""Every built-in part passes the kit that plugins from outside pass; broken parts fail it with the right sentence.

Parts are found by `available`, so a new file joins the sweep by itself. Modalities need samples: the embedded
world's, by type, or those of `example_samples`.
"""

from typing import Any

import pytest
import torch

from m3.data.sources.world import World
from m3.data.world.scene import SHAPES
from m3.errors import M3Error
from m3.network import build_modalities
from m3.parts import available, find
from m3.recipe import DataSpec
from m3.testing import check_modality, check_objective, check_positions, check_scorer, check_target, grid_tokens
from m3.testing.parts import GRIDS
from m3.testing.tokenizer import build_tokenizer

WORDS = """a an empty ground small large red green blue yellow purple cyan orange sphere cube cylinder cone left right
of in front behind beside"""
# Small sizes for every part that has a setting of the name; the others keep their defaults.
SMALL = {"size": 32, "classes": 6, "frames": 4, "count": 96, "bands": 32}
SMALL_TOKENS = {"size": 8, "class_width": 8, "groups": 12, "neighbours": 6, "embed_width": (8, 12, 16)}
# Settings that have no default.
NEEDED: dict[str, dict[str, Any]] = {
    "audio": {"frames": 96},
    "boxes": {"labels": list(SHAPES), "count": 4, "bins": 50},
    "metadata": {
        "fields": [{"name": "brightness", "high": 255}, {"name": "kind", "kind": "choice", "choices": ["a", "b"]}]
    },
    "palette": {"colours": [2, 4]},
    "points": {"attributes": 3},
    "regions": {"features": 192, "count": 5},
    "region_labels": {"classes": 5, "count": 5},
    "feature_map": {"teacher": "timm:vit_tiny_patch16_224"},
    "text": {"vocabulary": WORDS.split(), "length": 12},
}
# The modality and the tokenizer of this name; test_token_shards runs the kit on the modality.
NOT_ALONE = {"codes": "reads the folder of a trained tokenizer", "attention": "looks at pictures"}


def settings_of(kind: str, name: str, small: dict[str, Any]) -> dict[str, Any]:
    fields = find(kind, name).Spec.model_fields
    return {"type": name} | {key: value for key, value in small.items() if key in fields}


def modality_settings(name: str) -> dict[str, Any]:
    return settings_of("modalities", name, SMALL | NEEDED.get(name, {}))


def samples_of(name: str, count: int = 4) -> list[Any]:
    part = build_modalities({"own": modality_settings(name)})["own"]
    own = part.example_samples()
    if own:
        return own
    try:
        world = World(DataSpec(samples=count), {"own": part}, 3, "train")
    except M3Error as error:
        pytest.fail(f"no samples to test `{name}` with ({error}); give the modality `example_samples`")
    return [world.read(i).signals["own"] for i in range(count)]


def readers(name: str) -> list[dict[str, Any]]:
    """Settings of all tokenizers that read a modality."""
    signal = build_modalities({"own": modality_settings(name)})["own"].signal
    found = []
    for tokenizer in sorted(set(available("tokenizers")) - set(NOT_ALONE)):
        for small in (SMALL_TOKENS, SMALL_TOKENS | {"size": 1}):  # maps of features are small already
            settings = settings_of("tokenizers", tokenizer, small)
            try:
                build_tokenizer(settings, signal)
            except M3Error:
                continue
            found.append(settings)
            break
    return found


ALONE = sorted(set(available("modalities")) - set(NOT_ALONE))
PAIRS = [(name, tokenizer) for name in ALONE for tokenizer in readers(name)]


def test_every_modality_has_a_tokenizer_and_every_tokenizer_a_modality() -> None:
    assert {name for name, _ in PAIRS} == set(ALONE)
    assert {tokenizer["type"] for _, tokenizer in PAIRS} | {"codes"} == set(available("tokenizers"))


@pytest.mark.parametrize(("name", "tokenizer"), PAIRS, ids=[f"{name}-{t['type']}" for name, t in PAIRS])
def test_modalities_and_tokenizers_keep_their_contracts(name: str, tokenizer: dict[str, Any]) -> None:
    check_modality(modality_settings(name), samples_of(name), tokenizer)


@pytest.mark.parametrize("kind", available("positions"))
@pytest.mark.parametrize("counts", GRIDS.values(), ids=GRIDS)
def test_positions_keep_their_contract(kind: str, counts: tuple[int, ...]) -> None:
    if kind == "separable" and len(counts) == 1:
        with pytest.raises(M3Error, match=r"^separable positions need a grid of two or three axes; use `learned` "):
            check_positions({"type": kind}, counts)
        return
    if kind == "relative":  # the one kind that embeds nothing
        with pytest.raises(
            M3Error, match=r"^positions `relative` add nothing, so .* set relative_bias of the backbone"
        ):
            check_positions({"type": kind}, counts)
        return
    check_positions({"type": kind}, counts)


@pytest.mark.parametrize("kind", sorted(set(available("scorers")) - set(NOT_ALONE)))
def test_scorers_keep_their_contract(kind: str) -> None:
    """On all tokens together, or where a scorer asks for a kind of them, on those that it takes."""
    scorer = settings_of("scorers", kind, {})
    together = grid_tokens()
    refused = []
    for tokens in (together, *({name: part} for name, part in together.items())):
        try:
            check_scorer(scorer, tokens)
        except M3Error as error:
            refused.append(str(error))
        else:
            return
    pytest.fail(f"it ranks none of the kit's tokens: {refused}")


@pytest.mark.parametrize("kind", sorted(set(available("targets")) - set(NOT_ALONE) - {"teacher"}))
def test_targets_keep_their_contract(kind: str) -> None:
    check_target({"type": kind})


def test_teachers_keep_the_contract_of_targets() -> None:
    """They look at pictures and so must know the modality; test_teachers does the same for codes."""
    image = build_modalities({"image": {"type": "image", "size": 32}})["image"]
    tokenizer = build_tokenizer({"type": "patch", "size": 16}, image.signal)
    tokenizer.modality = image
    pixels = torch.stack([image.to_raw(sample) for sample in samples_of("image")])
    check_target({"type": "teacher", "model": "timm:vit_tiny_patch16_224"}, tokenizer, image.normalise(pixels))


@pytest.mark.parametrize(
    "settings",
    [
        {"normalise": True},
        {"normalise": "channel"},
        {"normalise": "channel", "eps_on": "deviation", "eps": (1e-6, 2e-6, 3e-6)},
        {"step": 1},
        {"normalise": True, "step": 0},
        {"normalise": "channel", "step": 1},
    ],
)
def test_normalised_targets_keep_the_contract(settings: dict[str, Any]) -> None:
    check_target({"type": "values", **settings})


@pytest.mark.parametrize("kind", available("objectives"))
def test_objectives_keep_their_contract(kind: str) -> None:
    settings: dict[str, Any] = {"type": kind}
    names = ("image", "depth")
    if kind == "reconstruct":
        decoder = {"type": "cross_decoder", "width": 48, "depth": 1, "heads": 2}
        settings |= {"decoder": decoder, "targets": {"image": {}, "depth": {"loss": "l1"}}, "balance": "uncertainty"}
    elif kind == "contrast":
        settings |= {"width": 8, "sides": {"image": {}, "depth": {}}}
    elif kind == "match":
        settings |= {"modalities": names, "swap": {"of": "depth", "group": 2}, "alignment": 0.1}
    elif kind == "autoencode":
        settings |= {"of": "image"}
        names = ("image",)
    elif kind == "latent":
        settings |= {"decoder": {"type": "cross_decoder", "width": 48, "depth": 1, "heads": 2}, "class_weight": 0.1}
    elif kind == "align":
        settings |= {"of": "image", "teacher": {"model": "timm:vit_tiny_patch16_224", "size": 64}, "layers": 1}
        names = ("image",)
    elif kind == "translate":
        settings |= {"masking": {"type": "fixed", "visible": 0.5}}
        names = ("semantic_map",)
    elif kind == "classify":
        settings |= {"smoothing": 0.1}
        names = ("image", "label")
    tokenizer = {"type": "embedding"} if kind == "translate" else {"type": "patch", "size": 8}
    modalities = {name: {**modality_settings(name), "tokenizer": tokenizer} for name in names}
    if kind == "classify":
        modalities["label"]["tokenizer"] = {"type": "label"}
    backbone = {"final_norm": False} if kind == "align" else None
    check_objective(settings, modalities, {name: samples_of(name) for name in names}, backbone)
