"""Targets normalised jointly, per channel, with eps on the variance or the deviation; one frame of a tube."""

import pytest
import torch

from m3.errors import M3Error
from m3.plugins import Signal
from m3.targets import Values
from m3.tokenizers.patch import Patch
from m3.tokenizers.tube import Tube
from m3.types import Tokens


def patch(channels: int = 2) -> Patch:
    return Patch(Patch.Spec(size=2), Signal("values", channels, (2, 2)), 8)


def tube(frames: int = 2) -> Tube:
    return Tube(Tube.Spec(size=(1, 3), frames=frames), Signal("values", 2, (2 * frames, 1, 6)), 8)


def target(tokenizer, **settings) -> Values:
    return Values(Values.Spec(**settings), tokenizer)


def ask(provider: Values, tokens: Tokens) -> torch.Tensor:
    return provider(tokens, torch.arange(tokens.count).expand(len(tokens.values), -1))


TOKENS = patch().tokenize(torch.tensor([[[[1.0, 3.0], [5.0, 7.0]], [[6.0, 6.0], [14.0, 14.0]]]]))


def test_all_values_together_by_hand() -> None:
    """Mean 7; squared distances 36 16 4 0 1 1 49 49 = 156; variance 156 / 7."""
    found = ask(target(patch(), normalise=True, eps=0.0), TOKENS)
    expected = (torch.tensor([1.0, 3, 5, 7, 6, 6, 14, 14]) - 7) / (156 / 7) ** 0.5
    torch.testing.assert_close(found, expected.view(1, 1, 8))


@pytest.mark.parametrize(
    ("eps_on", "root"), [("variance", (20 / 3 + 0.5) ** 0.5), ("deviation", (20 / 3) ** 0.5 + 0.5)]
)
def test_each_channel_by_hand(eps_on: str, root: float) -> None:
    """Channel 0: mean 4, variance 20 / 3 and eps 0.5; channel 1: mean 10, variance 64 / 3 and eps 0."""
    found = ask(target(patch(), normalise="channel", eps=(0.5, 0.0), eps_on=eps_on), TOKENS)
    first = (torch.tensor([1.0, 3, 5, 7]) - 4) / root
    second = (torch.tensor([6.0, 6, 14, 14]) - 10) / (64 / 3) ** 0.5
    torch.testing.assert_close(found, torch.cat([first, second]).view(1, 1, 8))


def test_eps_over_std_gives_the_target_of_pixels_in_0_to_1() -> None:
    """VideoMAE normalises pixels in [0, 1]; M3's values are (pixel - 0.4) / 0.2 and (pixel - 0.5) / 0.25."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(5, 2, 2, 2, generator=generator, dtype=torch.float64) * 1e-5
    std = torch.tensor([0.2, 0.25], dtype=torch.float64).view(2, 1, 1)
    tokens = patch().tokenize((pixels / std).float())
    own = ask(target(patch(), normalise="channel", eps_on="deviation", eps=(1e-6 / 0.2, 1e-6 / 0.25)), tokens)
    flat = pixels.flatten(2)
    expected = (flat - flat.mean(2, keepdim=True)) / (flat.std(2, keepdim=True) + 1e-6)
    torch.testing.assert_close(own.double(), expected.view(5, 1, 8), rtol=1e-4, atol=1e-5)
    plain = ask(target(patch(), normalise="channel", eps_on="deviation"), tokens)
    assert (plain.double() - expected.view(5, 1, 8)).abs().max() > 0.05


def test_one_frame_of_a_tube_by_hand() -> None:
    """Values of a tube are (channel, frame): frame 1 of [10 11 12 | 20 21 22] is [11 | 21]."""
    tokenizer = Tube(Tube.Spec(size=1, frames=3), Signal("values", 2, (3, 1, 1)), 8)
    tokens = Tokens(torch.tensor([[[10.0, 11, 12, 20, 21, 22]]]), torch.zeros(1, 1, 3))
    provider = target(tokenizer, step=1)
    assert (provider.width, provider.is_relative) == (2, False)
    assert ask(provider, tokens).tolist() == [[[11.0, 21.0]]]
    assert provider.restore(torch.tensor([[[5.0, 6.0]]]), tokens).tolist() == [[[5.0, 5, 5, 6, 6, 6]]]


@pytest.mark.parametrize("settings", [{"normalise": True}, {"normalise": "channel", "eps_on": "deviation"}, {}])
@pytest.mark.parametrize("step", [None, 0, 1])
def test_restore_undoes_the_target(settings: dict, step: int | None) -> None:
    tokenizer = tube()
    tokens = tokenizer.tokenize(torch.arange(48.0).view(1, 2, 4, 1, 6) ** 2)
    provider = target(tokenizer, **settings, step=step)
    back = provider.restore(ask(provider, tokens), tokens).unflatten(-1, (2, 2, 3))
    truth = tokens.values.unflatten(-1, (2, 2, 3))
    if step is not None:
        truth = truth[..., step : step + 1, :].expand_as(truth)
    torch.testing.assert_close(back, truth, rtol=1e-4, atol=1e-3)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        M3Error, match=r"^target.eps: 3 numbers are for `normalise: channel` and 3 channels, got `chann"
    ):
        target(patch(), normalise="channel", eps=(1e-6, 1e-6, 1e-6))
    with pytest.raises(
        M3Error, match=r"^target.eps: 2 numbers are for `normalise: channel` .*, got `True` and 2; give"
    ):
        target(patch(), normalise=True, eps=(1e-6, 1e-6))
    with pytest.raises(M3Error, match=r"^target.step: a token spans steps 0 to 1, got 2; choose one.$"):
        target(tube(), step=2)
    signal = Signal("values", 3, (9,), channel_axis=-1)
    points = type("Points", (), {"signal": signal, "output_width": 6, "value_width": 6})()
    with pytest.raises(M3Error, match=r"^target.normalise: channel and target.step need values .channel"):
        target(points, normalise="channel")
