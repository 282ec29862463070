"""A model goes to the Hub and comes back by its name, through transformers' own `push_to_hub` and `from_pretrained`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from m3.card import OURS

HERE = Path(__file__).parent

SCRIPT = """
import torch
from transformers import AutoModel, AutoProcessor
from m3 import M3Config, M3Model, M3Processor
from m3.recipe import load_recipe

recipe = load_recipe("recipes/quickstart.yaml", [])
torch.manual_seed(1)
sections = recipe.model_dump(mode="json")
model = M3Model(M3Config(**{key: sections[key] for key in ("modalities", "backbone", "objectives")}))
processor = M3Processor(model.config.modalities)
assert model.push_to_hub("mine").repo_url.repo_id == "someone/mine"
processor.push_to_hub("mine")
again = AutoModel.from_pretrained("someone/mine")
assert type(again) is M3Model and type(AutoProcessor.from_pretrained("someone/mine")) is M3Processor
for (name, x), y in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
    assert torch.equal(x, y), name
photo = torch.arange(3 * 64 * 64, dtype=torch.uint8).reshape(64, 64, 3).numpy()
batch = M3Processor.from_pretrained("someone/mine")(image=photo)
assert torch.equal(model.encode(batch).sequence, again.encode(batch).sequence)
"""


@pytest.fixture
def hub():
    """A Hub on this machine, while the test runs."""
    sys.path.insert(0, str(HERE))
    from stand_in_hub import serve

    sys.path.remove(str(HERE))
    server = serve()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_pushed_model_comes_back_from_the_hub_with_equal_outputs(hub, tmp_path):
    host, port = hub.server_address
    place = {"HF_ENDPOINT": f"http://{host}:{port}", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_" + "x" * 34}
    command = [sys.executable, "-W", "error::UserWarning:m3", "-c", SCRIPT]
    done = subprocess.run(
        command, env={**os.environ, **place}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    files = hub.RequestHandlerClass.files["someone/mine"]
    assert {"config.json", "model.safetensors", "README.md"} <= set(files)
    assert OURS.encode() in files["README.md"]  # not the card without content that transformers makes
    assert any(name.startswith(("processor_config", "preprocessor_config")) for name in files)
    assert not any(name.endswith((".bin", ".pth", ".pt", ".pkl")) for name in files)
