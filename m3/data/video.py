"""One small reader for video files, over decord or torchcodec, whichever is installed.

Letters: F frames of the file, T frames that are read, H height, W width.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3.data.recording import Clip
from m3.errors import M3Error
from m3.plugins import File


@dataclass(frozen=True)
class VideoFile:
    """An open video.

    Attributes:
        reader: the library's own reader.
        count: F.
        fps: frames per second.
        is_decord: which library it is.
    """

    reader: Any
    count: int
    fps: float
    is_decord: bool

    def read(self, index: np.ndarray) -> Clip:
        """Decode the frames at index (T,), ascending, in [0, F).

        Raises:
            M3Error: the file ends or breaks before one of them.
        """
        try:
            if self.is_decord:
                frames = self.reader.get_batch(index.tolist()).asnumpy()
                times = np.asarray(self.reader.get_frame_timestamp(index.tolist()))[:, 0]
            else:
                found = self.reader.get_frames_at(index.tolist())
                frames, times = found.data.numpy(), found.pts_seconds.numpy()
        except Exception as error:  # decoders raise their own, undocumented classes
            first = str(error).strip().partition("\n")[0]
            raise M3Error(f"a video breaks off between frames {index[0]} and {index[-1]}: {first}.") from error
        return Clip(frames, times.astype(np.float32))


def open_video(file: File) -> VideoFile:
    """Open a video file without decoding it.

    Raises:
        M3Error: no library to read it with, or no video in it.
    """
    has_decord = importlib.util.find_spec("decord") is not None
    if not has_decord and importlib.util.find_spec("torchcodec") is None:
        raise M3Error("reading video needs decord or torchcodec; run `pip install 'm3-multimodal[video]'`.")
    source = file if hasattr(file, "read") else str(file)
    try:
        if has_decord:
            import decord

            reader = decord.VideoReader(source, num_threads=1)
            count, fps = len(reader), float(reader.get_avg_fps())
        else:
            from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

            reader = VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1)
            count, fps = int(reader.metadata.num_frames), float(reader.metadata.average_fps)
    except Exception as error:  # as above
        first = str(error).strip().partition("\n")[0]
        raise M3Error(f"{getattr(file, 'name', file)} is no readable video: {first}.") from error
    if count < 1:
        raise M3Error(f"{getattr(file, 'name', file)} holds no frames.")
    return VideoFile(reader, count, fps, has_decord)
