"""Groups of neighbouring points: farthest-point centres, the nearest points of each, a small PointNet.

Letters: B batch, P points of a cloud, N groups, S groups that are embedded, k points per group, C = 3 + other
channels of a point, D width. Values of a group are ordered (point, channel), nearest point first.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from m3.errors import M3Error
from m3.linear import Linear
from m3.plugins import Signal, Strict, Tokenizer
from m3.points import farthest_points, morton, nearest
from m3.types import Tokens, take


class FrozenBatchNorm(nn.BatchNorm1d):
    """BatchNorm of the last axis by its running statistics, in training too, which therefore stay as they are."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(input.flatten(0, -2), *statistics, self.weight, self.bias, eps=self.eps).view_as(input)


class PointGroup(Tokenizer):
    """Point-MAE's groups and its embedding (Pang et al. 2022, section 3.1), with one deviation.

    BatchNorm is LayerNorm here: Point-MAE's statistics run over the groups of the whole batch, hidden ones
    included, so a sample's tokens would depend on its neighbours in the batch, on how it is cut into
    micro-batches, and on what the encoder must not see. Published weights keep theirs, with statistics that
    don't move any more.
    """

    class Spec(Strict):
        """Settings of `type: point_group`.

        Attributes:
            groups: N; a group holds a centre and its nearest points, so groups overlap.
            neighbours: k, the centre included.
            embed_width: widths of the hidden layers: two before the group's maximum, one after it.
            coordinates: `relative`: values are measured from the group's centre, and the position of a token
                is its centre (Point-MAE: a decoder is told where the points it must predict lie); `absolute`:
                values are coordinates of the cloud, tokens are sorted along a z-order curve, and the position
                of a token is its place in that order, which says nothing about where the points lie.
            norm: `layer`, or `frozen_batch`: BatchNorm with the statistics of a trained model, for published weights.
        """

        groups: PositiveInt = 64
        neighbours: PositiveInt = 32
        embed_width: tuple[PositiveInt, PositiveInt, PositiveInt] = (128, 256, 512)
        coordinates: Literal["relative", "absolute"] = "relative"
        norm: Literal["layer", "frozen_batch"] = "layer"

    is_lossless = False  # groups overlap, and lack points that no group reaches

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        is_list = signal.kind == "values" and len(signal.size) == 1 and signal.channel_axis == -1
        if not is_list or signal.channels < 3 or signal.is_boxed:
            raise M3Error(
                f"tokenizer `point_group` reads lists of points with 3 or more values, got {signal.channels} "
                f"{signal.kind} over {len(signal.size)} axes; use it for the modality `points`."
            )
        self.is_relative = spec.coordinates == "relative"
        self.axes = 3 if self.is_relative else 1
        self.reference = () if self.is_relative else (spec.groups,)
        self.value_width = self.output_width = spec.neighbours * signal.channels
        first, second, third = spec.embed_width
        norm = nn.LayerNorm if spec.norm == "layer" else FrozenBatchNorm
        self.point = nn.Sequential(Linear(signal.channels, first), norm(first), nn.ReLU(), Linear(first, second))
        # One layer on [maximum of the group, own features], in two parts: the maximum's is computed once a group.
        self.own = Linear(second, third)
        self.shared = Linear(second, third, bias=False)
        self.norm = norm(third)
        self.projection = Linear(third, width)

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Group a cloud (B, P, C) with NaN in rows without a point: values (B, N, k * C).

        A cloud of n < k points repeats them within its groups; one of n < N points has n valid tokens, the
        others repeat them; one without points has none, and zeros in place of values.
        """
        xyz = signal[..., :3]
        is_point = ~xyz.isnan().any(-1)
        index = farthest_points(xyz, self.spec.groups, is_point)
        place = torch.arange(self.spec.groups, device=signal.device)
        is_valid = place < is_point.sum(1, keepdim=True)
        if not self.is_relative:
            order = morton(take(xyz, index), is_valid).argsort(dim=1, stable=True)
            index, is_valid = index.gather(1, order), is_valid.gather(1, order)
        centres = take(xyz, index).nan_to_num(0.0)
        members = nearest(centres, xyz, self.spec.neighbours, is_point)
        points = take(signal, members.flatten(1)).nan_to_num(0.0).unflatten(1, members.shape[1:])  # (B, N, k, C)
        if not self.is_relative:
            return Tokens(points.flatten(2), place.float().view(1, -1, 1), is_valid)
        return Tokens(self._shifted(points, -centres).flatten(2), centres, is_valid)

    def embed(self, values: Tensor) -> Tensor:
        """Project groups (B, S, k * C) to (B, S, D), whatever the order of the points."""
        x = self.point(values.unflatten(-1, (self.spec.neighbours, self.signal.channels)))
        x = self.own(x) + self.shared(x.amax(-2, keepdim=True))
        return self.projection(F.relu(self.norm(x))).amax(-2)

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put groups (B, N, k * C) at positions (1 or B, N, A) together to a cloud of all their points (B, N * k, C).

        `size` is ignored: groups overlap, so their points are not those of the cloud. Values that are no
        floats (True for every value of a visible token) are spread over the points and not moved.
        """
        points = values.unflatten(-1, (self.spec.neighbours, self.signal.channels))
        if self.is_relative and values.is_floating_point():
            points = self._shifted(points, positions)
        return points.flatten(1, 2)

    def decode(self, output: Tensor) -> Tensor:
        """Return the prediction itself: a head predicts the values."""
        return output

    def _shifted(self, points: Tensor, offset: Tensor) -> Tensor:
        """Add offset (1 or B, N, 3) to the coordinates of points (B, N, k, C)."""
        return points + F.pad(offset, (0, self.signal.channels - 3)).unsqueeze(2)
