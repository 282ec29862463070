"""Parts of contrastive models: causal towers, ends of texts, frozen towers, stages, shared views, embeddings.

Letters: B samples, N tokens, E width of the shared space.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3 import M3Config, M3Model, M3Processor
from m3.backbone import BackboneSpec, feed_forward
from m3.build import meta_model
from m3.check import shrink
from m3.cli import main
from m3.cost import cost
from m3.errors import M3Error, read_settings
from m3.modalities.text import Text
from m3.network import build_modalities
from m3.partners import Swap, draw_partners
from m3.random import Draws
from m3.recipe import load_recipe
from m3.train import train
from m3.types import Batch, Tokens

IMAGE = {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 8}}
TEXT = {"type": "text", "vocabulary": "words:a b c d e f GO END PAD", "length": 5, "tokenizer": {"type": "embedding"}}
SMALL = {"width": 16, "depth": 2, "heads": 2}
PIXELS = (torch.arange(4 * 3 * 16 * 16) * 7 % 251).to(torch.uint8).reshape(4, 3, 16, 16)


def contrast(**changes) -> dict:
    return {"type": "contrast", "width": 8, "sides": {"image": {}, "text": {}}} | changes


def make(objectives: dict | None = None, words: dict | None = None, **sections) -> M3Model:
    torch.manual_seed(0)
    plain = {"modalities": {"image": IMAGE, "text": TEXT}, "backbone": SMALL}
    if words is not None:
        plain["towers"] = {"words": {**SMALL, "modalities": ["text"], "class_tokens": 0, **words}}
    return M3Model(M3Config(**(plain | sections), objectives=objectives or {"contrast": contrast()}))


def sentences(*rows: list[int]) -> Batch:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [-1] * (longest - len(row)) for row in rows], dtype=torch.int32)
    return Batch({"text": ids}, torch.arange(len(rows)))


def text(**settings) -> Text:
    part = {key: value for key, value in TEXT.items() if key != "tokenizer"}
    return build_modalities({"x": part | settings})["x"]  # type: ignore[return-value]


# -- towers -----------------------------------------------------------------------------------------------


def test_a_causal_tower_sees_only_what_was_before():
    model = make(words={"causal": True}).eval()
    states = [model.encode(batch).states for batch in (sentences([1, 2, 3, 4]), sentences([1, 2, 5, 6]))]
    torch.testing.assert_close(states[0][:, :2], states[1][:, :2], rtol=0, atol=0)
    assert ((states[0] - states[1])[0, 2:].abs().amax(-1) > 1e-3).all()
    both = make(words={}).eval()
    states = [both.encode(batch).states for batch in (sentences([1, 2, 3, 4]), sentences([1, 2, 5, 6]))]
    assert ((states[0] - states[1])[0].abs().amax(-1) > 1e-4).all()


def test_a_causal_tower_is_the_same_with_padding_behind():
    model = make(words={"causal": True}).eval()
    alone, padded = model.encode(sentences([1, 2, 3])), model.encode(sentences([1, 2, 3], [4, 5, 6, 1, 2]))
    torch.testing.assert_close(alone.states[0], padded.states[0, :3], rtol=1e-5, atol=1e-6)
    absent = Batch(sentences([1, 2], [3, 4]).signals, torch.arange(2), {"text": torch.tensor([True, False])})
    assert model.encode(absent).states.isfinite().all()


def test_a_causal_tower_with_class_tokens_is_refused():
    with pytest.raises(M3Error, match=r"towers.words: class tokens stand in front.*set class_tokens: 0"):
        make(words={"causal": True, "class_tokens": 1})


@pytest.mark.parametrize(
    ("mlp", "expected"),
    [("gelu", 1.9544997), ("gelu_tanh", 1.9545977), ("quick_gelu", 1.9356586)],
)
def test_activations_at_two(mlp: str, expected: float):
    """2 Phi(2); x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2; 2 / (1 + exp(-3.404))."""
    part = feed_forward(4, 1, BackboneSpec(width=4, heads=1, mlp=mlp).style)
    assert part.activation(torch.tensor(2.0)).item() == pytest.approx(expected, abs=1e-6)


def test_the_norm_before_the_blocks_reaches_class_tokens_and_patches():
    model = make(backbone=SMALL | {"input_norm": True, "depth": 1, "final_norm": False})
    seen = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.encode(Batch({"image": PIXELS}, torch.arange(4)))
    assert seen[0].shape == (4, 5, 16)
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(4, 5), rtol=0, atol=1e-5)
    assert make().backbone.input_norm is None


# -- texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence", "ids"),
    [
        ({}, "a b", [1, 2]),
        ({"start": "GO", "end": "END"}, "a b", [7, 1, 2, 8]),
        ({"start": "GO", "end": "END"}, "a b c d e f", [7, 1, 2, 3, 8]),
        ({"end": "END"}, "a b c d e f", [1, 2, 3, 4, 8]),
        ({"fill": "PAD"}, "a b", [1, 2, 9, 9, 9]),
        ({"end": "END", "fill": "END"}, "a b", [1, 2, 8, 8, 8]),
    ],
)
def test_starts_ends_and_fillings(settings: dict, sentence: str, ids: list[int]):
    assert text(**settings).to_raw(sentence).tolist() == ids


def test_ids_are_taken_as_they_are():
    assert text(start="GO", end="END", fill="PAD").to_raw([1, 2]).tolist() == [1, 2]


def test_clips_vocabulary_has_its_starts_and_ends():
    part = text(vocabulary="open_clip:", start="<start_of_text>", end="<end_of_text>", length=77)
    assert part.to_raw("a photo of a cat").tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_mistakes_in_texts_are_named():
    with pytest.raises(M3Error, match=r"text.end: `\[SEP\]` is no token of the vocabulary"):
        text(end="[SEP]")
    with pytest.raises(M3Error, match=r"text.length: 2 leaves no room beside `start` and `end`"):
        text(start="GO", end="END", length=2)


def test_pictures_with_captions_are_mirrored_only_where_the_captions_allow_it():
    assert "flip" not in text().follows
    assert "flip" in text(mirrors=True).follows


# -- sides ------------------------------------------------------------------------------------------------


def test_pools_by_hand():
    """FLIP's image is the mean of class token and patches; a text is read at its first or last token that exists."""
    every = {"image": {"pool": "all"}, "text": {"pool": "last"}}
    model = make({"contrast": contrast(sides=every)}, words={}).eval()
    part = model.objectives["contrast"]
    encoded = model.encode(Batch({"image": PIXELS}, torch.arange(4)))
    torch.testing.assert_close(part.pools["image"](encoded), encoded.sequence.sum(1) / 5)
    encoded = model.encode(sentences([1, 2, 3], [4, 5, 6, 1, 2]))
    expected = torch.stack([encoded.states[0, 2], encoded.states[1, 4]])
    torch.testing.assert_close(part.pools["text"](encoded), expected, rtol=0, atol=0)


