"""Log-mel spectrograms against kaldi's definition worked out slowly, window by window and band by band."""

import math

import numpy as np
import pytest

from m3.data.recording import Sound
from m3.data.sound import log_mel

pytest.importorskip("torchaudio", reason="spectrograms need torchaudio")


def mel(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)


def slow_log_mel(samples: np.ndarray, rate: int, bands: int) -> np.ndarray:
    """HTK mel, Hann over 25 ms every 10 ms, pre-emphasis 0.97, power spectrum, triangles from 20 Hz to half the rate.

    Only whole windows count. Each window loses its mean; pre-emphasis takes the first sample for its own
    predecessor; the FFT is as long as the next power of two.
    """
    samples = samples.astype(np.float64) - samples.mean(dtype=np.float64)
    width, shift = int(rate * 0.025), int(rate * 0.010)
    padded = 2 ** math.ceil(math.log2(width))
    window = [0.5 - 0.5 * math.cos(2 * math.pi * i / (width - 1)) for i in range(width)]
    low, high = mel(20), mel(rate / 2)
    step = (high - low) / (bands + 1)
    rows = []
    for start in range(0, len(samples) - width + 1, shift):
        piece = samples[start : start + width] - samples[start : start + width].mean()
        before = np.concatenate([piece[:1], piece[:-1]])
        power = np.abs(np.fft.rfft((piece - 0.97 * before) * window, padded)) ** 2
        row = []
        for band in range(bands):
            left, centre, right = (low + (band + i) * step for i in range(3))
            total = 0.0
            for line in range(padded // 2):
                at = mel(line * rate / padded)
                if left < at < right:
                    total += power[line] * min((at - left) / (centre - left), (right - at) / (right - centre))
            row.append(math.log(max(total, np.finfo(np.float32).eps)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(("rate", "bands"), [(16000, 128), (16000, 40), (22050, 64), (8000, 24)])
def test_log_mel_is_kaldis(rate: int, bands: int) -> None:
    time = np.arange(int(0.15 * rate)) / rate
    random = np.random.default_rng(rate)
    chirp = np.sin(2 * np.pi * (200 + 4000 * time) * time) * 0.4 + random.normal(0, 0.05, len(time)) + 0.1
    quiet = random.normal(0, 1e-3, len(time)).cumsum()
    found = log_mel(Sound(np.stack([chirp, quiet]).astype(np.float32), rate), rate, bands).numpy()
    assert found.dtype == np.float32
    for channel, samples in enumerate((chirp, quiet)):
        expected = slow_log_mel(samples.astype(np.float32), rate, bands)
        assert found.shape == (len(expected), 2, bands)
        assert np.abs(found[:, channel] - expected).max() < 1e-3


def test_silence_is_the_logarithm_of_the_smallest_step_of_float32() -> None:
    found = log_mel(Sound(np.zeros((1, 8000), np.float32), 16000), 16000, 32).numpy()
    assert found == pytest.approx(-23 * math.log(2))
    assert found.shape == (1 + (8000 - 400) // 160, 1, 32)


@pytest.mark.parametrize("given", [8000, 22050, 44100, 48000, 44101])
def test_another_rate_gives_the_same_tone(given: int) -> None:
    """A tone of 1000 Hz at any rate has, at 16 kHz, the spectrogram it has when it is sampled at 16 kHz."""
    tones = {
        rate: np.sin(2 * np.pi * 1000 * np.arange(rate) / rate, dtype=np.float32)[None] * 0.5 for rate in (given, 16000)
    }
    found = log_mel(Sound(tones[given], given), 16000, 40)[5:-5].numpy()
    expected = log_mel(Sound(tones[16000], 16000), 16000, 40)[5:-5].numpy()
    is_heard = expected > 0
    assert is_heard.sum() > 2 * len(expected)
    assert len(found) == len(expected)
    assert np.abs(found - expected)[is_heard].max() < 0.05
    assert (found.argmax(-1) == expected.argmax(-1)).all()
