"""Sounds in Parquet: samples of every width, labels, padding, and one sentence for each way of being wrong."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lissom.data.sounds import read_sounds, read_wav
from lissom.errors import LissomError


def wav(samples: np.ndarray, rate: int = 8000, channels: int = 1) -> bytes:
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return data.getvalue()


@pytest.mark.parametrize(
    ("kind", "samples"),
    [("u1", [0, 128, 192]), ("<i2", [-32768, 0, 16384]), ("<i4", [-(2**31), 0, 2**30])],
)
def test_samples_of_every_width(kind: str, samples: list[int]) -> None:
    rate, sound = read_wav(wav(np.array(samples, kind), 16000))
    assert rate == 16000
    assert sound.dtype == np.float32
    np.testing.assert_array_equal(sound, [-1, 0, 0.5])


def table(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_sounds_and_their_labels(tmp_path: Path) -> None:
    data = [wav(np.full(n, 1 << 14, "<i2")) for n in (3, 5)]
    path = table(tmp_path / "all.parquet", wav=data, digit=[7, 1], speaker=["a", "b"], gain=[0.5, 1.0])
    sounds = read_sounds(path)
    assert (len(sounds), sounds.rate) == (2, 8000)
    assert list(sounds.labels) == ["digit", "speaker"]
    np.testing.assert_array_equal(sounds.labels["digit"], [7, 1])
    np.testing.assert_array_equal(sounds.padded(np.array([1, 0]), 4), [[0.5] * 4, [0.5] * 3 + [0]])


def test_what_is_no_sound(tmp_path: Path) -> None:
    for data in (b"", b"RIFF", wav(np.zeros(4, "<i2"))[:20]):
        with pytest.raises(LissomError, match="the sound is no WAV file"):
            read_wav(data)
    with pytest.raises(LissomError, match="2 channels of 16 bits"):
        read_wav(wav(np.zeros(4, "<i2"), channels=2))
    good = wav(np.zeros(4, "<i2"))
    for columns, reason in (
        ({"sound": [good]}, "no column 'wav'"),
        ({"wav": ["x"]}, "as binary are wanted"),
        ({"wav": [good, b"x"]}, r"row 1 of all\.parquet is no WAV"),
        ({"wav": [good, None]}, r"row 1 of all\.parquet is no WAV"),
        ({"wav": [good, wav(np.zeros(4, "<i2"), 16000)]}, "2 rates"),
    ):
        with pytest.raises(LissomError, match=reason):
            read_sounds(table(tmp_path / "all.parquet", **columns))
    with pytest.raises(LissomError, match="as Parquet"):
        read_sounds(tmp_path / "nowhere.parquet")
