"""read: the embedded digits, users' functions and Python objects; stratified divisions."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from lissom.data.sources import DataSet, read, stratified
from lissom.data.splits import ArraySplit, Images, PixelSplit
from lissom.errors import LissomError
from lissom.images import Preprocessing

X = torch.randn(12, 3, 4, 4)
Y = torch.arange(12) % 3


def test_digits():
    data = read("digits")
    assert data.classes == tuple("0123456789")
    assert (len(data.train), len(data.test), data.val) == (1438, 359, None)
    assert data.image_size == (32, 32)
    share = np.bincount(data.test.labels) / np.bincount(np.concatenate([data.train.labels, data.test.labels]))
    assert np.abs(share - 0.2).max() < 0.01
    assert not set(data.train.rows) & set(data.test.rows)
    np.testing.assert_array_equal(data.test.rows, read("digits").test.rows)
    pixels = PixelSplit(data.test, Preprocessing(32, 32)).pixels
    assert pixels.max() > 240
    assert pixels.min() == 0
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_stratified():
    labels = np.array([0] * 50 + [1] * 30 + [2])
    first, second = stratified(labels, 81, 0.1, seed=4)
    assert len(first) == 8
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(81))
    np.testing.assert_array_equal(np.bincount(labels[first], minlength=3), [5, 3, 0])
    np.testing.assert_array_equal(first, stratified(labels, 81, 0.1, seed=4)[0])
    assert not np.array_equal(first, stratified(labels, 81, 0.1, seed=5)[0])
    bare, rest = stratified(None, 10, 0.5, seed=0)
    assert (len(bare), len(rest)) == (5, 5)


def test_a_tuple_of_torch_data_sets():
    data = read((TensorDataset(X, Y), TensorDataset(X[:6], Y[:6])))
    assert data.classes == ("0", "1", "2")
    assert isinstance(data.val, ArraySplit)
    np.testing.assert_array_equal(data.val.inputs(slice(None)), X[:6].numpy())
    np.testing.assert_array_equal(data.val.labels, Y[:6].numpy())
    assert data.image_size == (4, 4)
    assert read(data) is data


def test_arrays_and_a_third_split():
    x, y = X.numpy().astype(np.float64), Y.numpy()
    data = read(((x, y), (x[:6], y[:6]), (x[6:], y[6:])))
    assert list(data.splits) == ["train", "val", "test"]
    assert data.test.inputs(slice(None)).dtype == np.float32
    bare = read({"val": x})
    assert not bare.labelled
    assert bare.classes == ()


class Pictures:
    """A torch-style data set as torchvision's without a transform: Pillow images, with class names."""

    classes = ("cat", "dog")

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i >= 6:
            raise IndexError
        return Image.new("RGB", (5, 4), (i, i, i)), i % 2


def test_pictures_are_read_lazily():
    data = read({"val": Pictures()})
    assert isinstance(data.val, Images)
    assert data.classes == ("cat", "dog")
    assert data.image_size == (4, 5)
    split = PixelSplit(data.val, Preprocessing(4, 4))
    np.testing.assert_array_equal(split.pixels[:, 0, 0, 0], np.arange(6))


def test_bytes_arrays_are_images():
    data = read({"val": (np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 1, 0]))})
    assert isinstance(data.val, Images)
    assert data.image_size == (8, 8)


class Uneven(Pictures):
    def __getitem__(self, i):
        return torch.zeros(3, 4 + (i == 4), 4), 0


class Failing(Pictures):
    def __getitem__(self, i):
        raise RuntimeError("no such row")


class HalfLabelled(Pictures):
    def __getitem__(self, i):
        return (torch.zeros(3, 4, 4), 0) if i < 3 else torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "data of type int are not understood"),
        ((X, Y), r"a tuple is \(train, val\)"),
        ({"train": TensorDataset(X, Y)}, "no 'val' and no 'test'"),
        ({"valid": TensorDataset(X, Y)}, "the split 'valid'; known: train, val, test"),
        ({"val": DataLoader(TensorDataset(X, Y))}, "'val' is a data loader; give its data set"),
        ({"val": iter([])}, "'val' is a list_iterator"),
        ({"val": []}, "'val' is empty"),
        ({"val": (X, Y.float())}, r"labels of the split 'val' are float32 of shape \(12,\); integers"),
        ({"val": (X, Y[:5])}, r"of shape \(5,\); integers of shape \(12,\)"),
        ({"val": TensorDataset(X, Y.float())}, "integers of shape"),
        ({"val": (X.int(), Y)}, "the inputs of the split 'val' are int32"),
        ({"val": Uneven()}, r"item 4 of the split 'val' .*shape \(3, 5, 4\) after \(3, 4, 4\)"),
        ({"val": Failing()}, "item 0 of the split 'val' .*RuntimeError: no such row"),
        ({"val": HalfLabelled()}, "item 3 of the split 'val' has no label"),
        ({"train": (X, Y), "val": (X[:, :, :2], Y)}, r"do not hold the same kind of input \(train: \(3, 4, 4\), val"),
        ({"train": (X, Y), "val": Pictures()}, "same kind of input .*val: images"),
        ({"train": (X, Y), "val": (X, Y + 1)}, r"'val' of the data has the label 3, and there are 3 classes"),
        ({"train": (X, Y * 2), "val": (X, Y)}, "the class 1 is empty in the split 'train'"),
        ({"val": (X, Y), "test": X}, "'test' of the data has no labels and another one has"),
    ],
)
def test_one_sentence_for_each_fault(source, message):
    with pytest.raises(LissomError, match=message):
        read(source)


def test_a_users_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\n"
        "X, Y = np.zeros((6, 1, 2, 2), np.float32), np.arange(6) % 2\n"
        "def data(): return {'train': (X, Y), 'val': (X, Y)}\n"
        "def failing(): raise ValueError('out of data')\n"
        "def text(): return 'digits'\n"
    )
    data = read(f"{file}:data")
    assert (data.name, data.classes, len(data.val)) == ("mine", ("0", "1"), 6)
    with pytest.raises(LissomError, match="failing failed: ValueError: out of data"):
        read(f"{file}:failing")
    with pytest.raises(LissomError, match="returned 'digits'; data sets are wanted"):
        read(f"{file}:text")
    with pytest.raises(LissomError, match="has no function 'missing'"):
        read(f"{file}:missing")


def test_a_data_set_by_hand():
    split = ArraySplit("val", np.zeros((4, 3, 2, 2), np.float32), np.array([0, 1, 0, 1]))
    assert DataSet("mine", ("a", "b"), val=split).labelled


def test_reading_and_decoding_need_no_torch(tmp_path):
    for i in range(8):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i}.png")
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['timm'] = None\n"
        "from lissom.data.sources import read\n"
        "from lissom.images import Preprocessing\n"
        "from lissom.tasks.classification import make_task\n"
        f"task = make_task(read({str(tmp_path)!r}), preprocessing=Preprocessing(4, 4), trained_here=False)\n"
        "print(task.choose.inputs(slice(None)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(2, 3, 4, 4)", done.stderr
