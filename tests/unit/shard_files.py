"""Scenes in folders, tars and sources over them, for the tests of shards and of packing."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from m3.data.source import Source, open_source
from m3.modalities.image import Image
from m3.plugins import Modality
from m3.recipe import DataSpec


class Depth(Image):
    """Stands for a second map that shares .png with images."""

    extensions = (".png", ".npy")

    def load(self, path: Any) -> np.ndarray:
        return np.load(path) if path.name.endswith(".npy") else np.array(PILImage.open(path))


class Text(Image):
    """Stands for a modality of its own file type."""

    extensions = (".txt",)

    def load(self, path: Any) -> str:
        return path.read_text() if isinstance(path, Path) else path.read().decode()


def modalities(*names: str) -> dict[str, Modality]:
    known = {"image": Image, "depth": Depth, "text": Text}
    return {name: known[name](Image.Spec(size=4)) for name in names}


ALL = ("image", "depth", "text")


def open_data(root: Path | str, *names: str, source: str = "shards", split: Any = "train", **more: Any) -> Source:
    spec = DataSpec(source=source, root=str(root), **{"held_out": 0, **more})
    return open_source(spec, modalities(*names), 0, split)


def png(value: int) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(np.arange(value, value + 48, dtype=np.uint8).reshape(4, 4, 3)).save(file, "PNG")
    return file.getvalue()


def scenes(root: Path, count: int) -> Path:
    """Folders with ids in subfolders and with dots; of four samples one lacks its depth."""
    for i in range(count):
        key = f"{'ab'[i % 2]}/{i:03d}.v1"
        for name, data in {"image.png": png(i), "depth.png": png(2 * i), "text.txt": f"scene {i}\n".encode()}.items():
            folder, ending = name.split(".")
            file = root / folder / f"{key}.{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            if folder != "depth" or i % 4 != 3:
                file.write_bytes(data)
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def contents(source: Source) -> list[tuple[str, dict[str, Any], dict[str, int]]]:
    samples = [source.read(i) for i in range(len(source))]
    return [(s.id, {n: np.asarray(x).tolist() for n, x in s.signals.items()}, s.labels) for s in samples]
