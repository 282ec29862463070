"""Small data on disk and ways to open it, for the tests of sources."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from m3.data.source import Source, open_source
from m3.modalities.image import Image
from m3.plugins import Modality
from m3.recipe import DataSpec


class Depth(Image):
    """Stands for any second map."""

    extensions = (".png", ".npy")

    def load(self, path: Any) -> np.ndarray:
        return np.array(PILImage.open(path))


class Text(Image):
    """Stands for any modality that a manifest may hold itself."""

    extensions = (".txt",)
    is_inline = True

    def load(self, path: Any) -> str:
        return path.read_text() if isinstance(path, Path) else path.read().decode()


def modalities(*names: str) -> dict[str, Modality]:
    known = {"image": Image, "depth": Depth, "text": Text}
    return {name: known[name](Image.Spec(size=4)) for name in names}


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)


def open_data(spec: DataSpec, *names: str, split: Any = "train") -> Source:
    return open_source(spec, modalities(*names), 0, split)


def manifest(folder: Path, text: str, name: str = "pairs.csv", count: int = 4) -> DataSpec:
    for i in range(count):
        picture(folder / f"images/{i}.png", 10 * i)
    (folder / name).write_text(text)
    return DataSpec(source="folder", root=str(folder / name), held_out=0)


def colour(source: Source, index: int) -> int:
    return int(np.asarray(source.read(index).signals["image"])[0, 0, 0])
