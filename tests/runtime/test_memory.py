"""Memory of answers: the published fingerprints, what is forgotten, and that a killed writer leaves whole answers."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lissom
from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.runtime.bench import environment
from lissom.runtime.memory import (
    Memory,
    dhash,
    dhash_bits,
    false_hits,
    fingerprint,
    grey,
    invariant_key,
    invariants,
    shrink,
)

PREPARED = Preprocessing(4, 4, 3, mean=(0.5,) * 3, std=(0.25,) * 3).to_json()


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    return json.loads((Path(folder) / "dual_cnn" / "cases.json").read_text())["hashes"]


def pixels_of(case: dict[str, Any]) -> np.ndarray:
    return np.array(case["pixels_uint8_rgb"], np.uint8).reshape(case["shape"])


def test_published_difference_hashes(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        image = pixels_of(case)
        np.testing.assert_array_equal(grey(image), case["dhash_gray"])
        small = np.array(case["dhash_resized_8x9"], np.uint8)
        assert dhash_bits(small) == case["dhash"]  # the rule of the bits, exactly
        np.testing.assert_allclose(shrink(grey(image), 8, 9), small, atol=1)
        assert (dhash(image) ^ case["dhash"]).bit_count() <= 2


def test_published_invariants(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        image = pixels_of(case)
        real = np.array(case["complex_invariants"])[[0, 1, 3, 4]]  # the others are two imaginary parts
        np.testing.assert_allclose(invariants(image), real, rtol=1e-9)
        assert invariant_key(image) == pytest.approx(case["key"], rel=1e-12)
        assert fingerprint(image, "invariants") == f"{case['key']:.8e}".encode()


def scene(seed: int, size: int = 32) -> np.ndarray:
    """A smooth coloured image, uint8 (size, size, 3)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def test_what_each_kind_recognises() -> None:
    images = [scene(seed) for seed in range(40)]
    turned = {
        "mirrored": [image[:, ::-1] for image in images],
        "turned": [np.rot90(image) for image in images],
    }
    for kind in ("exact", "dhash", "invariants"):
        keys = [fingerprint(image, kind) for image in images]
        assert len(set(keys)) == len(images)
        assert keys == [fingerprint(image.copy(), kind) for image in images]
        for others in turned.values():
            same = np.mean([fingerprint(o, kind) == k for o, k in zip(others, keys, strict=True)])
            assert same >= 0.8 if kind == "invariants" else same == 0
    faint = images[0].copy()
    faint[0, 0, 0] ^= 1
    assert fingerprint(faint, "exact") != fingerprint(images[0], "exact")
    assert fingerprint(faint, "dhash") == fingerprint(images[0], "dhash")
    wide = np.arange(12, dtype=np.uint8)
    assert fingerprint(wide.reshape(3, 4), "exact") != fingerprint(wide.reshape(4, 3), "exact")


