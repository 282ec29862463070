"""Random changes of training samples: which of them the modalities of a recipe can follow, colours of pictures, clouds.

Letters: C channels, T frames, H height, W width, P points, A other values per point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from m3.data.policies import POLICIES
from m3.errors import M3Error, nearest, read_settings, within
from m3.parts import class_name
from m3.plugins import Modality, Strict
from m3.random import stream_number
from m3.recipe import AugmentSpec, DataSpec

PHOTOMETRIC = (
    "color_jitter",
    "gaussian_blur",
    "random_adjust_sharpness",
    "random_autocontrast",
    "random_channel_permutation",
    "random_equalize",
    "random_grayscale",
    "random_invert",
    "random_photometric_distort",
    "random_posterize",
    "random_solarize",
)
"""Transforms of torchvision.transforms.v2 that move no pixel and keep size and channels."""

Transform = Callable[[Tensor], Tensor]


class ScaleTranslate:
    """Stretches a cloud by a factor per axis and moves it, as Point-MAE does (Pang et al. 2022, section 4.1).

    It changes raw coordinates: with points that are normalised afterwards, little of it is left.
    """

    class Spec(Strict):
        """Settings of `type: scale_translate`.

        Attributes:
            scale: smallest and largest factor.
            translate: largest shift along an axis to either side, in the unit of the coordinates.
        """

        scale: tuple[PositiveFloat, PositiveFloat] = (2 / 3, 3 / 2)
        translate: NonNegativeFloat = 0.2

    def __init__(self, spec: Spec, chance: float = 1.0) -> None:
        self.spec, self.chance = spec, chance

    def __call__(self, x: Tensor) -> Tensor:
        """Change points (P, 3 + A), of which the first three are coordinates, with probability `chance`."""
        if torch.rand(()) >= self.chance:
            return x
        low, high = self.spec.scale
        factor = low + (high - low) * torch.rand(3)
        shift = self.spec.translate * (2 * torch.rand(3) - 1)
        return torch.cat([x[:, :3] * factor + shift, x[:, 3:]], 1)


class Chance:
    """Does something with a probability."""

    def __init__(self, transform: Transform, chance: float) -> None:
        self.transform, self.chance = transform, chance

    def __call__(self, x: Tensor) -> Tensor:
        """Change x, or leave it as it is."""
        return self.transform(x) if torch.rand(()) < self.chance else x


class Augmentation:
    """Changes samples as `data.augment` says; what it draws depends on the sample's key alone."""

    def __init__(self, settings: dict[str, list[dict[str, Any]]], modalities: dict[str, Modality]) -> None:
        """Make the transforms.

        Args:
            settings: modality -> its transforms, in the order in which they are applied.
            modalities: of the recipe.

        Raises:
            M3Error: an unknown modality or transform, settings that don't fit it, a modality that can't be changed.
        """
        self.transforms: dict[str, list[Transform]] = {}
        self.clouds = {name for name, part in modalities.items() if part.signal.channel_axis == -1}
        for name, entries in settings.items():
            if name not in modalities:
                raise M3Error(f"data.augment names `{name}`, which is no modality.{nearest(name, modalities)}")
            example = modalities[name].blank(1)[0]
            is_picture = example.dtype == torch.uint8 and example.ndim >= 3
            if not is_picture and name not in self.clouds:
                raise M3Error(f"data.augment.{name}: only pictures and points can be changed; remove this entry.")
            places = [f"data.augment.{name}.{number}" for number in range(len(entries))]
            self.transforms[name] = [
                self._of_picture(entry, where, name, modalities) if is_picture else _of_cloud(entry, where)
                for entry, where in zip(entries, places, strict=True)
            ]

    def _of_picture(self, entry: dict[str, Any], where: str, name: str, modalities: dict[str, Modality]) -> Transform:
        """Make one transform of pictures; one that moves pixels goes with no other map of the same sample."""
        if entry.get("type") not in POLICIES:
            return _photometric(entry, where, modalities[name].blank(1)[0])
        spec, settings = _split(entry, where)
        part = POLICIES[spec.type]
        others = [other for other, modality in modalities.items() if other != name and "crop" not in modality.follows]
        others += [other for other, modality in modalities.items() if other != name and modality.is_map]
        if part.moves and others:
            raise M3Error(
                f"{where}: `{spec.type}` moves pixels of `{name}`, which `{others[0]}` can't follow; remove it."
            )
        picture = modalities[name]
        mean, std = (getattr(picture, name, None) for name in ("mean", "std"))
        if not mean or not std or (part.moves and picture.signal.channels != 3):
            raise M3Error(f"{where}: `{spec.type}` changes pictures in RGB, which `{name}` does not hold; remove it.")
        height, width = picture.signal.size[-2:]
        with within(where):
            made = part(read_settings(part.Spec, settings, where), mean, std, (height, width))
        return Chance(made, spec.chance)

    def __call__(self, signals: dict[str, Tensor], key: str) -> dict[str, Tensor]:
        """Change the fitted signals of a sample; `key` names the sample and its use."""
        changed = {name: transforms for name, transforms in self.transforms.items() if name in signals}
        if not changed:
            return signals
        with torch.random.fork_rng(devices=[]):  # the transforms draw from torch's generator
            for name, transforms in changed.items():
                torch.manual_seed(stream_number(f"augment/{key}/{name}"))
                x = signals[name]
                if name not in self.clouds:
                    x = x.movedim(0, -3)  # videos are (C, T, H, W) here and (T, C, H, W) there
                for transform in transforms:
                    x = transform(x)
                signals = {**signals, name: (x if name in self.clouds else x.movedim(-3, 0)).contiguous()}
        return signals


