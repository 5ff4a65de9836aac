"""Images in Parquet: ``train.parquet``, ``val.parquet`` and ``test.parquet`` with the columns image and label, or mask.

``image`` holds encoded images, as binary or as a struct with a binary field ``bytes`` (the form of Hugging Face
datasets); ``label`` holds integers from 0, ``mask`` encoded masks in the form of ``image``. Class names of labels are
read from the file's own ``huggingface`` metadata where it has them, those of masks as ``lissom.data.masks`` says.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lissom.data.masks import MaskedImages
from lissom.data.splits import Images
from lissom.errors import LissomError

__all__ = ["has_masks", "read_mask_table", "read_table"]

KEPT_GROUPS = 4  # row groups in memory: threads decode neighbouring rows, in few groups at a time


class _ImageColumn(Sequence):
    """A column of encoded images, a few row groups in memory at a time. Safe to read from several threads."""

    def __init__(self, path: Path, groups: list[int], column: str = "image") -> None:
        self._path = path
        self._column = column
        self._starts = np.cumsum([0, *groups])
        self._groups: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: Any) -> Any:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self._group(number)[int(row - self._starts[number])].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    def _group(self, number: int) -> Any:
        import pyarrow.parquet as pq

        with self._lock:
            if number not in self._groups:
                while len(self._groups) >= KEPT_GROUPS:
                    del self._groups[next(iter(self._groups))]
                try:
                    table = pq.ParquetFile(self._path).read_row_group(number, columns=[self._column])
                except Exception as error:
                    raise LissomError(f"row group {number} of {self._path.name} cannot be read ({error})") from error
                self._groups[number] = table.column(self._column).combine_chunks()
            return self._groups[number]


def read_table(path: Path, split: str) -> tuple[tuple[str, ...], Images]:
    """Class names (empty where the file has none), and the images of one Parquet file; their bytes stay on disk.

    Raises LissomError where the file is no Parquet, lacks a column, or a label is missing, no integer, or negative.
    """
    import pyarrow as pa

    file = _opened(path)
    schema = file.schema_arrow
    _require(schema, path, ("image", "label"))
    images = _encoded(file, path, "image")
    if not pa.types.is_integer(schema.field("label").type):
        raise LissomError(
            f"the column label of {path} holds {schema.field('label').type}; integers from 0 are wanted, one a class"
        )
    try:
        column = file.read(columns=["label"]).column("label")
    except Exception as error:
        raise LissomError(f"the column label of {path} cannot be read: {str(error).splitlines()[0]}") from error
    if len(column) == 0:
        raise LissomError(f"{path} holds no rows")
    if column.null_count:
        raise LissomError(f"{column.null_count} rows of {path} have no label; give each one, or leave the rows out")
    labels = column.to_numpy().astype(np.int64)
    return _class_names(schema.metadata), Images.of(split, images, labels)


def has_masks(path: Path) -> bool:
    """Whether a Parquet file has the column mask, and no label. Raises LissomError where it is no Parquet."""
    names = _opened(path).schema_arrow.names
    return "mask" in names and "label" not in names


def read_mask_table(path: Path, split: str) -> tuple[dict[bytes, bytes], MaskedImages]:
    """The schema's metadata, and the images and masks of one Parquet file; their bytes stay on disk.

    Raises LissomError where the file is no Parquet, holds no rows, or lacks a column or holds another kind in it.
    """
    file = _opened(path)
    _require(file.schema_arrow, path, ("image", "mask"))
    images, masks = (_encoded(file, path, column) for column in ("image", "mask"))
    if len(images) == 0:
        raise LissomError(f"{path} holds no rows")
    return file.schema_arrow.metadata or {}, MaskedImages.pairs(split, images, masks)


def _opened(path: Path) -> Any:
    """The Parquet file, its schema and its row groups read."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        file.schema_arrow  # noqa: B018 - damage shows here, and in the next line
        [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except Exception as error:  # pyarrow raises its own kinds and OSError, by the place of the damage
        raise LissomError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    return file


def _require(schema: Any, path: Path, columns: tuple[str, ...]) -> None:
    for column in columns:
        if column not in schema.names:
            raise LissomError(f"{path} has no column {column!r} (it has: {', '.join(schema.names)}); rename one to it")


def _encoded(file: Any, path: Path, column: str) -> _ImageColumn:
    """The column of encoded images, its type checked."""
    import pyarrow as pa

    kind = file.schema_arrow.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise LissomError(f"the column {column} of {path} holds {kind}; encoded images as binary are wanted")
    return _ImageColumn(path, [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)], column)


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """The names that Hugging Face's datasets write: {"info": {"features": {"label": {"names": [...]}}}}."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
