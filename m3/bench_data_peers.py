"""The other libraries that `m3 bench data` measures beside M3: the same files, crops and sizes, in the same run."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sized
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from m3.data.sources.folder import Folder
from m3.errors import M3Error
from m3.plugins import Modality


def running_rate(batches: Iterator[Sized], workers: int, timed: int) -> float:
    """Return samples per second of a loader that runs.

    Args:
        batches: more of them than are taken, so that the workers are busy to the end.
        workers: of the loader; as many batches come before the clock starts, and one more.
        timed: batches that count.
    """
    for _ in islice(batches, 1 + workers):
        pass
    start = time.perf_counter()
    done = sum(len(batch) for batch in islice(batches, timed))
    return done / (time.perf_counter() - start)


class _Pictures:
    """A data set as torchvision's ImageFolder reads it: its loader, then the transform."""

    def __init__(self, files: list[str], transform: Callable[[Any], Any]) -> None:
        from torchvision.datasets.folder import default_loader

        self.files, self.transform, self.load = files, transform, default_loader

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.load(self.files[index]))


def image_folder_rate(source: Folder, count: int, batch: int, workers: int) -> float:
    """Return samples per second of torchvision with the same files, crop and resizing."""
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise M3Error("the comparison needs torchvision; run `pip install 'm3-multimodal[vision]'`.") from error
    (part,) = source.modalities.values()
    size, scale, mode = list(part.signal.size), source.spec.crop, v2.InterpolationMode.BICUBIC
    change: list[Any] = [v2.PILToTensor(), v2.Resize(size, mode, antialias=True)]
    if scale:
        change[1] = v2.RandomResizedCrop(size, (scale[0], scale[1]), interpolation=mode)
    if source.spec.flip:
        change.append(v2.RandomHorizontalFlip(source.spec.flip))
    paths = [value for row in source.rows[:count] for value in row.values.values() if isinstance(value, Path)]
    batch = min(batch, count)
    timed = max(count // batch, 2 * workers)
    order = [number % count for number in range(batch * (timed + 6 * workers + 1))]
    data: Any = _Pictures([os.fspath(path) for path in paths], v2.Compose(change))
    with warnings.catch_warnings():  # as for M3's own loader
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(data, batch, sampler=order, num_workers=workers, prefetch_factor=4 if workers else None)
        return running_rate(iter(loader), workers, timed)


def clip_rate(files: list[Path], part: Modality, load: Callable[[Path], Any]) -> float:
    """Return clips per second: a file is opened and the frames that a modality chooses of it are decoded.

    Args:
        files: the n-th gives a clip from the share n of its length.
        part: chooses the frames.
        load: opens a file, as `part.load` does.
    """
    moments = [number / max(1, len(files) - 1) for number in range(len(files))]
    part.cut(load(files[0]), 0.0)
    start = time.perf_counter()
    for file, moment in zip(files, moments, strict=True):
        part.cut(load(file), moment)
    return len(files) / (time.perf_counter() - start)
