"""Where data come from: one function, ``read``, for everything that a user may name or hand over."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lissom.data.folders import SPLITS, has_mask_folders, read_class_folders, read_images, read_mask_folders
from lissom.data.masks import MaskedImages, Naming, check_masks, naming_of
from lissom.data.splits import ArraySplit, Images, allocate
from lissom.data.tables import has_masks, read_mask_table, read_table
from lissom.errors import LissomError
from lissom.usercode import is_reference, load_function

__all__ = ["DataSet", "read", "stratified"]

DIGITS_SIZE = 32
DIGITS_SEED = 0


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set as it was found: class names, and the splits that there are.

    A split is ``Images`` (``MaskedImages`` where each has a mask) or ``ArraySplit``; all are of one kind. ``ignore`` is
    the index in masks that counts nowhere; None where there are no masks. Data without labels may have a single split
    (``val``), which ``lissom.tasks.of_data.task_of`` divides.
    """

    name: str
    classes: tuple[str, ...] = ()
    train: Images | ArraySplit | None = None
    val: Images | ArraySplit | None = None
    test: Images | ArraySplit | None = None
    ignore: int | None = None

    @property
    def splits(self) -> dict[str, Images | ArraySplit]:
        """The splits there are, by name."""
        found = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}

    @property
    def labelled(self) -> bool:
        """Whether what models are judged by has labels."""
        judged = [s for s in (self.val, self.test) if s is not None]
        return bool(judged) and all(s.labelled for s in judged)

    @property
    def trainable(self) -> bool:
        """Whether there is a training split with labels."""
        return self.train is not None and self.train.labelled

    @property
    def kind(self) -> str:
        """The kind of task that the labels are for: ``segmentation`` for masks, else ``classification``."""
        for split in self.splits.values():
            maps = isinstance(split, ArraySplit) and split.labels is not None and split.labels.ndim > 1
            if maps or isinstance(split, MaskedImages):
                return "segmentation"
        return "classification"

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the images where they are of one size, of the tensors, else None."""
        first = next(iter(self.splits.values()))
        if isinstance(first, Images):
            return first.size()
        return (first.shape[1], first.shape[2]) if len(first.shape) == 3 else None


def read(source: Any) -> DataSet:
    """The data that ``source`` names or is.

    ``source`` is one of

    - ``"digits"``: scikit-learn's 1,797 handwritten digits at 32 x 32, in RGB, a fifth of them as ``test``;
    - a folder with ``train/`` and ``val/`` (and ``test/``) of class folders;
    - the same with ``images/`` and ``masks/`` in each split, in place of the class folders: a mask has its image's name
      and size, and its pixels are class indices (see ``lissom.data.masks``, also for class names);
    - a folder of images without labels;
    - a folder with ``train.parquet`` and ``val.parquet`` (and ``test.parquet``), columns ``image`` and ``label``, or
      ``image`` and ``mask``;
    - ``"file.py:function"``, a function without arguments that returns one of the following;
    - a ``DataSet``;
    - ``{"train": split, "val": split, "test": split}``, or the tuple (train, val) or (train, val, test), where a split
      is ``Images`` or ``MaskedImages``, a torch-style data set (``len`` and ``[i]``) of (image, label) or of images
      alone, a tuple of arrays (inputs, labels), or an array of inputs. An image is a float tensor (C, H, W), already
      normalised as the model wants it, or else a Pillow image or a uint8 array (H, W, C), which lissom resizes and
      normalises. Float tensors are read once, so that random augmentation in a data set is frozen.

    ``test/`` stands in for a missing ``val/``. Raises LissomError where something is missing or does not fit together.
    """
    if isinstance(source, DataSet):
        return source
    if isinstance(source, str | Path):
        text = str(source)
        if text == "digits":
            return _digits()
        if is_reference(text):
            return _from_function(text)
        try:
            return _from_folder(Path(source).expanduser(), text)
        except OSError as error:
            raise LissomError(f"the data in {source} cannot be read: {error.strerror or error}") from error
    return _from_python(source)


def stratified(labels: np.ndarray | None, total: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``total`` rows divided in two, the first with ``share`` of them and of every class (as near as whole rows go).

    The same for the same seed; without ``labels`` the rows are drawn evenly. Both parts are in order.
    """
    mixed = np.random.default_rng(seed).permutation(total)
    if labels is None:
        place = np.arange(total, dtype=np.float64)
    else:
        # Each class spreads its rows evenly over [0, 1): any beginning of that line holds the same share of each.
        place = np.empty(total)
        for label in np.unique(labels):
            of_class = labels[mixed] == label
            count = int(of_class.sum())
            place[of_class] = (np.arange(count) + 0.5) / count
    ordered = mixed[np.argsort(place, kind="stable")]
    cut = round(total * share)
    return np.sort(ordered[:cut]), np.sort(ordered[cut:])


