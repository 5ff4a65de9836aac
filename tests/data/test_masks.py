"""Images with masks: both layouts, names and ignored index, alignment, and one sentence for each fault."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lissom.data.masks import MaskedImages, MaskSplit
from lissom.data.sources import read
from lissom.errors import LissomError
from lissom.images import Preprocessing

P = Preprocessing(6, 8, resize="squash")


def encoded(array, kind: str = "PNG", mode: str | None = None) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(out, kind)
    return out.getvalue()


def image(value: int = 0, size=(12, 16)) -> bytes:
    return encoded(np.full((*size, 3), value, np.uint8))


def mask(*values: int, size=(12, 16)) -> bytes:
    """Upright stripes of equal width, one a value."""
    columns = np.arange(size[1]) * len(values) // size[1]
    return encoded(np.broadcast_to(np.array(values, np.uint8)[columns], size).copy())


def claiming(png: bytes, side: int) -> bytes:
    """The PNG file, its header saying that it has ``side`` x ``side`` pixels."""
    header = png[12:16] + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def table(path: Path, images, masks, metadata=None, **columns) -> None:
    made = pa.table({"image": images, "mask": masks, **columns})
    pq.write_table(made.replace_schema_metadata(metadata), path, row_group_size=3)


@pytest.fixture
def parquet(tmp_path):
    for split in ("train", "val"):
        table(tmp_path / f"{split}.parquet", [image(i) for i in range(7)], [mask(0, 1, 2, 255)] * 7, name=["x"] * 7)
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for part, content in (("images", image(3)), ("masks", mask(0, 1))):
            (tmp_path / split / part).mkdir(parents=True)
            for i in range(3):
                (tmp_path / split / part / f"{i}.png").write_bytes(content)
    return tmp_path


def split_of(data, name="val") -> MaskSplit:
    return MaskSplit(data.splits[name], P, len(data.classes), data.ignore)


def test_parquet(parquet):
    data = read(parquet)
    assert data.classes == ("class 0", "class 1", "class 2")
    assert (data.kind, data.ignore, data.image_size, data.labelled, data.trainable) == (
        "segmentation", 255, (12, 16), True, True
    )  # fmt: skip
    split = split_of(data)
    assert split.labels.shape == (7, 6, 8)
    assert split.labels.dtype == np.uint8
    np.testing.assert_array_equal(split.labels[3], [[0, 0, 1, 1, 2, 2, 255, 255]] * 6)
    np.testing.assert_array_equal(split.pixels[:, 0, 0, 0], np.arange(7))
    assert split.inputs(slice(0, 2)).shape == (2, 3, 6, 8)


def test_folders(folder):
    (folder / "train" / "masks" / "notes.txt").write_text("no mask")
    data = read(folder)
    assert (data.name, data.classes, data.kind) == (folder.name, ("class 0", "class 1"), "segmentation")
    assert [data.train.describe(i) for i in range(3)] == [f"train/images/{i}.png" for i in range(3)]
    np.testing.assert_array_equal(split_of(data).labels[0], [[0] * 4 + [1] * 4] * 6)


def test_image_and_mask_keep_each_others_place():
    random = np.random.default_rng(0)
    index = random.integers(0, 2, (3, 4), np.uint8).repeat(40, 0).repeat(40, 1)  # 120 x 160, fields of 40 x 40
    pixels = np.stack([200 * index] * 3, -1)
    split = MaskSplit(MaskedImages.pairs("val", [pixels], [index]), Preprocessing(24, 16, resize="squash"), 2)
    inner = np.array([[y % 8 in (2, 3, 4, 5) and x % 4 in (1, 2) for x in range(16)] for y in range(24)])
    np.testing.assert_array_equal(split.pixels[0, ..., 0][inner] // 200, split.labels[0][inner])
    with pytest.raises(LissomError, match="resize='squash'"):
        MaskSplit(MaskedImages.pairs("val", [pixels], [index]), Preprocessing(24, 16), 2)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_the_modes_that_hold_indices(mode):
    index = np.array([[0, 1], [1, 0]], np.uint8)
    picture = Image.fromarray(index * 255).convert("1") if mode == "1" else Image.fromarray(index)
    if mode == "P":
        picture.putpalette([250, 10, 10, 10, 250, 10])
    out = io.BytesIO()
    picture.save(out, "PNG")
    for item in (out.getvalue(), picture):
        images = MaskedImages.pairs("val", [image()], [item])
        np.testing.assert_array_equal(images.open_mask(0), index)


def test_broken_and_misaligned_ones_are_named_and_left_out(parquet):
    images = [image(i) for i in range(9)]
    masks = [mask(0, 1, 2)] * 9
    images[1] = b"broken"
    masks[2] = masks[2][:40]
    masks[3] = mask(0, 1, size=(12, 15))
    masks[4] = image(1)
    masks[5] = None
    masks[6] = encoded(np.zeros((12, 16), np.uint16))
    masks[7] = claiming(masks[0], 9000)
    table(parquet / "val.parquet", images, masks)
    split = split_of(read(parquet))
    with pytest.warns(UserWarning, match=r"7 of 9 images were left out: row 1 .*, and 2 more"):
        np.testing.assert_array_equal(split.pixels[:, 0, 0, 0], [0, 8])
    assert split.labels.shape == (2, 6, 8)
    assert [name for name, _ in split.skipped] == [f"row {i}" for i in range(1, 8)]
    reasons = [reason for _, reason in split.skipped]
    for reason, part in zip(
        reasons,
        ["not a readable image", "its mask is unusable: not a readable image", "its mask has 15 x 12 pixels and the "
         "image 16 x 12", "its mask has the mode RGB; one 8-bit channel", "it has no mask", "its mask has the mode I",
         "its mask is unusable: 9000 x 9000 pixels, more than the limit"],
        strict=True,
    ):  # fmt: skip
        assert part in reason
    drawn = split.sample(9, 0)
    np.testing.assert_array_equal(drawn.labels, split.labels)
    assert drawn.skipped == split.skipped


def test_a_sample_is_the_same_before_and_after_decoding(parquet):
    early, late = split_of(read(parquet)), split_of(read(parquet))
    assert len(late) == 7
    np.testing.assert_array_equal(early.sample(3, 1).pixels, late.sample(3, 1).pixels)
    np.testing.assert_array_equal(early.sample(3, 1).labels, late.sample(3, 1).labels)


def test_what_has_no_partner_is_named(folder):
    (folder / "val" / "masks" / "0.png").unlink()
    (folder / "val" / "images" / "1.png").unlink()
    split = split_of(read(folder))
    with pytest.warns(UserWarning, match="2 of 3"):
        assert len(split) == 1
    assert split.skipped == [("val/images/0.png", "it has no mask"), ("val/masks/1.png", "the row holds no image")]


def test_all_broken_is_an_error(folder):
    for file in (folder / "val" / "masks").iterdir():
        file.write_bytes(b"")
    with pytest.raises(LissomError, match=r"not one of the 3 images of val can be read: val/images/0\.png \(its mask"):
        len(split_of(read(folder)))
    for file in (folder / "train" / "masks").iterdir():
        file.write_bytes(b"")
    with pytest.raises(LissomError, match=r"not one mask of the split 'train' .* can be read: train/images/0\.png"):
        read(folder)


# Names and ignored index


def test_classes_txt_names_classes_and_the_ignored_index(parquet):
    (parquet / "classes.txt").write_text("sky\n\nroad\nignore: 2\n")
    with pytest.raises(LissomError, match="row 0 in the split 'train' holds the index 255, and there are 2 classes"):
        read(parquet)
    for split in ("train", "val"):
        table(parquet / f"{split}.parquet", [image()], [mask(0, 1, 2)])
    data = read(parquet)
    assert (data.classes, data.ignore) == (("sky", "road"), 2)
    assert set(np.unique(split_of(data).labels)) == {0, 1, 2}


def test_metadata(parquet):
    said = {"classes": json.dumps(["sky", "road", "car", "tree"]), "ignore": "255"}
    table(parquet / "train.parquet", [image()], [mask(0, 1)], said)
    data = read(parquet)
    assert (data.classes, data.ignore) == (("sky", "road", "car", "tree"), 255)
    (parquet / "classes.txt").write_text("a\nb\nc\n")
    assert read(parquet).classes == ("a", "b", "c")


def test_a_data_set_is_known_by_its_folder(tmp_path):
    place = tmp_path / "CamVid"
    place.mkdir()
    for split in ("train", "test"):
        table(place / f"{split}.parquet", [image()], [mask(0, 5, 11)])
    data = read(place)
    assert (len(data.classes), data.classes[0], data.ignore) == (11, "sky", 11)
    table(place / "test.parquet", [image()], [mask(0, 12)])
    with pytest.raises(LissomError, match=r"index 12, and there are 11 classes \(0 to 10\) and the ignored index 11"):
        read(place)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sky\n", "names 1 classes"),
        ("sky\nroad\nsky\n", "names 3 classes, 2 different"),
        ("sky\nroad\nignore: void\n", "one line 'ignore: 255' is wanted"),
        ("sky\nroad\nignore: 1\n", "the ignored index 1; it is not below their number"),
        ("sky\nroad\nignore: 256\n", "at most 255"),
        ("x" * 2**21, "2097152 bytes"),
    ],
)
def test_a_classes_txt_that_cannot_be(parquet, text, message):
    (parquet / "classes.txt").write_text(text)
    with pytest.raises(LissomError, match=message):
        read(parquet)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"classes": "sky, road"}, "are no JSON"),
        ({"classes": '"sky"'}, "is to be a JSON list"),
        ({"classes": '["a", "b", "c"]', "ignore": "true"}, "'ignore' an integer"),
        ({"classes": '["a", "a"]'}, "the Parquet metadata names 2 classes, 1 different"),
    ],
)
def test_metadata_that_cannot_be(parquet, metadata, message):
    table(parquet / "train.parquet", [image()], [mask(0, 1)], metadata)
    with pytest.raises(LissomError, match=message):
        read(parquet)


# Faults


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 2), "use the indices 0, 2; number the classes without gaps from 0"),
        ((1, 2), "without gaps"),
        ((0, 255), "at least two of them besides the ignored 255"),
        ((255,), "use the indices 255"),
    ],
)
def test_indices_that_name_no_classes(parquet, values, message):
    table(parquet / "train.parquet", [image()], [mask(*values)])
    with pytest.raises(LissomError, match=message):
        read(parquet)


def test_masks_that_are_ignored_everywhere(parquet):
    (parquet / "classes.txt").write_text("a\nb\nc\n")
    table(parquet / "train.parquet", [image()], [mask(255)])
    with pytest.raises(LissomError, match=r"every pixel of the masks of the split 'train' .* is ignored"):
        read(parquet)


def test_an_index_that_train_lacks_stops_decoding_too(parquet):
    table(parquet / "val.parquet", [image()] * 2, [mask(0, 1), mask(0, 3)])
    with pytest.raises(LissomError, match="the mask of row 1 in the split 'val' holds the index 3, and there are 3"):
        read(parquet)
    images = MaskedImages.pairs("fit", [image()] * 2, [mask(0, 1), mask(0, 3)])
    with pytest.raises(LissomError, match="the mask of row 1 in the split 'fit' holds the index 3"):
        len(MaskSplit(images, P, 3))


def test_splits_that_do_not_fit_together(folder, parquet):
    table_without = pa.table({"image": [image()], "label": [0]})
    pq.write_table(table_without, parquet / "val.parquet")
    with pytest.raises(LissomError, match=r"val\.parquet has no column 'mask' \(it has: image, label\)"):
        read(parquet)
    for name in ("train", "val"):
        (folder / f"{name}.parquet").unlink()
    for file in (folder / "val" / "masks").iterdir():
        file.unlink()
    (folder / "val" / "masks").rmdir()
    with pytest.raises(LissomError, match="val has no masks/ and another split has"):
        read(folder)


def test_folders_that_cannot_be(folder):
    (folder / "val" / "images" / "0.jpg").write_bytes(b"")
    with pytest.raises(LissomError, match=r"images holds 0\.(jpg|png) and 0\.(jpg|png); give each image a name"):
        read(folder)
    for file in (folder / "val" / "images").iterdir():
        file.unlink()
    with pytest.raises(LissomError, match="images holds no image"):
        read(folder)


def test_tables_that_cannot_be(parquet):
    table(parquet / "val.parquet", [image()], ["a mask"])
    with pytest.raises(LissomError, match=r"the column mask of .* holds string; encoded images"):
        read(parquet)
    table(parquet / "val.parquet", pa.array([], pa.binary()), pa.array([], pa.binary()))
    with pytest.raises(LissomError, match=r"val\.parquet holds no rows"):
        read(parquet)


def test_from_python():
    index = np.array([[0, 1], [2, 1]], np.uint8)
    made = MaskedImages.pairs("any", [np.zeros((2, 2, 3), np.uint8)] * 4, [index] * 4)
    data = read({"train": made, "val": made})
    assert (data.classes, data.kind, data.ignore) == (("class 0", "class 1", "class 2"), "segmentation", 255)
    with pytest.raises(LissomError, match="has 4 images and 1 masks"):
        MaskedImages.pairs("any", made.items, [index])


@pytest.mark.skipif("LISSOM_DATA" not in os.environ, reason="LISSOM_DATA names no folder with camvid")
def test_camvid():
    data = read(Path(os.environ["LISSOM_DATA"]) / "camvid")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 367, "val": 101, "test": 233}
    assert (len(data.classes), data.classes[8], data.ignore, data.image_size) == (11, "car", 11, (360, 480))
    split = MaskSplit(data.test, Preprocessing(96, 128, resize="squash"), 11, 11).sample(10, 0)
    assert split.labels.shape == (10, 96, 128)
    assert split.skipped == []
    assert 0.1 < (split.labels == 3).mean() < 0.5  # road
