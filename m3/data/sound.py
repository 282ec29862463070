"""Sound files and sound tracks of videos to samples, and samples to log-mel spectrograms.

Letters: C channels, S samples, T frames of a spectrogram, F mel bands.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from m3.data.recording import Sound
from m3.data.video import container
from m3.errors import M3Error
from m3.plugins import File, ending

SOUND_FILES = (".wav", ".flac", ".ogg", ".mp3")
VIDEO_FILES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
BLOCK = 2**16
"""Samples of each channel that are read at once."""
RATES = (1000, 768_000)
"""Samples per second, the lowest and the highest that are believed."""


def read_sound(file: File) -> Sound:
    """Read a sound file with libsndfile, or the sound track of a video with PyAV.

    Raises:
        M3Error: a library is missing, or there is no sound.
    """
    sound = _sound_track(file) if ending(file) in VIDEO_FILES else _sound_file(file)
    if not sound.samples.size:
        raise M3Error(f"{file.name} holds no sound; leave it out.")
    return sound


def _sound_file(file: File) -> Sound:
    try:
        import soundfile
    except ImportError as error:
        raise M3Error(f"reading sound needs soundfile ({error}); run `pip install 'm3-multimodal[audio]'`.") from error
    blocks = []
    try:
        with soundfile.SoundFile(file) as opened:
            rate = int(opened.samplerate)
            # In pieces: a damaged header may claim any length, and one reading would make room for it.
            while len(block := opened.read(BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block)
            missing = opened.frames - sum(len(block) for block in blocks)
    except (RuntimeError, TypeError) as error:  # libsndfile's own errors are RuntimeErrors
        raise M3Error(f"{file.name} is no readable sound: {_reason(error)}.") from error
    if missing > 0:
        raise M3Error(f"{file.name} breaks off {missing / rate:.3g} s before its end; leave it out.")
    return Sound(np.concatenate(blocks).T if blocks else np.empty((1, 0), np.float32), rate)


def _reason(error: Exception) -> str:
    """Return what libsndfile says, without the name of the file in front."""
    return str(error).rpartition(": ")[2].strip().rstrip(".")


def _sound_track(file: File) -> Sound:
    with container(file) as opened:
        if not opened.streams.audio:
            raise M3Error(f"{file.name} has no sound track; leave it out.")
        from av import AudioResampler

        stream = opened.streams.audio[0]
        convert = AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
        blocks = [block.to_ndarray() for frame in opened.decode(stream) for block in convert.resample(frame)]
        return Sound(np.concatenate(blocks, 1) if blocks else np.empty((1, 0), np.float32), int(stream.rate))


def log_mel(sound: Sound, rate: int, bands: int) -> Tensor:
    """Return the logarithm of the mel spectrogram of each channel, as kaldi's fbank: float32 (T, C, F).

    As AudioMAE (Huang et al. 2022): the mean is taken off, Hann windows of 25 ms every 10 ms, HTK's mel scale, no
    dither, no energy.

    Args:
        sound: any rate and number of channels.
        rate: samples per second that it is brought to first.
        bands: F.

    Raises:
        M3Error: NaN in the sound, less than one window of it, or a rate that no recording has.
    """
    try:
        from torchaudio.compliance.kaldi import fbank
        from torchaudio.functional import resample
    except ImportError as error:
        raise M3Error(f"spectrograms need torchaudio ({error}); run `pip install 'm3-multimodal[audio]'`.") from error
    samples = torch.as_tensor(np.ascontiguousarray(sound.samples), dtype=torch.float32)
    if not samples.isfinite().all():
        raise M3Error("a sound holds NaN or infinite samples; repair it or leave it out.")
    if not RATES[0] <= sound.rate <= RATES[1]:
        raise M3Error(f"a sound claims {sound.rate} samples per second; correct its header or leave it out.")
    if sound.rate != rate:
        # A ratio of small numbers: the filter has as many taps as the product of both, which is no limit at all
        # for a rate like 44,101. The pitch is off by less than a millionth then, and not at all for usual rates.
        ratio = Fraction(sound.rate, rate).limit_denominator(1000)
        samples = resample(samples, ratio.numerator, ratio.denominator)
    if samples.shape[1] < rate * 25 // 1000:
        raise M3Error(f"a sound of {samples.shape[1]} samples at {rate} Hz is shorter than one window of 25 ms.")
    samples = samples - samples.mean(1, keepdim=True)
    options = {"htk_compat": True, "use_energy": False, "window_type": "hanning", "dither": 0.0, "frame_shift": 10.0}
    spectra = [fbank(x.unsqueeze(0), sample_frequency=rate, num_mel_bins=bands, **options) for x in samples]
    return torch.stack(spectra, dim=1)
