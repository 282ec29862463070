"""Quantisers: levels and codes by hand, straight-through gradients, how a codebook starts, moves and revives codes."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from m3.codebook import codes_used
from m3.errors import M3Error
from m3.parts import available, build_spec
from m3.quantize import Fsq, Vq

ROOT = Path(__file__).parents[2]


def vq(codes: int = 4, width: int = 2, **settings) -> Vq:
    torch.manual_seed(0)
    return Vq(Vq.Spec(codes=codes, width=width, **settings))


def started(book: torch.Tensor, counts: torch.Tensor, **settings) -> Vq:
    """A codebook (H, K, E) in its second step, with these moving averages."""
    part = vq(book.shape[1], book.shape[0] * book.shape[2], heads=len(book), **settings)
    part.book.copy_(book)
    part.counts.copy_(counts)
    part.sums.copy_(book * counts.unsqueeze(-1))
    part.steps.fill_(1)
    return part.train()


def blobs(count: int, seed: int = 1) -> torch.Tensor:
    """Vectors (1, count, 2) around (0, 0), (10, 0), (0, 10), (10, 10), `count` / 4 each, mixed."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]]).repeat(count // 4, 1)
    return (centres + 0.1 * torch.randn(count, 2, generator=generator)).unsqueeze(0)


# ------------------------------------------------------------------------------------------------ FSQ


def test_levels_are_those_computed_by_hand() -> None:
    """L = 3: tanh(z) 1.001. L = 4: tanh(z + artanh(0.5 / 1.5015)) 1.5015 - 0.5, over 2."""
    part = Fsq(Fsq.Spec(levels=(3, 4)))
    z = torch.tensor([[[-9.0, -9.0], [-0.3, -0.7], [0.0, 0.0], [0.6, 0.9], [9.0, 9.0]]])
    quantised, indices, losses = part(z)
    # tanh(-0.3) = -0.29 -> 0; tanh(0.6) = 0.54 -> 1. For L = 4 the shift is artanh(0.3330) = 0.3462:
    # 1.5015 tanh(-0.3538) - 0.5 = -1.01 -> -1; at 0.9: 1.5015 tanh(1.2462) - 0.5 = 0.77 -> 1; the ends -2 and 1.
    assert quantised.tolist() == [[[-1, -1], [0, -0.5], [0, 0], [1, 0.5], [1, 0.5]]]
    # Places 0 1 1 2 2 of 3, then 0 1 2 3 3 of 4: first + 3 second.
    assert indices.tolist() == [[0, 4, 7, 11, 11]]
    # Beyond 2 the bound is flat: (9 - 2)^2 and (9 - 0.3462 - 2)^2, or (9 + 0.3462 - 2)^2, and their mean.
    torch.testing.assert_close(losses, torch.tensor([[46.6366, 0, 0, 0, 51.4834]]), atol=2e-3, rtol=0)


def test_a_dimension_that_is_stuck_on_its_last_level_is_brought_back() -> None:
    """At z = 12 the bound passes no gradient, so only the commitment can move it."""
    for commitment, is_back in ((0.0, False), (1.0, True)):
        part = Fsq(Fsq.Spec(levels=(5,), commitment=commitment))
        z = torch.full((1, 1, 1), 12.0, requires_grad=True)
        for _ in range(60):
            quantised, _, losses = part(z)
            loss = (quantised + 0.5).square().sum() + part.commitment * losses.sum()
            (gradient,) = torch.autograd.grad(loss, z)
            z = (z - 0.2 * gradient).detach().requires_grad_()
        assert (part(z)[0].item() < 1) == is_back


