"""Memory of answers: an image seen before gets the answer it got then, and no network runs (arXiv 2412.01039).

A fingerprint is taken of an image's raw pixels, before anything is resized or normalised, and looked up. It is one of
three kinds. ``exact`` is SHA-256 of the pixels: a hit is the same image, and its answer is the same. ``dhash`` and
``invariants`` are the published ones, and can be wrong: a hit is an image with the same key. ``dhash`` compares
neighbours in 8 rows of 9 grey values, so that fine differences are lost; ``invariants`` are moments that mirroring and
quarter turns leave alone, so that a 6 turned into a 9 is answered as a 6. ``false_hits`` counts on labelled images how
often a kind would be wrong: look at that before you switch one on.

Answers are kept in SQLite, in memory or in a file: at most ``capacity`` of them, the least recently used leave. A
process that is killed leaves a file in which every answer is whole. The published memory never forgets.

Grey values and resizing are OpenCV's in whole numbers, without OpenCV (``grey``, ``shrink``).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from lissom.errors import LissomError

__all__ = [
    "CAPACITY",
    "KINDS",
    "HitRate",
    "Memory",
    "Remembered",
    "dhash",
    "dhash_bits",
    "false_hits",
    "fingerprint",
    "grey",
    "invariant_key",
    "invariants",
    "shrink",
]

KINDS = ("exact", "dhash", "invariants")
CAPACITY = 10_000
DIGITS_OF_CAPACITY = 18  # at most; Python reads no number of thousands
SIDE = 32  # invariants are of at most so many rows and columns
DIGITS = 9  # significant ones of a key of invariants: the last bits of a float differ from platform to platform


# Fingerprints


def fingerprint(pixels: np.ndarray, kind: str) -> bytes:
    """The key of an image, uint8 (H, W) or (H, W, 3), under which its answer is kept.

    ``exact``: SHA-256 of shape and pixels; ``dhash``: the 64 bits; ``invariants``: the sum of four, in 9 significant
    digits. Raises LissomError for another kind, and for what is no such image.
    """
    if kind == "exact":
        pixels = _image(pixels)
        return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).digest()
    if kind == "dhash":
        return dhash(pixels).to_bytes(8, "little")
    if kind == "invariants":
        return f"{invariant_key(pixels):.{DIGITS - 1}e}".encode()
    raise LissomError(f"no memory is called {kind!r}; known: {', '.join(KINDS)}")


def grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) as uint8 (H, W): 0.299 R + 0.587 G + 0.114 B in 14 bits, rounded; (H, W) as it is."""
    pixels = _image(pixels)
    if pixels.ndim == 2:
        return pixels
    red, green, blue = np.moveaxis(pixels.astype(np.int64), -1, 0)
    return ((4899 * red + 9617 * green + 1868 * blue + 8192) >> 14).astype(np.uint8)


def shrink(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W) as uint8 (height, width): bilinear between pixel centres, each output of four pixels at most.

    In OpenCV's fixed point: weights of 11 bits, rounded to the nearest even, and sums cut to 8 bits in its two steps.
    """
    rows, row_weights = _taps(image.shape[0], height)
    columns, column_weights = _taps(image.shape[1], width)
    across = (image.astype(np.int64)[:, columns] * column_weights).sum(-1)  # (H, width)
    down = ((across[rows] >> 4) * row_weights[..., None]) >> 16  # (height, 2, width)
    return ((down.sum(1) + 2) >> 2).clip(0, 255).astype(np.uint8)


def _taps(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """The two pixels that each of ``wanted`` outputs lies between, and their weights in 2048ths: int64 (wanted, 2)."""
    place = ((np.arange(wanted) + 0.5) * (size / wanted) - 0.5).astype(np.float32)
    left = np.floor(place)
    part = place - left
    part[(left < 0) | (left >= size - 1)] = 0
    left = left.clip(0, size - 1).astype(np.int64)
    weights = np.rint(np.stack([1 - part, part], 1) * np.float32(2048)).astype(np.int64)
    return np.stack([left, (left + 1).clip(max=size - 1)], 1), weights


def dhash(pixels: np.ndarray) -> int:
    """The difference hash of an image, 64 bits: grey, 8 rows of 9, ``dhash_bits``."""
    return dhash_bits(shrink(grey(pixels), 8, 9))


def dhash_bits(small: np.ndarray) -> int:
    """uint8 (8, 9) as 64 bits: bit 8 y + x is set where the right neighbour of (y, x) is larger."""
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int(sum(1 << int(place) for place in np.flatnonzero(bits)))


def invariants(pixels: np.ndarray) -> np.ndarray:
    """Four numbers of an image that mirroring and turning it by 90 degrees leave as they are, but for rounding.

    Grey, at most 32 x 32. With central moments mu_pq up to order 3 (p counts columns, q rows), complex moments

        c_pq = sum_k sum_w C(p, k) C(q, w) (-1)^(q - w) i^(p + q - k - w) mu_(k + w, p + q - k - w),

    rounded to 5 decimals, over mu_00^((p + q + 2) / 2), times ((p + q) / 2 + 1) pi^((p + q) / 2). Then, for (p, q) in
    (1, 1), (2, 0), (2, 1), (3, 0): r = Re(c_pq c_12^(p - q)), as sign(r) |r|^(1 / (1 + p - q)). float64 (4,); zeros for
    an image that is black all over.
    """
    image = grey(pixels)
    if max(image.shape) > SIDE:
        image = shrink(image, SIDE, SIDE)
    values = image.astype(np.float64)
    mass = values.sum()
    if mass == 0:
        return np.zeros(4)
    x, y = np.arange(1, values.shape[1] + 1.0), np.arange(1, values.shape[0] + 1.0)
    x -= (values.sum(0) @ x) / mass
    y -= (values.sum(1) @ y) / mass
    mu = {(p, q): float(y**q @ values @ x**p) for p in range(4) for q in range(4 - p)}
    mu |= {(0, 1): 0.0, (1, 0): 0.0}

    def moment(p: int, q: int) -> complex:
        total = 0j
        for k in range(p + 1):
            for w in range(q + 1):
                sign = (-1) ** (q - w) * 1j ** (p + q - k - w)
                total += math.comb(p, k) * math.comb(q, w) * sign * mu[k + w, p + q - k - w]
        rounded = complex(round(total.real, 5), round(total.imag, 5))
        return rounded / mass ** ((p + q + 2) / 2) * ((p + q) / 2 + 1) * math.pi ** ((p + q) / 2)

    turn = moment(1, 2)
    found = []
    for p, q in ((1, 1), (2, 0), (2, 1), (3, 0)):
        r = (moment(p, q) * turn ** (p - q)).real
        found.append(math.copysign(abs(r) ** (1 / (1 + p - q)), r))
    return np.array(found)


def invariant_key(pixels: np.ndarray) -> float:
    """The sum of an image's ``invariants``."""
    return float(invariants(pixels).sum())


