"""Grey videos whose frames can be told by their brightness, and damaged ones, for the tests of videos."""

from pathlib import Path

import numpy as np
import pytest
import torch

from m3.data.recording import Clip
from m3.modalities.video import Video
from m3.network import build_modalities

av = pytest.importorskip("av", reason="videos need PyAV")
RATE = 10


def written(path: Path, frames: int = 30, codec: str = "libx264", size: tuple[int, int] = (48, 64)) -> Path:
    """Write a video of which frame i is grey of brightness 8 i + 8."""
    with av.open(str(path), "w") as opened:
        stream = opened.add_stream(codec, rate=RATE)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = 12
        for number in range(frames):
            picture = np.full((*size, 3), 8 * number + 8, np.uint8)
            opened.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        opened.mux(stream.encode())
    return path


def shown(clip: Clip | torch.Tensor) -> list[int]:
    """Numbers of the frames of a grey video, from their brightness."""
    frames = clip.frames if isinstance(clip, Clip) else clip.permute(1, 2, 3, 0).numpy()
    return ((frames.mean((1, 2, 3)) - 8) / 8).round().astype(int).tolist()


def video(**settings) -> Video:
    return build_modalities({"x": {"type": "video", "size": [48, 64], **settings}})["x"]  # type: ignore[return-value]


def damaged(whole: bytes) -> dict[str, bytes]:
    return {
        "half": whole[: len(whole) // 2],
        "begin": whole[:1024],
        "end": whole[len(whole) // 2 :],
        "empty": b"",
        "text": b"this is no video\n" * 50,
        "noise": np.random.default_rng(0).bytes(20_000),
        "holes": whole[: len(whole) // 4] + bytes(len(whole) // 2) + whole[-(len(whole) // 4) :],
    }
