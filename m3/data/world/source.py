"""Numbered scenes of a split with all their signals.

Letters: H height, W width, T frames of a video, S samples of a sound, P points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from m3.data.recording import Clip
from m3.data.world.caption import SEEN_PIXELS, caption
from m3.data.world.cloud import sample_points
from m3.data.world.derived import boxes, camera_normals, regions
from m3.data.world.motion import DIRECTIONS, SPEEDS, motion_labels
from m3.data.world.question import question
from m3.data.world.render import Frame, render
from m3.data.world.scene import COLOURS, MATERIALS, SHAPES, Scene, Split, generator, sample_scene
from m3.data.world.sound import record, strikes, struck
from m3.errors import M3Error

SOUND, POINTS, QUESTION, MISTAKE = 1, 2, 3, 4
"""Uses of a scene's random numbers beside the scene itself; see `generator`."""


@dataclass(frozen=True)
class Offer:
    """How much of the signals that have an extent in time or a count.

    Attributes:
        frames: of a video; a sound lasts as long, frames / fps seconds.
        fps: frames per second.
        sound_rate: samples per second.
        points: of a cloud.
        is_alone: leave of each scene only the object with the most pixels.
        is_camera_still: the camera stays where it is at time 0.
        is_close: the camera is aimed at the object with the most pixels and zoomed in.
        is_asked: the text is a question about the scene, and `answers` what ten people say, instead of a caption.
        wrong_texts: share of the training split's captions that are of another scene.
        features: values of a region's feature.
        classes: of a region's soft labels.
    """

    frames: int = 8
    fps: float = 4.0
    sound_rate: int = 16000
    points: int = 1024
    is_alone: bool = False
    is_camera_still: bool = False
    is_close: bool = False
    is_asked: bool = False
    wrong_texts: float = 0.0
    features: int = 192
    classes: int = 1 + len(SHAPES)


USUAL = Offer()


