"""Numbered scenes of a split with all their signals.

Letters: H height, W width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from m3.data.world.caption import SEEN_PIXELS, caption
from m3.data.world.render import render
from m3.data.world.scene import COLOURS, SHAPES, Split, sample_scene


class WorldSource:
    """Scenes 0 ... length - 1 of a split, rendered when they are read."""

    SIGNALS = ("image", "depth", "semantic_map", "text")
    CLASS_NAMES = ("sky", "ground", *SHAPES)
    PALETTE = ((140, 190, 240), (110, 110, 110), (220, 50, 50), (50, 180, 70), (60, 90, 230), (240, 200, 40))
    """RGB in 0 ... 255 to paint each class of a semantic map with; it says nothing of the colours of the objects."""
    LABEL_NAMES: ClassVar[dict[str, tuple[str, ...]]] = {
        "shape": SHAPES,
        "color": tuple(COLOURS),
        "count": ("0", "1", "2", "3", "4", "5"),
    }

    def __init__(self, seed: int, split: Split, length: int, height: int = 64, width: int = 64) -> None:
        self.seed, self.length, self.height, self.width = seed, length, height, width
        self.split: Split = split

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> dict[str, Any]:
        """Render one scene.

        Returns:
            `signals`: image uint8 (H, W, 3), depth float32 (H, W) metres, semantic_map uint8 (H, W), text;
            `labels`: shape and color of the object with the most pixels, count of visible objects; `id`.

        Raises:
            IndexError: for an index outside 0 ... length - 1.
        """
        if not 0 <= index < self.length:
            raise IndexError(
                f"scene {index} does not exist: the {self.split} split has {self.length} scenes, numbered from 0"
            )
        scene = sample_scene(self.seed, index, self.split)
        frame = render(scene, self.height, self.width)
        seen = np.bincount(frame.instance.ravel(), minlength=len(scene.objects) + 1) / frame.instance.size
        main = scene.objects[int(seen[1:].argmax())]
        return {
            "signals": {
                "image": frame.image,
                "depth": frame.depth,
                "semantic_map": frame.semantic,
                "text": caption(scene, seen),
            },
            "labels": {
                "shape": SHAPES.index(main.shape),
                "color": list(COLOURS).index(main.colour),
                "count": int((seen[1:] >= SEEN_PIXELS).sum()),
            },
            "id": f"world/{self.split}/{index:06d}",
        }
