"""Recipes: what is refused and with which sentence, inheritance, overrides, and that a dump can be run."""

from pathlib import Path

import pytest
import yaml

from m3.errors import M3Error
from m3.overrides import merge, with_overrides
from m3.recipe import Recipe, dump_recipe, find_recipe, load_recipe, recipe_from
from m3.train import build_model

TEXT = """
modalities:
  image: {type: image, size: [16, 24], tokenizer: {type: patch, size: 8}}
backbone: {width: 16, depth: 1, heads: 2}
objectives:
  reconstruct: {type: reconstruct, decoder: {type: self_decoder, width: 8, depth: 1, heads: 2}, targets: {image: {}}}
train: {steps: 3, lr: 1e-4}
evaluate:
  tasks:
    hidden: {target: image}
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("train: {", "trian: {", r"^mine.yaml: trian: unknown key. Did you mean `train`\?|train: this key is required"),
        ("lr: 1e-4", "stepz: 7", r"^mine.yaml: train.stepz: unknown key. Did you mean `steps`\?$"),
        ("heads: 2}\nobj", "headz: 2}\nobj", r"backbone.headz: unknown key. Did you mean `heads`\?"),
        ("steps: 3", "steps: three", "^mine.yaml: train.steps: input should be a valid integer.*, got 'three'.$"),
        ("steps: 3", "steps: 3.5", "train.steps: input should be a valid integer.* fractional part, got 3.5.$"),
        ("steps: 3", "steps: 3, epochs: 2", "train: give either `steps` or `epochs`, not both and not neither.$"),
        ("steps: 3, ", "", "train: give either `steps` or `epochs`, not both and not neither.$"),
        ("steps: 3, ", "steps: 3, precision: fp8, ", "train.precision: input should be 'auto', 'bf16' or 'fp32', got"),
        ("train: {steps: 3, lr: 1e-4}", "", "^mine.yaml: train: this key is required; add it.$"),
        ("heads: 2}\nobj", "heads: 3}\nobj", "backbone: width 16 is not divisible by heads 3; change one of them.$"),
        ("steps: 3", "steps: 3, steps: 4", "^mine.yaml: not readable as YAML: the key `steps` stands twice.* line 7"),
        ("train: {", "train: {{", "^mine.yaml: not readable as YAML: "),
    ],
)
def test_a_wrong_file_is_refused_with_file_place_and_remedy(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in TEXT
    with pytest.raises(M3Error, match=sentence):
        load_recipe(write(tmp_path, TEXT.replace(old, new)))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(M3Error, match=r"^mine.yaml: a recipe is a set of keys and values, got (list|str|NoneType).$"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("modalities.image.sizee=8", r"^modalities.image.sizee: unknown key. Did you mean `size`\?$"),
        ("modalities.image.tokenizer.sise=8", r"^modalities.image.tokenizer.sise: unknown key. Did you mean `size`\?$"),
        ("modalities.image.size=-8", "^modalities.image.size: input should be greater than 0, got -8.$"),
        ("modalities.image.type=imagine", r"^modalities.image.type: `imagine` in `modalities` is not .* mean `image`"),
        ("modalities.image.type=lidar:Lidar", "^modalities.image.type: the plugin `lidar:Lidar` .* package `lidar`.$"),
        ("modalities.image.type=lidar.Lidar", "^modalities.image.type: `lidar.Lidar` in `modalities` is not known"),
        ("modalities.image.type=7", "^modalities.image.type: "),
        ("modalities.image.tokenizer=patch", "^modalities.image.tokenizer: "),
        (
            "modalities.image.type=null",
            "^modalities.image: there is no `type`; add one. Valid: `.*`depth`.*`image`, ",
        ),
        ("modalities.image.tokenizer=null", "^modalities.image.tokenizer: this key is required; add it, e.g. "),
        ("objectives.reconstruct.decoder.heads=3", "divisi.*heads"),
        ("backbone={width: 2, heads: 1}", "width 2 is too small for sin-cos positions over 2 axes; use at least 4"),
    ],
)
def test_a_wrong_part_is_refused_when_the_model_is_built(tmp_path: Path, override: str, sentence: str) -> None:
    recipe = load_recipe(write(tmp_path, TEXT), [override])
    with pytest.raises(M3Error, match=sentence):
        build_model(recipe)


def test_a_missing_recipe_names_the_nearest_packaged_one(tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=r"no recipe `quikstart`, neither a file nor .*Did you mean `quickstart`\?"):
        find_recipe("quikstart")
    with pytest.raises(M3Error, match=r"there is no recipe `mae_vit_z.yaml`.*Did you mean `mae_vit_[bhls]`\?"):
        load_recipe(write(tmp_path, "base: mae_vit_z.yaml"))


def test_a_circle_of_bases_is_named(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml", "a.yaml")
    write(tmp_path, "base: a.yaml", "b.yaml")
    with pytest.raises(M3Error, match=r"^[ab].yaml: `base` leads back to itself; break the circle.$"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train"])
def test_an_override_without_key_or_sign_is_refused(override: str) -> None:
    with pytest.raises(M3Error, match=f"^`{override}` is no override; write key.path=value, e.g. train.steps=1000.$"):
        load_recipe("quickstart", [override])


def test_an_override_that_is_no_yaml_is_refused_with_its_text() -> None:
    with pytest.raises(M3Error, match=r"train.betas=\[0.9"):
        load_recipe("quickstart", ["train.betas=[0.9"])


def test_an_empty_mapping_that_would_change_nothing_is_refused() -> None:
    """Settings are merged; nothing behind the sign empties them."""
    settings = {"evaluate": {"tasks": {"shape": {"type": "knn"}}}, "data": {"options": {}}}
    with pytest.raises(M3Error, match=r"`evaluate.tasks={}` changes nothing, .* write `evaluate.tasks=` to empty it"):
        with_overrides(settings, ["evaluate.tasks={}"])
    assert with_overrides(settings, ["evaluate.tasks="])["evaluate"] == {}
    assert with_overrides(settings, ["data.options={}", "data.augment={}"])["data"] == {"options": {}, "augment": {}}


def test_merge_keeps_removes_and_replaces() -> None:
    base = {"a": 1, "b": {"c": 2, "d": 3}, "part": {"type": "x", "p": 5}, "same": {"type": "x", "p": 5}}
    changes = {"a": None, "b": {"c": 7}, "part": {"type": "y", "q": 6}, "same": {"type": "x", "q": 6}, "new": [1, 2]}
    assert merge(base, changes) == {
        "b": {"c": 7, "d": 3},
        "part": {"type": "y", "q": 6},
        "same": {"type": "x", "p": 5, "q": 6},
        "new": [1, 2],
    }
    assert base["b"] == {"c": 2, "d": 3}, "the base must stay as it is"


def test_a_child_changes_removes_and_replaces_what_its_base_says(tmp_path: Path) -> None:
    write(tmp_path, "name: grandparent\n" + TEXT, "base.yaml")
    child = """