@pytest.mark.parametrize("levels", [(2,), (2, 3), (8, 5, 5, 5), (7, 4, 6)])
def test_every_code_is_a_number_and_back(levels: tuple[int, ...]) -> None:
    part = Fsq(Fsq.Spec(levels=levels))
    indices = torch.arange(math.prod(levels)).unsqueeze(0)
    codes = part.decode(indices)
    assert part.codes == math.prod(levels)
    assert len(codes[0].unique(dim=0)) == part.codes
    assert codes.abs().max() == 1
    # What lies on a level before the bound is applied comes back as the same number.
    half = (torch.tensor(levels) - 1) * 1.001 / 2
    offset = (1 - torch.tensor(levels) % 2) / 2
    z = torch.atanh((codes * (torch.tensor(levels) // 2) + offset) / half) - torch.atanh(offset / half)
    again, found, _ = part(z)
    assert torch.equal(found, indices)
    torch.testing.assert_close(again, codes)


def test_the_gradient_passes_the_rounding_as_that_of_the_bound() -> None:
    part = Fsq(Fsq.Spec(levels=(5, 4)))
    z = torch.tensor([[[0.4, -0.2], [1.3, 0.8]]], requires_grad=True)
    part(z)[0].backward(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    shift = math.atanh(0.5 / 1.5015)
    slope = torch.stack([1 - z[..., 0].tanh() ** 2, 1 - (z[..., 1] + shift).tanh() ** 2], -1)
    expected = slope * torch.tensor([2.002, 1.5015]) / 2 * torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    torch.testing.assert_close(z.grad, expected.detach())


def test_one_level_is_refused() -> None:
    with pytest.raises(M3Error, match="levels must be 2 or more in every dimension, got \\[8, 1\\]"):
        build_spec("quantisers", {"type": "fsq", "levels": [8, 1]}, "quantiser")


def test_quantisers_are_found_by_name() -> None:
    assert available("quantisers") == ["fsq", "vq"]
    with pytest.raises(M3Error, match="width 10 is not divisible by heads 4"):
        build_spec("quantisers", {"type": "vq", "width": 10, "heads": 4}, "quantiser")


# ------------------------------------------------------------------------------------------------- VQ


def test_the_nearest_code_is_taken_and_decoded_again() -> None:
    book = torch.tensor([[[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]])
    part = started(book, torch.ones(1, 3), cosine=False).eval()
    z = torch.tensor([[[1.0, 0.5], [3.0, 1.0], [1.0, 2.5], [-9.0, 2.1]]])
    quantised, indices, losses = part(z)
    assert indices.tolist() == [[0, 1, 2, 2]]
    assert quantised.tolist() == [[[0, 0], [4, 0], [0, 4], [0, 4]]]
    assert losses[0, :3].tolist() == [0.625, 1.0, 1.625]
    assert torch.equal(part.decode(indices), quantised)


def test_cosine_codes_are_chosen_by_angle() -> None:
    part = started(F.normalize(torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), dim=-1), torch.ones(1, 2)).eval()
    quantised, indices, losses = part(torch.tensor([[[100.0, 30.0], [0.01, 0.02]]]))
    assert indices.tolist() == [[0, 1]]
    torch.testing.assert_close(quantised, torch.tensor([[[1.0, 0.0], [0.5**0.5, 0.5**0.5]]]))
    torch.testing.assert_close(losses[0, 1], torch.tensor((2 - 2 * 3 / 10**0.5) / 2))


def test_heads_choose_alone_from_their_own_books() -> None:
    book = torch.tensor([[[0.0], [1.0]], [[0.0], [10.0]]])
    part = started(book, torch.ones(2, 2), cosine=False).eval()
    quantised, indices, _ = part(torch.tensor([[[0.9, 4.0], [0.2, 6.0]]]))
    assert indices.tolist() == [[1, 0, 0, 1]], "the numbers of a vector's heads lie side by side"
    assert quantised.tolist() == [[[1, 0], [0, 10]]]
    assert torch.equal(part.decode(indices), quantised)


def test_gradients_go_straight_through_and_the_commitment_pulls_to_the_code() -> None:
    part = started(torch.tensor([[[0.0, 0.0], [4.0, 0.0]]]), torch.ones(1, 2), cosine=False)
    z = torch.tensor([[[1.0, 2.0], [5.0, -1.0]]], requires_grad=True)
    quantised, _, losses = part(z)
    upstream = torch.tensor([[[3.0, -1.0], [0.5, 2.0]]])
    (straight,) = torch.autograd.grad(quantised, z, upstream, retain_graph=True)
    assert torch.equal(straight, upstream)
    (pull,) = torch.autograd.grad(losses.sum(), z)
    assert pull.tolist() == [[[1, 2], [1, -1]]], "2 (z - code) / d with codes (0, 0) and (4, 0)"


def test_the_first_step_passes_and_k_means_starts_the_book() -> None:
    part = vq(cosine=False).train()
    x = blobs(400)
    quantised, _, losses = part(x)
    assert torch.equal(quantised, x)
    assert losses.sum() == 0
    part.update()
    found = part.book[0][part.book[0].sum(1).argsort()]
    centres = torch.stack([x[0, i::4].mean(0) for i in range(4)])
    # 16 of 400 vectors are in the pool, so a centre is known to 0.1 / sqrt(4).
    torch.testing.assert_close(found[[0, 3]], centres[[0, 3]], atol=0.2, rtol=0)
    torch.testing.assert_close(found[1:3].sort(0).values, centres[1:3].sort(0).values, atol=0.2, rtol=0)
    assert part.counts.sum() == 400


def test_the_moving_average_is_that_computed_by_hand() -> None:
    part = started(torch.tensor([[[0.0, 0.0], [8.0, 0.0]]]), torch.tensor([[2.0, 2.0]]), cosine=False, decay=0.75)
    part(torch.tensor([[[1.0, 1.0], [3.0, -1.0], [2.0, 3.0], [6.0, 2.0]]]))
    part.update()
    # Counts 0.75 * 2 + 0.25 * (3, 1); sums 0.75 * (0, 0) + 0.25 * (6, 3) and 0.75 * (16, 0) + 0.25 * (6, 2).
    assert part.counts.tolist() == [[2.25, 1.75]]
    assert part.sums.tolist() == [[[1.5, 0.75], [13.5, 0.5]]]
    smoothed = [(2.25 + 1e-5) / (4 + 2e-5) * 4, (1.75 + 1e-5) / (4 + 2e-5) * 4]
    expected = torch.tensor([[[1.5 / smoothed[0], 0.75 / smoothed[0]], [13.5 / smoothed[1], 0.5 / smoothed[1]]]])
    torch.testing.assert_close(part.book, expected)
    assert int(part.steps) == 2


def test_dead_codes_become_vectors_of_the_step() -> None:
    book = torch.tensor([[[0.0, 0.0], [10.0, 10.0], [500.0, 0.0], [0.0, 500.0]]])
    part = started(book, torch.tensor([[8.0, 8.0, 0.02, 0.01]]), cosine=False, decay=0.9)
    x = blobs(40)
    part(x)
    part.update()
    revived = part.book[0, 2:]
    assert ((x[0].unsqueeze(0) == revived.unsqueeze(1)).all(-1).sum(1) == 1).all(), "each is one of the vectors"
    assert not torch.equal(revived[0], revived[1])
    # Before: 0.9 * (8, 8, 0.02, 0.01) + 0.1 * (40 assigned to the first two) add up to 18.427: a mean of 4.60675.
    torch.testing.assert_close(part.counts[0, 2:], torch.full((2,), 4.60675))
    torch.testing.assert_close(part.sums[0, 2:], revived * 4.60675)


def test_a_resumed_codebook_revives_as_many_codes_as_one_that_was_not_interrupted() -> None:
    """600 of 602 codes are dead, more than a step may revive, and a step has 700 vectors to take."""
    book = torch.cat([torch.tensor([[[0.0, 0.0], [10.0, 10.0]]]), torch.full((1, 600, 2), 900.0)], dim=1)
    counts = torch.cat([torch.full((1, 2), 300.0), torch.full((1, 600), 1e-4)], dim=1)
    parts = [started(book, counts, cosine=False) for _ in range(2)]
    parts[0]._is_started, parts[1]._is_started = True, False  # as in a fresh process
    for part in parts:
        part(blobs(700))
        part.update()
        assert (part.book[0] < 100).all(1).sum() == 2 + part.REVIVED
    assert torch.equal(parts[0].book, parts[1].book)


def test_codes_in_use_are_not_touched_by_revival() -> None:
    part = started(torch.tensor([[[0.0, 0.0], [10.0, 10.0]]]), torch.tensor([[30.0, 1.2]]), cosine=False)
    part(torch.zeros(1, 8, 2))
    part.update()
    assert part.book[0, 1].tolist() == pytest.approx([10, 10], rel=1e-4), "1.19 of 32 is above a 32nd of the mean"


def test_padding_moves_no_code() -> None:
    x, is_valid = blobs(40), torch.arange(40).unsqueeze(0) < 24
    padded, cut = vq(cosine=False).train(), vq(cosine=False).train()
    for _ in range(3):
        padded(x.masked_fill(~is_valid.unsqueeze(-1), 1e4), is_valid)
        cut(x[:, :24])
        padded.update()
        cut.update()
    torch.testing.assert_close(padded.book, cut.book)
    torch.testing.assert_close(padded.counts, cut.counts)


@pytest.mark.parametrize("cosine", [True, False])
def test_cutting_a_step_into_micro_batches_changes_nothing(cosine: bool) -> None:
    whole, cut = vq(8, 4, heads=2, cosine=cosine).train(), vq(8, 4, heads=2, cosine=cosine).train()
    for step in range(6):
        x = torch.randn(8, 25, 4, generator=torch.Generator().manual_seed(step))
        whole(x)
        whole.update()
        for part in x.split(2):
            cut(part)
        cut.update()
        torch.testing.assert_close(cut.book, whole.book, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cut.counts, whole.counts)


def test_two_processes_reach_the_same_book(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist\n"
        "from m3.quantize import Vq\n"
        "rank, world, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]\n"
        "torch.set_num_threads(1)\n"
        "if world > 1:\n"
        "    dist.init_process_group('gloo', init_method=f'file://{out}.meet', rank=rank, world_size=world)\n"
        "torch.manual_seed(0)\n"
        "part = Vq(Vq.Spec(codes=8, width=4)).train()\n"
        "for step in range(5):\n"
        "    x = torch.randn(8, 25, 4, generator=torch.Generator().manual_seed(step))\n"
        "    for i, own in enumerate(x.split(2)):\n"
        "        if i % world == rank:\n"
        "            part(own)\n"
        "    part.update()\n"
        "torch.save((part.book, part.counts), f'{out}.{rank}')\n"
        "if world > 1:\n"
        "    dist.barrier()\n"
        "    dist.destroy_process_group()\n"
    )
    for world in (1, 2):
        command = [sys.executable, str(script)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ranks = [
            subprocess.Popen([*command, str(rank), str(world), str(tmp_path / f"w{world}")], env=environment)
            for rank in range(world)
        ]
        assert [process.wait(60) for process in ranks] == [0] * world
    one, first, second = (torch.load(tmp_path / name) for name in ("w1.0", "w2.0", "w2.1"))
    for a, b, c in zip(one, first, second, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_a_loaded_codebook_goes_on_as_the_saved_one() -> None:
    x = blobs(80)
    part = vq().train()
    for _ in range(2):
        part(x)
        part.update()
    again = vq().train()
    again.load_state_dict({key: value.clone() for key, value in part.state_dict().items()})
    for model in (part, again):
        model(x + 1)
        model.update()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in part.state_dict().items())


def test_evaluation_leaves_the_codebook_alone() -> None:
    part = started(torch.tensor([[[0.0, 0.0], [4.0, 0.0]]]), torch.ones(1, 2), cosine=False).eval()
    before = {key: value.clone() for key, value in part.state_dict().items()}
    part(blobs(8))
    part.update()
    assert all(torch.equal(value, before[key]) for key, value in part.state_dict().items())


def test_use_of_codes_by_hand() -> None:
    used, perplexity = codes_used(torch.tensor([[2.0, 2.0, 4.0, 0.0], [0.0, 7.0, 0.0, 0.0]]))
    assert used == pytest.approx((3 / 4 + 1 / 4) / 2)
    # Shares 1/4, 1/4, 1/2: entropy 1.5 ln 2, perplexity 2 ** 1.5; one code: 1.
    assert perplexity == pytest.approx((2**1.5 + 1) / 2)