class WorldSource:
    """Scenes 0 ... length - 1 of a split, rendered when they are read."""

    SIGNALS = ("image", "depth", "semantic_map", "text", "video", "audio", "points", "normals", "boxes", "regions")
    """What scenes give; `answers` as well where they are asked."""
    CLASS_NAMES = ("sky", "ground", *SHAPES)
    PALETTE = ((140, 190, 240), (110, 110, 110), (220, 50, 50), (50, 180, 70), (60, 90, 230), (240, 200, 40))
    """RGB in 0 ... 255 to paint each class of a semantic map with; it says nothing of the colours of the objects."""
    LABEL_NAMES: ClassVar[dict[str, tuple[str, ...]]] = {
        "shape": SHAPES,
        "color": tuple(COLOURS),
        "count": ("0", "1", "2", "3", "4", "5"),
        "direction": DIRECTIONS,
        "speed": SPEEDS,
        "material": MATERIALS,
    }

    def __init__(
        self,
        seed: int,
        split: Split,
        length: int,
        height: int = 64,
        width: int = 64,
        *,
        signals: tuple[str, ...] | None = None,
        offer: Offer = USUAL,
    ) -> None:
        """Offer these `signals` (None: all); no other is computed.

        Raises:
            M3Error: for a signal that the world does not make.
        """
        self.seed, self.length, self.height, self.width = seed, length, height, width
        self.split: Split = split
        self.signals = self.SIGNALS if signals is None else signals
        self.offer = offer
        known = (*self.SIGNALS, *(("answers",) if offer.is_asked else ()))
        unknown = [name for name in self.signals if name not in known]
        if unknown:
            raise M3Error(f"signals: the world makes no `{unknown[0]}`; choose from {', '.join(known)}.")

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> dict[str, Any]:
        """Render one scene.

        Returns:
            `signals`: those that were asked for of image uint8 (H, W, 3), depth float32 (H, W) metres, semantic_map
            uint8 (H, W), text, video `Clip`, audio `Sound`, points float32 (P, 6) as `sample_points` says, normals
            float32 (H, W, 3) in the camera's frame, boxes and regions as functions of the name say;
            `labels`: shape, color and material of the object with the most pixels, count of visible objects, direction
            and speed of that object in the picture from the first to the last frame of the video; `id`.

        Raises:
            IndexError: for an index outside 0 ... length - 1.
        """
        if not 0 <= index < self.length:
            raise IndexError(
                f"scene {index} does not exist: the {self.split} split has {self.length} scenes, numbered from 0"
            )
        scene = sample_scene(self.seed, index, self.split)
        if self.offer.is_camera_still:
            scene = replace(scene, camera=replace(scene.camera, turn=0.0))
        frame = render(scene, self.height, self.width)
        seen = np.bincount(frame.instance.ravel(), minlength=len(scene.objects) + 1) / frame.instance.size
        number = int(seen[1:].argmax())
        main, duration = scene.objects[number], (self.offer.frames - 1) / self.offer.fps
        if self.offer.is_alone:
            scene, number = replace(scene, objects=(main,)), 0
        if self.offer.is_close:
            scene = replace(scene, camera=scene.camera.close_to(main))
        if self.offer.is_alone or self.offer.is_close:
            frame = render(scene, self.height, self.width)
            seen = np.bincount(frame.instance.ravel(), minlength=len(scene.objects) + 1) / frame.instance.size
        labels = {
            "shape": SHAPES.index(main.shape),
            "color": list(COLOURS).index(main.colour),
            "count": int((seen[1:] >= SEEN_PIXELS).sum()),
            **motion_labels(scene, number, duration),
            "material": MATERIALS.index(main.material),
        }
        signals = self._signals(index, scene, frame, seen)
        if self.offer.is_asked:
            names = {label: self.LABEL_NAMES[label][number] for label, number in labels.items()}
            asked = question(names, self._random(index, QUESTION))
            signals |= {name: asked[name] for name in ("text", "answers") if name in self.signals}
        return {"signals": signals, "labels": labels, "id": f"world/{self.split}/{index:06d}"}

    def _signals(self, index: int, scene: Scene, frame: Frame, seen: np.ndarray) -> dict[str, Any]:
        offer, duration = self.offer, self.offer.frames / self.offer.fps
        make = {
            "image": lambda: frame.image,
            "depth": lambda: frame.depth,
            "semantic_map": lambda: frame.semantic,
            "text": lambda: self._wrong_text(index) or caption(scene, seen),
            "video": lambda: self._video(scene, frame.image, strikes(scene, self._random(index, SOUND), duration)),
            "audio": lambda: record(scene, self._random(index, SOUND), duration, offer.sound_rate),
            "points": lambda: sample_points(scene, self._random(index, POINTS), offer.points),
            "normals": lambda: camera_normals(scene.camera, frame),
            "boxes": lambda: boxes(scene, frame),
            "regions": lambda: regions(scene, frame, offer.features, offer.classes),
        }
        return {name: make[name]() for name in self.signals if name in make}

    def _wrong_text(self, index: int) -> str | None:
        """Return the caption of another scene where a scene has a wrong one."""
        share = self.offer.wrong_texts if self.split == "train" and self.length > 1 else 0.0
        random = self._random(index, MISTAKE)
        if random.random() >= share:
            return None
        other = (index + int(random.integers(1, self.length))) % self.length
        offer = replace(self.offer, wrong_texts=0.0)
        texts = WorldSource(self.seed, self.split, self.length, self.height, self.width, signals=("text",), offer=offer)
        return texts.read(other)["signals"]["text"]

    def _video(self, scene: Scene, image: np.ndarray, hits: list[np.ndarray]) -> Clip:
        times = np.arange(self.offer.frames) / self.offer.fps
        later = [render(struck(scene, hits, t), self.height, self.width, t).image for t in times[1:].tolist()]
        return Clip(np.stack([image, *later]), times.astype(np.float32))

    def _random(self, index: int, use: int) -> np.random.Generator:
        return generator(self.seed, index, self.split, use)
