"""Activations that are computed again change no loss and no gradient, and take less memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3.build import meta_model
from m3.check import shrink
from m3.cost import cost
from m3.data.loader import Samples, first_batches
from m3.model import M3Model
from m3.recipe import Recipe, load_recipe, recipe_from
from m3.train import build_model, open_source


def small(name: str, again: bool) -> Recipe:
    settings = shrink(load_recipe(name), Path("unused")).model_dump(mode="json", exclude_none=True)
    settings["backbone"] |= {"drop_path": 0.3, "depth": 3}
    settings["train"]["checkpoint_activations"] = again
    return recipe_from(settings, name)


def step(recipe: Recipe) -> tuple[M3Model, Tensor, dict[str, Tensor], int]:
    """Return the loss, the gradients and the bytes that autograd holds between forward and backward."""
    model = build_model(recipe).train()
    samples = Samples(open_source(recipe, model, "train"), model.modalities, recipe.data, recipe.seed)
    prepared = model.prepare(next(first_batches(samples, 4, 4)))
    held: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = model(prepared).loss
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    size = sum(x.untyped_storage().nbytes() for place, x in held.items() if place not in own)
    loss.backward()
    return model, loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("mae_tiny", {"Block"}),
        ("clip_tiny", {"Block"}),
        ("fourm_tiny", {"Block", "DecoderBlock"}),
        ("audiomae_tiny", {"Block", "WindowBlock"}),
    ],
)
def test_losses_and_gradients_are_the_same(name: str, blocks: set[str]) -> None:
    _, loss, gradients, size = step(small(name, False))
    model, again, found, less = step(small(name, True))
    assert {type(layer).__name__ for layer in model.layers()} == blocks == set(model._no_split_modules)
    assert torch.equal(again, loss)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-6, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")
    assert any(layer.is_recomputed for layer in model.layers())
    assert less < 0.6 * size


def test_what_is_kept_is_counted_with_the_inputs_of_blocks() -> None:
    """By hand: of 12 blocks of ViT-S on 49 of 196 patches, each keeps (50, 384) float32 numbers."""
    model = meta_model(load_recipe("mae_vit_s"))
    whole = cost(model)
    model.recompute()
    less = cost(model)
    inputs = sum(50 * 384 * 4 for _ in range(12))
    assert inputs < less.activation_bytes < 0.25 * whole.activation_bytes
    assert less.forward_flops == whole.forward_flops
    assert 1.2 < less.train_flops / whole.train_flops < 1.34  # the blocks' forward pass once more
