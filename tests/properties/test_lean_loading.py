"""Loading takes the memory of the weights and little more; dtype, device_map and shards work as in transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from m3 import M3Config, M3Model, convert

SCRIPT = """
import json, sys, time
import torch
from m3 import M3Model, convert
torch.set_num_threads(1)
small, path, kind = sys.argv[1:]
load = M3Model.from_pretrained if kind == "ours" else convert.load
load(small)  # what is imported and set up on the way is no memory of the model
def memory(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) * 1024

open("/proc/self/clear_refs", "w").write("5")  # the highest mark starts anew
before = memory("VmRSS")
start = time.perf_counter()
model = load(path)
seconds = time.perf_counter() - start
weights = sum(p.numel() * p.element_size() for p in model.parameters())
sum(float(p.detach().sum()) for p in model.parameters())  # what is only mapped is read now
print(json.dumps({"factor": (memory("VmHWM") - before) / weights, "weights": weights, "seconds": seconds}))
"""


def vit(width: int, depth: int, heads: int) -> M3Model:
    image = {"type": "image", "size": 224, "tokenizer": {"type": "patch", "size": 16}, "positions": {"type": "learned"}}
    backbone = {"width": width, "depth": depth, "heads": heads, "class_positions": True}
    return M3Model(M3Config(modalities={"image": image}, backbone=backbone, objectives={}))


@pytest.mark.parametrize("kind", ["ours", "timm"])
@pytest.mark.parametrize(
    "size", [(384, 12, 6), pytest.param((1024, 24, 16), marks=pytest.mark.slow)], ids=["ViT-S", "ViT-L"]
)
def test_a_vit_loads_with_less_than_1_3_times_its_weights(size, kind: str, tmp_path: Path) -> None:
    for name, model in {"small": vit(192, 1, 3), "large": vit(*size)}.items():
        if kind == "ours":
            model.save_pretrained(tmp_path / name)
        else:
            (tmp_path / name).mkdir()
            convert.save(model, tmp_path / name, "vit")
    del model
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "small"), str(tmp_path / "large"), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 < found["factor"] < 1.3, found


@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_a_model_is_built_once_and_without_memory(tmp_path: Path, kind: str, monkeypatch) -> None:
    vit(192, 1, 3).save_pretrained(tmp_path / "ours")
    (tmp_path / "timm").mkdir()
    convert.save(vit(192, 1, 3), tmp_path / "timm", "vit")
    built, build = [], M3Model.__init__

    def counted(self: M3Model, *given, **options) -> None:
        build(self, *given, **options)
        built.append({parameter.device.type for parameter in self.parameters()})

    monkeypatch.setattr(M3Model, "__init__", counted)
    (M3Model.from_pretrained if kind == "ours" else convert.load)(tmp_path / kind)
    assert built == [{"meta"}]


def test_dtype_device_map_and_shards_behave_as_in_transformers(tmp_path: Path) -> None:
    model = vit(192, 2, 3)
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    shards = list((tmp_path / "shards").glob("*.safetensors"))
    largest = max(x.numel() * 4 for x in model.parameters())  # one tensor is never cut
    assert len(shards) > 2
    assert max(shard.stat().st_size for shard in shards) < max(1e6, largest) + 1e4
    again = M3Model.from_pretrained(tmp_path / "shards", low_cpu_mem_usage=True)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    half = M3Model.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.device == torch.device("cpu")
    nowhere = M3Model.from_pretrained(tmp_path / "shards", device_map="meta")
    assert {p.device.type for p in nowhere.parameters()} == {"meta"}
    half.save_pretrained(tmp_path / "half")
    assert {p.dtype for p in M3Model.from_pretrained(tmp_path / "half", dtype="auto").parameters()} == {torch.bfloat16}
    expected = model.backbone.blocks[0].mlp.fc1.weight.bfloat16()  # type: ignore[union-attr]
    assert torch.equal(half.backbone.blocks[0].mlp.fc1.weight, expected)  # type: ignore[union-attr]


def test_a_foreign_checkpoint_in_shards_is_one_model(tmp_path: Path) -> None:
    model = vit(192, 1, 3)
    convert.save(model, tmp_path / "whole.safetensors", "vit")
    whole = convert.load(tmp_path / "whole.safetensors")
    state, names = dict(whole.state_dict()), {}
    folder = tmp_path / "shards"
    folder.mkdir()
    convert.save(model, tmp_path / "one", "vit")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "one" / "model.safetensors")
    for number, keys in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        save_file({key: tensors[key] for key in keys}, folder / f"part{number}.safetensors")
        names |= dict.fromkeys(keys, f"part{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = convert.load(folder).state_dict()
    assert all(torch.equal(found[name], x) for name, x in state.items())
