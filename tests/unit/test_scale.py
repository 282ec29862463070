"""Memory and communication of several processes, against sums by hand."""

import pytest

from m3.build import meta_model
from m3.cli import main
from m3.cost import cost
from m3.recipe import load_recipe
from m3.scale import shares


def test_ddp_holds_all_and_sends_gradients_twice() -> None:
    recipe = load_recipe("mae_vit_s", ["train.batch_size=64", "train.micro_batch=null", "train.precision=fp32"])
    model = meta_model(recipe)
    count = sum(p.numel() for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    ddp = shares(recipe, model, 8)["eight_gpus (DDP)"]
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (4 * count, 8 * count, 8 * count)
    assert ddp.activations == 8 * cost(model).activation_bytes
    assert ddp.sent == int(2 * 7 / 8 * 4 * count)
    alone = shares(recipe, model, 1)["eight_gpus (DDP)"]
    assert (alone.gradients, alone.sent) == (4 * count, 0)


def test_fsdp_shares_out_the_state_and_gathers_block_by_block() -> None:
    recipe = load_recipe("mae_vit_s", ["train.batch_size=64", "train.precision=bf16"])
    model = meta_model(recipe)
    count = sum(p.numel() for p in model.parameters())
    # A block: qkv, projection, both layers of the mlp with biases, two norms; the decoder's are 512 wide.
    wide = 12 * 512**2 + 13 * 512
    blocks = 12 * (12 * 384**2 + 13 * 384) + 8 * wide
    full = shares(recipe, model, 8)["fsdp2 (FSDP2)"]
    assert full.weights == -(-4 * count // 8) + 2 * (count - blocks + 2 * wide)
    assert full.gradients == -(-4 * count // 8) + 2 * wide
    assert full.optimizer == 2 * -(-4 * count // 8)
    assert full.sent == int(7 / 8 * 2 * 3 * count)
    half = shares(recipe, model, 8)["zero2 (FSDP2)"]
    assert half.weights == -(-4 * count // 8) + 2 * count
    assert half.sent == int(7 / 8 * 2 * 2 * count)


def test_the_command_prints_them_and_refuses_what_can_not_be_cut(capsys) -> None:
    assert main(["show", "mae_tiny", "--world", "8"]) == 0
    printed = capsys.readouterr().out
    assert "Each of 8 processes, 1 micro-batch(es) of 8" in printed
    assert "all-reduce" in printed
    assert "Assumed" in printed
    assert main(["show", "mae_tiny", "--world", "7"]) == 2
    assert "can't be cut evenly into 7 processes" in capsys.readouterr().err
    assert main(["show", "mae_tiny", "--world", "0"]) == 2


@pytest.mark.parametrize("world", [2, 64])
def test_more_processes_hold_less_each(world: int) -> None:
    recipe = load_recipe("mae_vit_l", ["train.batch_size=4096"])
    model = meta_model(recipe)
    ways = shares(recipe, model, world)
    assert ways["fsdp2 (FSDP2)"].total < ways["zero2 (FSDP2)"].total < ways["eight_gpus (DDP)"].total
