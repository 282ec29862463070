"""One small reader for video files, over PyAV (FFmpeg), or over decord or torchcodec where only they are installed.

Letters: F frames of the file, T frames that are read, H height, W width.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m3.data.recording import Clip
from m3.errors import M3Error
from m3.plugins import File

MOST_PIXELS = 2**26
"""Of a frame. A damaged header may claim any size, and FFmpeg would make room for it."""

INSTALL = "run `pip install 'm3-multimodal[video]'`"

MOST_THREADS = 4
"""Of a decoder. Each begins with a frame of its own, so more of them mostly decode what nobody asked for."""


class Frames(ABC):
    """An opened video. Frames are decoded when they are read."""

    @property
    @abstractmethod
    def count(self) -> int:
        """F."""

    @abstractmethod
    def read(self, index: np.ndarray) -> Clip:
        """Decode the frames at index (T,), ascending, in [0, F).

        Raises:
            M3Error: the file ends or breaks before one of them.
        """


def open_video(file: File) -> Frames:
    """Open a video with the first of PyAV, decord and torchcodec that is installed.

    PyAV comes first: decord 0.6 ends the process on some damaged files, torchcodec needs an FFmpeg of the system.

    Raises:
        M3Error: none of them is installed, or the file holds no readable video.
    """
    for package, opener in {
        "av": _open_with_av,
        "decord": open_with_decord,
        "torchcodec": _open_with_torchcodec,
    }.items():
        if importlib.util.find_spec(package) is not None:
            return opener(file)
    raise M3Error(f"videos need PyAV (or decord, or torchcodec); {INSTALL}.")


def read_clip(file: File) -> Clip:
    """Read a clip that was stored without loss: a .npz with `frames` and perhaps `times`.

    Raises:
        M3Error: it has no `frames`.
    """
    with np.load(file, allow_pickle=False) as arrays:
        if "frames" not in arrays:
            raise M3Error(
                f"an .npz with a video must hold an array `frames`, this one holds {', '.join(arrays.files)}."
            )
        return Clip(arrays["frames"], arrays.get("times"))


def threads() -> int:
    """Return how many threads a decoder may use: as many as torch, which has one in each of a loader's workers."""
    return min(torch.get_num_threads(), MOST_THREADS)


# -- PyAV -----------------------------------------------------------------------------------------------


@contextmanager
def container(file: File) -> Iterator[Any]:
    """Open a file that FFmpeg reads, as PyAV's container.

    Raises:
        M3Error: PyAV is missing, or the file is cut off, empty or of another kind.
    """
    try:
        import av
    except ImportError as error:
        raise M3Error(f"videos need PyAV ({error}); {INSTALL}.") from error
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
class VideoFile(Frames):
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
        numbers, places = np.unique(index, return_inverse=True)
        wanted, frames, filled = self.stamps[numbers], np.empty(0), 0
        start = np.searchsorted(self.keys, wanted, "right") - 1
        with container(self.file) as opened:
            stream = _stream(opened, self.file)
            for number in np.unique(start):
                opened.seek(int(self.keys[max(number, 0)]), stream=stream)
                for picture in _decode(opened, stream, wanted[start == number].tolist()):
                    if not filled:
                        frames = np.empty((len(wanted), *picture.shape), np.uint8)
                    frames[filled] = picture
                    filled += 1
            if filled < len(wanted):
                raise M3Error(f"{self.file.name} breaks off before its frame {index[-1]}; leave it out.")
            times = (self.stamps[index] * float(stream.time_base)).astype(np.float32)
            return Clip(frames if len(wanted) == len(index) else frames[places], times)


def _open_with_av(file: File) -> VideoFile:
    """Find the frames of a video without decoding them."""
    with container(file) as opened:
        stream = _stream(opened, file)
        # Old .avi files say when a frame is to be decoded, not when it is shown; without reordering that is the same.
        packets = [(p.dts if p.pts is None else p.pts, p.is_keyframe) for p in opened.demux(stream) if p.size]
        known = sorted(packet for packet in packets if packet[0] is not None)
    if not known or not any(is_key for _, is_key in known):
        raise M3Error(f"{file.name} holds no frames; leave it out.")
    stamps = np.array([stamp for stamp, _ in known], np.int64)
    return VideoFile(file, stamps, stamps[[is_key for _, is_key in known]])


