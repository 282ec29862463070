"""Sound, as log-mel spectrograms.

Letters: B batch, C channels, T frames of 10 ms, F mel bands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from m3.data.recording import Sound
from m3.data.sound import SOUND_FILES, VIDEO_FILES, log_mel, read_sound
from m3.drawing import hide
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict

WINDOW, SHIFT = 0.025, 0.010
"""Seconds of a window, and from one to the next."""


class Audio(Modality):
    """Raw: float32 (T, C, F) log-mel. Normalised: (B, C, T, F), (x - mean) / (2 std); NaN behind the end."""

    class Spec(Strict):
        """Settings of `type: audio`; the defaults are AudioMAE's for AudioSet (Huang et al. 2022).

        Attributes:
            frames: T that the model is built for and the most it reads; 10 ms each.
            bands: F.
            rate: samples per second.
            channels: 1: the mean of all channels; 2: left and right.
            mean: of the data's log-mel values.
            std: of the data's log-mel values; the recipe `m3 data stats` prints both.
        """

        frames: PositiveInt = 1024
        bands: PositiveInt = 128
        rate: PositiveInt = 16000
        channels: PositiveInt = 1
        mean: float = -4.2677393
        std: PositiveFloat = 4.5689974

    extensions = (*SOUND_FILES, *VIDEO_FILES)
    measure = "log-mel MSE"
    padding = float("nan")

    @property
    def signal(self) -> Signal:
        """Values (B, C, T, F)."""
        return Signal("values", self.spec.channels, (self.spec.frames, self.spec.bands), has_gaps=True)

    @property
    def follows(self) -> frozenset[str]:
        """A flip changes left and right of two channels, and nothing of one; what others mean is not known."""
        return frozenset({"crop", "flip"} if self.spec.channels <= 2 else {"crop"})

    def blank(self, count: int) -> Tensor:
        """Return spectrograms of the mean, float32 (B, T, C, F)."""
        return torch.full((count, self.spec.frames, self.spec.channels, self.spec.bands), self.spec.mean)

    def load(self, file: File) -> Sound:
        """Read a sound file or the sound track of a video."""
        return read_sound(file)

    def cut(self, sample: Any, moment: float) -> Any:
        """Take as many samples as T frames need from a longer sound."""
        sound = self._sound(sample)
        wanted = round(((self.spec.frames - 1) * SHIFT + WINDOW) * sound.rate)
        first = round(moment * max(0, sound.samples.shape[-1] - wanted))
        return Sound(sound.samples[..., first : first + wanted], sound.rate)

    def to_raw(self, sample: Any) -> Tensor:
        """Read a `Sound`, or samples (S,) or (C, S) at `rate` -> log-mel (at most T, C, F)."""
        sound = self._sound(sample)
        samples = sound.samples
        if samples.ndim != 2 or samples.dtype.kind != "f" or not samples.size:
            raise M3Error(
                f"a sound must be float samples of shape (channels, samples), got {samples.dtype} of shape "
                f"{samples.shape}; scale integers to -1 to 1."
            )
        if self.spec.channels == 1:
            samples = samples.mean(0, keepdims=True)
        elif len(samples) != self.spec.channels:
            raise M3Error(
                f"a sound has {len(samples)} channel(s), but `channels` is {self.spec.channels}; set it to 1."
            )
        return log_mel(Sound(samples, sound.rate), self.spec.rate, self.spec.bands)[: self.spec.frames]

    def _sound(self, sample: Any) -> Sound:
        """Take an array for a sound at `rate`; one channel may come without its axis."""
        sound = sample if isinstance(sample, Sound) else Sound(np.asarray(sample), self.spec.rate)
        return sound._replace(samples=np.atleast_2d(sound.samples))

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Change left and right where the picture is mirrored; its crop means nothing here: `cut` chose the part."""
        return raw.flip(1) if crop.is_flipped else raw

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn log-mel (B, T, C, F) into (B, C, T, F) around 0."""
        return ((raw - self.spec.mean) / (2 * self.spec.std)).transpose(1, 2)

    def statistics(self, raw: Tensor) -> Tensor:
        """Return count, sum and sum of squares of the log-mel values that are there -> (3, 1)."""
        x = raw[~raw.isnan()].double()
        return torch.stack([torch.tensor(float(len(x)), dtype=x.dtype), x.sum(), x.square().sum()]).unsqueeze(1)

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (C, T, F): time to the right, pitch up, channels one below the other; -2 to 2 in brightness."""
        from matplotlib import colormaps

        x = signal.float().cpu().numpy()
        colours = (colormaps["viridis"](np.clip((np.nan_to_num(x) + 2) / 4, 0, 1))[..., :3] * 255).astype(np.uint8)
        known = ~signal[0].isnan() if is_known is None else is_known.to(signal.device) & ~signal[0].isnan()
        return np.concatenate([hide(channel, known).transpose(1, 0, 2)[::-1] for channel in colours])

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Sum squared errors of known positions and their number -> (2,)."""
        is_known = ~truth.isnan().any(1) & weight.bool()
        error = (predicted.float() - truth.float()).square().mean(1)
        return torch.stack([error[is_known].sum(), is_known.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Mean squared error in units of `normalise`."""
        return float(sums[0] / sums[1])
