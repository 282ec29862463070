"""Read whole and damaged files of modalities; run by `test_fuzz.py` in a process of its own with limited memory.

Prints one JSON line for each: how many files were read, how many refused, the longest time, the memory they took
beyond that of whole files, and the sentences that are too long or empty. A crash or a hang is seen from outside.
"""

import io
import json
import resource
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from m3.data.files import Member
from m3.data.loader import fit_together
from m3.network import build_modalities
from m3.plugins import Crop

MODALITIES = {
    "image": {"type": "image", "size": 16},
    "depth": {"type": "depth", "size": 16},
    "semantic_map": {"type": "semantic_map", "size": 16, "classes": 4},
    "normals": {"type": "normals", "size": 16},
    "boxes": {"type": "boxes", "labels": ["cat", "dog"]},
    "text": {"type": "text", "vocabulary": ["a", "b"], "length": 16},
    "audio": {"type": "audio", "frames": 32, "bands": 16},
    "video": {"type": "video", "size": 16, "frames": 4},
    "points": {"type": "points", "count": 32},
    "metadata": {
        "type": "metadata",
        "fields": [
            {"name": "age", "low": 0, "high": 9, "bins": 10},
            {"name": "kind", "kind": "choice", "choices": ["cat", "dog"]},
        ],
    },
    "vector": {"type": "vector", "size": 40},
    "regions": {"type": "regions", "features": 5, "count": 8},
    "answers": {"type": "answers", "classes": 3, "names": ["red", "blue", "no"]},
}
RANDOM = np.random.default_rng(11)
COLOURS = (np.indices((24, 32)).sum(0)[..., None] * [3, 4, 5]).astype(np.uint8)
WAVE = (0.3 * np.sin(np.arange(16000) / 9)).astype(np.float32)


def picture(array: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(array).save(file, kind)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # its keyword allow_pickle is no array
    return file.getvalue()


def sound(kind: str) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, WAVE, 16000, format=kind)
    return file.getvalue()