def _image(pixels: np.ndarray) -> np.ndarray:
    pixels = np.asarray(pixels)
    shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (1, 3))
    if pixels.dtype != np.uint8 or not shaped or not pixels.size:
        raise LissomError(f"a fingerprint is of uint8 (H, W) or (H, W, 3), not {pixels.dtype} {pixels.shape}")
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels


# How often a memory would be wrong


@dataclass(frozen=True)
class HitRate:
    """What a memory would have done on ``images`` labelled ones: ``hits`` of them, ``wrong`` of those with the label
    of another class."""

    kind: str
    images: int
    hits: int
    wrong: int

    @property
    def false_rate(self) -> float:
        """The share of all images that would have been answered with another class."""
        return self.wrong / self.images if self.images else 0.0

    def __str__(self) -> str:
        return (
            f"memory {self.kind}: {self.hits} of {self.images} labelled images would be answered from memory, "
            f"{self.wrong} of them with the label of another class ({100 * self.false_rate:.2f} % of all)"
        )


def false_hits(labelled: Iterable[tuple[np.ndarray, int]], kind: str, capacity: int = CAPACITY) -> HitRate:
    """How often a memory of this kind answers with the wrong class, on (image, label) in this order, images as
    ``fingerprint`` takes them.

    The memory is filled with their own labels, so that a network's errors do not count: a wrong hit is an image with
    the key of an earlier one of another class. The first image under a key gives its label, as answers do. Data that
    hold no repeated and no turned images show how keys of different images collide, and nothing else. Raises
    LissomError where kind or capacity is unknown.
    """
    _check(kind, capacity)
    known: OrderedDict[bytes, int] = OrderedDict()
    count = hits = wrong = 0
    for image, label in labelled:
        key, count = fingerprint(image, kind), count + 1
        if key in known:
            known.move_to_end(key)
            hits += 1
            wrong += known[key] != int(label)
        else:
            known[key] = int(label)
            if len(known) > capacity:
                known.popitem(last=False)
    return HitRate(kind, count, hits, wrong)


# The memory


def _check(kind: Any, capacity: Any) -> None:
    if kind not in KINDS:
        raise LissomError(f"no memory is called {kind!r}; known: {', '.join(KINDS)}")
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
        raise LissomError(f"a memory's capacity is a number of answers, at least 1, not {capacity!r}")


class Remembered(NamedTuple):
    """An answer as it was given: float32 (classes,), and the stage that gave it."""

    answer: np.ndarray
    stage: int


_SCHEMA = {
    "answers": "CREATE TABLE answers (key BLOB PRIMARY KEY, used INTEGER, stage INTEGER, answer BLOB)",
    "by_use": "CREATE INDEX by_use ON answers (used)",
    "owner": "CREATE TABLE owner (kind TEXT, artifact TEXT)",
}
# How many answers there are, when one was last used, and how many are none. SQLite keeps values of any type in any
# column, and an index may say otherwise than its table: +used is read from the table, as ``get`` reads its row.
_READ = """
SELECT COUNT(*), COALESCE(MAX(+used), 0), COUNT(*) - COALESCE(SUM(
    typeof(key) = 'blob' AND typeof(used) = 'integer' AND +used BETWEEN 0 AND (1 << 62)
    AND typeof(stage) = 'integer' AND stage >= 0
    AND typeof(answer) = 'blob' AND length(answer) > 0 AND length(answer) % 4 = 0), 0)
FROM answers
"""


