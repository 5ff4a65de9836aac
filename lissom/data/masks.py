"""Images with masks of class indices: opened, checked and decoded together, so that both stay aligned.

A mask is an image of one 8-bit channel (grey, palette or bilevel) of its image's size, whose values are class indices
from 0; one more index, ``ignore``, marks pixels that count nowhere. Files that lose detail (JPEG) cannot hold masks.

Class names and the ignored index are the first found of

1. ``classes.txt`` in the data's folder: one name a line in the order of the indices, and a line ``ignore: 11`` where
   the ignored index is not 255;
2. the Parquet schema's metadata: ``classes``, a JSON list of names, and ``ignore``, an integer;
3. what is published of a data set whose folder bears its name (``KNOWN``);
4. the indices that the masks of ``train`` use, named ``class 0``, ``class 1``, ...; 255 is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lissom.data.splits import CHUNK, Images, PixelSplit, WrongData
from lissom.errors import LissomError
from lissom.images import Preprocessing, open_image

__all__ = ["IGNORE", "KNOWN", "MaskSplit", "MaskedImages", "Naming", "check_masks", "naming_in_file", "naming_of"]

IGNORE = 255  # what most data sets mark unlabelled pixels with
CLASSES_FILE = "classes.txt"
MODES = ("L", "P", "1")  # Pillow's names of one 8-bit channel: grey, palette, bilevel


class Naming(NamedTuple):
    """Class names in the order of their indices, and the index that counts nowhere."""

    classes: tuple[str, ...]
    ignore: int = IGNORE


# Data sets whose files say nothing of their classes, by the name of their folder in lower case.
KNOWN = {
    # The selection of classes by Badrinarayanan et al. (SegNet, arXiv 1511.00561); "unlabelled" is 11.
    "camvid": Naming(
        ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"), 11
    ),
}


@dataclass(frozen=True, eq=False)
class MaskedImages(Images):
    """A list of images with a mask each that nobody has decoded yet.

    ``masks[i]`` belongs to ``items[i]``: a path, an encoded image's bytes, a Pillow image, a uint8 array (H, W), or
    None where the source has no mask in that row. ``targets`` is None: masks are no numbers a row.
    """

    masks: Sequence[Any] = ()

    @classmethod
    def pairs(cls, name: str, items: Sequence[Any], masks: Sequence[Any], root: Path | None = None) -> MaskedImages:
        """All of ``items`` with their ``masks``. Raises LissomError where their numbers differ."""
        if len(items) != len(masks):
            raise LissomError(f"the split {name!r} has {len(items)} images and {len(masks)} masks; give one mask each")
        return cls(name, items, None, root, np.arange(len(items)), masks)

    @property
    def labelled(self) -> bool:
        """Whether it is known what a model should answer: always."""
        return True

    def open_mask(self, i: int) -> np.ndarray:
        """The i-th mask, uint8 (H, W). Raises LissomError with the reason where it is broken or no mask."""
        item = self.masks[int(self.rows[i])]
        if item is None:
            raise LissomError("it has no mask")
        try:
            mask = open_image(item) if isinstance(item, bytes | str | Path) else item
        except LissomError as error:
            raise LissomError(f"its mask is unusable: {error}") from error
        if not isinstance(mask, np.ndarray):
            if mask.mode not in MODES:
                raise LissomError(f"its mask has the mode {mask.mode}; one 8-bit channel of class indices is wanted")
            mask = np.asarray(mask, np.uint8)
        if mask.ndim != 2 or mask.dtype != np.uint8:
            raise LissomError(f"its mask is {mask.dtype} of shape {mask.shape}; uint8 (H, W) is wanted")
        return mask

    def describe(self, i: int) -> str:
        """The i-th image's file (its mask's where there is no image), or its row in the source."""
        row = int(self.rows[i])
        if isinstance(self.items, list) and self.items[row] is None and isinstance(self.masks[row], Path):
            mask = self.masks[row]
            return str(mask.relative_to(self.root)) if self.root else str(mask)
        return super().describe(i)


class MaskSplit(PixelSplit):
    """Images and their masks as inputs and targets of a model, decoded on first use at its input size, and kept.

    Both are resized to the whole input ("squash"), the mask to the nearest pixel. What ``PixelSplit`` leaves out is
    left out here, and an image too whose mask is missing, broken, of another size, or of more than one channel.
    ``labels`` is uint8 (N, H, W): indices below ``classes``, and ``ignore``.

    Raises LissomError on first use where not one image can be read, or a mask holds another index.
    """

    def __init__(self, images: MaskedImages, preprocessing: Preprocessing, classes: int, ignore: int = IGNORE) -> None:
        if preprocessing.resize != "squash":
            raise LissomError("images with masks are resized whole: give a preprocessing with resize='squash'")
        super().__init__(images, preprocessing)
        self.classes = classes
        self.ignore = ignore
        self._masked = images

    @property
    def labels(self) -> np.ndarray:
        """uint8 (N, H, W)."""
        return self._decoded()[1]

    def _part(self, rows: np.ndarray) -> MaskSplit:
        return MaskSplit(self._masked.take(rows), self.preprocessing, self.classes, self.ignore)

    def _forms(self) -> list[tuple[tuple[int, ...], Any]]:
        p = self.preprocessing
        return [*super()._forms(), ((p.height, p.width), np.uint8)]

    def _row(self, i: int) -> tuple[np.ndarray, ...]:
        from PIL import Image

        mask = self._masked.open_mask(i)
        image = self._masked.open(i)
        high, wide = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
        if mask.shape != (high, wide):
            raise LissomError(f"its mask has {mask.shape[1]} x {mask.shape[0]} pixels and the image {wide} x {high}")
        index = _first_wrong(_indices(mask), self.classes, self.ignore)
        if index is not None:
            raise _wrong(self._masked, i, index, self.classes, self.ignore)
        p = self.preprocessing
        if mask.shape != (p.height, p.width):
            mask = np.asarray(Image.fromarray(mask).resize((p.width, p.height), Image.Resampling.NEAREST))
        return p.pixels(image), mask


# Checks at reading, so that a wrong index is told before anything is trained or measured.


def check_masks(splits: Mapping[str, MaskedImages], naming: Naming | None, text: str) -> Naming:
    """``naming``, or where it is None what the masks of ``train`` (of the first split, without it) use.

    Every mask is decoded once; broken ones are passed over here, and left out by name when the split is decoded.
    ``text`` names the data in errors. Raises LissomError for an index that is neither a class nor ignored, indices
    with gaps and a single class where no names are given, and masks that cannot be read or are ignored everywhere.
    """
    first = next(iter(splits))
    used = {name: _used(images) for name, images in splits.items()}
    there = np.flatnonzero(np.any(used[first], axis=0))
    if not len(there):
        raise LissomError(f"not one mask of the split {first!r} of {text} can be read: {_reason(splits[first])}")
    if naming is None:
        known = there[there != IGNORE]
        if len(known) < 2 or known[-1] >= len(known):
            raise LissomError(
                f"the masks of the split {first!r} of {text} use the indices {_listed(there)}; "
                f"number the classes without gaps from 0, at least two of them besides the ignored {IGNORE}, "
                f"or name classes and ignored index in {CLASSES_FILE}"
            )
        naming = Naming(tuple(f"class {index}" for index in range(len(known))))
    count = len(naming.classes)
    for name, images in splits.items():
        index = _first_wrong(np.any(used[name], axis=0), count, naming.ignore)
        if index is not None:
            raise _wrong(images, int(used[name][:, index].argmax()), index, count, naming.ignore)
    if not (there < count).any():
        raise LissomError(f"every pixel of the masks of the split {first!r} of {text} is ignored (index {there[0]})")
    return naming


def _used(images: MaskedImages) -> np.ndarray:
    """bool (N, 256): which indices each mask holds; none where it is broken."""
    found = np.zeros((len(images), 256), bool)

    def look(start: int) -> None:
        for i in range(start, min(start + CHUNK, len(images))):
            try:
                found[i] = _indices(images.open_mask(i))
            except Exception:  # a user's own sequence raises anything; decoding meets it again and names it
                continue

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(look, range(0, len(images), CHUNK)))
    return found


def _reason(images: MaskedImages) -> str:
    """Why the first mask cannot be read."""
    try:
        images.open_mask(0)
    except Exception as error:
        return f"{images.describe(0)} ({error})"
    return "no reason"  # it can: only a list that answers otherwise each time comes here


def _indices(mask: np.ndarray) -> np.ndarray:
    """bool (256,): which indices a mask holds."""
    return np.bincount(mask.ravel(), minlength=256) > 0


def _first_wrong(there: np.ndarray, classes: int, ignore: int) -> int | None:
    wrong = [int(index) for index in np.flatnonzero(there) if index >= classes and index != ignore]
    return wrong[0] if wrong else None


def _wrong(images: MaskedImages, i: int, index: int, classes: int, ignore: int) -> WrongData:
    return WrongData(
        f"the mask of {images.describe(i)} in the split {images.name!r} holds the index {index}, and there are "
        f"{classes} classes (0 to {classes - 1}) and the ignored index {ignore}; correct the mask, or name classes and "
        f"ignored index in {CLASSES_FILE}"
    )


def _listed(indices: np.ndarray) -> str:
    return ", ".join(str(i) for i in indices[:8]) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")


# Names


def naming_of(folder: Path, metadata: Mapping[bytes, bytes] | None = None) -> Naming | None:
    """Class names and ignored index of the data in ``folder``, where they are said (see the top of this file).

    ``metadata`` is a Parquet schema's. Raises LissomError where what is said cannot be.
    """
    return naming_in_file(folder / CLASSES_FILE) or _in_metadata(metadata) or KNOWN.get(folder.resolve().name.lower())


def naming_in_file(path: Path) -> Naming | None:
    """What ``classes.txt`` says; None where there is no such file."""
    if not path.is_file():
        return None
    if path.stat().st_size > 2**20:
        raise LissomError(f"{path} has {path.stat().st_size} bytes; one class name a line is wanted")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise LissomError(f"{path} is no UTF-8 text; one class name a line is wanted") from error
    marks = [line.partition(":")[2].strip() for line in lines if line.startswith("ignore:")]
    names = tuple(line for line in lines if not line.startswith("ignore:"))
    if len(marks) > 1 or not all(mark.isdecimal() for mark in marks):
        raise LissomError(f"{path} names the ignored index as {', '.join(marks)!r}; one line 'ignore: 255' is wanted")
    return _checked(names, int(marks[0]) if marks else IGNORE, str(path))


def _in_metadata(metadata: Mapping[bytes, bytes] | None) -> Naming | None:
    if not metadata or b"classes" not in metadata:
        return None
    try:
        names = json.loads(metadata[b"classes"])
        ignore = json.loads(metadata.get(b"ignore", str(IGNORE).encode()))
    except ValueError as error:
        raise LissomError(f"the Parquet metadata 'classes' and 'ignore' are no JSON: {error}") from error
    if not isinstance(names, list) or type(ignore) is not int:
        raise LissomError("the Parquet metadata 'classes' is to be a JSON list of names, and 'ignore' an integer")
    return _checked(tuple(str(name) for name in names), ignore, "the Parquet metadata")


def _checked(names: tuple[str, ...], ignore: int, origin: str) -> Naming:
    if len(names) < 2 or len(set(names)) < len(names):
        raise LissomError(f"{origin} names {len(names)} classes, {len(set(names))} different ones; name each, once")
    if not len(names) <= ignore <= 255:
        raise LissomError(
            f"{origin} names {len(names)} classes and the ignored index {ignore}; it is not below their number, and at "
            "most 255"
        )
    return Naming(names, ignore)
