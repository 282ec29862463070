"""What of a training step is the trainer's own."""

import json
import time
from pathlib import Path

import torch

from m3.check import shrink
from m3.model import M3Model
from m3.overhead import COUNTED, overhead
from m3.recipe import load_recipe, recipe_from


def test_what_lies_outside_of_the_network_and_the_optimizer_counts(monkeypatch, capsys) -> None:
    settings = shrink(load_recipe("mae_tiny"), Path("unused")).model_dump(mode="json", exclude_none=True)
    settings["data"]["workers"] = 0
    methods = [getattr(owner, name) for owner, name in COUNTED]
    forward, prepare, step = M3Model.forward, M3Model.prepare, torch.optim.AdamW.step

    def slow(method, seconds):
        def slowly(*args, **kwargs):
            time.sleep(seconds)
            return method(*args, **kwargs)

        return slowly

    monkeypatch.setattr(M3Model, "forward", slow(forward, 0.6))
    monkeypatch.setattr(M3Model, "prepare", slow(prepare, 0.4))
    found = overhead(recipe_from(settings, "here"), 3, as_json=True)
    assert 0.35 < found["overhead"] * found["seconds_per_step"] < 0.9, "0.4 seconds and what the machine is busy with"
    assert found["seconds_per_step"] > 1.0
    assert 0 <= found["data_wait"] < 0.5
    assert json.loads(capsys.readouterr().out)["overhead"] == found["overhead"]
    monkeypatch.undo()
    assert [getattr(owner, name) for owner, name in COUNTED] == methods
    assert torch.optim.AdamW.step is step