def check_geometry(spec: DataSpec, modalities: dict[str, Modality]) -> None:
    """Raise where a random crop or flip of the pictures would make another modality of the sample wrong."""
    if not any(part.is_map for part in modalities.values()):  # then nothing is cropped or flipped
        return
    decisions = {"crop": (spec.crop is not None, "cropped", "null"), "flip": (spec.flip > 0, "mirrored", "0")}
    for decision, (is_made, done, off) in decisions.items():
        for name, part in modalities.items():
            if is_made and decision not in part.follows:
                raise M3Error(
                    f"data.{decision}: pictures are {done} at random, which `{name}` can't follow, so it would no "
                    f"longer say what they show; set data.{decision}={off}."
                )


def _of_cloud(entry: dict[str, Any], where: str) -> Transform:
    """Make one transform of points."""
    spec, settings = _split(entry, where)
    if spec.type != "scale_translate":
        raise M3Error(f"{where}.type: `{spec.type}` is no change of points; use `scale_translate`.")
    return ScaleTranslate(read_settings(ScaleTranslate.Spec, settings, where), spec.chance)


def _split(entry: dict[str, Any], where: str) -> tuple[AugmentSpec, dict[str, Any]]:
    """Take what every entry has from the settings of its transform."""
    spec = read_settings(AugmentSpec, {k: v for k, v in entry.items() if k in AugmentSpec.model_fields}, where)
    return spec, {key: value for key, value in entry.items() if key not in AugmentSpec.model_fields}


def _photometric(entry: dict[str, Any], where: str, example: Tensor) -> Transform:
    """Make one transform of colours and try it."""
    spec, settings = _split(entry, where)
    if spec.type not in PHOTOMETRIC:
        known = (*PHOTOMETRIC, *POLICIES)
        raise M3Error(f"{where}.type: `{spec.type}` is no change of colours.{nearest(spec.type, known)}")
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise M3Error(f"{where} needs torchvision; run `pip install 'm3-multimodal[vision]'`.") from error
    try:
        made = getattr(v2, class_name(spec.type))(**settings)
        with torch.random.fork_rng(devices=[]):
            made(example.movedim(0, -3))
    except (TypeError, ValueError, RuntimeError) as error:
        raise M3Error(f"{where}: {class_name(spec.type)} does not take these settings: {error}.") from error
    return made if spec.chance == 1 else v2.RandomApply([made], spec.chance)
