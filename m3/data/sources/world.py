"""The embedded world as a source: every scene gives all modalities."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from m3.data.source import Sample, Source, Split
from m3.data.world import WorldSource
from m3.data.world.scene import SHAPES
from m3.data.world.source import USUAL, Offer
from m3.errors import M3Error, read_settings
from m3.parts import type_name
from m3.plugins import Modality, Strict
from m3.recipe import DataSpec

ENDLESS = 1_000_000
"""Scenes of a run that does not limit `samples`."""

PICTURES = ("image", "depth", "semantic_map", "video", "normals")
"""Types whose signals end in height and width."""


class Options(Strict):
    """`data.options` of source `world`.

    Attributes:
        frames: of a video; a sound lasts as long, frames / fps seconds.
        fps: frames per second.
        sound_rate: samples of sound per second.
        points: of a cloud.
        camera: `turning` on a slow circle; `still`; `close`: turning, and zoomed in on the object with the most pixels,
            as one photographs a thing.
        objects: `all` of a scene, or of each scene only the `main` one, with the most pixels.
        wrong_texts: share of training samples with the caption of another scene, as alternative texts of the web often
            say little of their picture; held-out samples keep theirs.
        text: a `caption`, or a `question` about colour or shape of the main object or the number of objects; a
            modality of type `answers` then gets the answer.
    """

    frames: PositiveInt = USUAL.frames
    fps: PositiveFloat = USUAL.fps
    sound_rate: PositiveInt = USUAL.sound_rate
    points: PositiveInt = USUAL.points
    camera: Literal["turning", "still", "close"] = "turning"
    objects: Literal["all", "main"] = "all"
    wrong_texts: float = Field(default=USUAL.wrong_texts, ge=0.0, le=1.0)
    text: Literal["caption", "question"] = "caption"


class World(Source):
    """Procedural scenes, made on the fly. A modality gets the signal of its type, whatever its name."""

    def __init__(self, spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> None:
        super().__init__(spec, modalities, seed, split)
        options = read_settings(Options, spec.options, "data.options")
        chosen = {
            "is_alone": options.objects == "main",
            "is_camera_still": options.camera == "still",
            "is_close": options.camera == "close",
            "is_asked": options.text == "question",
        }
        offer = Offer(**options.model_dump(exclude={"objects", "camera", "text"}), **chosen)
        self.types = {name: part.reads or type_name(type(part).__name__) for name, part in modalities.items()}
        for name, kind in self.types.items():
            if kind == "answers" and not offer.is_asked:
                raise M3Error(
                    f"modalities.{name}: the world answers only what it asks; set data.options.text=question."
                )
            if kind not in (*WorldSource.SIGNALS, "answers"):
                raise M3Error(
                    f"modalities.{name}: the world makes no `{kind}`; it offers {', '.join(WorldSource.SIGNALS)}. "
                    f"Use another data.source."
                )
        height, width = _frame_size(modalities)
        length = (spec.samples or ENDLESS) if split == "train" else spec.held_out
        signals = tuple(dict.fromkeys(self.types.values()))
        self.scenes = WorldSource(seed, split, length, height, width, signals=signals, offer=self._offer(offer))

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int) -> Sample:
        """Render one scene."""
        scene = self.scenes.read(index)
        signals = {name: scene["signals"][kind] for name, kind in self.types.items()}
        for name in (name for name, kind in self.types.items() if kind == "points"):  # with as many colours as are read
            signals[name] = signals[name][:, : self.modalities[name].signal.channels]
        return Sample(signals, scene["id"], scene["labels"])

    def _offer(self, offer: Offer) -> Offer:
        """Return regions of the sizes that the modalities read."""
        for name, part in self.modalities.items():
            if self.types[name] == "regions":
                size = part.signal.channels - 4
                is_label = type_name(type(part).__name__) == "region_labels"
                if is_label and size <= len(SHAPES):
                    raise M3Error(
                        f"modalities.{name}.classes: the world knows a background and {len(SHAPES)} shapes, got {size}."
                    )
                offer = replace(offer, classes=size) if is_label else replace(offer, features=size)
        return offer


def _frame_size(modalities: dict[str, Modality]) -> tuple[int, int]:
    """Return the largest picture any modality reads, so that the others are made smaller, never larger."""
    parts = [part for part in modalities.values() if type_name(type(part).__name__) in PICTURES]
    sizes = [part.signal.size[-2:] for part in parts]
    return (max(s[0] for s in sizes), max(s[1] for s in sizes)) if sizes else (64, 64)
