"""The UniRepLKNet proof: reach and sound by hand, arms that differ in their kernels alone; run very small."""

from __future__ import annotations

import io
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lissom.layers.dilated_reparam import DilatedReparamBlock
from lissom.proofs import unireplknet
from lissom.proofs.arms import Budget, built
from lissom.proofs.base import SHOWS, ProofResult, run_proof

TINY = replace(
    unireplknet.QUICK, dims=(8,), depths=(1,), train=40, held_out=50, images=Budget(2, 8, 1e-3), timed=(4, 14),
    rounds=1, field=17,
)  # fmt: skip


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unireplknet, "QUICK", TINY)
        return run_proof("unireplknet", quick=True, seeds=2)


def test_every_arm_has_a_figure_a_seed(result: ProofResult) -> None:
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    accuracy = {row.name: row.cost for row in result.rows if row.metric == "accuracy"}
    assert list(accuracy) == ["digits, 13 x 13 and branches", "digits, 13 x 13 alone", "digits, 3 x 3"]
    assert {cost["steps"] for cost in accuracy.values()} == {2}
    assert sum(row.metric == "time" for row in result.rows) == 4
    reach = {(row.name, row.metric): row.mean for row in result.rows if row.metric.startswith("reach")}
    assert len(reach) == 6
    assert reach["four blocks of 13 x 13", "reach of 90 %"] > reach["four blocks of 3 x 3", "reach of 90 %"]
    assert len(result.claims) == 6
    assert result.claims[0].verdict == SHOWS  # merging changes no answer
    assert "Sound was left out" in result.notes[0]


def test_arms_differ_in_their_kernels_alone() -> None:
    whole, alone, small = (
        built(lambda k=k, b=b: unireplknet.small_network((8,), (1,), 10, k, b), 0)
        for k, b in ((13, True), (13, False), (3, False))
    )
    assert isinstance(alone.stages[0][0].dwconv, DilatedReparamBlock)
    assert alone.stages[0][0].dwconv.branches == ()
    assert len(whole.stages[0][0].dwconv.branches) == 5
    assert torch.equal(whole.stages[0][0].dwconv.lk_origin.weight, alone.stages[0][0].dwconv.lk_origin.weight)
    assert small.stages[0][0].dwconv.weight.shape == (8, 1, 3, 3)
    for key, value in small.state_dict().items():
        assert "dwconv" in key or value.shape == whole.state_dict()[key].shape


def test_reach_by_hand() -> None:
    gradients = torch.zeros(9, 9)
    gradients[4, 4] = 100.0  # the middle does not count
    gradients[4, 5] = 5.0
    gradients[2, 4] = 3.0
    gradients[0, 0] = 2.0
    radii = [unireplknet.gradient_radius(gradients, share) for share in (0.25, 0.5, 0.8, 0.81, 1.0)]
    assert radii == pytest.approx([0.5, 1, 2, 3.05, 4])


def test_a_table_of_sounds_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sounds = []
    for length in (2000, 4000, 9000, 3000):
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(8000)
            out.writeframes((3000 * rng.standard_normal(length)).astype("<i2").tobytes())
        sounds.append(file.getvalue())
    table = pa.table({"wav": sounds, "digit": pa.array([3, 4, 3, 5], pa.int8()), "take": pa.array([7, 9, 0, 4])})
    pq.write_table(table, tmp_path / "all.parquet")
    fit, report = unireplknet.spoken_digits(tmp_path / "all.parquet")
    assert (fit.shape, report.shape) == ((1, 40, 64), (1, 40, 64))
    assert fit.labels.tolist() == [3, 4]
    assert report.labels.tolist() == [3, 5]
    seen = fit.inputs(slice(None))
    assert float(seen.mean()) == pytest.approx(0, abs=1e-4)
    assert float(seen.std()) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.full
def test_the_quick_proof_shows_what_merging_saves() -> None:
    result = run_proof("unireplknet", quick=True, seeds=2)
    rows = {row.name: row.mean for row in result.rows if row.metric == "time"}
    assert rows["13 x 13, merged"] < rows["13 x 13, with branches"]