def test_projections():
    sides = {"image": {"pool": "attention", "projection": "none"}, "text": {"projection": "affine"}}
    part = make({"contrast": contrast(width=16, sides=sides)}).objectives["contrast"]
    assert {n for n, _ in part.projections.named_parameters()} == {"text.weight", "text.bias"}
    with pytest.raises(M3Error, match=r"objectives.contrast.sides.image.projection: `none` needs a tower of width 8"):
        make({"contrast": contrast(sides=sides)})


def test_a_pool_without_its_class_token_is_refused():
    with pytest.raises(M3Error, match=r"objectives.contrast.sides.text.pool: `class` needs a class token"):
        make({"contrast": contrast(sides={"image": {}, "text": {"pool": "class"}})}, words={})


# -- embed ------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_of_all_tokens_and_survive_saving(tmp_path: Path):
    dropping = {"image": {"masking": {"type": "fixed", "visible": 0.25}}, "text": {}}
    model = make({"contrast": contrast(sides=dropping)}, words={}).eval()
    batch = M3Processor(model.config.modalities)(image=list(PIXELS.numpy()), text=["a b", "c", "d e f", None])
    found = model.embed(batch)
    assert {side: tuple(x.shape) for side, x in found.items()} == {"image": (4, 8), "text": (4, 8)}
    torch.testing.assert_close(found["image"].norm(dim=-1), torch.ones(4))
    assert found["text"].isnan().all(1).tolist() == [False, False, False, True]
    pooled = model.encode(Batch({"image": PIXELS}, torch.arange(4))).states.mean(1)
    expected = pooled @ model.objectives["contrast"].projections["image"].weight.T
    torch.testing.assert_close(found["image"], expected / expected.norm(dim=-1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert set(model.embed(Batch({"image": PIXELS}, torch.arange(4)))) == {"image"}
    model.save_pretrained(tmp_path)
    again = M3Model.from_pretrained(tmp_path).eval().embed(batch)
    assert all(torch.equal(again[side].nan_to_num(), found[side].nan_to_num()) for side in found)


def test_what_can_not_be_embedded_is_named():
    model = make({"a": contrast(), "b": contrast()})
    with pytest.raises(M3Error, match="no contrastive objective `c`"):
        model.embed(Batch({"image": PIXELS}, torch.arange(4)), "c")
    with pytest.raises(M3Error, match="the batch has none of image, text; give at least one"):
        model.embed(Batch({}, torch.arange(4)))
    target = {"image": {"loss": "mse"}}
    decoder = {"type": "cross_decoder", "width": 8, "depth": 1, "heads": 2}
    other = make({"r": {"type": "reconstruct", "targets": target, "decoder": decoder}})
    with pytest.raises(M3Error, match="the model has no shared space"):
        other.embed(Batch({"image": PIXELS}, torch.arange(4)))


def test_the_command_compares_files_and_sentences(tmp_path: Path, capsys):
    train(shrink(load_recipe("clip_tiny"), tmp_path / "run"), is_shown=False)
    from PIL import Image

    Image.fromarray(PIXELS[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    given = [f"image={tmp_path / 'photo.png'}", "text=a red cube", "text=a small blue cone"]
    assert main(["embed", str(tmp_path / "run"), *given, "--out", str(tmp_path / "vectors.npz")]) == 0
    said = capsys.readouterr().out
    assert "Similarity of image and text" in said
    assert "a small blue cone" in said
    import numpy as np

    saved = np.load(tmp_path / "vectors.npz")
    assert saved["text"].shape == (2, 32)
    assert f"{float(saved['image'][0] @ saved['text'][1]):.3f}" in said
    assert main(["embed", "no_model_is_needed", "photo.jpg", "--out", "x.txt"]) == 2
    assert "--out writes an .npz file, got x.txt" in capsys.readouterr().err


# -- stages, frozen towers, shared views ------------------------------------------------------------------


def small_run(name: str, out: Path, *changes: str):
    recipe = shrink(load_recipe(name, list(changes)), out)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"lr": 1e-2})})