def _digits() -> DataSet:
    from PIL import Image
    from sklearn.datasets import load_digits

    raw = load_digits()
    size = (DIGITS_SIZE, DIGITS_SIZE)
    # Grey values are 0 to 16; 255 / 16 would carry bicubic overshoot over the edge, where Pillow clips it anyway.
    small = np.round(raw.images * (255 / 16)).astype(np.uint8)
    grey = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in small]
    images = Images.of("digits", list(np.stack(grey)[..., None].repeat(3, axis=-1)), raw.target.astype(np.int64))
    test, train = stratified(images.labels, len(images), 0.2, DIGITS_SEED)
    classes = tuple(str(digit) for digit in range(10))
    return DataSet("digits", classes, train=images.take(train, "train"), test=images.take(test, "test"))


def _from_function(reference: str) -> DataSet:
    function = load_function(reference)
    try:
        found = function()
    except LissomError:
        raise
    except Exception as error:
        raise LissomError(f"{reference} failed: {type(error).__name__}: {error}") from error
    if isinstance(found, str | Path):
        raise LissomError(f'{reference} returned {found!r}; data sets are wanted, as {{"train": ..., "val": ...}}')
    data = read(found)
    return replace(data, name=Path(reference.rpartition(":")[0]).stem)


def _from_folder(path: Path, text: str) -> DataSet:
    if not path.exists():
        raise LissomError(f"there is no folder {text}; name a folder of images, file.py:function, or digits")
    if path.suffix == ".py":
        raise LissomError(f"{text} is a Python file; name the function that returns the data too, as {text}:function")
    if not path.is_dir():
        raise LissomError(f"{text} is a file; name the folder that holds the data, file.py:function, or digits")
    name = path.resolve().name
    there = sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if not p.name.startswith("."))
    listed = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "") or "nothing"
    tables = [split for split in SPLITS if (path / f"{split}.parquet").is_file()]
    folders = [split for split in SPLITS if (path / split).is_dir()]
    if tables:
        _require_judged(tables, text, listed, ".parquet")
        if any(has_masks(path / f"{split}.parquet") for split in tables):
            read_masks = {split: read_mask_table(path / f"{split}.parquet", split) for split in tables}
            said = next((metadata for metadata, _ in read_masks.values() if b"classes" in metadata), None)
            masked = {split: images for split, (_, images) in read_masks.items()}
            return _checked_masks(name, naming_of(path, said), masked, text)
        read_tables = {split: read_table(path / f"{split}.parquet", split) for split in tables}
        names = next((classes for classes, _ in read_tables.values() if classes), ())
        return _checked(name, names, {split: images for split, (_, images) in read_tables.items()}, text)
    if folders:
        _require_judged(folders, text, listed, "/")
        if has_mask_folders(path):
            return _checked_masks(name, naming_of(path), read_mask_folders(path), text)
        classes, splits = read_class_folders(path)
        return _checked(name, classes, splits, text)
    images = read_images(path)
    if images is None:
        raise LissomError(
            f"{text} holds no images and neither train/ and val/ nor train.parquet and val.parquet; it holds {listed}"
        )
    return DataSet(name, (), val=images)


def _require_judged(present: list[str], text: str, listed: str, ending: str) -> None:
    if "val" not in present and "test" not in present:
        raise LissomError(
            f"{text} has no val{ending} (it holds {listed}); put images with labels that the model "
            f"was not trained on in val{ending}, or in test{ending}"
        )