base: base.yaml
modalities:
  image: {size: [8, 8]}
objectives:
  reconstruct: {decoder: {type: cross_decoder, depth: 0}}
train: {steps: null, epochs: 2.5}
"""
    recipe = load_recipe(write(tmp_path, child, "child.yaml"))
    assert recipe.name == "child"
    assert recipe.modalities == {"image": {"type": "image", "size": [8, 8], "tokenizer": {"type": "patch", "size": 8}}}
    assert recipe.objectives["reconstruct"]["decoder"] == {"type": "cross_decoder", "depth": 0}
    assert (recipe.train.steps, recipe.train.epochs, recipe.train.lr) == (None, 2.5, 1e-4)


def test_a_base_may_be_a_packaged_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "base: quickstart\ntrain: {steps: 5}\n"))
    whole = load_recipe("quickstart")
    assert recipe.name == "mine"
    assert recipe.train == whole.train.model_copy(update={"steps": 5})
    assert recipe.modalities == whole.modalities


def test_overrides_are_applied_in_order_with_yaml_values(tmp_path: Path) -> None:
    overrides = ["train.steps=9", "train.steps=11", "data.crop=[0.25, 1]", "evaluate.tasks.new.target=image"]
    recipe = load_recipe(
        write(tmp_path, TEXT), [*overrides, "out=some=where", "train.betas=[0.8,0.9]", "train.lr=2e-3"]
    )
    assert (recipe.train.steps, recipe.train.lr, recipe.train.betas) == (11, 2e-3, (0.8, 0.9))
    assert recipe.data.crop == (0.25, 1.0)
    assert list(recipe.evaluate.tasks) == ["hidden", "new"]
    assert recipe.folder == Path("some=where")


def test_null_means_null_where_null_is_a_value() -> None:
    """`lr_per: null` uses `lr` as it is; written over a base or on the command line, it must not mean 256."""
    assert load_recipe("mae_vit_b").train.lr_per == 256
    assert load_recipe("mae_vit_b", ["train.lr_per=null"]).train.lr_per is None


def test_a_number_with_exponent_and_no_dot_is_a_number(tmp_path: Path) -> None:
    assert yaml.safe_load("1e-4") == "1e-4", "YAML 1.1 reads it as text, so somebody must turn it into a number"
    assert load_recipe(write(tmp_path, TEXT)).train.lr == 1e-4
    assert load_recipe(write(tmp_path, TEXT), ["train.eps=1e-6"]).train.eps == 1e-6


@pytest.mark.parametrize("name", ["quickstart", "mae_tiny", "multimae_vit_b"])
def test_a_dumped_recipe_is_the_same_when_read(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["train.lr=3e-5", "data.source=folder", f"data.root={tmp_path}", "out=über/all"])
    text = dump_recipe(recipe)
    read = load_recipe(write(tmp_path, text, "another_name.yaml"))
    assert isinstance(read, Recipe)
    assert read == recipe
    assert dump_recipe(read) == text
    assert list(read.modalities) == list(recipe.modalities), "the order of the modalities is that of the tokens"
    assert "base" not in yaml.safe_load(text)


def test_the_root_of_the_data_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write(tmp_path, TEXT), ["data.source=folder", "data.root=photos"])
    assert recipe.data.root == str(tmp_path.resolve() / "photos")


def test_settings_do_not_change_after_they_are_read() -> None:
    recipe = recipe_from(yaml.safe_load(TEXT), "here", default_name="given")
    assert recipe.name == "given"
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 4
