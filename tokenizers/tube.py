"""Tubes: blocks of a few frames times a patch (VideoMAE, Tong et al. 2022).

Letters: B batch, C channels, T frames, H height, W width, N tubes, P = C t h w values per tube, D width; t, h, w
is the size of a tube. Values are ordered (channel, frame, row, column).
"""

from __future__ import annotations

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from m3.errors import M3Error
from m3.linear import Linear
from m3.plugins import Signal, Strict, Tokenizer
from m3.positions import grid
from m3.types import Tokens


class Tube(Tokenizer):
    """Blocks of values over three axes through one linear projection; videos, and volumes alike."""

    class Spec(Strict):
        """Settings of `type: tube`.

        Attributes:
            size: height and width of a tube; one number for square ones.
            frames: t, frames of a tube.
            fps: frames per second that the model is built for. With it, the position of a tube along time is its
                true time, so a clip that was sampled more slowly lies wider; without, it is its number.
        """

        size: PositiveInt | tuple[PositiveInt, PositiveInt] = 16
        frames: PositiveInt = 2
        fps: PositiveFloat | None = None

    axes = 3

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        if signal.kind != "values" or len(signal.size) != 3:
            raise M3Error(
                f"tokenizer `tube` reads values over three axes, got {signal.kind} over {len(signal.size)}; use "
                f"`patch` for maps."
            )
        size = (spec.size, spec.size) if isinstance(spec.size, int) else spec.size
        self.tube = (spec.frames, *size)
        self.reference = self._counts(signal.size)
        self.value_width = self.output_width = signal.channels * spec.frames * size[0] * size[1]
        self.projection: nn.Module = Linear(self.value_width, width)

    def reads(self, signal: Signal) -> bool:
        """Return True for other videos, and for images."""
        as_video = signal._replace(size=(self.tube[0], *signal.size)) if len(signal.size) == 2 else signal
        return super().reads(as_video)

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Cut (B, C, T, H, W) float into tokens with values (B, N, P).

        An image (B, C, H, W) is a video of one tube that stands still, at time 0 (Girdhar et al. 2022, section 3).
        """
        if signal.ndim == 4:
            still = self.tokenize(signal.unsqueeze(2).expand(-1, -1, self.tube[0], -1, -1))
            time, *place = still.positions.unbind(-1)
            return Tokens(still.values, torch.stack([torch.zeros_like(time), *place], dim=-1))
        t, h, w = counts = self._counts(signal.shape[2:])
        x = signal.unflatten(4, (w, -1)).unflatten(3, (h, -1)).unflatten(2, (t, -1))
        values = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        positions = grid(counts, self.reference, signal.device)
        if times is not None and self.spec.fps is not None:
            middle = times.float().unflatten(1, (t, -1)).mean(2) * self.spec.fps  # in frames
            tubes = (middle - (self.tube[0] - 1) / 2) / self.tube[0]
            positions = positions.repeat(len(signal), 1, 1)
            tubes = tubes.repeat_interleave(h * w, dim=1)
            # A clip that doesn't know its times, in a batch with others that do, has its tubes' numbers.
            positions[..., 0] = tubes.where(tubes.isfinite(), positions[..., 0])
        return Tokens(values, positions)

    def embed(self, values: Tensor) -> Tensor:
        """Project (B, S, P) to (B, S, D); values that nobody knows (NaN) enter as 0, the mean."""
        return self.projection(values.nan_to_num(0.0) if self.signal.has_gaps else values)

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put (B, N, P) together to (B, C, T, H, W), or to an image (B, C, H, W): the mean of its tube's frames."""
        if len(size) == 2:
            video = self.detokenize(values, positions, (self.tube[0], *size))
            return video.mean(2) if video.is_floating_point() else video[:, :, 0]
        counts = self._counts(size)
        x = values.unflatten(2, (-1, *self.tube)).unflatten(1, counts)  # (B, T', H', W', C, t, h, w)
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)

    def decode(self, output: Tensor) -> Tensor:
        """Return the prediction itself: a head predicts the values."""
        return output

    def _counts(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return how many tubes lie along each axis."""
        if any(extent % own for extent, own in zip(size, self.tube, strict=True)):
            shown = [" x ".join(str(n) for n in x) for x in (size, self.tube)]
            raise M3Error(f"size {shown[0]} is not a multiple of the tube {shown[1]}; change one of them.")
        return tuple(extent // own for extent, own in zip(size, self.tube, strict=True))
