"""``lissom predict`` and ``lissom measure`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lissom.cli import main
from lissom.images import Preprocessing

PREPARED = Preprocessing(4, 4, 3).to_json()


def photographs(folder: Path, count: int = 2) -> list[str]:
    paths = []
    for seed in range(count):
        pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        paths.append(str(folder / f"{seed}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_predict_prints_file_class_and_confidence(tmp_path: Path, make, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    artifact, images = str(make(preprocessing=PREPARED).path), photographs(tmp_path)
    assert main(["predict", artifact, *images, "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, image in zip(lines, images, strict=True):
        assert line.startswith(f"{image}: ")
        assert line.endswith(" %")
    assert main(["predict", artifact, *images, "--threads", "1", "--json", "--top", "2"]) == 0
    for row, line in zip(json.loads(capsys.readouterr().out), lines, strict=True):
        assert line == f"{row['image']}: {row['class']} {100 * row['confidence']:.1f} %"
        assert len(row["top"]) == 2
        assert row["top"][0] == {"class": row["class"], "confidence": row["confidence"]}


def test_predict_goes_on_past_what_it_cannot_read(tmp_path: Path, make, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    artifact, images = str(make(preprocessing=PREPARED).path), photographs(tmp_path)
    bad = tmp_path / "bad\x1b[2J.jpg"  # a name that would clear the terminal
    bad.write_bytes(b"no image")
    arguments = ["predict", artifact, images[0], str(bad), str(tmp_path / "none.png"), images[1], "--threads", "1"]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == images
    assert "bad?[2J.jpg: not a readable image" in err
    assert "none.png: " in err
    assert main([*arguments, "--json"]) == 2
    assert ["error" in row for row in json.loads(capsys.readouterr().out)] == [False, True, True, False]


def test_predict_with_a_memory(tmp_path: Path, make, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    artifact, images = str(make(preprocessing=PREPARED).path), photographs(tmp_path)
    for kind in ("ant", "bee"):
        (tmp_path / "data" / "val" / kind).mkdir(parents=True)
        photographs(tmp_path / "data" / "val" / kind)
    options = ["--memory", "dhash:100", "--memory-file", str(tmp_path / "seen"), "--threads", "1"]
    check = ["--memory-check", str(tmp_path / "data")]
    assert main(["predict", artifact, *images, images[0], *options, *check]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.endswith("(seen before)") for line in lines] == [False, False, True]
    assert lines[2].startswith(lines[0])
    assert "memory dhash: 2 of 4 labelled images would be answered from memory, 2 of them with the label of an" in err
    assert main(["predict", artifact, images[1], *options, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["remembered"] is True
    for arguments, words in (
        (["--memory", "phash"], "no memory is called 'phash'"),
        (["--memory-file", "f"], "give --memory kind too"),
        (["--memory", "exact", *options[2:4]], "is a memory of kind dhash"),
        (["--memory", "exact", "--memory-check", str(tmp_path / "none")], "there is no folder"),
    ):
        assert main(["predict", artifact, images[0], *arguments, "--threads", "1"]) == 2
        assert words in capsys.readouterr().err.lower()


def test_measure_prints_a_table_or_json(make, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    one, two = str(make("one").path), str(make("two", convolutions=1).path)
    assert main(["measure", one, two, "--threads", "1", "--seconds", "0.01", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in document["rows"]] == [one, two]
    assert all(row["latency_ms"] > 0 for row in document["rows"])


def test_bad_input_ends_with_2(tmp_path: Path, make, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    artifact = str(make().path)
    for arguments, words in (
        (["predict", str(tmp_path), "a.png"], "is no artifact"),
        (["predict", artifact], "images"),
        (["measure"], "things"),
        (["measure", artifact, "--shape", "3,32"], "is no input shape"),
        (["measure", artifact, "--device", "moon"], "no device is called 'moon'"),
        (["measure", artifact, "--batch", "2"], "was exported for batch 1"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err.lower()
