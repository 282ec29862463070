"""Files that are no checkpoint, damaged, of something else, or that would run code: one sentence, nothing runs."""

from __future__ import annotations

import os
import pickle
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from m3 import convert
from m3.cli import main
from m3.errors import M3Error

BLOCK = ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def vit() -> dict[str, torch.Tensor]:
    """The smallest ViT in timm's names; heads follow from the width."""
    width, state = 192, {"pos_embed": torch.randn(1, 5, 192), "cls_token": torch.randn(1, 1, 192)}
    state |= {"patch_embed.proj.weight": torch.randn(width, 3, 4, 4), "patch_embed.proj.bias": torch.randn(width)}
    shapes = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    shapes |= {"mlp.fc1": (2 * width, width), "mlp.fc2": (width, 2 * width)}
    for name, shape in shapes.items():
        state[f"blocks.0.{name}.weight"], state[f"blocks.0.{name}.bias"] = torch.randn(shape), torch.randn(shape[0])
    return state | {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_bare", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(is_bare: bool, tmp_path: Path, capsys) -> None:
    trap, file = tmp_path / "written", tmp_path / "model.pth"
    if is_bare:
        file.write_bytes(pickle.dumps({"trap": Harmful(trap)}, protocol=2))
    else:
        torch.save({"model": vit(), "trap": Harmful(trap)}, file)
    pickle.loads(pickle.dumps(Harmful(tmp_path / "proof")))  # the trap works
    assert (tmp_path / "proof").exists()
    assert main(["convert", str(file), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "mkdir, and reading it could run code: only tensors, numbers and text are read" in said
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_the_reader_does_not_know_is_refused_as_one(tmp_path: Path) -> None:
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps({"trap": Harmful(tmp_path / "written")}, protocol=4))
    with pytest.raises(M3Error, match=r"model.pkl holds Python objects, and reading it could run code"):
        convert.load(file)
    assert not (tmp_path / "written").exists()


def test_files_that_are_something_else_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("This is no checkpoint.\n" * 20)
    with pytest.raises(M3Error, match=r"text.pth is no checkpoint that PyTorch can read"):
        convert.load(tmp_path / "text.pth")
    save_file(vit(), tmp_path / "vit.safetensors")
    whole = (tmp_path / "vit.safetensors").read_bytes()
    for share in (0.0001, 0.01, 0.5, 0.99):
        (tmp_path / "cut.safetensors").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(M3Error, match=r"cut.safetensors can't be read as safetensors .* damaged or cut"):
            convert.load(tmp_path / "cut.safetensors")
    torch.save(vit(), tmp_path / "vit.pth")
    whole = (tmp_path / "vit.pth").read_bytes()
    for share in (0.01, 0.5, 0.99):
        (tmp_path / "cut.pth").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(M3Error, match=r"cut.pth"):
            convert.load(tmp_path / "cut.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(M3Error, match="holds no tensors under names"):
        convert.load(tmp_path / "empty.pth")
    with pytest.raises(M3Error, match=r"nothing.pth is not there"):
        convert.load(tmp_path / "nothing.pth")
    with pytest.raises(M3Error, match=r"holds \d+ files of weights; give a file of weights"):
        convert.load(tmp_path)


def test_a_safetensors_file_or_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(M3Error, match=r"empty.safetensors is empty: it holds no tensors"):
        convert.load(tmp_path / "empty.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(M3Error, match=r"folder holds no files of weights; give a file of weights, or a folder with"):
        convert.load(tmp_path / "folder")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_settings_that_are_damaged_are_named(tmp_path: Path, name: str) -> None:
    save_file(vit(), tmp_path / "model.safetensors")
    for text, said in (("{ no", "is no JSON"), ("[1]", "is JSON, but holds no settings by name")):
        (tmp_path / name).write_text(text)
        with pytest.raises(M3Error, match=rf"{name} {said}"):
            convert.load(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe{")
    with pytest.raises(M3Error, match=rf"{name} is no JSON"):
        convert.load(tmp_path)
    if "index" in name:
        (tmp_path / name).write_text("{}")
        with pytest.raises(M3Error, match=rf"{name} tells no `weight_map`"):
            convert.load(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("decoder.decoder_embed.weight", "vit.embeddings.cls_token"),
        ("videomae.encoder.layer.0.attention.attention.q_bias",),
    ],
    ids=["ViTMAE", "VideoMAE"],
)
def test_weights_of_transformers_need_their_config(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Its safetensors files carry metadata, which are no config."""
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in names}, file, metadata={"format": "pt"})
    for path in (file, tmp_path):
        with pytest.raises(M3Error, match=r"its `config\.json` is needed too; give the folder that holds both"):
            convert.load(path)
    kind = "videomae" if "videomae" in names[0] else "vit_mae"
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}", "hidden_size": "wide"}}')
    with pytest.raises(M3Error, match=r"transformers does not take its `config\.json` \(.*hidden_size.*\); fetch it"):
        convert.load(tmp_path)


def test_a_model_of_another_kind_is_named_by_what_it_holds(tmp_path: Path) -> None:
    unet = {
        "down_blocks.0.resnets.0.conv1.weight": torch.zeros(4, 4, 3, 3),
        "time_embedding.linear_1.bias": torch.zeros(4),
    }
    save_file(unet, tmp_path / "unet.safetensors")
    with pytest.raises(
        M3Error, match=r"has names such as down_blocks.*, which are those of no format that is read .*vit_mae"
    ):
        convert.load(tmp_path / "unet.safetensors")
    save_file(vit(), tmp_path / "vit.safetensors")
    with pytest.raises(M3Error, match=r"which are those of no format that is read \(vit_mae\)"):
        convert.load(tmp_path / "vit.safetensors", format="vit_mae")
    with pytest.raises(M3Error, match=r"`vitt` is no format.*Did you mean `vit`"):
        convert.load(tmp_path / "vit.safetensors", format="vitt")


def test_what_is_missing_or_left_over_is_named(tmp_path: Path) -> None:
    state = vit()
    save_file(state | {"blocks.0.adapter.down": torch.zeros(2, 2)}, tmp_path / "more.safetensors")
    with pytest.raises(M3Error, match=r"no place for `blocks.0.adapter.down`"):
        convert.load(tmp_path / "more.safetensors")
    del state["blocks.0.norm2.bias"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(M3Error, match=r"`blocks.0.norm2.bias` is missing"):
        convert.load(tmp_path / "less.safetensors")


def test_the_command_says_what_it_found_and_how_to_load_it(tmp_path: Path, capsys) -> None:
    save_file(vit(), tmp_path / "vit.safetensors")
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "vit.safetensors"), str(out), "modalities.image.channels=1"]) == 0
    lines = capsys.readouterr().out
    said = " ".join(lines.split())
    assert "is ViT in timm's names" in said
    assert "note backbone.heads=3" in said
    assert "goes from 3 x 4 x 4 to 1 x 4 x 4 (every channel gets the mean of the old ones x 3 / 1)" in said
    assert "18 tensors are used, 0 left out." in said
    assert lines.splitlines()[-4].endswith(f"parameters are in {out}. Load it:")
    loaded: dict = {}
    exec(textwrap.dedent("\n".join(lines.splitlines()[-3:])), loaded)
    assert loaded["model"].config.modalities["image"]["channels"] == 1
    assert loaded["processor"].modalities.keys() == {"image"}
    assert main(["convert", str(out), str(tmp_path / "back.safetensors"), "--to", "vit"]) == 0
    assert convert.load(tmp_path / "back.safetensors").config.modalities["image"]["channels"] == 1
    assert main(["convert", str(out), str(tmp_path / "back"), "--to", "mae"]) == 2
    assert "MAE is one objective `reconstruct`" in capsys.readouterr().err


def test_where_the_model_is_written_must_be_a_folder_that_is_not_the_source(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    save_file(vit(), tmp_path / "in" / "model.safetensors")
    before = (tmp_path / "in" / "model.safetensors").read_bytes()
    for source, out, said in (
        ("in", "ours.safetensors", "must be a folder, as our model is several files; to write another format say --to"),
        ("in", "in/model.safetensors", "must be a folder"),
        ("in", "in", "holds the weights that are read; give another folder"),
        ("in/model.safetensors", "in", "holds the weights that are read; give another folder"),
    ):
        assert main(["convert", str(tmp_path / source), str(tmp_path / out)]) == 2
        assert said in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "in" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "---\ntags:\n- image\nlicense: cc-by-nc-4.0\n---\n# A model\nlicense: mit\n"),
        ("config.json", '{"architecture": "vit", "pretrained_cfg": {"license": "cc-by-nc-4.0"}}'),
    ],
)
def test_the_licence_beside_the_weights_goes_into_the_card(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "in").mkdir()
    save_file(vit(), tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / name).write_text(text)
    convert.load(tmp_path / "in").save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0\n" in card
    assert "# in\n" in card
    (tmp_path / "in" / name).write_text("{}" if name.endswith("json") else "# A model\nlicense: mit\n")
    convert.load(tmp_path / "in").save_pretrained(tmp_path / "out")
    assert "license: other\n" in (tmp_path / "out" / "README.md").read_text()