def test_odd_images_have_fingerprints() -> None:
    for image in (
        np.zeros((1, 1), np.uint8), np.zeros((5, 3, 3), np.uint8), np.full((300, 20), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (7, 100, 1), dtype=np.uint8),
    ):  # fmt: skip
        for kind in ("exact", "dhash", "invariants"):
            assert fingerprint(image, kind)
    assert invariant_key(np.zeros((4, 4), np.uint8)) == 0
    for wrong in (np.zeros((4, 4), np.float32), np.zeros((2, 4, 4, 3), np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(LissomError, match=r"a fingerprint is of uint8 \(H, W\)"):
            fingerprint(wrong, "exact")
    with pytest.raises(LissomError, match="known: exact, dhash, invariants"):
        fingerprint(np.zeros((4, 4), np.uint8), "phash")


def test_the_least_recently_used_is_forgotten(tmp_path: Path) -> None:
    for file in (None, tmp_path / "seen"):
        memory = Memory("exact", 2, file)
        memory.put(b"a", np.array([1.0, 2.0], np.float32), 0)
        memory.put(b"b", np.array([3.0, 4.0], np.float32), 1)
        assert memory.get(b"a") is not None  # used now
        memory.put(b"c", np.array([5.0, 6.0], np.float32), 0)
        assert memory.get(b"b") is None
        found = memory.get(b"a")
        assert found is not None
        assert found.answer.tolist() == [1.0, 2.0]
        assert (len(memory), memory.hits, memory.misses) == (2, 2, 1)
        memory.put(b"a", np.array([7.0, 8.0], np.float32), 0)  # takes no room of others
        assert memory.get(b"c") is not None
        memory.close()


def test_a_file_outlives_its_process_and_keeps_to_a_smaller_capacity(tmp_path: Path) -> None:
    with Memory("dhash", 10, tmp_path / "seen") as memory:
        memory.bind("one")
        for i in range(5):
            memory.put(bytes([i]), np.array([i, -i], np.float32), i % 2)
        memory.get(bytes([0]))
    with Memory("dhash", 3, tmp_path / "seen") as memory:
        memory.bind("one")
        assert [i for i in range(5) if memory.get(bytes([i]))] == [0, 3, 4]
        found = memory.get(bytes([3]))
        assert found is not None
        assert (found.answer.tolist(), found.stage) == ([3.0, -3.0], 1)


def test_what_is_refused(tmp_path: Path) -> None:
    with Memory("dhash", 10, tmp_path / "seen") as memory:
        memory.bind("one")
        with pytest.raises(LissomError, match="another process has the memory"):
            Memory("dhash", 10, tmp_path / "seen")
        with pytest.raises(LissomError, match="answers of another artifact"):
            memory.bind("two")
    with pytest.raises(LissomError, match="is a memory of kind dhash, not exact"):
        Memory("exact", 10, tmp_path / "seen")
    with Memory("dhash", 10, tmp_path / "seen") as memory, pytest.raises(LissomError, match="another artifact"):
        memory.bind("two")
    (tmp_path / "text").write_text("no data base at all, but long enough to be taken for one" * 99)
    with pytest.raises(LissomError, match="cannot be used: file is not a database"):
        Memory("exact", 10, tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other")
    other.executescript("CREATE TABLE t (x); CREATE TRIGGER w AFTER INSERT ON t BEGIN DELETE FROM t; END;")
    other.close()
    with pytest.raises(LissomError, match="holds something else than answers"):
        Memory("exact", 10, tmp_path / "other")
    with pytest.raises(LissomError, match="cannot be used: unable to open"):
        Memory("exact", 10, tmp_path / "no" / "folder")
    for text in ("exact:", "exact:-1", "exact:many", "exact:1:2", "exact:" + "9" * 5000):
        with pytest.raises(LissomError, match="KIND or KIND:CAPACITY") as caught:
            Memory.of(text)
        assert len(str(caught.value)) < 200
    for text in ("exact:0", "phash"):
        with pytest.raises(LissomError, match=r"at least 1|known: exact"):
            Memory.of(text)
    assert Memory.of("invariants:7").capacity == 7


@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
def test_a_strangers_file_stays_as_it_is(journal: str, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "other")
    other.executescript(f"PRAGMA journal_mode = {journal}; CREATE TABLE t (x); INSERT INTO t VALUES (1);")
    other.close()
    before = (tmp_path / "other").read_bytes()
    with pytest.raises(LissomError, match="holds something else than answers"):
        Memory("exact", 10, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    "damage",
    [
        "used = 'x'", "used = 9223372036854775807", "used = -1", "used = NULL", "stage = -5", "stage = 1.5",
        "stage = 'first'", "answer = x''", "answer = x'000000'", "answer = 7", "answer = NULL", "key = NULL",
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_when_it_is_opened(damage: str, tmp_path: Path) -> None:
    with Memory("exact", 10, tmp_path / "seen") as memory:
        for i in range(3):
            memory.put(bytes([i]), np.array([i, -i], np.float32), i)
    base = sqlite3.connect(tmp_path / "seen")
    base.execute(f"UPDATE answers SET {damage} WHERE key = x'01'")
    base.commit()
    base.close()
    with pytest.raises(LissomError, match=r"seen is damaged; delete it$"):
        Memory("exact", 10, tmp_path / "seen")


WRITER = """
import sys
import numpy as np
from lissom.runtime.memory import Memory
memory = Memory("exact", 400, sys.argv[1])
memory.bind("writer")
n = int(sys.argv[2])
while True:
    memory.put(n.to_bytes(8, "little"), np.full(2000, n, np.float32), n % 3)
    print(n, flush=True)
    n += 1
"""


def test_a_killed_writer_leaves_whole_answers(tmp_path: Path) -> None:
    """Every answer that the writer said it had kept is there, unless newer ones took its place; none is a half."""
    rng, said = random.Random(0), [-2]
    for _ in range(3):
        # One more than was said may be in the file.
        command = [sys.executable, "-c", WRITER, str(tmp_path / "seen"), str(said[-1] + 2)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as writer:
            assert writer.stdout is not None
            said.append(int(writer.stdout.readline()))
            time.sleep(rng.uniform(0.05, 0.4))
            writer.send_signal(signal.SIGKILL)
            said += [int(line) for line in writer.stdout if line.endswith("\n")]
        with Memory("exact", 400, tmp_path / "seen") as memory:
            memory.bind("writer")
            assert memory._base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert len(memory) <= 400
            for n in said[1:][-390:]:
                found = memory.get(n.to_bytes(8, "little"))
                assert found is not None
                assert (found.stage, found.answer.tolist()) == (n % 3, [float(n)] * 2000)
    assert len(said) > 6


def test_false_hits_are_counted_on_labelled_images() -> None:
    images = [scene(seed, 16) for seed in range(10)]
    labels = list(range(10))
    clean = false_hits(zip(images, labels, strict=True), "invariants")
    assert (clean.images, clean.hits, clean.wrong, clean.false_rate) == (10, 0, 0, 0.0)
    # Mirrored twins: of the same class, and of another.
    twins = [*zip(images, labels, strict=True), (images[0][:, ::-1], 0), (images[1][:, ::-1], 5)]
    found = false_hits(twins, "invariants")
    assert (found.hits, found.wrong) == (2, 1)
    assert "2 of 12 labelled images would be answered from memory, 1 of them with the label of another" in str(found)
    assert false_hits(twins, "exact").hits == 0
    assert false_hits(twins, "invariants", capacity=1).hits == 0  # forgotten before they come again
    for capacity in (0, True, 1.5):
        with pytest.raises(LissomError, match="a number of answers, at least 1"):
            false_hits(twins, "exact", capacity=capacity)  # type: ignore[arg-type]
    with pytest.raises(LissomError, match="known: exact, dhash, invariants"):
        false_hits([], "phash")


class Counting:
    """Stands for the artifact's stages, and counts the images that run through them."""

    def __init__(self, stages: Any) -> None:
        self.stages, self.images = stages, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stages, name)

    def run(self, x: np.ndarray) -> Any:
        self.images += len(x)
        return self.stages.run(x)


def counted(predictor: Any) -> Counting:
    predictor._stages = Counting(predictor._stages)
    return predictor._stages


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def test_exact_repeats_cost_no_run_and_change_no_answer(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    path = make(preprocessing=PREPARED).path
    stream = [picture(seed) for seed in (0, 1, 0, 2, 1, 0)]
    saved = tmp_path / "0.png"
    Image.fromarray(picture(0)).save(saved)
    plain = lissom.load(path, 1).predict([*stream, saved], top=3)
    assert not any(p.remembered for p in plain)
    predictor = lissom.load(path, 1, memory="exact")
    runs = counted(predictor)
    found = predictor.predict([*stream, saved], top=3)
    assert runs.images == 3
    assert [p.remembered for p in found] == [False, False, True, False, True, True, True]
    assert [(p.ranking, p.exit, p.image) for p in found] == [(p.ranking, p.exit, p.image) for p in plain]
    assert (predictor.memory.hits, predictor.memory.misses) == (4, 3)  # type: ignore[union-attr]


def test_repeats_within_one_batch_run_once(make) -> None:  # type: ignore[no-untyped-def]
    path = make(batch=4, preprocessing=PREPARED).path
    stream = [picture(seed) for seed in (0, 0, 1, 0, 1, 2)]
    plain = lissom.load(path, 1).predict(stream)
    predictor = lissom.load(path, 1, memory="exact:10")
    runs = counted(predictor)
    found = predictor.predict(stream)
    assert [p.remembered for p in found] == [False, True, False, True, True, False]
    assert [p.label for p in found] == [p.label for p in plain]
    assert runs.images == 8  # two batches of the artifact's four


def test_a_memory_is_kept_between_processes_and_by_artifact(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    one, two = make("one", preprocessing=PREPARED).path, make("two", convolutions=1, preprocessing=PREPARED).path
    with Memory("exact", file=tmp_path / "seen") as memory:
        first = lissom.load(one, 1, memory).predict([picture(0)])
    with Memory("exact", file=tmp_path / "seen") as memory:
        (again,) = lissom.load(one, 1, memory).predict([picture(0)])
        assert again.remembered
        assert again.ranking == first[0].ranking
        with pytest.raises(LissomError, match="answers of another artifact"):
            lissom.load(two, 1, memory)
    other = Preprocessing(4, 4, 3, mean=(0.4,) * 3, std=(0.25,) * 3).to_json()
    with Memory("exact", file=tmp_path / "seen") as memory, pytest.raises(LissomError, match="another artifact"):
        lissom.load(make("three", preprocessing=other).path, 1, memory)
    with pytest.raises(LissomError, match="exported for tensors"):
        lissom.load(make("four").path, 1, memory="exact")


@pytest.mark.parametrize("damage", ["stage = 1", f"answer = x'{bytes(16).hex()}'"])
def test_an_answer_that_the_artifact_cannot_have_given_is_refused(damage: str, tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    path = make(preprocessing=PREPARED).path  # one stage, five classes
    with Memory("exact", file=tmp_path / "seen") as memory:
        lissom.load(path, 1, memory).predict([picture(0)])
    base = sqlite3.connect(tmp_path / "seen")
    base.execute(f"UPDATE answers SET {damage}")
    base.commit()
    base.close()
    with Memory("exact", file=tmp_path / "seen") as memory, pytest.raises(LissomError, match="is damaged; delete it"):
        lissom.load(path, 1, memory).predict([picture(0)])


def test_what_cannot_be_read_is_named_and_not_remembered(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    predictor = lissom.load(make(preprocessing=PREPARED).path, 1, memory="dhash")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(LissomError, match=r"bad\.png: not a readable image"):
        predictor.predict([bad])
    with pytest.raises(LissomError, match=r"image 0: an image array is uint8"):
        predictor.predict([np.zeros((4, 4, 3), np.float32)])
    assert len(predictor.memory) == 0  # type: ignore[arg-type]