def test_a_locked_tower_stays_as_it_was_and_the_text_learns(tmp_path: Path):
    first = small_run("mae_vit_b", tmp_path / "mae", "modalities.image.size=32")
    train(first, is_shown=False)
    recipe = small_run("lit_vit_b16", tmp_path / "lit", "modalities.image.size=32")
    recipe = recipe.model_copy(update={"init": str(tmp_path / "mae" / "model")})
    train(recipe, is_shown=False)
    before, after = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("mae", "lit"))
    shared = {name for name in after if name in before}
    assert {name.split(".")[0] for name in shared} == {"backbone", "tokenizers"}
    assert all(torch.equal(before[name], after[name]) for name in shared)
    fresh = M3Model(M3Model.from_pretrained(tmp_path / "lit" / "model").config)
    frozen = {name for name, p in fresh.named_parameters() if not p.requires_grad}
    assert frozen == shared
    moved = [name for name, p in fresh.named_parameters() if name.startswith("towers.words.blocks")]
    assert moved
    assert all(after[name].abs().max() > 0 for name in moved if name.endswith("bias")), "biases start at zero"


def test_the_unmasked_stage_goes_on_from_the_masked_one(tmp_path: Path, capsys):
    train(small_run("flip_tiny", tmp_path / "flip"), is_shown=False)
    recipe = small_run("flip_tiny_tuning", tmp_path / "tuned")
    assert load_recipe("flip_tiny_tuning").init == "runs/flip_tiny/model"
    recipe = recipe.model_copy(update={"init": str(tmp_path / "flip" / "model")})
    train(recipe)
    said = " ".join(capsys.readouterr().out.split())
    assert "fresh" not in said.partition("come from")[2].partition("training samples")[0]
    settings = json.loads((tmp_path / "tuned" / "model" / "config.json").read_text())
    masking = settings["objectives"]["contrast"]["sides"]["image"]["masking"]
    assert masking == {"type": "fixed", "visible": 1.0}
    scales = [
        load_file(tmp_path / run / "model" / "model.safetensors")["objectives.contrast.logit_scale"]
        for run in ("flip", "tuned")
    ]
    assert abs(scales[0] + math.log(0.07)) > 1e-4, "the first stage learned it"
    assert scales[1] != scales[0]
    assert (scales[1] - scales[0]).abs() < 3 * 1e-2, "it went on from where the first stage ended"


