"""Videos: clips of a fixed number of frames.

Letters: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from m3.data.geometry import fit_map
from m3.data.recording import Clip
from m3.data.video import Frames, open_video, read_clip
from m3.drawing import hide
from m3.errors import M3Error
from m3.modalities.image import Image
from m3.plugins import Crop, File, Signal, ending
from m3.samples import numbers

SHOWN = 4
"""Frames in a picture."""


class Video(Image):
    """Raw: uint8 (C, T, H, W), 0 to 255. Normalised: (raw / 255 - mean) / std per channel."""

    class Spec(Image.Spec):
        """Settings of `type: video`.

        Attributes:
            frames: T that the model reads.
            stride: frames of the file from one that is read to the next (VideoMAE: 4 for Kinetics, 2 for
                Something-Something); null: T frames spread evenly over the whole file.
        """

        frames: PositiveInt = 16
        stride: PositiveInt | None = 4

    extensions = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".npz")

    @property
    def signal(self) -> Signal:
        """Values (B, C, T, H, W)."""
        return Signal("values", self.spec.channels, (self.spec.frames, *self.size))

    def blank(self, count: int) -> Tensor:
        """Return black clips, uint8 (B, C, T, H, W)."""
        return torch.zeros(count, self.spec.channels, self.spec.frames, *self.size, dtype=torch.uint8)

    def load(self, file: File) -> Any:
        """Find the frames of a video; `cut` decodes those that are needed, and only those.

        A .npz holds a whole clip: `frames` uint8 (T, H, W, C) and, if they are known, `times` float32 (T,) in seconds.
        """
        return read_clip(file) if ending(file) == ".npz" else open_video(file)

    def cut(self, sample: Any, moment: float) -> Any:
        """Choose T frames of a video or of a longer clip; the last one is repeated where there are too few."""
        if isinstance(sample, Frames):
            return sample.read(frame_numbers(sample.count, self.spec.frames, self.spec.stride, moment))
        clip = sample if isinstance(sample, Clip) else Clip(np.asarray(sample))
        if clip.frames.ndim != 4 or not len(clip.frames):
            raise M3Error(f"a video must have shape (frames, height, width, channels), got {clip.frames.shape}.")
        if len(clip.frames) == self.spec.frames:
            return clip
        index = frame_numbers(len(clip.frames), self.spec.frames, self.spec.stride, moment)
        return Clip(clip.frames[index], None if clip.times is None else clip.times[index])

    def times(self, sample: Any) -> Tensor | None:
        """Return seconds (T,) from the clip's first frame."""
        if not isinstance(sample, Clip) or sample.times is None:
            return None
        times = torch.as_tensor(sample.times, dtype=torch.float32)
        return times - times[0]

    def to_raw(self, sample: Any) -> Tensor:
        """Read a `Clip` or an array, uint8 (T, H, W, C) -> uint8 (C, T, H, W)."""
        x = torch.as_tensor(numbers(sample.frames if isinstance(sample, Clip) else sample, "a video"))
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[3] != self.spec.channels:
            raise M3Error(
                f"a video must be uint8 (frames, height, width, {self.spec.channels}), got {x.dtype} of shape "
                f"{tuple(x.shape)}; convert it to 0 to 255 or set `channels`."
            )
        if len(x) != self.spec.frames:
            raise M3Error(f"a clip has {len(x)} frames, but `frames` is {self.spec.frames}; cut it first.")
        return x.permute(3, 0, 1, 2)  # as it lies, see `fit`

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Crop and resize (bicubic, antialiased) to `size`, the same crop in all frames.

        Frames as a batch of pictures whose channels lie together are resized ten times faster than channels apart.
        """
        return fit_map(raw.transpose(0, 1), self.size, crop, "bicubic").transpose(0, 1).contiguous()

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (C, T, H, W) as frames side by side, at most four of them, evenly spread."""
        chosen = np.linspace(0, signal.shape[1] - 1, min(SHOWN, signal.shape[1])).round().astype(int)
        frames = []
        for number in chosen:
            pixels = super().show(signal[:, number])
            frames.append(hide(pixels, None if is_known is None else is_known[number]))
        return np.concatenate(frames, axis=1)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = super()._statistics(device)
        return mean.unsqueeze(-1), std.unsqueeze(-1)

    def _shares(self, signal: Tensor) -> Tensor:
        mean, std = super()._statistics(signal.device) if signal.ndim == 4 else self._statistics(signal.device)
        return (signal.float() * std + mean).clamp(0, 1)


def frame_numbers(count: int, frames: int, stride: int | None, moment: float) -> np.ndarray:
    """Choose `frames` numbers, ascending, of `count` frames.

    Args:
        count: frames that there are.
        frames: how many are wanted.
        stride: from one to the next; null: evenly spread over all, each in the middle of its share.
        moment: 0 for the first possible clip, 1 for the last one.
    """
    if stride is None:
        chosen = ((np.arange(frames) + 0.5) * count / frames).astype(int)
    else:
        span = (frames - 1) * stride + 1
        first = round(moment * max(0, count - span))
        chosen = first + np.arange(frames) * stride
    return np.minimum(chosen, count - 1)
