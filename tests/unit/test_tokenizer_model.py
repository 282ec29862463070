"""A discrete tokenizer from training to use: better than a constant, saved, encoding data, frozen inside a model."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m3 import M3Error, M3Model, M3Processor, M3Tokenizer
from m3.data.world import WorldSource
from m3.modalities.semantic_map import SemanticMap
from m3.recipe import load_recipe, recipe_from
from m3.tokenize_data import tokenize
from m3.train import build_model, train
from m3.types import Batch

ROOT = Path(__file__).parents[2]
TINY = ["backbone.width=32", "backbone.depth=1", "backbone.heads=2", "objectives.autoencode.coder.depth=1"]
TINY += ["modalities.depth.size=16", "modalities.depth.tokenizer.size=4", "data.workers=0", "data.held_out=64"]
TINY += ["objectives.autoencode.quantiser.codes=32", "objectives.autoencode.quantiser.width=8", "data.samples=256"]
TINY += ["train.steps=60", "train.batch_size=16", "train.lr=3e-3", "train.warmup=5", "train.threads=1"]
TINY += ["train.trackers=[]", "train.precision=fp32", "train.save_every=60", "evaluate.samples=64"]
DATA = ["data.samples=25", "data.held_out=7"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "run"
    rows = train(load_recipe("tokenizer_depth_vq", [*TINY, f"out={out}"]))
    table = {row.task: row for row in rows}
    assert table["depth through codes"].model < 0.5 * table["depth through codes"].baseline
    assert table["depth, harder"].is_won
    assert table["depth codes in use"].model > 0.2
    assert 2 < table["depth codes"].model <= 32
    return out


def depth_maps(count: int = 3) -> torch.Tensor:
    """Slanted planes (count, 1, 16, 16) around 0, each another slope."""
    ramp = torch.linspace(-1.5, 1.5, 16).expand(16, 16)
    return torch.stack([ramp * (i + 1) / count + ramp.t() * i / count for i in range(count)]).unsqueeze(1)


# ------------------------------------------------------------------------------------------- the model


def test_a_tokenizer_has_no_backbone_and_says_so(run: Path) -> None:
    model = M3Model.from_pretrained(run / "model")
    assert model.backbone is None
    batch = M3Processor.from_pretrained(run / "model")(depth=np.ones((16, 16), np.float32))
    with pytest.raises(M3Error, match="the model has no backbone, since none of its objectives has a view"):
        model.encode(batch)


@pytest.mark.parametrize("coder", ["{type: vit, depth: 1}", "{type: conv, stages: 1, blocks: 1}"])
@pytest.mark.parametrize("quantiser", ["{type: fsq, levels: [4, 3, 3]}", "{type: vq, codes: 9, width: 6, heads: 2}"])
@pytest.mark.parametrize("kind", ["image", "semantic"])
def test_all_coders_quantisers_and_kinds_learn_together(coder: str, quantiser: str, kind: str) -> None:
    entries = {
        "image": "{type: image, size: 16, tokenizer: {type: patch, size: 4}}",
        "semantic": "{type: semantic_map, size: 16, classes: 6, tokenizer: {type: class_patch, size: 4}}",
    }
    loss = {"image": "mse", "semantic": "cross_entropy"}[kind]
    own = ["backbone.width=16", "backbone.depth=1", "backbone.heads=2", "modalities.depth=null"]
    own += [f"modalities.{kind}={entries[kind]}", f"objectives.autoencode.of={kind}"]
    own += [f"objectives.autoencode.loss={loss}", f"objectives.autoencode.coder={coder}"]
    model = build_model(load_recipe("tokenizer_depth_vq", [*own, f"objectives.autoencode.quantiser={quantiser}"]))
    raw = model.modalities[kind].blank(2)
    raw = (torch.arange(raw.numel()).reshape(raw.shape) * 7919 % 6).to(raw.dtype)
    signal = model.modalities[kind].normalise(raw)
    tokenizer = M3Tokenizer(model)
    model.requires_grad_(True).train()
    tokens = {kind: model.tokenizers[kind].tokenize(signal)}
    for _ in range(2):  # the first step of a learned codebook passes unquantised
        objective = model.objectives["autoencode"]
        loss = objective({}, tokens)
        loss.total().backward()
        assert {name: part.count for name, part in loss.parts.items()} == objective.counts({}, tokens)
        assert list(loss.parts) == list(objective.part_names)
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == []
        model.zero_grad()
        model.after_step()
    model.eval()
    indices = tokenizer.encode(signal)
    assert indices.dtype == torch.int64
    assert indices[0].numel() == torch.tensor(tokenizer.grid).prod()
    assert indices.min() >= 0
    assert indices.max() < tokenizer.codes
    assert tokenizer.decode(indices).shape == signal.shape


def test_convolutions_refuse_a_grid_that_cannot_be_halved() -> None:
    conv = "objectives.autoencode.coder={type: conv, stages: 4}"
    with pytest.raises(M3Error, match="halves a grid of rows and columns 4 times, which one of 8 x 8 tokens can't be"):
        build_model(load_recipe("tokenizer_depth_vq", [conv]))


def test_absent_maps_are_neither_counted_nor_learned_from() -> None:
    model = build_model(load_recipe("tokenizer_depth_vq", TINY)).train()
    objective = model.objectives["autoencode"]
    whole = model.tokenizers["depth"].tokenize(depth_maps(3))
    is_valid = torch.tensor([True, False, True]).unsqueeze(1).expand(-1, 16)
    part = type(whole)(whole.values, whole.positions, is_valid)
    loss = objective({}, {"depth": part})
    assert loss.parts["depth"].count == 2 * 16 * 16
    assert loss.parts["commitment"].count == 2 * 16
    assert objective.quantiser._seen.counts.sum() == 2 * 16
    assert objective.count_codes(part).sum() == 2 * 16


# --------------------------------------------------------------------------------------- M3Tokenizer


def test_codes_survive_saving_bit_for_bit(run: Path, tmp_path: Path) -> None:
    tokenizer = M3Tokenizer.from_pretrained(run / "model")
    assert (tokenizer.name, tokenizer.codes, tokenizer.grid) == ("depth", 32, (4, 4))
    indices = tokenizer.encode(depth_maps())
    assert indices.shape == (3, 16)
    assert indices.unique().numel() > 3
    tokenizer.save_pretrained(tmp_path / "copy")
    again = M3Tokenizer.from_pretrained(tmp_path / "copy")
    assert torch.equal(again.encode(depth_maps()), indices)
    assert torch.equal(again.decode(indices), tokenizer.decode(indices))


def test_codes_stand_for_their_own_scene(run: Path) -> None:
    tokenizer = M3Tokenizer.from_pretrained(run / "model")
    scenes = [WorldSource(5, "held_out", 8, 16, 16).read(i)["signals"]["depth"] for i in range(8)]
    truth = tokenizer.modality.normalise(torch.stack([tokenizer.modality.to_raw(x) for x in scenes]))
    decoded = tokenizer.decode(tokenizer.encode(truth))
    assert (decoded - truth).abs().mean() < 0.5 * (truth - truth.mean()).abs().mean()
    assert (decoded - truth).abs().mean() < (decoded.roll(1, 0) - truth).abs().mean(), "nearest to its own scene"


def test_a_batch_and_its_signal_give_the_same_codes(run: Path) -> None:
    tokenizer = M3Tokenizer.from_pretrained(run / "model")
    metres = np.arange(256, dtype=np.float32).reshape(16, 16)
    batch = M3Processor.from_pretrained(run / "model")(depth=[metres, metres.T])
    signal = tokenizer.modality.normalise(batch.signals["depth"])
    assert torch.equal(tokenizer.encode(batch), tokenizer.encode(signal))
    assert not torch.equal(*tokenizer.encode(batch))


def test_larger_maps_have_more_codes_and_come_back_at_their_size(run: Path) -> None:
    tokenizer = M3Tokenizer.from_pretrained(run / "model")
    large = torch.nn.functional.interpolate(depth_maps(), (32, 16))
    indices = tokenizer.encode(large)
    assert indices.shape == (3, 32)
    assert tokenizer.decode(indices, (32, 16)).shape == large.shape


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=r"there is no tokenizer in `.*nothing`.*give the model folder of a run"):
        M3Tokenizer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(M3Error, match="a model with one `autoencode` objective, this one has 0"):
        M3Tokenizer(build_model(load_recipe("mae_tiny", ["backbone.width=32", "backbone.heads=2"])))


# ---------------------------------------------------------------------------------------- m3 tokenize


def members(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {m.name: np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar}
    return found


def test_shards_hold_the_codes_of_every_sample(run: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tokenizer_depth_vq", [*TINY, *DATA])
    tokenize(str(run / "model"), recipe, tmp_path / "out", per_shard=10)
    assert len(list((tmp_path / "out" / "train" / "depth").glob("*.tar"))) == 3
    train_codes, held_out = (members(tmp_path / "out" / split / "depth") for split in ("train", "val"))
    assert (len(train_codes), len(held_out)) == (25, 7)
    codes = train_codes["world/train/000013.npy"]
    assert (codes.dtype, codes.shape) == (np.uint16, (4, 4))
    tokenizer = M3Tokenizer.from_pretrained(run / "model")
    scene = WorldSource(recipe.seed, "train", 25, 16, 16).read(13)["signals"]["depth"]
    expected = tokenizer.encode(M3Processor.from_pretrained(run / "model")(depth=scene))
    assert codes.flatten().tolist() == expected[0].tolist()
    # They are maps of class ids, so the modality of those reads them.
    part = SemanticMap(SemanticMap.Spec(size=4, classes=32))
    assert part.to_raw(codes).tolist() == codes.tolist()


def test_a_killed_run_goes_on_and_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", load_recipe("tokenizer_depth_vq", [*TINY, *DATA])
    tokenize(str(run / "model"), recipe, out, per_shard=10)
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.tar")}
    first, second = (out / "train" / "depth" / f"00000{i}.tar" for i in (0, 1))
    kept = first.stat().st_mtime_ns
    second.unlink()
    (second.parent / f".{second.name}.part").write_bytes(b"half of it")
    tokenize(str(run / "model"), recipe, out, per_shard=10)
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*.tar")} == files
    assert first.stat().st_mtime_ns == kept, "what was there is not made again"
    assert not list(out.rglob("*.part"))


def test_two_processes_share_the_shards(run: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tokenizer_depth_vq", [*TINY, *DATA])
    tokenize(str(run / "model"), recipe, tmp_path / "one", per_shard=10)
    # On CPUs `accelerate launch` starts a single process; torch's launcher sets the same variables for each.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "m3.cli", "tokenize", str(run / "model"), "tokenizer_depth_vq", str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [*command, "--per-shard", "10", *TINY, *DATA]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "process 1 of 2: 10 samples" in done.stdout
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.tar")} for f in tmp_path.iterdir())
    assert one == two


def test_other_codes_are_not_mixed_in(run: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tokenizer_depth_vq", [*TINY, *DATA])
    tokenize(str(run / "model"), recipe, tmp_path, per_shard=10)
    with pytest.raises(M3Error, match="holds codes made with another `per_shard` \\(10 there, 5 here\\)"):
        tokenize(str(run / "model"), recipe, tmp_path, per_shard=5)


def test_unreadable_samples_are_left_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "data" / "depth").mkdir(parents=True)
    for i in range(20):
        np.save(tmp_path / "data" / "depth" / f"{i:02d}.npy", np.arange(256.0).reshape(16, 16) + i)
    (tmp_path / "data" / "depth" / "07.npy").write_bytes(b"no array")
    recipe = load_recipe(
        "tokenizer_depth_vq", [*TINY, "data.source=folder", f"data.root={tmp_path / 'data'}", "data.held_out=0"]
    )
    tokenize(str(run / "model"), recipe, tmp_path / "out", per_shard=50)
    assert len(members(tmp_path / "out" / "train" / "depth")) == 19
    assert "1 unreadable samples were left out" in capsys.readouterr().out


# --------------------------------------------------------------------------------- codes inside a model


def with_codes(run: Path, out: Path) -> dict:
    decoder = {"type": "cross_decoder", "width": 16, "depth": 1, "heads": 2}
    return {
        "name": "codes",
        "out": str(out),
        "modalities": {
            "image": {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 4}},
            "depth": {"type": "depth", "size": 16, "tokenizer": {"type": "codes", "path": str(run / "model")}},
        },
        "backbone": {"width": 32, "depth": 1, "heads": 2},
        "objectives": {
            "reconstruct": {
                "type": "reconstruct",
                "masking": {"type": "dirichlet", "visible": 8},
                "decoder": decoder,
                "targets": {"image": {}, "depth": {"loss": "cross_entropy"}},
            }
        },
        "data": {"samples": 64, "held_out": 8, "workers": 0},
        "train": {"steps": 3, "batch_size": 8, "threads": 1, "trackers": [], "precision": "fp32"},
        "evaluate": {
            "samples": 8,
            "preview_rows": 2,
            "tasks": {"depth": {"target": "depth", "visible": {"image": 1.0}, "baseline": "constant"}},
        },
    }


def test_a_model_trains_on_codes_and_keeps_the_tokenizer_out_of_its_weights(run: Path, tmp_path: Path) -> None:
    before = load_file(run / "model" / "model.safetensors")
    rows = train(recipe_from(with_codes(run, tmp_path / "run"), "test"))
    assert rows[0].measure == "L1 error"
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not any("autoencode" in key or "quantiser" in key for key in saved)
    assert saved["tokenizers.depth.embedding.weight"].shape == (32, 32)
    model = M3Model.from_pretrained(tmp_path / "run" / "model")
    assert {name for name, _ in model.named_parameters()} == set(saved)
    batch = M3Processor.from_pretrained(tmp_path / "run" / "model")(depth=np.eye(16, dtype=np.float32))
    codes = M3Tokenizer.from_pretrained(run / "model").encode(batch)
    assert torch.equal(model.tokenise(batch)["depth"].values.squeeze(-1), codes)
    assert model.reconstruct(batch).predicted["depth"].shape == (1, 1, 16, 16)
    after = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_another_tokenizer_in_the_same_place_is_noticed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "moved")
    model = build_model(recipe_from(with_codes(tmp_path / "moved", tmp_path / "out"), "test"))
    model.save_pretrained(tmp_path / "model")
    pinned = json.loads((tmp_path / "model" / "config.json").read_text())["modalities"]["depth"]["tokenizer"]["hash"]
    weights = tmp_path / "moved" / "model" / "model.safetensors"
    state = load_file(weights)
    state["objectives.autoencode.output.bias"] += 1
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(M3Error, match=f"is not the one this model was built with \\(hash .*, not {pinned}\\)"):
        M3Model.from_pretrained(tmp_path / "model")


def test_a_model_that_moved_away_from_its_tokenizer_is_built_and_says_what_it_lacks(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "moved")
    model = build_model(recipe_from(with_codes(tmp_path / "moved", tmp_path / "out"), "test"))
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "moved")
    loaded = M3Model.from_pretrained(tmp_path / "model")
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    batch = Batch({"depth": torch.eye(16).unsqueeze(0)}, torch.zeros(1, dtype=torch.long))
    lacking = r"there is no tokenizer in `.*moved/model`.*; give the model folder of a run .* starts at the current"
    with pytest.raises(M3Error, match=lacking):
        loaded.reconstruct(batch)
    shutil.copytree(run, tmp_path / "moved")
    assert loaded.reconstruct(batch).predicted["depth"].shape == (1, 1, 16, 16)
    with pytest.raises(M3Error, match=lacking):
        build_model(recipe_from(with_codes(tmp_path / "nowhere" / "moved", tmp_path / "out"), "test"))


def test_a_modality_with_other_settings_is_refused(run: Path, tmp_path: Path) -> None:
    settings = with_codes(run, tmp_path)
    settings["modalities"]["depth"]["size"] = 32
    with pytest.raises(M3Error, match="give the modality the settings that the tokenizer was trained with"):
        build_model(recipe_from(settings, "test"))


def test_flags_of_codes_are_spread_over_their_places(run: Path, tmp_path: Path) -> None:
    model = build_model(recipe_from(with_codes(run, tmp_path), "test"))
    tokens = model.tokenise(M3Processor(model.config.modalities)(depth=np.eye(16, dtype=np.float32)))["depth"]
    is_token = (torch.arange(16) % 5 == 2).unsqueeze(0)
    spread = model.spread("depth", is_token, tokens, (16, 16))
    assert spread.shape == (1, 16, 16)
    assert torch.equal(spread[0, ::4, ::4].flatten(), is_token[0])
    assert torch.equal(spread[0, 3::4, 3::4].flatten(), is_token[0])


def test_a_tokenizer_that_was_saved_in_half_precision_computes_in_float32(run: Path, tmp_path: Path) -> None:
    model = M3Model.from_pretrained(run / "model")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer = M3Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.model.dtype == torch.float32
    codes = tokenizer.encode(depth_maps())
    assert torch.equal(tokenizer.encode(depth_maps().double()), codes)
