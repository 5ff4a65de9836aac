"""Sounds in Parquet: a column of WAV files as bytes, and columns of integers or words that label them."""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lissom.errors import LissomError

__all__ = ["Sounds", "read_sounds", "read_wav"]


@dataclass(frozen=True, eq=False)
class Sounds:
    """Waveforms (n_i,) float32 from -1 to 1, all of one ``rate`` a second, and labels by the name of their column."""

    name: str
    rate: int
    waveforms: list[np.ndarray]
    labels: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.waveforms)

    def padded(self, rows: np.ndarray, samples: int) -> np.ndarray:
        """The sounds ``rows``, cut to ``samples`` or with zeros behind: (len(rows), samples) float32."""
        found = np.zeros((len(rows), samples), np.float32)
        for place, row in enumerate(rows):
            sound = self.waveforms[int(row)][:samples]
            found[place, : len(sound)] = sound
        return found


def read_wav(data: bytes, name: str = "the sound") -> tuple[int, np.ndarray]:
    """Samples a second, and the sound (n,) float32 from -1 to 1, of a WAV file with one channel of whole numbers.

    Raises LissomError, naming the sound as ``name``, for anything else.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            samples = file.readframes(file.getnframes())
    except (wave.Error, EOFError, ValueError) as error:
        raise LissomError(f"{name} is no WAV file that can be read ({error})") from error
    if channels != 1 or width not in (1, 2, 4) or rate < 1:
        raise LissomError(f"{name} has {channels} channels of {8 * width} bits; one of 8, 16 or 32 bits is wanted")
    samples = samples[: len(samples) // width * width]
    if width == 1:  # bytes from 0 to 255 around 128
        return rate, (np.frombuffer(samples, np.uint8).astype(np.float32) - 128) / 128
    whole = np.frombuffer(samples, f"<i{width}").astype(np.float64)
    return rate, (whole / 2.0 ** (8 * width - 1)).astype(np.float32)


def read_sounds(path: str | Path, column: str = "wav") -> Sounds:
    """The sounds in the ``column`` of a Parquet file; all other columns of integers or words are labels.

    Raises LissomError where the file is no Parquet, the column is missing or holds something else, or rates differ.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path).expanduser()
    try:
        table = pq.read_table(path)
    except Exception as error:  # pyarrow raises its own kinds and OSError, by the place of the damage
        raise LissomError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    if column not in table.column_names:
        raise LissomError(f"{path} has no column {column!r} (it has: {', '.join(table.column_names)})")
    kind = table.schema.field(column).type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise LissomError(f"the column {column} of {path} holds {kind}; WAV files as binary are wanted")
    rates, waveforms = set(), []
    for row, data in enumerate(table.column(column).to_pylist()):
        rate, sound = read_wav(data or b"", f"row {row} of {path.name}")
        rates.add(rate)
        waveforms.append(sound)
    if len(rates) != 1:
        raise LissomError(f"the sounds of {path} have {len(rates)} rates; all of one are wanted")
    labels: dict[str, Any] = {}
    for field in table.schema:
        if field.name != column and (pa.types.is_integer(field.type) or pa.types.is_string(field.type)):
            labels[field.name] = np.asarray(table.column(field.name).to_pylist())
    return Sounds(path.parent.name, rates.pop(), waveforms, labels)