def _from_python(source: Any) -> DataSet:
    if isinstance(source, Mapping):
        named = dict(source)
    elif isinstance(source, tuple) and len(source) in (2, 3):
        named = dict(zip(SPLITS, source, strict=False))
        last = source[1]
        if _is_array(last) and np.ndim(last) == 1:
            raise LissomError("a tuple is (train, val): give ((inputs, labels), (inputs, labels)), or {'val': ...}")
    else:
        raise LissomError(
            f"data of type {type(source).__name__} are not understood; "
            'give a folder, (train, val), or {"train": ..., "val": ..., "test": ...}'
        )
    unknown = [str(key) for key in named if key not in SPLITS]
    if unknown:
        raise LissomError(f"the data name the split {unknown[0]!r}; known: {', '.join(SPLITS)}")
    named = {key: split for key, split in named.items() if split is not None}
    if "val" not in named and "test" not in named:
        raise LissomError("the data have no 'val' and no 'test'; give one that the model was not trained on")
    splits = {key: _split(key, named[key]) for key in SPLITS if key in named}
    kinds = {type(split) for split in splits.values()}
    shapes = {split.shape for split in splits.values() if isinstance(split, ArraySplit)}
    if len(kinds) > 1 or len(shapes) > 1:
        found = ", ".join(f"{k}: {s.shape if isinstance(s, ArraySplit) else 'images'}" for k, s in splits.items())
        raise LissomError(f"the splits do not hold the same kind of input ({found}); give all in one form")
    masked = {key: split for key, split in splits.items() if isinstance(split, MaskedImages)}
    if masked:
        return _checked_masks("data", None, masked, "the data")
    first = next(iter(named.values()))
    classes = getattr(first, "classes", None) or ()
    classes = tuple(str(c) for c in classes) if isinstance(classes, list | tuple) else ()
    return _checked("data", classes, splits, "the data")


def _checked(name: str, classes: tuple[str, ...], splits: Mapping[str, Images | ArraySplit], text: str) -> DataSet:
    """The data set, its labels held against the classes and each other.

    Without class names, the classes are 0 to the largest label of ``train`` (of the first split, without it).
    """
    data = DataSet(name, classes, splits.get("train"), splits.get("val"), splits.get("test"))
    judged = [key for key in ("val", "test") if key in splits]
    if not data.labelled:
        bare = [key for key in judged if splits[key].labels is None]
        if len(bare) < len(judged):
            raise LissomError(f"the split {bare[0]!r} of {text} has no labels and another one has; label both or none")
        return data
    if not classes:
        first = next(split.labels for split in splits.values() if split.labels is not None)
        classes = tuple(str(label) for label in range(int(first.max()) + 1))
    for key, split in splits.items():
        if split.labels is None:
            continue
        if split.labels.min() < 0:
            raise LissomError(f"the split {key!r} of {text} has the label {split.labels.min()}; labels start at 0")
        if split.labels.max() >= len(classes):
            raise LissomError(
                f"the split {key!r} of {text} has the label {split.labels.max()}, and there are "
                f"{len(classes)} classes (0 to {len(classes) - 1}); correct the label, or add the class to the others"
            )
    if "train" in splits and splits["train"].labels is not None:
        counts = np.bincount(splits["train"].labels, minlength=len(classes))
        if not counts.all():
            empty = int(counts.argmin())
            label = classes[empty] if classes[empty] == str(empty) else f"{classes[empty]!r} (label {empty})"
            raise LissomError(f"the class {label} is empty in the split 'train' of {text}; number classes without gaps")
    return replace(data, classes=classes)


def _checked_masks(name: str, naming: Naming | None, splits: Mapping[str, MaskedImages], text: str) -> DataSet:
    """The data set, its masks held against the classes that ``naming`` or the masks themselves tell."""
    classes, ignore = check_masks(splits, naming, text)
    return DataSet(name, classes, splits.get("train"), splits.get("val"), splits.get("test"), ignore)


# Splits from Python


