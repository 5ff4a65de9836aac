"""Splits: lazy decoding, broken images, aligned labels, samples, room beyond RAM."""

from __future__ import annotations

import errno
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from lissom.data import splits
from lissom.data.splits import ArraySplit, Images, PixelSplit
from lissom.errors import LissomError
from lissom.images import Preprocessing

P = Preprocessing(8, 8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def png(value: int, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def bomb() -> bytes:
    """A small PNG whose header claims 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def thousand(tmp_path):
    """1,000 small PNG files of which 3 are broken; image i has the colour i % 200 and the label i."""
    files = []
    for i in range(1000):
        path = tmp_path / f"{i:04}.png"
        data = png(i % 200)
        path.write_bytes({10: data[: len(data) // 2], 500: b"no image at all", 999: bomb()}.get(i, data))
        files.append(path)
    return Images.of("choose", files, np.arange(1000), root=tmp_path)


def test_three_broken_images_among_a_thousand_are_named_and_left_out(tmp_path):
    split = PixelSplit(thousand(tmp_path), P)
    left_out = r"choose: 3 of 1000 images were left out: 0010\.png .*0500\.png .*0999\.png"
    with pytest.warns(UserWarning, match=left_out) as w:
        assert len(split) == 997
    assert split.pixels.shape == (997, 8, 8, 3)
    assert len(w) == 1
    assert [name for name, _ in split.skipped] == ["0010.png", "0500.png", "0999.png"]
    assert "pixels, more than the limit" in split.skipped[2][1] or "bomb" in split.skipped[2][1]
    np.testing.assert_array_equal(split.pixels[:, 0, 0, 0], split.labels % 200)
    assert not set(split.labels) & {10, 500, 999}
    x = split.inputs(np.array([0, 996]))
    assert x.shape == (2, 3, 8, 8)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[1], (998 % 200 / 255 - 0.5) / 0.25, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # decoded once, warned once
        split.inputs(slice(0, 5))


def test_a_warning_names_five_files_and_counts_the_rest():
    items = [b"broken"] * 7 + [png(1)]
    split = PixelSplit(Images.of("choose", items), P)
    with pytest.warns(UserWarning, match=r"row 4 \(.*\), and 2 more"):
        assert len(split) == 1
    assert len(split.skipped) == 7
    assert split.labels is None


def test_all_broken_is_an_error():
    with pytest.raises(LissomError, match="not one of the 2 images of choose can be read"):
        len(PixelSplit(Images.of("choose", [b"", None]), P))


def test_the_kinds_of_item_that_a_list_may_hold():
    items = [
        png(7),
        np.full((4, 4), 7, np.uint8),
        np.full((16, 16, 3), 7, np.uint8),
        Image.new("RGB", (9, 5), (7, 7, 7)),
    ]
    split = PixelSplit(Images.of("choose", items), P)
    np.testing.assert_array_equal(split.pixels, np.full((4, 8, 8, 3), 7))


class Counted(list):
    """A list that notes which items were read."""

    def __init__(self, items):
        super().__init__(items)
        self.read: list[int] = []

    def __getitem__(self, i):
        self.read.append(i)
        return super().__getitem__(i)


def test_nothing_is_decoded_before_it_is_needed_and_a_sample_decodes_its_rows_only():
    items = Counted([png(i) for i in range(100)])
    split = PixelSplit(Images.of("fit", items, np.arange(100)), P)
    sample = split.sample(10, seed=3)
    assert items.read == []
    np.testing.assert_array_equal(sample.pixels[:, 0, 0, 0], sample.labels)
    assert len(items.read) == 10


def test_a_sample_is_the_same_before_and_after_decoding(tmp_path):
    images = thousand(tmp_path)
    early, late = PixelSplit(images, P), PixelSplit(images, P)
    with pytest.warns(UserWarning, match="3 of 1000"):
        len(late)
    a, b = early.sample(600, 1), late.sample(600, 1)
    with pytest.warns(UserWarning, match="of 600 images"):
        np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.pixels, b.pixels)
    assert a.skipped == b.skipped != []
    assert not np.array_equal(late.sample(600, 2).labels, b.labels)
    np.testing.assert_array_equal(a.sample(20, 5).labels, b.sample(20, 5).labels)
    assert len(late.sample(5000, 0)) == 997


def test_an_array_over_the_limit_lies_in_a_file_that_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "RAM_LIMIT", 0)
    monkeypatch.setattr(splits.tempfile, "tempdir", str(tmp_path))
    split = PixelSplit(Images.of("fit", [png(i) for i in range(40)], np.arange(40)), P)
    assert isinstance(split.pixels, np.memmap)
    np.testing.assert_array_equal(split.pixels[:, 0, 0, 0], np.arange(40))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(splits, "RAM_LIMIT", 0)
    monkeypatch.setattr(splits.os, "posix_fallocate", full)
    with pytest.raises(LissomError, match=r"do not fit in .*No space left on device.*TMPDIR"):
        len(PixelSplit(Images.of("fit", [png(1)]), P))


def test_array_splits():
    x = np.arange(5 * 3 * 2 * 2, dtype=np.float32).reshape(5, 3, 2, 2)
    split = ArraySplit("choose", x, np.arange(5))
    np.testing.assert_array_equal(split.inputs(slice(1, 3)), x[1:3])
    sample = split.sample(3, 0)
    assert len(sample) == 3
    np.testing.assert_array_equal(sample.inputs(slice(None)), x[sample.labels])
    np.testing.assert_array_equal(sample.labels, split.sample(3, 0).labels)
    assert len(split.sample(99, 0)) == 5
    assert split.skipped == []