def test_a_view_that_two_objectives_share_is_encoded_once(monkeypatch):
    masking = {"type": "fixed", "visible": 0.5}
    reconstruct = {"type": "reconstruct", "inputs": ["image"], "masking": masking}
    reconstruct["decoder"] = {"type": "self_decoder", "width": 8, "depth": 1, "heads": 2}
    reconstruct["targets"] = {"image": {"loss": "mse"}}
    joined = contrast(sides={"image": {"masking": {"visible": 0.5, "type": "fixed"}}, "text": {}})
    model = make({"reconstruct": reconstruct, "contrast": joined}, words={})
    called = []
    encode = M3Model.encode_tokens
    monkeypatch.setattr(M3Model, "encode_tokens", lambda *a, **k: called.append(tuple(a[2].visible)) or encode(*a, **k))
    batch = Batch({"image": PIXELS, "text": sentences([1], [2], [3], [4]).signals["text"]}, torch.arange(4))
    output = model(batch)
    assert called == [("image",), ("text",)]
    assert set(output.parts.parts) == {"reconstruct/image", "contrast/image-text"}
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_hard_negatives_are_texts_that_are_like_the_samples_own_picture():
    """Row: who borrows, by its picture; column: whose text is lent."""
    model = make().eval()
    part = model.objectives["contrast"]
    batch = Batch({"image": PIXELS, "text": sentences([1], [2], [3], [4]).signals["text"]}, torch.arange(4))
    prepared = model.prepare(batch)
    encoded = {view: model.encode_tokens(prepared.tokens, plan) for view, plan in prepared.plans.items()}
    image, words = (part.embed(side, encoded[part.side_views[side]]) for side in ("image", "text"))
    found = part.similarity(encoded, "text")
    torch.testing.assert_close(found[1, 3], (image[1] @ words[3]) / 0.07)
    torch.testing.assert_close(part.similarity(encoded, "image"), found.T)
    with pytest.raises(M3Error, match="`depth` is in no side of the contrast"):
        part.similarity(encoded, "depth")
    likes = torch.full((4, 4), -50.0)
    likes[torch.arange(4), torch.tensor([1, 2, 3, 0])] = 50.0  # not symmetric
    tokens = {"text": Tokens(torch.zeros(4, 1, 1), torch.zeros(1, 1, 1))}
    swap = Swap(of="text", group=4, share=1.0, by="contrast")
    assert draw_partners(swap, tokens, Draws(torch.arange(4)), likes).index.tolist() == [1, 2, 3, 0]


def test_a_large_batch_in_micro_batches_is_the_same_training(tmp_path: Path):
    """Gradient caching through the trainer: 2 steps of 16 samples at once, and of 4 at a time."""
    runs = {}
    for micro in (16, 4):
        recipe = small_run("flip_tiny", tmp_path / str(micro))
        sizes = {"batch_size": 16, "micro_batch": micro, "steps": 2, "lr": 1e-3}
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=sizes)})
        train(recipe, is_shown=False)
        lines = [json.loads(line) for line in (tmp_path / str(micro) / "metrics.jsonl").read_text().splitlines()]
        losses = [(line["contrast/image-text"], line["gradient_norm"]) for line in lines if "lr" in line]
        runs[micro] = (losses, load_file(tmp_path / str(micro) / "model" / "model.safetensors"))
    assert len(runs[16][0]) == 2
    for whole, cut in zip(runs[16][0], runs[4][0], strict=True):
        assert cut == pytest.approx(whole, rel=1e-4)
    for name, weight in runs[16][1].items():
        torch.testing.assert_close(runs[4][1][name], weight, rtol=0, atol=2e-4, msg=name)


def test_half_of_the_patches_cost_about_half():
    """33 of 65 tokens in the larger tower; the text tower costs the same."""
    clip, flip = (cost(meta_model(load_recipe(name))).forward_flops for name in ("clip_tiny", "flip_tiny"))
    assert 0.5 < flip / clip < 0.65


def test_settings_of_a_tower_are_read_strictly():
    with pytest.raises(M3Error, match=r"backbone.causl: unknown key. Did you mean `causal`"):
        read_settings(BackboneSpec, {"causl": True}, "backbone")
