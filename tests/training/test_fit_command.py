"""``lissom fit``: files and lines it leaves, resuming, distillation, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lissom.cli import main

MODEL = """
import torch
from torch import nn

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def deep():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(),
        nn.Linear(24, 2)
    )


def wide():
    torch.manual_seed(1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with models.py and pictures/: dark and bright images, 8 x 8."""
    for split, count in (("train", 20), ("val", 6)):
        for label, level in (("bright", 200), ("dark", 50)):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (level + i, level, level - i)).save(folder / f"{i}.png")
    (tmp_path / "models.py").write_text(MODEL)
    (tmp_path / "dark.py").write_text(MODEL.replace("MEAN, STD = (0.5, 0.5, 0.5)", "MEAN, STD = (0.1, 0.1, 0.1)"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


BASE = ("--data", "pictures", "--epochs", "3", "--batch", "6", "--lr", "0.05")


def test_it_trains_and_writes_weights_and_history(place, capsys):
    assert main(["fit", "models.py:small", *BASE, "--out", "made"]) == 0
    said = capsys.readouterr()
    assert [line.split()[:2] for line in said.err.splitlines() if line.startswith("epoch")] == [
        ["epoch", "1/3"],
        ["epoch", "2/3"],
        ["epoch", "3/3"],
    ]
    assert "top-1 accuracy: 100.00 %" in said.out
    state = load_file(place / "made" / "model.safetensors")
    assert state["4.weight"].shape == (2, 16)
    history = json.loads((place / "made" / "history.json").read_text())
    assert [entry["epoch"] for entry in history["history"]] == [1, 2, 3]
    assert history["report"]["quality"] == 100
    assert sorted(p.name for p in (place / "made").iterdir()) == ["history.json", "last.ckpt", "model.safetensors"]

    assert main(["fit", "models.py:small", *BASE, "--out", "made"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["fit", "models.py:small", *BASE, "--out", "made", "--resume", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["history"] == history["history"]
    assert not [line for line in said.err.splitlines() if line.startswith("epoch")]


def test_another_number_of_classes_gets_a_new_head(place, capsys):
    assert main(["fit", "models.py:wide", *BASE]) == 0
    assert "the head is new: 2 outputs" in capsys.readouterr().err
    assert load_file(place / "trained" / "wide" / "model.safetensors")["2.weight"].shape == (2, 48)


def test_distillation_takes_a_teacher_and_its_weights(place, capsys):
    assert main(["fit", "models.py:small", *BASE, "--out", "teacher"]) == 0
    weights = ["--teacher", "models.py:small", "--teacher-weights", "teacher/model.safetensors"]
    assert main(["fit", "models.py:small", *BASE, "--method", "distillation", *weights, "--out", "student"]) == 0
    student, teacher = (load_file(place / name / "model.safetensors") for name in ("student", "teacher"))
    assert not torch.equal(student["2.weight"], teacher["2.weight"])


PELA = ("fit", "models.py:deep", *BASE, "--method", "pela")


def test_pela_makes_a_trained_model_low_rank_and_transfers_it(place, capsys):
    """From the shell: train, make low-rank and mend, then fine-tune on a second data set of other classes."""
    assert main(["fit", "models.py:deep", *BASE, "--out", "first"]) == 0
    trained = ["--weights", "first/model.safetensors"]
    settings = "low_rank(ratio=2.0, features='none', perturbation_weight=1.0)"
    assert main([*PELA, *trained, "--recipe", settings, "--out", "thin"]) == 0
    said = capsys.readouterr()
    assert "put two thin layers in the place of 2 of 3" in said.err
    assert "100.00 %" in said.out
    state = load_file(place / "thin" / "model.safetensors")
    rank = 48 * 32 // (2 * (48 + 32))
    assert state["2.0.weight"].shape == (rank, 48)
    assert state["2.1.weight"].shape == (32, rank)
    assert state["6.weight"].shape == (2, 24)  # the classifier is left alone
    assert json.loads((place / "thin" / "history.json").read_text())["recipe"].startswith("low_rank(")

    for split, count in (("train", 12), ("val", 4)):
        for label, colour in (("blue", (20, 20, 200)), ("green", (20, 200, 20)), ("red", (200, 20, 20))):
            folder = place / "colours" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), tuple(c + i for c in colour)).save(folder / f"{i}.png")
    tuned = ["fit", "models.py:deep", "--weights", "thin/model.safetensors", *BASE]
    assert main([*tuned, "--data", "colours", "--epochs", "6", "--out", "second"]) == 0
    said = capsys.readouterr()
    assert "the head is new: 3 outputs" in said.err
    assert "100.00 %" in said.out
    second = load_file(place / "second" / "model.safetensors")
    assert {k: v.shape for k, v in second.items() if k[0] in "24"} == {
        k: v.shape for k, v in state.items() if k[0] in "24"
    }
    assert not torch.equal(second["2.0.weight"], state["2.0.weight"])


def test_one_line_makes_low_rank_and_transfers(place, capsys):
    """Two pictures' worth of data, the second of three classes and other sizes; cut off between the two, it goes on."""
    for split, count in (("train", 12), ("val", 4)):
        for label, colour in (("blue", (20, 20, 200)), ("green", (20, 200, 20)), ("red", (200, 20, 20))):
            folder = place / "colours" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (11, 9), tuple(c + i for c in colour)).save(folder / f"{i}.png")
    settings = "low_rank(ratio=2.0, features='none', perturbation_weight=1.0)"
    line = [*PELA, "--recipe", settings, "--then", "colours", "--then-epochs", "6", "--out", "tuned"]
    assert main(line) == 0
    said = capsys.readouterr()
    assert "the head is new: 3 outputs" in said.err
    assert said.out.count("on held-out data") == 2
    first, second = (load_file(place / "tuned" / part / "model.safetensors") for part in ("first", "."))
    assert first["6.weight"].shape == (2, 24)
    assert second["6.weight"].shape == (3, 24)
    assert first["2.0.weight"].shape == second["2.0.weight"].shape == (9, 48)
    assert not torch.equal(first["2.0.weight"], second["2.0.weight"])
    history = json.loads((place / "tuned" / "history.json").read_text())
    assert (history["data"], history["first"]["data"]) == ("colours", "pictures")
    assert [len(h["history"]) for h in (history["first"], history)] == [3, 6]
    assert history["report"]["quality"] == 100

    assert main(line) == 2  # an earlier run's folder
    assert "--resume" in capsys.readouterr().err
    for name in ("last.ckpt", "model.safetensors", "history.json"):
        (place / "tuned" / name).unlink()
    assert main([*line, "--resume"]) == 0
    again = load_file(place / "tuned" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in second.items())
    epochs = [text.split()[1] for text in capsys.readouterr().err.splitlines() if text.startswith("epoch")]
    assert epochs == [f"{n}/6" for n in range(1, 7)]


