"""The TVConv proof: its layout and what counting can reach by hand, arms of one start; run very small."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lissom.layers.tvconv import TVConv2d
from lissom.proofs import tvconv
from lissom.proofs.arms import Budget, built, image_task
from lissom.proofs.base import SHOWS, ProofResult, run_proof

TINY = replace(
    tvconv.QUICK, layout_train=40, layout_held_out=40, layout=Budget(2, 8, 1e-3), pixels=8, train=40, held_out=50,
    images=Budget(2, 8, 1e-3), width=4, image_width=4, hidden=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tvconv, "QUICK", TINY)
        patch.setattr(tvconv, "TIMED", (4, 8))
        patch.setattr(tvconv, "ROUNDS", 1)
        return run_proof("tvconv", quick=True, seeds=2)


def test_every_arm_has_a_figure_a_seed(result: ProofResult) -> None:
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    accuracy = {row.name: row for row in result.rows if row.metric == "accuracy"}
    parts = ("generated layout", "digits aligned", "digits moved")
    assert set(accuracy) == {f"{part}, {arm}" for part in parts for arm in ("TVConv", "depthwise")}
    assert {row.cost["steps"] for row in accuracy.values()} == {2}
    stored = [row for row in result.rows if row.metric == "stored form differs by"]
    assert [row.name for row in stored] == [f"{part}, TVConv" for part in parts]
    assert all(max(row.values) < 1e-5 for row in stored)
    assert len(result.claims) == 6
    assert next(claim for claim in result.claims if "stored form" in claim.text).verdict == SHOWS


def test_arms_start_alike_but_for_their_kernels() -> None:
    arms = tvconv._arms(24, 4, 2, 4, TINY)
    variant, plain = (built(arms[name], 5) for name in ("TVConv", "depthwise"))
    assert sum(isinstance(module, TVConv2d) for module in variant.modules()) == 2
    shared = variant.state_dict().keys() & plain.state_dict().keys()
    assert len(shared) > 20
    assert all(torch.equal(variant.state_dict()[key], plain.state_dict()[key]) for key in shared)
    kernels = [key for key in plain.state_dict().keys() - shared if key.endswith("weight")]
    assert len(kernels) == 2


def test_two_cells_decide_and_seven_do_not() -> None:
    images, labels = tvconv.layout(60, (1, 5), np.random.default_rng(2))
    again, _ = tvconv.layout(60, (1, 5), np.random.default_rng(2))
    assert np.array_equal(images, again)
    assert (images.shape, images.dtype, labels.dtype) == ((60, 1, 24, 24), np.float32, np.int64)

    def crosses(cell: int) -> np.ndarray:
        """Which glyph a cell holds, by what it resembles more."""
        top, left = 8 * (cell // 3) + 1, 8 * (cell % 3) + 1
        seen = images[:, 0, top : top + 5, left : left + 5]
        return (seen * tvconv.CROSS).sum((1, 2)) > (seen * tvconv.PLUS).sum((1, 2))

    assert np.array_equal(labels, crosses(1) + 2 * crosses(5))
    assert all(0.2 < crosses(cell).mean() < 0.8 for cell in range(9))


def test_what_counting_can_reach() -> None:
    """By all arrangements of nine glyphs, with the likeliest class of each count."""
    seen: dict[int, Counter[tuple[int, int]]] = {}
    for glyphs in itertools.product((0, 1), repeat=9):
        seen.setdefault(sum(glyphs), Counter())[glyphs[0], glyphs[7]] += 1
    right = sum(max(classes.values()) for classes in seen.values())
    assert tvconv.counting_ceiling() == pytest.approx(100 * right / 2**9)
    assert tvconv.counting_ceiling() == pytest.approx(38.67, abs=0.01)


def test_moved_images_keep_their_labels_and_move() -> None:
    task = image_task(tvconv._natural(quick=True), 8, 0, train=40, held_out=50, channels=1)
    loose = tvconv.moved(task, 3)
    assert np.array_equal(loose.report.labels, task.report.labels)
    before, after = task.report.inputs(slice(None)), loose.report.inputs(slice(None))
    assert before.shape == after.shape
    assert not np.array_equal(before, after)
    for old, new in zip(before[:5], after[:5], strict=True):
        padded = np.pad(old, ((0, 0), (2, 2), (2, 2)), mode="edge")
        assert any(np.array_equal(new, padded[:, y : y + 8, x : x + 8]) for y in range(5) for x in range(5))


def test_a_table_of_faces_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "orl_faces"
    folder.mkdir()
    encoded = []
    for number in range(48):
        file = io.BytesIO()
        Image.fromarray(np.full((112, 92), 5 * number, np.uint8)).save(file, "PNG")
        encoded.append(file.getvalue())
    table = pa.table({"image": encoded, "person": pa.array([7, 7, 7, 9] * 12, pa.int16())})
    pq.write_table(table, folder / "all.parquet")
    monkeypatch.setenv("LISSOM_DATA", str(tmp_path))
    assert tvconv._natural(quick=True).name == "digits"
    data = tvconv._natural(quick=False)
    assert (data.name, data.classes) == ("orl_faces", ("0", "1"))
    task = image_task(data, 16, 0, train=32, channels=1)
    assert task.fit is not None
    assert np.bincount(task.fit.labels).tolist() == [24, 8]
    assert np.bincount(task.report.labels).tolist() == [12, 4]
