"""Sound, video and time series as image-like maps, so that a network for images can read them (arXiv 2311.15599).

UniRepLKNet's front ends: nothing of the network changes but its number of input channels. Kaldi's log-mel filterbank
is written out here, as the audio programs of the field use it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

__all__ = ["AUDIO_STATISTICS", "audio_to_image", "fbank", "map_to_series", "series_to_image", "video_to_image"]

# Mean and standard deviation of the filterbanks of each data set, as published.
AUDIO_STATISTICS = {
    "speechcommands": (-6.845978, 5.5654526),
    "audioset": (-4.2677393, 4.5689974),
    "esc50": (-6.6268077, 5.358466),
}
_FLOOR = torch.finfo(torch.float32).eps


def fbank(
    waveform: torch.Tensor, rate: int = 16000, mel_bins: int = 128, low: float = 20.0, high: float | None = None
) -> torch.Tensor:
    """Log-mel filterbank energies of Kaldi's kind: samples (..., n) at ``rate`` a second -> (..., frames, mel_bins).

    Frames of 25 ms every 10 ms, whole ones only; each loses its mean, is pre-emphasised by 0.97, weighted with a
    symmetric Hann window and padded to a power of 2; the power spectrum is summed in triangles, ``mel_bins`` of them
    evenly spaced in mel = 1127 ln(1 + f / 700) from ``low`` to ``high`` Hz (None: half the rate); then the logarithm,
    of at least 1.19e-7. No dither. Bins too narrow for the transform to have a frequency in them stay at that floor
    (one of 128 at 16 kHz, as published; many at 8 kHz). Raises ValueError for less than one frame.
    """
    length, hop = rate * 25 // 1000, rate // 100
    if waveform.shape[-1] < length:
        raise ValueError(f"{waveform.shape[-1]} samples are less than one frame of {length}")
    frames = waveform.unfold(-1, length, hop)
    frames = frames - frames.mean(-1, keepdim=True)
    before = F.pad(frames.flatten(0, -2), (1, 0), mode="replicate")[:, :-1].reshape(frames.shape)
    window = torch.hann_window(length, periodic=False, dtype=frames.dtype, device=frames.device)
    size = 1 << (length - 1).bit_length()
    power = torch.fft.rfft((frames - 0.97 * before) * window, size).abs().square()
    triangles = _triangles(mel_bins, size, rate, low, rate / 2 if high is None else high).to(power)
    return (power @ triangles.T).clamp_min(_FLOOR).log()


def _triangles(bins: int, size: int, rate: int, low: float, high: float) -> torch.Tensor:
    """(bins, size / 2 + 1): how much each frequency counts in each bin; the highest frequency counts in none."""
    ends = [1127 * math.log1p(frequency / 700) for frequency in (low, high)]
    step = (ends[1] - ends[0]) / (bins + 1)
    frequencies = torch.arange(size // 2, dtype=torch.float64) * rate / size
    mel = 1127 * torch.log1p(frequencies / 700)
    left = (ends[0] + step * torch.arange(bins, dtype=torch.float64))[:, None]
    table = torch.minimum((mel - left) / step, (left + 2 * step - mel) / step).clamp_min(0)
    return F.pad(table, (0, 1))


def audio_to_image(
    waveform: torch.Tensor,
    frames: int,
    statistics: tuple[float, float] | None = AUDIO_STATISTICS["speechcommands"],
    rate: int = 16000,
    mel_bins: int = 128,
) -> torch.Tensor:
    """Sounds (B, samples) -> (B, 1, mel_bins, frames): frequencies as rows, time as columns, for ``in_chans=1``.

    The filterbank of the sound without its mean, padded with zeros at the end or cut to ``frames`` (published: 128 of
    Speech Commands, 512 of ESC-50, 1024 of AudioSet), then (x - mean) / (2 deviation) with the data set's
    ``statistics``; None leaves it as it is. The padding is normalised too, as published.
    """
    energies = fbank(waveform - waveform.mean(-1, keepdim=True), rate, mel_bins)[:, :frames]
    energies = F.pad(energies, (0, 0, 0, frames - energies.shape[1]))
    if statistics is not None:
        mean, deviation = statistics
        energies = (energies - mean) / (2 * deviation)
    return energies.transpose(1, 2)[:, None]


def video_to_image(video: torch.Tensor, mosaic: bool = False) -> torch.Tensor:
    """Frames (B, C, T, H, W) -> one image (B, C, s H, s W), T = s^2, for an unchanged network.

    The published map is the plain reshape: each frame fills H / s whole rows, s of its own rows side by side in each.
    With ``mosaic`` the frames stand beside each other, s x s, row by row. Raises ValueError where T is no square.
    """
    batch, channels, count, height, width = video.shape
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} frames are no square number, and do not fill a square image")
    if mosaic:
        video = video.unflatten(2, (side, side)).transpose(3, 4)  # (B, C, s, H, s, W)
    return video.reshape(batch, channels, side * height, side * width)


def series_to_image(embedding: torch.Tensor) -> torch.Tensor:
    """Embedded series (B, T, D) -> (B, 1, s, s), s^2 = T D: the numbers row by row. Raises ValueError for others."""
    numbers = embedding.shape[1] * embedding.shape[2]
    side = math.isqrt(numbers)
    if side * side != numbers:
        raise ValueError(f"{embedding.shape[1]} x {embedding.shape[2]} numbers are no square, and fill no image")
    return embedding.reshape(-1, 1, side, side)


def map_to_series(features: torch.Tensor, published: bool = False) -> torch.Tensor:
    """The network's last map (B, C, h, w) -> tokens (B, h w, C), one a position.

    The publisher's program reshapes without transposing, and so mixes channels and positions; its decoder was trained
    on that: ``published`` does the same.
    """
    if published:
        return features.reshape(len(features), -1, features.shape[1])
    return features.flatten(2).transpose(1, 2)
