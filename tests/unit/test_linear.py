"""The linear layer equals torch's own in value and in every gradient, whichever library computes it."""

import pytest
import torch
from torch import nn

from m3.linear import HAS_ONEDNN, Linear


def pair(inputs: int, outputs: int, bias: bool = True) -> tuple[Linear, nn.Linear]:
    torch.manual_seed(0)
    ours, torchs = Linear(inputs, outputs, bias=bias), nn.Linear(inputs, outputs, bias=bias)
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (1, 1, 1, 24), (24,), (3, 0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_torchs(shape: tuple[int, ...], bias: bool) -> None:
    ours, torchs = pair(24, 10, bias)
    x = torch.randn(shape)
    results = []
    for layer in (ours, torchs):
        given = x.clone().requires_grad_()
        y = layer(given)
        (y * torch.arange(1, y.numel() + 1).view(y.shape)).sum().backward()
        results.append([y, given.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_rows_that_do_not_lie_one_after_the_other() -> None:
    ours, torchs = pair(24, 10)
    x = torch.randn(24, 4, 6).permute(2, 1, 0)[::2]
    torch.testing.assert_close(ours(x), torchs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_go_to_torch(dtype: torch.dtype) -> None:
    ours, torchs = pair(24, 10)
    x = torch.randn(3, 24, dtype=dtype)
    assert torch.equal(ours.to(dtype)(x), torchs.to(dtype)(x))


def test_autocast_decides_the_type_as_for_torchs_layer() -> None:
    ours, torchs = pair(24, 10)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        assert torch.equal(ours(x), torchs(x))


def test_the_faster_library_is_there() -> None:
    """Every release of torch that is supported has the operator; without it speed would be lost in silence."""
    assert HAS_ONEDNN or not torch.backends.mkldnn.is_available()
