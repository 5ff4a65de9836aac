"""The Dyn-Perceiver proof: its counting by hand, its verdicts from its figures, and one run for real, in miniature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lissom.meters.costs import total
from lissom.proofs import dyn_perceiver
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, run_proof
from lissom.proofs.dyn_perceiver import QUICK, Curve, _built, _judged, costs_of
from lissom.training.loop import fit


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_operations_of_an_ordinary_exit_are_its_stages_and_heads() -> None:
    version = replace(QUICK, widths=(4, 8, 8, 16), blocks=1)
    shape = (3, 16, 16)
    alone, ordinary, dyn = (_built(system, version, 5, 0).eval() for system in ("alone", "ordinary", "dyn"))
    (plain,) = costs_of(alone, shape)
    assert plain == total(alone, shape)[1]
    given = ((4, 16, 16), (4, 16, 16), (8, 8, 8), (8, 4, 4))
    stages = [total(stage, maps)[1] for stage, maps in zip(ordinary.stages, given, strict=True)]
    stem, heads = 16 * 16 * 4 * 27, 8 * 5
    assert costs_of(ordinary, shape).tolist() == [
        stem + sum(stages[:2]) + heads, stem + sum(stages[:3]) + 2 * heads, plain + 2 * heads,
    ]  # fmt: skip
    assert len(costs_of(dyn, shape)) == 4
    assert costs_of(dyn, shape)[-1] == total(dyn, shape)[1] + 16 * 5  # the exit on the way that it does not need
    assert len(ordinary(torch.zeros(2, *shape))) == 3


def test_all_three_start_from_the_same_cnn() -> None:
    alone, ordinary, dyn = (_built(system, QUICK, 5, 3) for system in ("alone", "ordinary", "dyn"))
    for a, b, c in zip(alone.stages.parameters(), ordinary.stages.parameters(), dyn.stages.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def logits(margins: np.ndarray) -> np.ndarray:
    return np.stack([margins, np.zeros_like(margins)], -1)


def test_a_curve_is_judged_on_other_images_than_its_thresholds() -> None:
    rng = np.random.default_rng(0)
    choose = logits(rng.normal(size=(3, 400)))
    report = logits(np.abs(rng.normal(size=(3, 300))))  # always class 0
    costs = np.array([1.0, 2.0, 4.0])
    curve = Curve.of(choose, report, np.zeros(300, int), costs)
    assert curve.accuracy.tolist() == [100.0] * 33
    assert curve.macs[0] < 1.5
    assert curve.macs[-1] > 3
    wrong = Curve.of(choose, report, np.ones(300, int), costs)
    assert wrong.height(1.5, 3.5) == 0


def test_a_height_is_what_the_best_within_each_budget_reaches() -> None:
    curve = Curve(np.array([50.0, 80.0, 60.0]), np.array([1.0, 2.0, 3.0]))
    assert curve.height(2.0, 4.0) == pytest.approx(80.0)  # a dearer one that is worse is not taken
    assert curve.height(1.0, 2.0) == pytest.approx(65.0)


def figures(alone: float, ordinary: float, dyn: float, height: float) -> dict[str, Any]:
    curve = Curve(np.linspace(50, 90, 33), np.linspace(40, 120, 33))
    found: dict[str, Any] = {"range": (40.0, 120.0), "ordinary height": 80.0, "dyn height": 80.0 + height}
    for system, last, count in (("alone", alone, 1), ("ordinary", ordinary, 3), ("dyn", dyn, 4)):
        found |= {f"{system} exits": np.array([60.0] * (count - 1) + [last]), f"{system} curve": curve,
                  f"{system} costs": np.linspace(40, 120, count) if count > 1 else np.array([100.0])}  # fmt: skip
    return found


def verdicts(*found: dict[str, Any]) -> list[str]:
    return [claim.verdict for claim in _judged("digits", found).claims]


def test_verdicts_follow_the_figures() -> None:
    assert verdicts(figures(90, 88, 90.4, 3), figures(90.2, 88.1, 90.5, 3.1)) == [SHOWS] * 4
    assert verdicts(figures(90, 91, 85, -3), figures(90, 91.1, 85.1, -3.1)) == [NOT_SHOWN] * 4
    level = [NOT_SHOWN, SHOWS, NOT_SHOWN, NOT_SHOWN]
    assert verdicts(figures(90, 90.1, 89.9, 0), figures(90, 90.11, 89.9, 0)) == level
    assert verdicts(figures(90, 88, 91, 3)) == [INCONCLUSIVE] * 4  # one seed has no interval
    apart = [{**figures(90, 88, 91 + n / 10, 3), "dyn height": np.nan} for n in (0, 1)]
    claim = _judged("digits", apart).claims[3]
    assert (claim.verdict, claim.evidence[:23]) == (INCONCLUSIVE, "no budget fits both: th")


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        tiny = replace(QUICK, widths=(8, 8, 8, 16), epochs=1, batch=128, blocks=1)
        patch.setattr(dyn_perceiver, "QUICK", tiny)
        return run_proof("dyn_perceiver", quick=True, seeds=2)


def test_rows_hold_one_figure_a_seed(result: ProofResult) -> None:
    assert len(result.claims) == 4
    rows = {row.name: row for row in result.rows}
    assert all(len(row.values) == 2 for row in result.rows)
    assert all(0 <= value <= 100 for row in result.rows for value in row.values)
    exits = [name for name in rows if name.startswith("Dyn-Perceiver")]
    shares = [rows[name].cost["% of operations"] for name in exits]
    assert len(exits) == 4
    assert shares == sorted(shares)
    assert rows["the CNN alone, last"].cost["% of operations"] == 100


def test_what_the_folder_has_is_not_trained_again(tmp_path, monkeypatch) -> None:
    tiny = replace(QUICK, widths=(8, 8, 8, 16), epochs=1, batch=128, blocks=1)
    monkeypatch.setattr(dyn_perceiver, "QUICK", tiny)
    whole = run_proof("dyn_perceiver", quick=True, seeds=1, folder=tmp_path)
    lines = [line for line in (tmp_path / "systems.jsonl").read_text().splitlines() if line]
    assert len(lines) == 3
    (tmp_path / "systems.jsonl").write_text("\n".join([*lines[:2], lines[2][:40]]))  # killed while it wrote the third
    trained = []
    monkeypatch.setattr(dyn_perceiver, "fit", lambda model, *rest, **more: trained.append(fit(model, *rest, **more)))
    again = run_proof("dyn_perceiver", quick=True, seeds=1, folder=tmp_path)
    assert len(trained) == 1
    assert again.rows == whole.rows


@pytest.mark.full
def test_quick_for_real() -> None:
    result = run_proof("dyn_perceiver", quick=True, seeds=2)
    assert next(row for row in result.rows if row.name == "the CNN alone, last").mean > 85
