"""Folders of images: what is read, and one sentence for each way in which a folder can be wrong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lissom.data.sources import read
from lissom.errors import LissomError


def image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for c, name in enumerate(("cat", "dog")):
            for i in range(3):
                image(tmp_path / split / name / f"{i}.png", 10 * c + i)
    return tmp_path


def test_class_folders(folder):
    image(folder / "train" / "cat" / "more" / "deep.JPG", 9)
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    (folder / "train" / ".cache").mkdir()
    data = read(folder)
    assert data.name == folder.name
    assert data.classes == ("cat", "dog")
    assert list(data.splits) == ["train", "val"]
    assert [data.train.describe(i) for i in range(4)] == [
        f"train/cat/{name}" for name in ("0.png", "1.png", "2.png", "more/deep.JPG")
    ]
    np.testing.assert_array_equal(data.train.labels, [0, 0, 0, 0, 1, 1, 1])
    assert data.image_size == (6, 6)
    assert data.labelled


def test_images_of_several_sizes_have_no_size(folder):
    Image.new("RGB", (9, 4)).save(folder / "train" / "dog" / "wide.png")
    assert read(folder).image_size is None


def test_val_may_lack_a_class_and_classes_stay_those_of_train(folder):
    for path in (folder / "val" / "cat").iterdir():
        path.unlink()
    (folder / "val" / "cat").rmdir()
    data = read(str(folder))
    assert data.classes == ("cat", "dog")
    np.testing.assert_array_equal(data.val.labels, [1, 1, 1])


def test_unlabelled_images(tmp_path):
    for i in range(5):
        image(tmp_path / f"{i}.png", i)
    data = read(tmp_path)
    assert data.classes == ()
    assert len(data.val) == 5
    assert data.val.labels is None
    assert not data.labelled


def test_no_such_folder(tmp_path):
    with pytest.raises(LissomError, match=r"there is no folder .*nowhere; name a folder"):
        read(tmp_path / "nowhere")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(LissomError, match=r"x\.zip is a file; name the folder"):
        read(tmp_path / "x.zip")


def test_a_python_file_without_function(tmp_path):
    with pytest.raises(LissomError, match="there is no folder"):
        read(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(LissomError, match=r"name the function"):
        read(tmp_path / "mine.py")


def test_no_val(folder):
    (folder / "val").rename(folder / "valid")
    with pytest.raises(LissomError, match=r"has no val/ \(it holds train/, valid/\); put images .* in val/"):
        read(folder)


def test_an_empty_class(folder):
    (folder / "train" / "eel").mkdir()
    (folder / "train" / "eel" / "eel.txt").write_text("")
    with pytest.raises(LissomError, match=r"the class 'eel' is empty: .*eel holds no image"):
        read(folder)


def test_a_class_that_train_lacks(folder):
    image(folder / "val" / "eel" / "1.png")
    with pytest.raises(LissomError, match=r"has the class 'eel', which train/ lacks; train/ has: cat, dog"):
        read(folder)


def test_a_split_without_classes(folder):
    for path in (folder / "val").rglob("*.png"):
        path.rename(folder / "val" / f"{path.parent.name}{path.name}")
    for path in (folder / "val").iterdir():
        if path.is_dir():
            path.rmdir()
    with pytest.raises(LissomError, match="val holds no class folders"):
        read(folder)


def test_no_images(tmp_path):
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(LissomError, match=r"holds no images and neither train/ .* it holds readme\.txt"):
        read(tmp_path)
