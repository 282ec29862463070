"""The readers of video files: files of every kind, only what is needed, damaged files, other libraries than PyAV."""

import importlib.util
import io
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from m3.data import video as video_module
from m3.data.files import Member
from m3.data.video import DecordFile, TorchcodecFile, VideoFile, open_video
from m3.errors import M3Error
from m3.modalities.video import Video
from tests.unit.video_files import RATE, damaged, shown, video, written

av = pytest.importorskip("av", reason="videos need PyAV")


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("video") / "grey.mp4")


# -- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [ending for ending in Video.extensions if ending != ".npz"])  # a clip, no video file
def test_every_kind_of_file_gives_the_frames_that_were_written(ending: str, tmp_path: Path) -> None:
    codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(ending, "libx264")
    found = open_video(written(tmp_path / f"a{ending}", codec=codec))
    assert found.count == 30
    for index in ([0, 4, 8, 12], [27, 28, 29], [0, 29], [11, 12, 13], [5], [3, 3, 7, 7]):
        clip = found.read(np.array(index))
        assert shown(clip) == index
        assert clip.times is not None
        assert clip.times.tolist() == pytest.approx([i / RATE for i in index], abs=1e-3)


def test_a_member_of_an_archive_reads_like_a_file(grey: Path) -> None:
    member = Member(grey.read_bytes(), "0001.mp4")
    index = np.array([2, 9, 25])
    assert np.array_equal(open_video(member).read(index).frames, open_video(grey).read(index).frames)


def test_only_what_is_needed_is_decoded(grey: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames 0 and 26 lie 26 apart with a key frame every 12: at most 1 + 3 are decoded, not 27."""
    decoded = []
    frames = video_module._frames
    monkeypatch.setattr(
        video_module, "_frames", lambda *given: (decoded.append(frame.pts) or frame for frame in frames(*given))
    )
    assert shown(open_video(grey).read(np.array([0, 26]))) == [0, 26]
    assert len(decoded) <= 4


def test_skipping_frames_that_nothing_depends_on_changes_no_other(tmp_path: Path) -> None:
    """Noise that moves: a frame made from a skipped one would differ from the same frame of a full decoding."""
    path, noise = tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 256, (48, 64 + 30, 3), np.uint8)
    with av.open(str(path), "w") as opened:
        stream = opened.add_stream("libx264", rate=RATE, options={"bf": "3", "x264-params": "b-pyramid=normal"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(30):
            picture = np.ascontiguousarray(noise[:, number : number + 64])
            opened.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        opened.mux(stream.encode())
    with av.open(str(path)) as opened:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)])
    for index in ([0, 7, 20, 29], [5, 6, 7], [28], list(range(30))):
        assert np.array_equal(open_video(path).read(np.array(index)).frames, expected[index])


# -- damaged files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["half", "begin", "end", "empty", "text", "noise", "holes"])
def test_a_damaged_file_is_one_sentence(kind: str, grey: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(damaged(grey.read_bytes())[kind])
    start = time.perf_counter()
    sentence = r"^bad.mp4 (is cut off, damaged or no video: [^\n]+|breaks off before its frame \d+; leave it out)\.$"
    for file in (path, Member(path.read_bytes(), "bad.mp4")):
        with pytest.raises(M3Error, match=sentence):
            open_video(file).read(np.arange(30))
    assert time.perf_counter() - start < 5


def test_a_video_that_stops_early_is_refused_where_a_frame_is_missing(tmp_path: Path) -> None:
    """A .webm has no table of frames: cut in half it is a shorter video, of which all that is listed can be read."""
    whole = written(tmp_path / "a.webm", codec="libvpx")
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    found = open_video(whole)
    assert 3 < found.count < 30
    assert len(found.read(np.arange(found.count - 1)).frames) == found.count - 1
    broken = VideoFile(whole, np.append(found.stamps, found.stamps[-1] + 5000), found.keys)
    with pytest.raises(M3Error, match=r"^a.webm breaks off before its frame \d+; leave it out.$"):
        broken.read(np.array([0, broken.count - 1]))


def test_a_file_without_pictures_is_one_sentence(tmp_path: Path) -> None:
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as opened:
        stream = opened.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        opened.mux(stream.encode(frame))
        opened.mux(stream.encode())
    with pytest.raises(M3Error, match=r"^a.mp4 has no pictures; leave it out.$"):
        open_video(Member(sound.getvalue(), "a.mp4"))


# -- other libraries ------------------------------------------------------------------------------------


def others(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this reader of videos be the only one that is installed, or skip where it isn't."""
    module = pytest.importorskip(package, reason=f"{package} is not installed")
    if package == "torchcodec" and module.ffmpeg_major_version is None:
        pytest.skip("torchcodec finds no FFmpeg")
    found = importlib.util.find_spec
    hidden = {"av", "decord", "torchcodec"} - {package}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else found(name))


@pytest.mark.parametrize(("package", "kind"), [("decord", DecordFile), ("torchcodec", TorchcodecFile)])
def test_other_readers_give_the_same_frames_where_they_are_alone(
    package: str, kind: type, grey: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = np.array([0, 3, 17, 17])
    expected = open_video(grey).read(index)
    others(package, monkeypatch)
    for file in (grey, Member(grey.read_bytes(), "0001.mp4")):
        opened = open_video(file)
        assert isinstance(opened, kind)
        assert opened.count == 30
        clip = opened.read(index)
        assert np.abs(clip.frames.astype(int) - expected.frames.astype(int)).max() <= 1
        np.testing.assert_allclose(clip.times, expected.times, atol=1e-4)
    part = video(frames=4, stride=2)
    assert shown(part.cut(open_video(grey), 1.0)) == [23, 25, 27, 29]


@pytest.mark.parametrize("package", ["decord", "torchcodec"])
def test_other_readers_refuse_what_is_no_video(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    others(package, monkeypatch)
    with pytest.raises(M3Error, match=r"^a.mp4 is cut off, damaged or no video.$"):
        open_video(Member(b"no video at all", "a.mp4"))


def test_without_any_reader_the_sentence_says_what_to_install(grey: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(M3Error, match=r"^videos need PyAV .*; run `pip install 'm3-multimodal\[video\]'`.$"):
        open_video(grey)


def test_torchcodec_without_ffmpeg_is_one_sentence(grey: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "torchcodec" else None)
    monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace(ffmpeg_major_version=None))
    with pytest.raises(M3Error, match=r"^torchcodec finds no FFmpeg; run `pip install 'm3-multimodal\[video\]'`.$"):
        open_video(grey)