def test_pela_takes_the_ranks_of_a_slim_run(place, capsys):
    """Its result.json holds a recipe; what of it is no low_rank is left out, and said."""
    recipe = "fuse() + low_rank(RANKS, skip=('4', '6'), features='none') + int8()"
    for number, (ranks, rank) in enumerate((("ranks=(('2', 5),)", 5), ("spread='energy', ratios=(('2', 3.0),)", 6))):
        text = recipe.replace("RANKS", ranks)
        (place / "result.json").write_text(json.dumps({"best": {"recipe": text, "metrics": {}}}))
        assert main([*PELA, "--recipe", "result.json", "--out", f"thin{number}"]) == 0
        assert "left out of the recipe: fuse, int8" in capsys.readouterr().err
        state = load_file(place / f"thin{number}" / "model.safetensors")
        assert state["2.0.weight"].shape == (rank, 48)
        assert state["4.weight"].shape == (24, 32)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--recipe", "int8()"], "holds no low_rank"),
        (["--recipe", "low_rank(ranks=(('9', 5),))"], "cannot replace '9'"),
        (["--recipe", "low_rank(ratio=0)"], "at least 1"),
        (["--recipe", "nowhere.json"], "cannot be read"),
        ([], "no repeated blocks"),
        (["--teacher", "models.py:deep"], "--teacher is for --method distillation"),
        (["--method", "supervised", "--recipe", "low_rank()"], "--recipe is for --method pela"),
        (["--data", "digits"], "pela trains on the data that the model was trained on"),
    ],
)
def test_pela_says_what_it_cannot_do(place, capsys, arguments, sentence):
    assert main([*PELA, "--out", "none", *arguments]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert not (place / "none").exists()


def test_pela_starts_from_trained_weights_only(place, capsys):
    assert main(["fit", "digits_vit", "--method", "pela", "--epochs", "1"]) == 2
    assert "random ones; give its --weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "distillation"], "needs a teacher"),
        (["--teacher", "models.py:small"], "--teacher is for --method distillation"),
        (["--teacher-weights", "x.safetensors"], "no --teacher"),
        (["--method", "distillation", "--teacher", "resnet18"], "random weights"),
        (["--method", "distillation", "--teacher", "dark.py:small"], "normalise"),
        (["--method", "alchemy"], "known: delayed_shrinking, distillation, "),
        (["--data", "nowhere"], "nowhere"),
        (["--then", "nowhere"], "nowhere"),
        (["--then-epochs", "3"], "no --then"),
        (["--precision", "fp8"], "32-true"),
        (["--devices", "many"], "devices"),
    ],
)
def test_what_cannot_work_is_told_in_one_sentence(place, capsys, arguments, sentence):
    assert main(["fit", "models.py:small", *BASE, "--out", "none", *arguments]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert not (place / "none").exists()
