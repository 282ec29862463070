"""`m3 export`: a checkpoint becomes the folder that the end of the run writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3 import M3Model, checkpoint, sharded
from m3.check import shrink
from m3.cli import main
from m3.recipe import load_recipe, recipe_from
from m3.train import train


def trained(out: Path, recipe: str = "mae_tiny", **changes: object) -> Path:
    settings: dict = shrink(load_recipe(recipe), out, 4).model_dump(mode="json", exclude_none=True)
    settings["train"] |= {"threads": 1, "save_every": 2, **changes}
    train(recipe_from(settings, recipe), is_shown=False)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("export") / "run", ema=0.9)


def test_the_last_checkpoint_becomes_what_the_run_itself_wrote(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["export", str(run), str(tmp_path / "model")]) == 0
    assert main(["export", str(run), str(tmp_path / "model_ema"), "--ema"]) == 0
    for name in ("model", "model_ema"):
        found = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        expected = {path.name: path.read_bytes() for path in (run / name).iterdir()}
        assert found.keys() == expected.keys()
        measured = {"README.md", "config.json"}  # the run also says what it measured
        assert {key for key in found if found[key] != expected[key]} <= measured
        about = M3Model.from_pretrained(run / name).config.about
        assert M3Model.from_pretrained(tmp_path / name).config.about == {k: about[k] for k in ("recipe", "steps")}
    last = checkpoint.folder_of(run, 4)
    assert capsys.readouterr().out == (
        f"{tmp_path / 'model'}: the trained weights of {last}\n"
        f"{tmp_path / 'model_ema'}: the averaged weights of {last}\n"
    )


def test_a_checkpoint_anywhere_is_enough(run: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint.folder_of(run, 2), tmp_path / "alone")
    assert main(["export", str(tmp_path / "alone"), str(tmp_path / "model")]) == 0
    model, last = (M3Model.from_pretrained(folder) for folder in (tmp_path / "model", run / "model"))
    assert model.config.about == {"recipe": "mae_tiny", "steps": 2}
    theirs = last.state_dict()
    assert any(not torch.equal(weight, theirs[name]) for name, weight in model.state_dict().items())


def test_codebooks_which_are_no_parameters_are_in_it(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "tokenizer_depth_vq")
    assert main(["export", str(run), str(tmp_path / "model")]) == 0
    written, expected = (folder / "model.safetensors" for folder in (tmp_path / "model", run / "model"))
    assert written.read_bytes() == expected.read_bytes()


def test_a_damaged_checkpoint_is_told_and_stays_and_the_one_before_it_is_taken(
    run: Path, tmp_path: Path, capsys
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "checkpoints", copy / "checkpoints")
    for step, is_left in ((4, True), (2, False)):
        folder = checkpoint.folder_of(copy, step)
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
        assert main(["export", str(copy), str(tmp_path / f"from {step}")]) == (0 if is_left else 2)
        told = capsys.readouterr()
        assert f"damaged checkpoint {folder}: model.safetensors is damaged (written: " in told.out
        assert folder.is_dir()
        assert (f"the trained weights of {checkpoint.folder_of(copy, 2)}" in told.out) == is_left
    assert told.err == f"m3 export: {copy} holds no undamaged checkpoint; bring the folder back from a copy.\n"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_parts_are_put_together_and_those_of_another_version_refused(run: Path, tmp_path: Path, capsys) -> None:
    folder = checkpoint.folder_of(tmp_path / "cut", 4)
    shutil.copytree(checkpoint.folder_of(run, 4), folder)
    files = {"model": folder / "model.safetensors", "ema": folder / "ema.safetensors"}
    parts = {f"{kind}.{name}": x for kind, file in files.items() for name, x in load_file(file).items()}
    for file in files.values():
        file.unlink()
    sharded.write(folder / sharded.FOLDER, parts)
    rewrite(folder, lambda state: state.update(files={}))
    for name, words in (("model", []), ("model_ema", ["--ema"])):
        assert main(["export", str(folder), str(tmp_path / name), *words]) == 0
        written, expected = (at / name / "model.safetensors" for at in (tmp_path, run))
        assert written.read_bytes() == expected.read_bytes()

    shutil.rmtree(folder / sharded.FOLDER)
    sharded.write(folder / sharded.FOLDER, {name: x for name, x in parts.items() if name != "ema.1"})
    assert main(["export", str(folder), str(tmp_path / "trained")]) == 0, "the trained weights are all there"
    assert main(["export", str(folder), str(tmp_path / "new"), "--ema"]) == 2
    assert (
        "another version of M3: the names or shapes of 1 weights are others, e.g. `ema.1`;" in capsys.readouterr().err
    )


def test_a_checkpoint_of_another_version_is_refused_with_a_sentence(run: Path, tmp_path: Path, capsys) -> None:
    def refused(change: Callable[[Path], None]) -> str:
        copy = tmp_path / "old"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint.folder_of(run, 4), checkpoint.folder_of(copy, 4))
        change(checkpoint.folder_of(copy, 4))
        assert main(["export", str(copy), str(tmp_path / "model")]) == 2
        assert not (tmp_path / "model").exists()
        start = f"m3 export: {checkpoint.folder_of(copy, 4)} was written by another version of M3: "
        end = f"; use the version that wrote it, which {copy / 'run.json'} names.\n"
        told = capsys.readouterr().err
        assert told.startswith(start)
        assert told.endswith(end)
        return told.removeprefix(start).removesuffix(end)

    def without_seed(folder: Path) -> None:
        rewrite(folder, lambda state: state["order"].pop("seed"))

    def with_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            file = folder / "model.safetensors"
            weights = load_file(file)
            change(weights)
            save_file(weights, file)
            rewrite(folder, lambda state: state["files"].update({file.name: checkpoint.checksum(file)}))

        return write

    assert refused(without_seed) == "its state.json has no 'seed'"
    name, another = "backbone.blocks.0.norm1.weight", "backbone.blocks.0.another.weight"
    for change in (
        lambda weights: weights.pop(name),
        lambda weights: weights.update({name: weights[name][:1].clone()}),  # which would fit by broadcasting
    ):
        assert refused(with_weights(change)) == f"the names or shapes of 1 weights are others, e.g. `model.{name}`"
    renamed = with_weights(lambda weights: weights.update({another: weights.pop(name)}))
    assert refused(renamed) == f"the names or shapes of 2 weights are others, e.g. `model.{another}`"


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    state = checkpoint.read_state(folder)
    change(state)
    (folder / checkpoint.STATE).write_text(json.dumps(state))


def test_mistakes_end_with_a_sentence(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "new")]) == 2
    assert f"{tmp_path} is neither a run with a checkpoint nor a checkpoint" in capsys.readouterr().err
    assert main(["export", str(run), str(run)]) == 2
    assert f"{run} exists already; name a new folder." in capsys.readouterr().err
    plain = trained(tmp_path / "plain")
    assert main(["export", str(plain), str(tmp_path / "new"), "--ema"]) == 2
    assert "holds no averaged weights, since train.ema was not set; leave out --ema." in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