def _stream(opened: Any, file: File) -> Any:
    if not opened.streams.video:
        raise M3Error(f"{file.name} has no pictures; leave it out.")
    stream = opened.streams.video[0]
    size = stream.codec_context.width, stream.codec_context.height
    if min(size) < 1 or size[0] * size[1] > MOST_PIXELS:
        raise M3Error(f"{file.name} claims frames of {size[0]} x {size[1]}, which no video has; leave it out.")
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
    stream.codec_context.thread_count = threads()
    stream.codec_context.thread_type = "AUTO"
    return stream


def _decode(opened: Any, stream: Any, wanted: list[int]) -> Iterator[np.ndarray]:
    """Decode from where the container stands until every wanted stamp, ascending, is reached: uint8 (H, W, 3) each."""
    from av.video.reformatter import VideoReformatter

    convert, left = VideoReformatter(), list(reversed(wanted))  # one for all frames: its tables take time to make
    for frame in _frames(opened, stream, set(wanted)):
        if frame.pts is None or frame.pts < left[-1]:
            continue
        picture = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
        while left and frame.pts >= left[-1]:  # a frame that is lost: the next one
            left.pop()
            yield picture
        if not left:
            break


def _frames(opened: Any, stream: Any, wanted: set[int]) -> Iterator[Any]:
    """Decode frames; those that are not wanted and that no other is made from may be left out."""
    for packet in opened.demux(stream):
        is_needed = packet.pts is None or packet.pts in wanted
        stream.codec_context.skip_frame = "DEFAULT" if is_needed else "NONREF"
        yield from packet.decode()


# -- decord and torchcodec ------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecordFile(Frames):
    """A video opened by decord. Damaged files may end the process.

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
        """Decode frames as `Frames.read` says."""
        try:
            frames = self.reader.get_batch(index.tolist()).asnumpy()
            times = np.asarray(self.reader.get_frame_timestamp(index.tolist()))[:, 0]
        except Exception as error:  # decord raises its own, undocumented classes
            raise M3Error(f"{self.file.name} breaks off before its frame {index[-1]}; leave it out.") from error
        return Clip(frames, times.astype(np.float32))


def open_with_decord(file: File) -> DecordFile:
    """Open a video with decord.

    Raises:
        M3Error: decord is missing, or the file holds no readable video.
    """
    try:
        import decord
    except ImportError as error:
        raise M3Error(f"decord is not installed; {INSTALL}.") from error
    try:
        source = str(file) if isinstance(file, Path) else file
        found = DecordFile(file, decord.VideoReader(source, num_threads=threads()))
    except Exception as error:  # as above
        raise M3Error(f"{file.name} is cut off, damaged or no video.") from error
    if not found.count:
        raise M3Error(f"{file.name} holds no frames; leave it out.")
    return found


@dataclass(frozen=True)
class TorchcodecFile(Frames):
    """A video opened by torchcodec, which uses the FFmpeg of the system.

    Attributes:
        file: where it is.
        reader: torchcodec's own.
    """

    file: File
    reader: Any

    @property
    def count(self) -> int:
        """F."""
        return len(self.reader)

    def read(self, index: np.ndarray) -> Clip:
        """Decode frames as `Frames.read` says."""
        try:
            found = self.reader.get_frames_at(index.tolist())
        except Exception as error:  # it raises what its C++ raises
            raise M3Error(f"{self.file.name} breaks off before its frame {index[-1]}; leave it out.") from error
        return Clip(found.data.numpy(), found.pts_seconds.numpy().astype(np.float32))


def _open_with_torchcodec(file: File) -> TorchcodecFile:
    try:
        import torchcodec  # type: ignore[import-not-found]  # optional, and no part of any extra

        version = torchcodec.ffmpeg_major_version
    except (ImportError, RuntimeError) as error:  # older ones can't be imported without FFmpeg
        raise M3Error(f"torchcodec can't load ({str(error).splitlines()[0]}); {INSTALL}.") from error
    if version is None:
        raise M3Error(f"torchcodec finds no FFmpeg; {INSTALL}.")
    try:
        source = file if isinstance(file, Path) else file.read()
        found = TorchcodecFile(
            file, torchcodec.decoders.VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=threads())
        )
    except Exception as error:  # as above
        raise M3Error(f"{file.name} is cut off, damaged or no video.") from error
    if not found.count:
        raise M3Error(f"{file.name} holds no frames; leave it out.")
    return found
