"""Parquet folders: labels, class names, lazy bytes, and one sentence for each fault."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lissom.data.sources import read
from lissom.data.splits import PixelSplit
from lissom.errors import LissomError
from lissom.images import Preprocessing

P = Preprocessing(6, 6)


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((6, 6), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, labels, images=None, group=7, names=None, **columns):
    images = [png(i) for i in range(len(labels))] if images is None else images
    table = pa.table({"image": images, "label": labels, **columns})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=group)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.parquet", pa.array(np.arange(60) % 3, pa.int8()))
    write(tmp_path / "test.parquet", [0, 1, 2, 2])
    return tmp_path


def test_train_and_test(folder):
    data = read(folder)
    assert data.classes == ("0", "1", "2")
    assert list(data.splits) == ["train", "test"]
    assert data.image_size == (6, 6)
    split = PixelSplit(data.train, P)
    np.testing.assert_array_equal(split.pixels[:, 0, 0, 0], np.arange(60))
    assert split.labels.dtype == np.int64
    sample = PixelSplit(data.train, P).sample(13, 0)  # rows from several row groups
    np.testing.assert_array_equal(sample.pixels[:, 0, 0, 0] % 3, sample.labels)


def test_structs_class_names_and_rows_without_bytes(tmp_path):
    images = [
        {"bytes": png(1), "path": "a.png"},
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": png(3), "path": None},
    ]
    for split in ("train", "val"):
        write(tmp_path / f"{split}.parquet", [0, 1, 0], images, names=["cat", "dog"])
    data = read(tmp_path)
    assert data.classes == ("cat", "dog")
    split = PixelSplit(data.val, P)
    with pytest.warns(UserWarning, match=r"1 of 3 images were left out: row 1 \(the row holds no image\)"):
        np.testing.assert_array_equal(split.labels, [0, 0])


def test_no_val_and_no_test(folder):
    (folder / "test.parquet").unlink()
    with pytest.raises(LissomError, match=r"has no val\.parquet \(it holds train\.parquet\)"):
        read(folder)


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_missing_column(folder, column):
    table = pq.read_table(folder / "test.parquet")
    pq.write_table(table.rename_columns([c + "s" * (c == column) for c in table.column_names]), folder / "test.parquet")
    with pytest.raises(LissomError, match=rf"test\.parquet has no column '{column}' \(it has: .*{column}s"):
        read(folder)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 7], r"'test' of .* has the label 7, and there are 3 classes \(0 to 2\)"),
        ([0, 1, -1], r"has the label -1; labels start at 0"),
        ([0.0, 1.0, 2.0], r"the column label of .* holds double; integers from 0 are wanted"),
        (["a", "b", "c"], r"the column label of .* holds string; integers"),
        ([0, None, 1], r"1 rows of .* have no label"),
        (pa.array([], pa.int64()), r"test\.parquet holds no rows"),
    ],
)
def test_labels_that_cannot_be(folder, labels, message):
    images = pa.array([], pa.binary()) if len(labels) == 0 else None
    write(folder / "test.parquet", labels, images)
    with pytest.raises(LissomError, match=message):
        read(folder)


def test_an_empty_class(folder):
    write(folder / "train.parquet", [0, 2, 2])
    with pytest.raises(LissomError, match="the class 1 is empty in the split 'train'"):
        read(folder)


def test_images_that_are_no_bytes(folder):
    write(folder / "test.parquet", [0, 1], images=[1, 2])
    with pytest.raises(LissomError, match=r"the column image of .* holds int64; encoded images"):
        read(folder)


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[: len(d) // 2], lambda d: b"x" * len(d)])
def test_a_damaged_file(folder, damage):
    path = folder / "test.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LissomError, match=r"test\.parquet cannot be read as Parquet"):
        read(folder)


def test_a_row_group_that_is_damaged_inside_leaves_its_rows_out(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / f"{split}.parquet", [0] * 30, group=10)
    path = tmp_path / "val.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    split = PixelSplit(read(tmp_path).val, P)
    with pytest.warns(UserWarning, match=r"10 of 30 images were left out: row 10 \(row group 1 of val\.parquet"):
        np.testing.assert_array_equal(split.pixels[:, 0, 0, 0], [*range(10), *range(20, 30)])


@pytest.mark.skipif("LISSOM_DATA" not in os.environ, reason="LISSOM_DATA names no folder with cifar10 and mnist")
def test_real_tables():
    root = Path(os.environ["LISSOM_DATA"])
    cifar, mnist = read(root / "cifar10"), read(root / "mnist")
    assert (len(cifar.train), len(cifar.test), len(cifar.classes), cifar.image_size) == (50_000, 10_000, 10, (32, 32))
    assert (len(mnist.train), len(mnist.test), len(mnist.classes), mnist.image_size) == (10_000, 10_000, 10, (28, 28))
    split = PixelSplit(mnist.test, Preprocessing(28, 28, 1, (0.5,), (0.5,))).sample(50, 0)
    assert split.inputs(slice(None)).shape == (50, 1, 28, 28)
