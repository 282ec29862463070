"""What the loss does not depend on is found, touched and forgotten again."""

import torch
from torch import nn

from m3.unused import Unused


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(3, 2), nn.Linear(3, 2, bias=False), nn.Linear(3, 2)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0))


def test_parameters_without_a_path_from_the_loss_are_found() -> None:
    model = Two()
    unused = Unused(model.first(torch.arange(3.0)).square().sum(), model)
    assert [id(p) for p in unused.parameters] == [id(model.scale), id(model.second.weight)]


def test_touching_changes_no_loss_and_no_gradient() -> None:
    model = Two()
    loss = model.first(torch.arange(3.0)).square().sum()
    expected = torch.autograd.grad(loss, list(model.first.parameters()), retain_graph=True)
    unused = Unused(loss, model)
    whole = loss + unused.touched()
    assert torch.equal(whole, loss)
    whole.backward()
    assert torch.equal(model.second.weight.grad, torch.zeros(2, 3)), "DDP's hook has something to wait for"
    assert all(torch.equal(p.grad, g) for p, g in zip(model.first.parameters(), expected, strict=True))
    unused.forget()
    assert model.second.weight.grad is None, "AdamW must not decay what took no part"
    assert model.scale.grad is None
    assert model.first.bias.grad is not None


def test_what_an_earlier_micro_batch_used_keeps_its_gradient() -> None:
    model = Two()
    model.second(torch.arange(3.0)).sum().backward()
    kept = model.second.weight.grad.clone()
    unused = Unused(model.first(torch.arange(3.0)).sum(), model)
    assert [id(p) for p in unused.parameters] == [id(model.scale)]
    unused.forget()
    assert torch.equal(model.second.weight.grad, kept)


def test_what_another_process_used_keeps_its_gradient(monkeypatch) -> None:
    model = Two()
    monkeypatch.setattr("m3.unused.summed", lambda x: x + torch.tensor([1.0, 0, 0, 1.0]))
    unused = Unused(model.first(torch.arange(3.0)).sum(), model)
    (unused.touched() + model.first(torch.arange(3.0)).sum()).backward()
    unused.forget()
    assert (model.scale.grad is None, model.second.weight.grad is None) == (False, False)
