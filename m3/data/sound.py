"""Sound files and sound tracks of videos to samples, and samples to log-mel spectrograms.

Letters: C channels, S samples, T frames of a spectrogram, F mel bands.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from m3.data.recording import Sound
from m3.errors import M3Error
from m3.plugins import File, ending

SOUND_FILES = (".wav", ".flac", ".ogg", ".mp3")
VIDEO_FILES = (".mp4", ".mkv", ".webm", ".mov", ".avi")


def read_sound(file: File) -> Sound:
    """Read a sound file with libsndfile, or the sound track of a video with decord.

    Raises:
        M3Error: a library is missing, or there is no sound.
    """
    name = getattr(file, "name", file)
    if ending(file) in VIDEO_FILES:
        return _sound_track(file)
    if importlib.util.find_spec("soundfile") is None:
        raise M3Error("reading sound needs soundfile; run `pip install 'm3-multimodal[audio]'`.")
    import soundfile

    try:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (RuntimeError, OSError, TypeError) as error:  # libsndfile's own errors are RuntimeErrors
        raise M3Error(f"{name} is no readable sound: {str(error).strip()}") from error
    if not len(samples):
        raise M3Error(f"{name} holds no sound; leave it out.")
    return Sound(samples.T, int(rate))


def _sound_track(file: File) -> Sound:
    if importlib.util.find_spec("decord") is None:
        raise M3Error("reading the sound track of a video needs decord; run `pip install 'm3-multimodal[video]'`.")
    import decord

    name = getattr(file, "name", file)
    try:
        reader = decord.AudioReader(file if hasattr(file, "read") else str(file))
        samples, rate = reader._array, round(reader.shape[1] / reader.duration())
    except Exception as error:  # decord raises its own, undocumented classes
        raise M3Error(f"{name} has no readable sound track: {str(error).strip().partition(chr(10))[0]}.") from error
    return Sound(np.asarray(samples, np.float32), rate)


def log_mel(sound: Sound, rate: int, bands: int) -> Tensor:
    """Return the logarithm of the mel spectrogram of each channel, as kaldi's fbank: float32 (T, C, F).

    As AudioMAE (Huang et al. 2022): the mean is taken off, Hann windows of 25 ms every 10 ms, HTK's mel scale, no
    dither, no energy.

    Args:
        sound: any rate and number of channels.
        rate: samples per second that it is brought to first.
        bands: F.

    Raises:
        M3Error: NaN in the sound, or less than one window of it.
    """
    try:
        from torchaudio.compliance.kaldi import fbank
        from torchaudio.functional import resample
    except ImportError as error:
        raise M3Error(f"spectrograms need torchaudio ({error}); run `pip install 'm3-multimodal[audio]'`.") from error
    samples = torch.as_tensor(np.ascontiguousarray(sound.samples), dtype=torch.float32)
    if not samples.isfinite().all():
        raise M3Error("a sound holds NaN or infinite samples; repair it or leave it out.")
    if sound.rate != rate:
        samples = resample(samples, sound.rate, rate)
    if samples.shape[1] < rate * 25 // 1000:
        raise M3Error(f"a sound of {samples.shape[1]} samples at {rate} Hz is shorter than one window of 25 ms.")
    samples = samples - samples.mean(1, keepdim=True)
    options = {"htk_compat": True, "use_energy": False, "window_type": "hanning", "dither": 0.0, "frame_shift": 10.0}
    spectra = [fbank(x.unsqueeze(0), sample_frequency=rate, num_mel_bins=bands, **options) for x in samples]
    return torch.stack(spectra, dim=1)
