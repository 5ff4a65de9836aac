"""The two kinds of split: images decoded when they are needed, and inputs that are tensors already.

Images with masks are in ``lissom.data.masks``. All satisfy ``lissom.tasks.task.Split``. Rows are always drawn from what
the source listed, before anything is decoded, so that a sample is the same whether or not the split was decoded before.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from lissom.errors import LissomError
from lissom.images import Preprocessing, open_image

__all__ = ["RAM_LIMIT", "ArraySplit", "Images", "PixelSplit", "WrongData", "allocate", "draw"]

RAM_LIMIT = 2 * 10**9  # bytes; a larger array lies in a temporary file
NAMED = 5  # how many left-out images a warning names
CHUNK = 16  # images a thread decodes at a time: neighbours, that lie in one row group of a Parquet file


class WrongData(LissomError):
    """Data that contradict themselves. Decoding stops with it, where a broken file alone would be left out."""


def allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of zeros: in RAM up to RAM_LIMIT bytes, above it in a temporary file that vanishes with the array.

    Raises LissomError where the temporary folder has not enough room.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size <= RAM_LIMIT:
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(prefix="lissom-") as file:  # without a name already: a killed run leaves nothing
            # Reserved now: a full disk is an error here, and would be a killed process at the first write into the map.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise LissomError(
            f"{size / 1e9:.1f} GB for decoded data do not fit in {tempfile.gettempdir()} ({error.strerror}); "
            "free some space, or set TMPDIR to a folder with more"
        ) from error


def draw(total: int, count: int, seed: int) -> np.ndarray:
    """``count`` of ``total`` rows (all of them where there are fewer) without replacement, in order: int64."""
    if count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


@dataclass(frozen=True, eq=False)
class Images:
    """A list of images that nobody has decoded yet.

    ``items[i]`` is a path, an encoded image's bytes, a Pillow image, a uint8 array (H, W) or (H, W, C), or None where
    the source has no image in that row; it may be read from disk on access. ``targets`` is int64, one an item, or None.
    ``rows`` are the items that belong to this list, in order. ``root`` is what paths are named relative to.
    """

    name: str
    items: Sequence[Any]
    targets: np.ndarray | None
    root: Path | None
    rows: np.ndarray

    @classmethod
    def of(cls, name: str, items: Sequence[Any], targets: np.ndarray | None = None, root: Path | None = None) -> Images:
        """All of ``items``."""
        return cls(name, items, targets, root, np.arange(len(items)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (N,), or None."""
        return None if self.targets is None else self.targets[self.rows]

    @property
    def labelled(self) -> bool:
        """Whether it is known what a model should answer."""
        return self.targets is not None

    def take(self, rows: np.ndarray, name: str | None = None) -> Self:
        """The same list with only ``rows`` (positions in this list)."""
        return replace(self, rows=self.rows[rows], name=name or self.name)

    def open(self, i: int) -> Any:
        """The i-th image as a Pillow image or a uint8 array. Raises LissomError with the reason where it is broken."""
        item = self.items[int(self.rows[i])]
        if item is None:
            raise LissomError("the row holds no image")
        return open_image(item) if isinstance(item, bytes | str | Path) else item

    def describe(self, i: int) -> str:
        """The i-th image's file, or its row in the source."""
        row = int(self.rows[i])
        # A list of paths costs nothing to look at; other items may have to be read, and have no name anyway.
        item = self.items[row] if isinstance(self.items, list) else None
        if not isinstance(item, str | Path):
            return f"row {row}"
        return str(Path(item).relative_to(self.root)) if self.root else str(item)

    def size(self) -> tuple[int, int] | None:
        """(height, width) where the first readable images agree on it, else None."""
        sizes = set()
        for i in draw(len(self), 16, 0):
            with contextlib.suppress(LissomError):
                image = self.open(i)
                sizes.add(image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width))
        return sizes.pop() if len(sizes) == 1 else None