class Memory:
    """Answers by fingerprint, at most ``capacity`` of them; the least recently used one leaves.

    ``kind`` is one of ``KINDS``. ``file`` keeps them on disk, for the next process; only one at a time may have it
    open. A file belongs to one kind, and to the artifact whose answers it holds (``bind``). ``hits`` and ``misses``
    count look-ups. Threads may share a memory. Raises LissomError where kind or capacity is unknown, and where the file
    is of another kind, in use, or no memory.
    """

    def __init__(self, kind: str = "exact", capacity: int = CAPACITY, file: str | Path | None = None) -> None:
        _check(kind, capacity)
        self.kind, self.capacity = kind, capacity
        self.file = None if file is None else Path(file)
        self.hits = self.misses = 0
        self._lock = threading.Lock()
        with self._told():
            # Committed by each statement: a process that is killed loses nothing that it has put here.
            where = str(self.file or ":memory:")
            self._base = sqlite3.connect(where, 0.2, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._base.close()
                raise

    @classmethod
    def of(cls, text: str, file: str | Path | None = None) -> Self:
        """A memory from ``KIND`` or ``KIND:CAPACITY``, as in "dhash:5000"."""
        kind, colon, number = text.partition(":")
        if colon and not (number.isascii() and number.isdigit() and len(number) <= DIGITS_OF_CAPACITY):
            raise LissomError(f"a memory is KIND or KIND:CAPACITY, as in dhash:5000, not {text[:40]!r}")
        return cls(kind, int(number) if colon else CAPACITY, file)

    def _open(self) -> None:
        run = self._base.execute
        run("PRAGMA trusted_schema = OFF")
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("BEGIN EXCLUSIVE")
        there = dict(run("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        run("COMMIT")
        if there and there != _SCHEMA:  # nothing of a stranger's (views, triggers) is ever run, and nothing changed
            raise LissomError(f"{self.file} holds something else than answers; name another file")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")
        if not there:
            run("BEGIN EXCLUSIVE")
            for statement in _SCHEMA.values():
                run(statement)
            run("INSERT INTO owner VALUES (?, '')", (self.kind,))
            run("COMMIT")
        owners = run("SELECT kind, artifact FROM owner").fetchall()
        if len(owners) != 1:
            raise LissomError(f"{self.file} is damaged; delete it")
        if owners[0][0] != self.kind:
            raise LissomError(f"{self.file} is a memory of kind {owners[0][0]}, not {self.kind}; name another file")
        self._owner = str(owners[0][1])
        self._count, self._clock, damaged = run(_READ).fetchone()
        if damaged:
            raise LissomError(f"{self.file} is damaged; delete it")
        self._forget()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what SQLite raises into one sentence."""
        try:
            yield
        except sqlite3.Error as error:
            reason = str(error) or type(error).__name__
            if "locked" in reason:
                raise LissomError(
                    f"another process has the memory {self.file} open; wait for it, or name another file"
                ) from error
            raise LissomError(f"the memory {self.file or ''} cannot be used: {reason}".replace("  ", " ")) from error

    def bind(self, artifact: str) -> None:
        """Say whose answers these are, by an artifact's hash. Raises LissomError where they are another's."""
        if self._owner and self._owner != artifact:
            where = self.file or "this memory"
            raise LissomError(f"{where} holds the answers of another artifact, which may be others; name another file")
        if not self._owner:
            with self._lock, self._told():
                self._base.execute("UPDATE owner SET artifact = ?", (artifact,))
            self._owner = artifact

    def key(self, pixels: np.ndarray) -> bytes:
        """The image's fingerprint of this memory's kind."""
        return fingerprint(pixels, self.kind)

    def get(self, key: bytes) -> Remembered | None:
        """The answer kept under a key, or None. It counts as used."""
        with self._lock, self._told():
            row = self._base.execute("SELECT stage, answer FROM answers WHERE key = ?", (key,)).fetchone()
            if row is None:
                self.misses += 1
                return None
            self._clock += 1
            self._base.execute("UPDATE answers SET used = ? WHERE key = ?", (self._clock, key))
            self.hits += 1
        return Remembered(np.frombuffer(row[1], "<f4").astype(np.float32), int(row[0]))

    def put(self, key: bytes, answer: np.ndarray, stage: int) -> None:
        """Keep an answer, float32 (classes,), under a key; the least recently used leaves where there is no room."""
        data = np.ascontiguousarray(answer, "<f4").tobytes()
        with self._lock, self._told():
            self._clock += 1
            new = self._base.execute("SELECT 1 FROM answers WHERE key = ?", (key,)).fetchone() is None
            values = (key, self._clock, int(stage), data)
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", values)
            self._count += new
            self._forget()

    def _forget(self) -> None:
        if self._count > self.capacity:
            over = self._count - self.capacity
            self._base.execute(
                "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY used LIMIT ?)", (over,)
            )
            self._count = self.capacity

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Close the file; the memory is of no further use."""
        self._base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