class _Pictures(Sequence):
    """The images of a torch-style data set, read again at each access, by one thread at a time."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        with self._lock:
            return _pair(self._rows[row])[0]


def _is_array(value: Any) -> bool:
    """NumPy arrays and torch tensors, without importing torch."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__array__")


def _is_picture(value: Any) -> bool:
    """A Pillow image, or uint8 (H, W) or (H, W, C)."""
    from PIL import Image

    if isinstance(value, Image.Image):
        return True
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        return False
    return value.ndim == 2 or (value.ndim == 3 and value.shape[-1] in (1, 3))


def _pair(item: Any) -> tuple[Any, Any]:
    """(image, label) of a data set's item; the label is None where the item is an image alone."""
    if isinstance(item, tuple | list):
        if len(item) != 2:
            raise ValueError(f"it holds {len(item)} things")
        return item[0], item[1]
    return item, None


def _split(name: str, source: Any) -> Images | ArraySplit:
    if isinstance(source, Images | ArraySplit):
        return source
    if _is_array(source):
        return _from_arrays(name, source, None)
    if isinstance(source, tuple | list) and len(source) == 2 and all(_is_array(part) for part in source):
        return _from_arrays(name, *source)
    if hasattr(source, "dataset") and hasattr(source, "batch_size"):
        raise LissomError(f"the split {name!r} is a data loader; give its data set, lissom makes its own batches")
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise LissomError(
            f"the split {name!r} is a {type(source).__name__}; "
            "give a data set with len() and [i], arrays (inputs, labels), or an array"
        )
    return _from_dataset(name, source)


def _labels(name: str, values: Any, count: int) -> np.ndarray:
    labels = np.asarray(values)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise LissomError(
            f"the labels of the split {name!r} are {labels.dtype} of shape {labels.shape}; "
            f"integers of shape ({count},) are wanted"
        )
    return labels.astype(np.int64)


def _from_arrays(name: str, inputs: Any, labels: Any) -> Images | ArraySplit:
    array = np.asarray(inputs)
    if len(array) == 0:
        raise LissomError(f"the split {name!r} is empty")
    known = None if labels is None else _labels(name, labels, len(array))
    if array.dtype == np.uint8 and _is_picture(array[0]):
        return Images.of(name, list(array), known)
    if not np.issubdtype(array.dtype, np.floating) or array.ndim < 2:
        raise LissomError(
            f"the inputs of the split {name!r} are {array.dtype} of shape {array.shape}; "
            "float (N, C, H, W), or uint8 (N, H, W, C) are wanted"
        )
    return ArraySplit(name, np.ascontiguousarray(array, np.float32), known)


def _from_dataset(name: str, rows: Any) -> Images | ArraySplit:
    count = len(rows)
    if count == 0:
        raise LissomError(f"the split {name!r} is empty")
    labels: list[Any] = []
    store: np.ndarray | None = None
    pictures = False
    for i in range(count):
        try:
            image, label = _pair(rows[i])
            if i == 0:
                pictures = _is_picture(image)
            if not pictures:
                array = np.asarray(image)
                if not np.issubdtype(array.dtype, np.floating):
                    raise ValueError(f"{array.dtype} of shape {array.shape}")
                if store is None:
                    store = allocate((count, *array.shape), np.float32)
                if array.shape != store.shape[1:]:
                    raise ValueError(f"shape {array.shape} after {store.shape[1:]}")
                store[i] = array
        except LissomError:
            raise
        except Exception as error:
            raise LissomError(
                f"item {i} of the split {name!r} is not (image, label) or an image, a float tensor (C, H, W), "
                f"a Pillow image or uint8 (H, W, C): {type(error).__name__}: {error}"
            ) from error
        labels.append(label)
    bare = [label is None for label in labels]
    if any(bare) and not all(bare):
        raise LissomError(f"item {bare.index(True)} of the split {name!r} has no label, and others have")
    known = None if all(bare) else _labels(name, [np.asarray(label)[()] for label in labels], count)
    return Images.of(name, _Pictures(rows), known) if store is None else ArraySplit(name, store, known)
