"""Photographs and other images with any number of 8-bit channels.

Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from PIL.ExifTags import Base
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from m3.data.geometry import fit_map
from m3.drawing import hide
from m3.errors import M3Error
from m3.plugins import Crop, File, Modality, Signal, Strict
from m3.samples import numbers

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Image(Modality):
    """Raw: uint8 (C, H, W), 0 to 255. Normalised: (raw / 255 - mean) / std per channel."""

    class Spec(Strict):
        """Settings of `type: image`.

        Attributes:
            size: height and width the model reads; one number for square images.
            channels: C.
            mean: per channel, in [0, 1]; ImageNet's for 3 channels, else 0.5.
            std: per channel; ImageNet's for 3 channels, else 0.25.
        """

        size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
        channels: PositiveInt = 3
        mean: tuple[float, ...] | None = None
        std: tuple[PositiveFloat, ...] | None = None

    extensions = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
    is_map = True
    measure = "PSNR dB"
    higher_is_better = True

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.size = (spec.size, spec.size) if isinstance(spec.size, int) else spec.size
        is_rgb = spec.channels == 3
        self.mean = spec.mean or (IMAGENET_MEAN if is_rgb else (0.5,) * spec.channels)
        self.std = spec.std or (IMAGENET_STD if is_rgb else (0.25,) * spec.channels)
        if len(self.mean) != spec.channels or len(self.std) != spec.channels:
            raise M3Error(
                f"image: mean and std must have {spec.channels} values, one per channel, "
                f"got {len(self.mean)} and {len(self.std)}."
            )

    @property
    def signal(self) -> Signal:
        """Values (B, C, H, W)."""
        return Signal("values", self.spec.channels, self.size)

    def blank(self, count: int) -> Tensor:
        """Return black images, uint8 (B, C, H, W)."""
        return torch.zeros(count, self.spec.channels, *self.size, dtype=torch.uint8)

    def load(self, file: File) -> Any:
        """Decode an image file, turned upright as its EXIF data say: a PIL image, or uint8 (H, W, 3) of a JPEG."""
        with PILImage.open(file) as image:
            if image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(Base.Orientation, 1) == 1:
                pixels = _jpeg(file)
                if pixels is not None:
                    return pixels
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image

    def to_raw(self, sample: Any) -> Tensor:
        """Read a PIL image or an array/tensor, uint8 (H, W), (H, W, C) or (C, H, W) -> uint8 (C, H, W)."""
        is_rgb = isinstance(sample, np.ndarray) and sample.dtype == np.uint8 and sample.shape[2:] == (3,)
        if is_rgb and self.spec.channels == 1:  # grey is asked for: converted as a picture from a file
            sample = PILImage.fromarray(sample)
        if isinstance(sample, PILImage.Image):
            sample = _eight_bits(sample)
            mode = {1: "L", 3: "RGB"}.get(self.spec.channels, sample.mode)
            sample = sample if sample.mode == mode else sample.convert(mode)
        array = numbers(sample, "an image")
        x = torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)
        if x.ndim == 2:
            x = x.unsqueeze(0)
        elif x.ndim == 3 and x.shape[0] != self.spec.channels and x.shape[2] == self.spec.channels:
            x = x.permute(2, 0, 1)
        if x.dtype != torch.uint8 or x.ndim != 3 or x.shape[0] != self.spec.channels:
            raise M3Error(
                f"an image must be uint8 with {self.spec.channels} channels, got {x.dtype} of shape {tuple(x.shape)}; "
                f"convert it to 0 to 255 or set `channels`."
            )
        return x  # as it lies: torchvision resizes pixels whose channels lie together faster

    def fit(self, raw: Tensor, crop: Crop) -> Tensor:
        """Crop and resize (bicubic, antialiased) to `size`."""
        return fit_map(raw, self.size, crop, "bicubic").contiguous()

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn uint8 (B, C, H, W) into float32 with mean 0 and deviation 1 per channel."""
        mean, std = self._statistics(raw.device)
        return (raw.float() - mean * 255) / (std * 255)

    def statistics(self, raw: Tensor) -> Tensor:
        """Return count, sum and sum of squares of each channel of pixels in [0, 1] -> (3, C)."""
        x = raw.transpose(0, 1).flatten(1).double() / 255
        return torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])

    def show(self, signal: Tensor, is_known: Tensor | None = None) -> np.ndarray:
        """Draw (C, H, W); the first three channels, or the first one in grey."""
        pixels = self.pixels(signal.unsqueeze(0))[0].permute(1, 2, 0)
        return hide((pixels * 255).round().to(torch.uint8).cpu().numpy(), is_known)

    def score(self, predicted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        """Sum squared errors of pixels in [0, 1] and their number -> (2,)."""
        error = (self._shares(predicted) - self._shares(truth)).square().mean(1)
        return torch.stack([(error * weight).sum(), weight.sum()]).double()

    def finish_score(self, sums: Tensor) -> float:
        """Peak signal-to-noise ratio in dB, 10 log10(1 / mean squared error)."""
        return float(-10 * torch.log10((sums[0] / sums[1]).clamp(min=1e-10)))

    def pixels(self, signal: Tensor) -> Tensor:
        """Undo `normalise`: (B, C, H, W) -> (B, 3, H, W) in [0, 1], the first three channels or the first in grey."""
        x = self._shares(signal)
        return x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)

    def _shares(self, signal: Tensor) -> Tensor:
        mean, std = self._statistics(signal.device)
        return (signal.float() * std + mean).clamp(0, 1)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1)
        return torch.tensor(self.mean, device=device).view(shape), torch.tensor(self.std, device=device).view(shape)


def _jpeg(file: File) -> np.ndarray | None:
    """Decode a JPEG straight to uint8 (H, W, 3), a quarter faster than by way of Pillow's own image; same values.

    Returns:
        None where torchvision can't: it is missing, or refuses the file, of which Pillow then has the last word.
    """
    try:
        from torchvision.io import decode_jpeg

        data = file.read_bytes() if isinstance(file, Path) else _whole(file)
        pixels: Any = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return pixels.permute(1, 2, 0).numpy()
    except (ImportError, RuntimeError):
        return None


def _whole(file: BinaryIO) -> bytes:
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)  # Pillow goes on reading where it stood
    return data


def _eight_bits(image: PILImage.Image) -> PILImage.Image:
    """Make a picture one of 8 bits per channel where Pillow's own conversion would clip or warn."""
    if image.mode.startswith("I;16"):
        return PILImage.fromarray((np.array(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise M3Error(f"an image of mode {image.mode} has no known range; save it with 8 or 16 bits per channel.")
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
