"""A signal as the bytes of one file: what shards hold, and how a member of an archive reaches `Modality.load`."""

from __future__ import annotations

import io
import json
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PILImage

from m3.data.recording import Clip, Sound
from m3.errors import M3Error


class Stored(NamedTuple):
    """One signal as a file.

    Attributes:
        ending: of the file's name, lower case, with the dot.
        data: its bytes.
    """

    ending: str
    data: bytes


class Member(io.BytesIO):
    """A file that lies in an archive, in memory. `name` is what it would be called in a folder."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name

    def __repr__(self) -> str:
        # Decoders put the object into their messages.
        return self.name


def encode(signal: Any) -> Stored:
    """Store a signal that exists only in memory, without loss.

    Text becomes .txt (UTF-8), uint8 (H, W) or (H, W, 3) and pictures .png, a `Sound` .wav of floats, a `Clip` and a
    mapping of arrays .npz, a list of rows with names in them (boxes) .json, every other array .npy.

    Raises:
        M3Error: the signal is nothing of these.
    """
    if isinstance(signal, str):
        return Stored(".txt", signal.encode())
    file = io.BytesIO()
    if isinstance(signal, Sound):
        return Stored(".wav", _wave(signal))
    if isinstance(signal, Clip):
        signal = {name: x for name, x in signal._asdict().items() if x is not None}
    if isinstance(signal, dict):
        np.savez(file, **signal)
        return Stored(".npz", file.getvalue())
    if isinstance(signal, list) and any(isinstance(x, str) for row in signal if isinstance(row, tuple) for x in row):
        return Stored(".json", json.dumps(signal).encode())
    array = np.asarray(signal)
    is_picture = array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3))
    if isinstance(signal, PILImage.Image) or is_picture:
        (signal if isinstance(signal, PILImage.Image) else PILImage.fromarray(array)).save(file, "PNG")
        return Stored(".png", file.getvalue())
    if array.dtype.kind not in "biuf":
        raise M3Error(f"a signal of type {type(signal).__name__} has no file form; give text, a picture or an array.")
    np.save(file, array, allow_pickle=False)
    return Stored(".npy", file.getvalue())


def _wave(sound: Sound) -> bytes:
    """Return a .wav file with the samples as they are."""
    from scipy.io import wavfile

    file = io.BytesIO()
    wavfile.write(file, sound.rate, np.ascontiguousarray(sound.samples.T, dtype=np.float32))
    return file.getvalue()
