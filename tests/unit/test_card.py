"""The model card says what the weights are, and leaves a card that somebody wrote."""

from __future__ import annotations

from pathlib import Path

import yaml

from m3 import M3Config, M3Model
from m3.card import EMPTY, OURS, Facts, card, write_card

IMAGE = {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 8}}
DEPTH = {"type": "depth", "size": 16, "tokenizer": {"type": "patch", "size": 8}}


def config(**about: object) -> M3Config:
    reconstruct = {"type": "reconstruct", "inputs": ["image"], "decoder": {"type": "cross_decoder", "width": 16}}
    return M3Config(
        modalities={"image": IMAGE, "depth": DEPTH},
        backbone={"width": 32, "depth": 1, "heads": 2},
        objectives={"reconstruct": reconstruct | {"targets": {"depth": {}}}},
        about=about or None,
    )


def facts(parameters: int = 1, **about: object) -> Facts:
    return Facts(config(**about), parameters, ("image",), {"depth"})


def test_it_says_modalities_recipe_metrics_licence_and_how_to_load() -> None:
    row = {"task": "depth from image", "measure": "L1 error", "model": 0.25, "baseline": 0.3, "baseline_name": "mean"}
    text = card(facts(1_250_000, recipe="own", steps=7, metrics=[row], license="cc-by-4.0"))
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "m3", "license": "cc-by-4.0", "tags": ["m3", "multimodal", "image", "depth"]}
    for line in (
        "# own",
        "Trained by `m3 train own` for 7 steps; `recipe.yaml` beside it is the whole recipe.",
        "| image | image | 16 | patch | seen |",
        "| depth | depth | 16 | patch | predicted |",
        "1.25 M parameters; transformer of width 32, 1 blocks, 2 heads. Objectives: reconstruct (reconstruct).",
        "| depth from image | L1 error | 0.25 | 0.3 | mean |",
        "cc-by-4.0.",
        "states = model.encode(processor(image=[...])).sequence",
    ):
        assert line in text.splitlines(), line
    assert "Held-out" not in card(facts())
    assert "Nothing is recorded of how these weights were trained." in card(facts())


def test_converted_weights_keep_the_licence_of_their_source() -> None:
    text = card(facts(source="MAE", weights="mae_base.pth"))
    assert "# mae_base.pth" in text
    assert "Converted by `m3 convert` from `mae_base.pth`, weights in the format of MAE." in text
    assert text.endswith(
        "That of the weights it was converted from; converting changes nothing about it. The files did not state it.\n"
    )
    text = card(facts(source="MAE", weights="mae_base.pth", license="cc-by-nc-4.0"))
    assert "\nlicense: cc-by-nc-4.0\n" in text
    assert "\ncc-by-nc-4.0, that of the weights it was converted from; converting changes nothing" in text
    text = card(facts(recipe="own", steps=3, init="mae_base.pth"))
    assert "for 3 steps, starting from `mae_base.pth`;" in text
    assert "may be bound by the weights they started from and the data" in text


def test_it_tells_towers_and_tokenizers_and_calls_the_processor_so_that_python_takes_it() -> None:
    both = Facts(config(), 1, ("image", "depth"), ())
    both.config.towers = {"photo": {"modalities": ["image"], "width": 48, "depth": 2, "heads": 3}}
    text = card(both)
    assert "transformer of width 32, 1 blocks, 2 heads, tower `photo` of width 48, 2 blocks, 3 heads." in text
    both.config.towers["words"] = {"modalities": ["depth"]}
    assert "; tower `photo` of width 48, 2 blocks, 3 heads, tower `words` of width 768, 12 blocks, 12 heads." in card(
        both
    )
    both.config.modalities = {"rgb@224": IMAGE}
    assert 'states = model.encode(processor(**{"rgb@224": [...]})).sequence' in card(both)
    text = card(Facts(config(), 1, (), {"image"}))
    assert 'tokenizer = M3Tokenizer.from_pretrained("FOLDER OR HUB ID")\n' in text
    assert "codes = tokenizer.encode(processor(image=[...]))" in text
    assert "| image | image | 16 | patch | made codes |" in text


def test_it_is_saved_with_the_model_and_survives_loading(tmp_path: Path) -> None:
    model = M3Model(config(recipe="own", steps=7))
    model.save_pretrained(tmp_path)
    assert "# own" in (tmp_path / "README.md").read_text()
    row = {"task": "t", "measure": "m", "model": 1.0, "baseline": 2.0, "baseline_name": "b", "higher_is_better": False}
    model.describe(tmp_path, metrics=[row])
    again = M3Model.from_pretrained(tmp_path)
    assert again.config.about == {"recipe": "own", "steps": 7, "metrics": [row]}
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == (tmp_path / "README.md").read_text()
    assert "| t | m | 1 | 2 | b |" in (tmp_path / "README.md").read_text()


def test_a_card_of_ones_own_stays_and_one_without_content_goes(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Mine\n")
    write_card(tmp_path, facts())
    assert path.read_text() == "# Mine\n"
    path.write_text(f"a model that has been {EMPTY}\n")
    write_card(tmp_path, facts())
    assert OURS in path.read_text()
