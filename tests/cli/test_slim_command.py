"""``lissom slim``: what a user gets wrong is one sentence, exit code 2, no traceback, and nothing is left behind."""

import os
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lissom.cli import main


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of class folders: 2 classes, 6 images in train and 4 in val each."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


class Attack:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.system, (f"touch {self.place}",)


def run(tmp_path, capsys, *words):
    """The command's exit code and what it said on stderr, less its progress."""
    code = main(["slim", *map(str, words), "--out", str(tmp_path / "run")])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lissom:") or "Traceback" in line]
    return code, said


def refused(tmp_path, capsys, *words):
    code, said = run(tmp_path, capsys, *words)
    assert code == 2
    assert len(said) == 1
    assert not (tmp_path / "run").exists()
    return said[0]


def test_a_truncated_weight_file(tmp_path, capsys, photos):
    save_file({"weight": torch.zeros(100, 100)}, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[: len(whole) // 2])
    said = refused(tmp_path, capsys, tmp_path / "w.safetensors", "--arch", "test_resnet", "--data", photos)
    assert "w.safetensors" in said


def test_a_header_that_promises_too_much(tmp_path, capsys, photos):
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(tmp_path, capsys, tmp_path / "w.safetensors", "--arch", "test_resnet", "--data", photos)


def test_a_pickle_that_tries_to_execute_code(tmp_path, capsys, photos):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"state_dict": Attack(tmp_path / "owned")}))
    torch.save({"state_dict": Attack(tmp_path / "owned")}, tmp_path / "z.pth")
    for name in ("w.pth", "z.pth"):
        said = refused(tmp_path, capsys, tmp_path / name, "--arch", "test_resnet", "--data", photos)
        assert name in said
    assert not (tmp_path / "owned").exists()


def test_a_model_with_other_outputs_than_classes(tmp_path, capsys, photos):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 100))\n"
    )
    said = refused(tmp_path, capsys, f"{tmp_path / 'mine.py'}:net", "--data", photos)
    assert "100 outputs" in said
    assert "2 classes" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--budget", "latncy<=0.7x"], "did you mean 'latency'"),
        (["--fail-if", "p95>12"], "unit"),
        (["--recipe", "int9()"], "int9"),
        (["--runtime", "tvm"], "tvm"),
        (["--device", "usb"], "usb"),
        ([], "--train EPOCHS"),
    ],
)
def test_options(tmp_path, capsys, photos, words, says):
    assert says in refused(tmp_path, capsys, "test_resnet", "--data", photos, *words)


def test_a_folder_without_val(tmp_path, capsys):
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "train" / "cat" / "0.png")
    assert "val" in refused(tmp_path, capsys, "test_resnet", "--data", tmp_path / "data")


def test_no_data_and_no_model(tmp_path, capsys, photos):
    assert "--data" in refused(tmp_path, capsys, "test_resnet")
    assert "MODEL" in refused(tmp_path, capsys, "--data", photos)


def test_resume_without_a_folder(capsys):
    assert main(["slim", "--resume"]) == 2
    assert "--out" in capsys.readouterr().err


def test_an_interrupt_is_130_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    import lissom.slimming as slimming

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(slimming, "read", interrupted)
    assert main(["slim", "--out", str(tmp_path / "run")]) == 130
    assert "--resume" in capsys.readouterr().err