def video(kind: str, codec: str) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=kind) as opened:
        pictures: Any = opened.add_stream(codec, rate=10)
        track: Any = None
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
        if kind == "mp4":
            track = opened.add_stream("aac", rate=16000, layout="mono")
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(RANDOM.integers(0, 256, (32, 32, 3), np.uint8), format="rgb24")
            frame.pts = number
            opened.mux(pictures.encode(frame))
        opened.mux(pictures.encode())
        for start in range(0, 15360 if track else 0, 1024):
            frame = av.AudioFrame.from_ndarray(WAVE[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            opened.mux(track.encode(frame))
        if track:
            opened.mux(track.encode())
    return file.getvalue()


def ply() -> bytes:
    head = "ply\nformat binary_little_endian 1.0\nelement vertex 40\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
    return head.encode() + RANDOM.random((40, 3), np.float32).tobytes()


CLOUD = RANDOM.random((40, 3))
DEEP = (np.indices((24, 32)).sum(0) * 100).astype(np.uint16)
NORMALS = np.dstack([np.zeros((24, 32, 2)), np.ones((24, 32))]).astype(np.float32)
BOXES = json.dumps([["cat", 0.1, 0.2, 0.3, 0.4], ["dog", 0, 0, 1, 1]]).encode()
FOUND = np.concatenate([RANDOM.random((6, 5)), np.tile([0.1, 0.2, 0.3, 0.9], (6, 1))], axis=1).astype(np.float32)
WHOLE: dict[str, dict[str, Callable[[], bytes]]] = {
    "image": {
        f".{k}": lambda k=k: picture(COLOURS, {"jpg": "JPEG", "tif": "TIFF"}.get(k, k))
        for k in ("png", "jpg", "webp", "bmp", "tif")
    },
    "depth": {
        ".png": lambda: picture(DEEP, "PNG"),
        ".npy": lambda: npy(DEEP.astype(np.float32)),
        ".tif": lambda: picture(DEEP.astype(np.float32), "TIFF"),
    },
    "semantic_map": {".png": lambda: picture((DEEP % 4).astype(np.uint8), "PNG"), ".npy": lambda: npy(DEEP % 4)},
    "normals": {".png": lambda: picture(((NORMALS + 1) * 127.5).astype(np.uint8), "PNG"), ".npy": lambda: npy(NORMALS)},
    "boxes": {".json": lambda: BOXES},
    "text": {".txt": lambda: b"a b b a b"},
    "audio": {f".{k}": lambda k=k: sound(k) for k in ("wav", "flac", "ogg", "mp3")}
    | {".mp4": lambda: video("mp4", "libx264")},
    "video": {
        ".mp4": lambda: video("mp4", "libx264"),
        ".mkv": lambda: video("matroska", "libx264"),
        ".webm": lambda: video("webm", "libvpx"),
        ".avi": lambda: video("avi", "mpeg4"),
        ".npz": lambda: npz(frames=np.stack([COLOURS] * 5), times=np.arange(5, dtype=np.float32)),
    },
    "points": {
        ".ply": ply,
        ".npy": lambda: npy(CLOUD),
        ".xyz": lambda: "\n".join(" ".join(map(str, row)) for row in CLOUD).encode(),
    },
    "metadata": {".json": lambda: b'{"age": 3.5, "kind": "dog", "else": null}'},
    "vector": {".npy": lambda: npy(CLOUD[:, 0].astype(np.float32))},
    "regions": {
        ".npz": lambda: npz(features=FOUND[:, :5], boxes=FOUND[:, 5:]),
        ".npy": lambda: npy(FOUND),
    },
    "answers": {".txt": lambda: b'{"red": 6, "Dark red": 3, "blue": 1}'},
}


def claims(ending: str, whole: bytes) -> list[bytes]:
    """Return files whose headers claim far more than they hold."""
    big = b"\x7f\xff\xff\xff"
    if ending == ".png":
        head = b"IHDR" + big + big + whole[24:29]
        return [whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]]
    if ending == ".bmp":
        return [whole[:18] + struct.pack("<ii", 2**30, 2**30) + whole[26:]]
    if ending == ".npy":
        shapes = ("(1000000, 1000000)", "(24, 32, 1000000000)", "(40000000000, 3)", "(-1, 3)")
        heads = [
            f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n" for shape in shapes
        ]
        return [whole[:8] + struct.pack("<H", 118) + head.encode() + bytes(64) for head in heads]
    if ending == ".wav":
        wide = whole[:22] + struct.pack("<HI", 65535, 16000) + whole[28:]
        fast = whole[:24] + struct.pack("<I", 2**32 - 1) + whole[28:]
        odd = whole[:24] + struct.pack("<I", 44101) + whole[28:]
        return [wide, fast, odd, whole[:40] + b"\xff\xff\xff\xff" + whole[44:]]
    if ending == ".flac":
        return [whole[:21] + bytes([whole[21] | 15]) + b"\xff\xff\xff\xff" + whole[26:]]
    if ending in (".mp4", ".avi", ".mkv", ".webm"):
        form = {".mp4": ">HH", ".avi": "<II"}.get(ending, ">BB")
        most = 2 ** (4 * struct.calcsize(form) - 1) - 1
        many = whole.replace(b"stsz" + bytes(8), b"stsz" + bytes(4) + big)
        return [whole.replace(struct.pack(form, 32, 32), struct.pack(form, most, most)), many]
    if ending == ".ply":
        return [whole.replace(b"vertex 40", b"vertex 40000000000")]
    if ending == ".json":
        return [b"[" * 100_000, b"[" + b"9" * 10_000 + b"]", b'[["cat", 0, 0, 1, 1e999]]', b'[["cat", NaN, 0, 1, 1]]']
    return []


def damaged(ending: str, whole: bytes) -> list[bytes]:
    """Return cut, foreign, overwritten and boasting files."""
    files = [whole[: round(len(whole) * share)] for share in (0, 0.02, 0.1, 0.5, 0.9)] + [whole[:-1], whole[1:]]
    files += [b"no such thing\n" * 30, RANDOM.bytes(5000), bytes(5000)]
    for number in (1, 5, 50):
        for _ in range(6):
            changed = np.frombuffer(whole, np.uint8).copy()
            changed[RANDOM.integers(0, len(changed), number)] = RANDOM.integers(0, 256, number)
            files.append(changed.tobytes())
    for value in (np.nan, np.inf):
        if ending == ".npy":
            files.append(npy(np.full((24, 32, 3), value, np.float32)))
            files.append(npy(np.full((24, 32), value, np.float32)))
    return files + claims(ending, whole)


def main(name: str) -> None:
    parts = build_modalities({name: MODALITIES[name]})
    part = parts[name]

    def read(data: bytes, ending: str) -> torch.Tensor:
        sample = part.cut(part.load(Member(data, f"file{ending}")), 0.5)  # type: ignore[arg-type]
        return fit_together({name: part.to_raw(sample)}, parts, Crop())[name]

    wholes = {ending: make() for ending, make in WHOLE[name].items()}
    for ending, whole in wholes.items():
        read(whole, ending)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_count, refused, slowest, wrong = 0, 0, 0.0, []
    for ending, whole in wholes.items():
        for number, data in enumerate(damaged(ending, whole)):
            print(f"{name} {ending} {number}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            try:
                raw = read(data, ending)
                part.normalise(raw[None])
                read_count += 1
            except Exception as error:
                refused += 1
                if not str(error) or len(str(error)) > 500:
                    wrong.append(f"{ending} {number}: {type(error).__name__}: {str(error)[:200]}")
            slowest = max(slowest, time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    found = {"read": read_count, "refused": refused, "slowest": slowest, "grown": grown, "wrong": wrong}
    print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for given in sys.argv[1:]:
        main(given)