class PixelSplit:
    """Images as inputs of a model: decoded on first use, by threads, to uint8 at the model's input size, and kept.

    An image that is corrupt or over the limits of ``lissom.images`` is left out, counted, and named in ``skipped`` and
    in one ``UserWarning``; labels stay aligned. Anything that needs to know which images are good (``len``, ``labels``,
    ``inputs``, ``pixels``) decodes all of them; ``skipped`` is complete after that. ``sample`` decodes nothing.

    Raises LissomError on first use where not one image can be read.
    """

    def __init__(self, images: Images, preprocessing: Preprocessing) -> None:
        self.name = images.name
        self.preprocessing = preprocessing
        self.skipped: list[tuple[str, str]] = []
        self._images = images
        self._kept = np.arange(0)  # positions in _images of the rows of _stored
        self._stored: tuple[np.ndarray, ...] | None = None  # the pixels, and what a subclass decodes beside them
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"PixelSplit({self.name!r}, {len(self._images)} images)"

    @property
    def pixels(self) -> np.ndarray:
        """uint8 (N, H, W, C), before normalisation: what augmentation works on."""
        return self._decoded()[0]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (N,), or None."""
        labels = self._images.labels
        if labels is None:
            return None
        return labels if len(self.pixels) == len(labels) else labels[self._kept]

    def inputs(self, indices: np.ndarray | slice) -> np.ndarray:
        """float32 (n, C, H, W), normalised."""
        return self.preprocessing.normalise(self.pixels[indices])

    def sample(self, count: int, seed: int) -> Self:
        """At most ``count`` rows less the broken ones, the same for the same seed; only they are decoded."""
        rows = draw(len(self._images), count, seed)
        drawn = self._part(rows)
        if self._stored is not None:
            good = np.isin(self._kept, rows)
            drawn._stored = tuple(store[good] for store in self._stored)
            drawn._kept = np.flatnonzero(np.isin(rows, self._kept))
            bad = {self._images.describe(int(row)) for row in np.setdiff1d(rows, self._kept)}
            drawn.skipped = [entry for entry in self.skipped if entry[0] in bad]
        return drawn

    # What a split that decodes more than pixels replaces.

    def _part(self, rows: np.ndarray) -> Self:
        """A split of the same kind with only ``rows`` of the images, not decoded."""
        return type(self)(self._images.take(rows), self.preprocessing)

    def _forms(self) -> list[tuple[tuple[int, ...], Any]]:
        """Shape and type of one row of each array that is decoded."""
        p = self.preprocessing
        return [((p.height, p.width, p.channels), np.uint8)]

    def _row(self, i: int) -> tuple[np.ndarray, ...]:
        """The i-th image decoded: one value for each of ``_forms``. Raises where it is broken, with the reason."""
        return (self.preprocessing.pixels(self._images.open(i)),)

    def _decoded(self) -> tuple[np.ndarray, ...]:
        with self._lock:
            if self._stored is None:
                self._stored = self._decode()
            return self._stored

    def _decode(self) -> tuple[np.ndarray, ...]:
        total = len(self._images)
        stores = [allocate((total, *shape), kind) for shape, kind in self._forms()]

        def decode(start: int) -> list[tuple[int, str]]:
            broken = []
            for i in range(start, min(start + CHUNK, total)):
                try:
                    for store, value in zip(stores, self._row(i), strict=True):
                        store[i] = value
                except WrongData:
                    raise
                except LissomError as error:
                    broken.append((i, str(error)))
                except Exception as error:  # a decoded image that cannot be converted or resized is broken as well
                    broken.append((i, f"not a usable image ({type(error).__name__}: {error})"))
            return broken

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            broken = [entry for entries in pool.map(decode, range(0, total, CHUNK)) for entry in entries]
        kept = np.delete(np.arange(total), [i for i, _ in broken])
        self.skipped = [(self._images.describe(i), reason) for i, reason in broken]
        named = ", ".join(f"{name} ({reason})" for name, reason in self.skipped[:NAMED])
        if len(kept) == 0:
            raise LissomError(f"not one of the {total} images of {self.name} can be read: {named}")
        if broken:
            more = f", and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
            warnings.warn(f"{self.name}: {len(broken)} of {total} images were left out: {named}{more}", stacklevel=5)
            for store in stores:
                for place, i in enumerate(kept):  # closed up in place: a copy may not fit in RAM
                    if place != i:
                        store[place] = store[i]
        self._kept = kept
        return tuple(store[: len(kept)] for store in stores)


class ArraySplit:
    """Inputs that are tensors already: float32 (N, C, H, W) as the model wants them.

    ``labels`` is int64 (N,), masks of class indices uint8 (N, H, W), or None.
    """

    def __init__(self, name: str, array: np.ndarray, labels: np.ndarray | None = None) -> None:
        self.name = name
        self.skipped: list[tuple[str, str]] = []
        self._array = array
        self._labels = labels

    def __repr__(self) -> str:
        return f"ArraySplit({self.name!r}, {self._array.shape})"

    @property
    def shape(self) -> tuple[int, ...]:
        """One input's shape, without the batch."""
        return self._array.shape[1:]

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    @property
    def labelled(self) -> bool:
        """Whether it is known what a model should answer."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self._array)

    def inputs(self, indices: np.ndarray | slice) -> np.ndarray:
        """float32 (n, C, H, W)."""
        return np.ascontiguousarray(self._array[indices])

    def take(self, rows: np.ndarray, name: str | None = None) -> ArraySplit:
        """The same split with only ``rows``."""
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            array, labels = self._array, self._labels
        else:
            array = allocate((len(rows), *self.shape), np.float32)
            np.take(self._array, rows, axis=0, out=array)
            labels = None if self._labels is None else self._labels[rows]
        return ArraySplit(name or self.name, array, labels)

    def sample(self, count: int, seed: int) -> ArraySplit:
        """At most ``count`` rows, the same for the same seed."""
        return self.take(draw(len(self), count, seed))
