"""Point-MAE's layout, against the model written again with its names and shapes.

Letters: B clouds, N groups, k points of a group, D width.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3 import convert
from m3.errors import M3Error
from m3.types import MaskPlan, Tokens, take
from tests.parity.published import (
    assert_equal,
    difference,
    encoded_view,
    randomised,
    tensors_in,
    tokens_of,
)
from tests.parity.published_blocks import Attention, Block

WIDTH, GROUPS, K = 48, 6, 5


class Unbiased(Attention):
    """Queries, keys and values without a bias."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 3, "query and value")
        del self.q_bias, self.v_bias
        self.q_bias, self.v_bias = 0.0, 0.0


class Blocks(nn.Module):
    def __init__(self, depth: int, has_norm: bool) -> None:
        super().__init__()
        blocks = [Block(WIDTH, 3, 4 * WIDTH, eps=1e-5, attention=Unbiased()) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        if has_norm:
            self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + places)
        return x


def layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(inputs, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Conv1d(hidden, outputs, 1))


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_conv, self.second_conv = layers(3, 8, 12), layers(24, 20, WIDTH)

    def forward(self, groups: Tensor) -> Tensor:
        """(B, N, k, 3) -> (B, N, D)."""
        x = self.first_conv(groups.flatten(0, 1).transpose(1, 2))
        whole = x.amax(2, keepdim=True).expand_as(x)
        return self.second_conv(torch.cat([whole, x], dim=1)).amax(2).unflatten(0, groups.shape[:2])


def places() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, WIDTH))


class MaskTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.pos_embed = PointNet(), places()
        self.blocks, self.norm = Blocks(2, False), nn.LayerNorm(WIDTH)


class PointMae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.MAE_encoder, self.MAE_decoder = MaskTransformer(), Blocks(3, True)
        self.mask_token, self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1, WIDTH)), places()
        self.increase_dim = nn.Sequential(nn.Conv1d(WIDTH, 3 * K, 1))

    def forward(self, groups: Tensor, centres: Tensor, visible: Tensor, asked: Tensor) -> Tensor:
        """Predict the groups asked for -> (B, T, k * 3)."""
        seen, hidden = take(centres, visible), take(centres, asked)
        x = self.MAE_encoder.blocks(take(self.MAE_encoder.encoder(groups), visible), self.MAE_encoder.pos_embed(seen))
        x = torch.cat([self.MAE_encoder.norm(x), self.mask_token.expand(len(x), asked.shape[1], -1)], dim=1)
        x = self.MAE_decoder(x, self.decoder_pos_embed(torch.cat([seen, hidden], dim=1)))
        x = self.MAE_decoder.norm(x[:, -asked.shape[1] :])
        return self.increase_dim(x.transpose(1, 2)).transpose(1, 2)


def saved(folder: Path) -> tuple[Path, PointMae]:
    theirs = randomised(PointMae(), seed=31)
    generator = torch.Generator().manual_seed(2)
    for x in theirs.buffers():
        value = torch.rand(x.shape, generator=generator) + 0.5 if x.is_floating_point() else torch.tensor(77)
        x.copy_(value)
    torch.save({"base_model": {f"module.{n}": x for n, x in theirs.state_dict().items()}}, folder / "theirs.pth")
    return folder / "theirs.pth", theirs


GIVEN = ["backbone.heads=3", f"modalities.points.tokenizer.groups={GROUPS}"]


@pytest.fixture(params=[{}, {"WIDTH": 60, "K": 7}], ids=["small", "larger"])
def sizes(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setitem(globals(), name, value)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.usefixtures("sizes")
def test_predictions_are_theirs_and_the_file_comes_back_equal(tmp_path: Path, dtype, near):
    path, theirs = saved(tmp_path)
    found = convert.convert(path, GIVEN)
    assert (found.format, found.left) == ("pointmae", {})
    convert.save(found.model, tmp_path / "ours.pth", "pointmae")
    assert_equal(tensors_in(tmp_path / "ours.pth"), theirs.state_dict())
    model, theirs = found.model.to(dtype), theirs.to(dtype)
    cloud = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(6)).to(dtype)
    tokens = tokens_of(model, {"points": cloud})["points"]
    assert isinstance(tokens, Tokens)
    visible, asked = torch.tensor([[0, 3], [2, 5]]), torch.tensor([[1, 2, 4, 5], [0, 1, 3, 4]])
    plan = MaskPlan(visible={"points": visible}, target={"points": asked})
    own = model.objectives["reconstruct"].predict(
        "points", encoded_view(model, {"points": cloud}, plan), {"points": tokens}, asked
    )
    with torch.no_grad():
        expected = theirs(tokens.values.unflatten(2, (K, 3)), tokens.positions, visible, asked)
    assert difference(own, expected) < near


def test_statistics_of_batches_stay_as_they_are_in_training(tmp_path: Path):
    model = convert.load(saved(tmp_path)[0], GIVEN).train()
    net = model.tokenizers["points"]
    before = {name: x.clone() for name, x in net.named_buffers()}
    values = torch.randn(3, 4, 3 * K, generator=torch.Generator().manual_seed(1))
    trained = net.embed(values)
    assert all(torch.equal(x, before[name]) for name, x in net.named_buffers())
    assert torch.equal(trained, net.eval().embed(values))
    assert torch.allclose(trained[1:2, 2:], net.embed(values[1:2, 2:]), atol=1e-6)  # nothing of the neighbours


def test_biases_that_theirs_has_not_must_be_zero(tmp_path: Path):
    model = convert.load(saved(tmp_path)[0], GIVEN)
    model.backbone.blocks[1].attention.qkv.bias.data[5] = 1e-3
    with pytest.raises(M3Error, match=r"`backbone\.blocks\.1\.attention\.qkv\.bias` is not 0"):
        convert.save(model, tmp_path / "ours.pth", "pointmae")


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path: Path):
    path, theirs = saved(tmp_path)
    tensors = theirs.state_dict()
    torch.save(tensors | {"MAE_encoder.cls_token": torch.ones(1)}, path)
    with pytest.raises(M3Error, match=r"no place for `MAE_encoder\.cls_token`"):
        convert.load(path, GIVEN)
    del tensors["MAE_encoder.encoder.first_conv.1.running_var"]
    torch.save(tensors, path)
    with pytest.raises(M3Error, match=r"`MAE_encoder\.encoder\.first_conv\.1\.running_var` is missing"):
        convert.load(path, GIVEN)


def test_a_decoder_without_a_layer_before_it_is_as_wide_as_the_encoder(tmp_path: Path):
    with pytest.raises(M3Error, match="as wide as the encoder, 48, got 24"):
        convert.load(saved(tmp_path)[0], [*GIVEN, "objectives.reconstruct.decoder.width=24"])


def test_published_batch_norm_is_that_of_torch():
    from m3.tokenizers.point_group import FrozenBatchNorm

    x = torch.arange(24.0).view(2, 3, 4) ** 0.5
    norm = FrozenBatchNorm(4)
    norm.running_mean, norm.running_var = torch.tensor([1.0, 0, 2, 3]), torch.tensor([4.0, 1, 0.25, 9])
    expected = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    assert torch.allclose(norm(x), expected, atol=1e-6)
    assert torch.allclose(norm.eval()(x), F.batch_norm(x.flatten(0, 1), norm.running_mean, norm.running_var).view_as(x))
