"""One small reader for video files, over PyAV (FFmpeg), or over decord where only that is installed.

Letters: F frames of the file, T frames that are read, H height, W width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3.data.recording import Clip
from m3.errors import M3Error
from m3.plugins import File

MOST_PIXELS = 2**26
"""Of a frame. A damaged header may claim any size, and FFmpeg would make room for it."""


@contextmanager
def container(file: File) -> Iterator[Any]:
    """Open a file that FFmpeg reads, as PyAV's container.

    Raises:
        M3Error: PyAV is missing, or the file is cut off, empty or of another kind.
    """
    try:
        import av
    except ImportError as error:
        raise M3Error(f"videos need PyAV ({error}); run `pip install 'm3-multimodal[video]'`.") from error
    if not isinstance(file, Path):
        file.seek(0)
    try:
        with av.open(str(file) if isinstance(file, Path) else file) as opened:
            yield opened
    except (M3Error, FileNotFoundError):
        raise
    except Exception as error:  # damaged files make PyAV raise nearly anything, a UnicodeDecodeError too
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise M3Error(f"{file.name} is cut off, damaged or no video: {reason.rstrip('.')}.") from error


@dataclass(frozen=True)
class VideoFile:
    """A video of which is known where its frames are; none is decoded yet.

    Attributes:
        file: where it is.
        stamps: int64 (F,), ascending: when each frame is shown, in the file's own unit.
        keys: int64, ascending: those of them from which decoding can start.
    """

    file: File
    stamps: np.ndarray
    keys: np.ndarray

    @property
    def count(self) -> int:
        """F."""
        return len(self.stamps)

    def read(self, index: np.ndarray) -> Clip:
        """Decode the frames at index (T,), ascending, in [0, F): no more than their key frames demand.

        Raises:
            M3Error: the file ends or breaks before one of them.
        """
        wanted, found = self.stamps[np.unique(index)], []
        start = np.searchsorted(self.keys, wanted, "right") - 1
        with container(self.file) as opened:
            stream = _stream(opened, self.file)
            for number in np.unique(start):
                opened.seek(int(self.keys[max(number, 0)]), stream=stream)
                found += _decode(opened, stream, wanted[start == number].tolist())
            if len(found) < len(wanted):
                raise M3Error(f"{self.file.name} breaks off before its frame {index[-1]}; leave it out.")
            places = np.searchsorted(wanted, self.stamps[index])
            times = self.stamps[index] * float(stream.time_base)
            return Clip(np.stack(found)[places], times.astype(np.float32))


@dataclass(frozen=True)
class DecordFile:
    """A video opened by decord: faster where frames are spread over the file, but damaged files may end the process.

    Attributes:
        file: where it is.
        reader: decord's own.
    """

    file: File
    reader: Any

    @property
    def count(self) -> int:
        """F."""
        return len(self.reader)

    def read(self, index: np.ndarray) -> Clip:
        """Decode the frames at index (T,), ascending, in [0, F).

        Raises:
            M3Error: the file ends or breaks before one of them.
        """
        try:
            frames = self.reader.get_batch(index.tolist()).asnumpy()
            times = np.asarray(self.reader.get_frame_timestamp(index.tolist()))[:, 0]
        except Exception as error:  # decord raises its own, undocumented classes
            raise M3Error(f"{self.file.name} breaks off before its frame {index[-1]}; leave it out.") from error
        return Clip(frames, times.astype(np.float32))


def open_video(file: File) -> VideoFile | DecordFile:
    """Find the frames of a video without decoding them.

    Raises:
        M3Error: PyAV and decord are missing, or the file holds no readable video.
    """
    if importlib.util.find_spec("av") is None and importlib.util.find_spec("decord") is not None:
        return _open_with_decord(file)
    with container(file) as opened:
        stream = _stream(opened, file)
        # Old .avi files say when a frame is to be decoded, not when it is shown; without reordering that is the same.
        packets = [(p.dts if p.pts is None else p.pts, p.is_keyframe) for p in opened.demux(stream) if p.size]
        known = sorted(packet for packet in packets if packet[0] is not None)
    if not known or not any(is_key for _, is_key in known):
        raise M3Error(f"{file.name} holds no frames; leave it out.")
    stamps = np.array([stamp for stamp, _ in known], np.int64)
    return VideoFile(file, stamps, stamps[[is_key for _, is_key in known]])


def _open_with_decord(file: File) -> DecordFile:
    import decord

    try:
        found = DecordFile(file, decord.VideoReader(str(file) if isinstance(file, Path) else file, num_threads=1))
    except Exception as error:  # as above
        raise M3Error(f"{file.name} is cut off, damaged or no video.") from error
    if not found.count:
        raise M3Error(f"{file.name} holds no frames; leave it out.")
    return found


def _stream(opened: Any, file: File) -> Any:
    if not opened.streams.video:
        raise M3Error(f"{file.name} has no pictures; leave it out.")
    stream = opened.streams.video[0]
    size = stream.codec_context.width, stream.codec_context.height
    if min(size) < 1 or size[0] * size[1] > MOST_PIXELS:
        raise M3Error(f"{file.name} claims frames of {size[0]} x {size[1]}, which no video has; leave it out.")
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
    stream.codec_context.thread_count = 1  # the loader's workers share out the cores
    return stream


def _decode(opened: Any, stream: Any, wanted: list[int]) -> list[np.ndarray]:
    """Decode from where the container stands until every wanted stamp, ascending, is reached: uint8 (H, W, 3) each."""
    found: list[np.ndarray] = []
    for frame in opened.decode(stream):
        if frame.pts is None or frame.pts < wanted[len(found)]:
            continue
        picture = frame.to_ndarray(format="rgb24")
        while len(found) < len(wanted) and frame.pts >= wanted[len(found)]:  # a frame that is lost: the next one
            found.append(picture)
        if len(found) == len(wanted):
            break
    return found
