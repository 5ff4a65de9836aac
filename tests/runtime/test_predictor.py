"""An artifact as a function: any number of inputs, images, and nothing but the files that were exported."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lissom
from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.runtime.bench import environment

PREPARED = Preprocessing(4, 4, 3, mean=(0.5,) * 3, std=(0.25,) * 3).to_json()


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 6])
def test_any_number_of_inputs_goes_through_a_static_batch(batch: int, count: int, make, want) -> None:  # type: ignore[no-untyped-def]
    predictor = lissom.load(make(batch=batch).path, threads=1)
    x = np.random.default_rng(0).standard_normal((count, 3, 4, 4), dtype=np.float32)
    before = x.copy()
    x.flags.writeable = False
    answers = predictor(x)
    assert answers.shape == (count, 5)
    np.testing.assert_allclose(answers, want(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(x, before)


def test_memory_order_and_float64_do_not_matter(make, want) -> None:  # type: ignore[no-untyped-def]
    predictor = lissom.load(make().path, threads=1)
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(predictor(x), want(x.astype(np.float32)), rtol=1e-4, atol=1e-4)


def test_a_wrong_input_is_one_sentence(make) -> None:  # type: ignore[no-untyped-def]
    predictor = lissom.load(make().path, threads=1)
    with pytest.raises(LissomError, match=r"shape \(n, 3, 4, 4\), not \(1, 3, 5, 5\)$"):
        predictor(np.zeros((1, 3, 5, 5), np.float32))
    with pytest.raises(LissomError, match=r"one input is x\[None\]"):
        predictor(np.zeros((3, 4, 4), np.float32))
    with pytest.raises(LissomError, match=r"not uint8; predict\(\) prepares images"):
        predictor(np.zeros((1, 3, 4, 4), np.uint8))


def test_images_come_as_paths_bytes_and_arrays(tmp_path: Path, make, want) -> None:  # type: ignore[no-untyped-def]
    predictor = lissom.load(make(batch=2, preprocessing=PREPARED, recipe="int8()").path, threads=1)
    assert predictor.classes == ("ant", "bee", "cat", "dog", "eel")
    assert predictor.recipe == "int8()"
    path = tmp_path / "a.png"
    Image.fromarray(picture(0)).save(path)
    buffer = io.BytesIO()
    Image.fromarray(picture(1)).save(buffer, "PNG")
    found = predictor.predict([path, buffer.getvalue(), picture(2)], top=3)
    assert [p.image for p in found] == [str(path), "image 1", "image 2"]
    prepare = Preprocessing.from_json(PREPARED)
    scores = want(np.stack([prepare(picture(seed)) for seed in range(3)])).astype(np.float64)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    for prediction, share in zip(found, shares, strict=True):
        assert prediction.label == share.argmax()
        assert prediction.name == predictor.classes[share.argmax()]
        assert prediction.confidence == pytest.approx(share.max(), abs=1e-3)
        assert prediction.exit == 0
        assert [name for name, _ in prediction.ranking] == [predictor.classes[i] for i in np.argsort(-share)[:3]]


def test_softmax_survives_large_answers_and_classes_without_names(make) -> None:  # type: ignore[no-untyped-def]
    predictor = lissom.load(make(classes=["ant"]).path, threads=1)
    (prediction,) = predictor.read(np.array([[0, 0, 0, 5000, 0]], np.float32), ["x"], top=9)
    assert (prediction.name, prediction.confidence) == ("3", 1.0)
    assert len(prediction.ranking) == 5
    with pytest.raises(LissomError, match="not one score a class"):
        predictor.read(np.zeros((1, 2, 3), np.float32), ["x"])


def test_scores_that_are_no_numbers_are_no_class(make) -> None:  # type: ignore[no-untyped-def]
    predictor = lissom.load(make(preprocessing=PREPARED).path, 1, memory="exact")
    for bad in (np.nan, np.inf, -np.inf):
        scores = np.array([[1, 2, 3, 4, 5], [bad] * 5], np.float32)
        with pytest.raises(LissomError, match=r"^b\.png: the artifact's scores are no finite numbers"):
            predictor.read(scores, ["a.png", "b.png"])
    masked = np.array([[1, -np.inf, -np.inf, -np.inf, -np.inf]], np.float32)  # classes that cannot be
    (prediction,) = predictor.read(masked, ["a.png"], top=2)
    assert [share for _, share in prediction.ranking] == [1.0, 0.0]
    with pytest.raises(LissomError, match="not one score a class"):
        predictor.read(np.zeros((1, 0), np.float32), ["x"])
    predictor._stages.run = lambda x: np.full((1, 5), np.nan, np.float32)  # type: ignore[method-assign]
    with pytest.raises(LissomError, match="image 0: the artifact's scores are no finite numbers"):
        predictor.predict([picture(0)])
    assert len(predictor.memory) == 0  # type: ignore[arg-type]  # and it is not remembered


def test_pipes_and_images_without_end_are_not_read(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    predictor = lissom.load(make(preprocessing=PREPARED).path, threads=1)
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        with pytest.raises(LissomError, match=r"not a readable image \(a folder, a pipe or a device\)"):
            predictor.predict([tmp_path / name])
    with pytest.raises(LissomError, match="would be resized to more than the limit"):
        predictor.predict([np.zeros((1, 8_000_000), np.uint8)])


def test_images_that_cannot_be_read_are_named(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    predictor = lissom.load(make(preprocessing=PREPARED).path, threads=1)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(LissomError, match=r"bad\.jpg: not a readable image"):
        predictor.predict([picture(0), bad])
    with pytest.raises(LissomError, match=r"image 1: an image array is uint8 .* not float32"):
        predictor.predict([picture(0), np.zeros((4, 4, 3), np.float32)])
    tensors = lissom.load(make("tensors").path, threads=1)
    with pytest.raises(LissomError, match="does not say how images become its inputs"):
        tensors.predict([picture(0)])


def test_an_altered_artifact_is_not_loaded(make) -> None:  # type: ignore[no-untyped-def]
    artifact = make()
    data = bytearray((artifact.path / "stage0.bin").read_bytes())
    data[-1] ^= 1
    (artifact.path / "stage0.bin").write_bytes(data)
    with pytest.raises(LissomError, match=r"stage0\.bin was altered since its export"):
        lissom.load(artifact.path)
    (artifact.path / "stage0.bin").unlink()
    with pytest.raises(LissomError, match=r"lacks its file stage0\.bin"):
        lissom.load(artifact.path)


def test_a_plan_that_points_elsewhere_or_vouches_for_nothing_is_refused(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    artifact = make()
    plan = (artifact.path / "plan.json").read_text()
    (tmp_path / "secret").write_text("x")
    (artifact.path / "plan.json").write_text(plan.replace('"stage0.bin"', '"../secret"'))
    with pytest.raises(LissomError, match="a file outside itself"):
        lissom.load(artifact.path)
    (artifact.path / "plan.json").write_text(plan.replace('"stage0.xml": "', '"stage9.xml": "'))
    with pytest.raises(LissomError, match="does not vouch for its graph"):
        lissom.load(artifact.path)


@pytest.mark.parametrize(
    "damage",
    [{"interpolation": "magic"}, {"height": 5}, {"crop": 0}, {"std": None}, {"bogus": 1}, {"mean": [1, 2]}],
)
def test_damaged_preprocessing_is_one_sentence(damage: dict[str, object], make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LissomError, match=r"the preprocessing in .* is damaged"):
        lissom.load(make(preprocessing={**PREPARED, **damage}).path)


def test_an_artifact_loads_and_answers_without_torch_and_arrays_without_pillow(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    path = make(preprocessing=PREPARED).path
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'timm', 'nncf', 'sklearn', 'pyarrow', 'PIL'): sys.modules[name] = None\n"
        "import lissom, numpy\n"
        f"predictor = lissom.load({str(path)!r}, threads=1)\n"
        "assert predictor(numpy.zeros((2, 3, 4, 4), numpy.float32)).shape == (2, 5)\n"
        "del sys.modules['PIL']\n"
        f"print(predictor.predict([{str(tmp_path / 'a.png')!r}])[0].name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in ("ant", "bee", "cat", "dog", "eel")
