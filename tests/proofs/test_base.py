"""The Proof form: intervals, the verdict's rule, the table, JSON, and what run_proof refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lissom import registry
from lissom.errors import LissomError
from lissom.proofs.base import (
    INCONCLUSIVE,
    NOT_SHOWN,
    SHOWS,
    Claim,
    KeptFigures,
    ProofResult,
    Row,
    Settings,
    mean_interval,
    run_proof,
    verdict_by_interval,
)


def test_the_interval_is_students():
    # Four values with mean 3 and standard deviation 2: t(0.975, 3) = 3.18245, standard error 1.
    mean, interval = mean_interval([1.0, 5.0, 3.0 + 2**0.5, 3.0 - 2**0.5])
    assert mean == pytest.approx(3)
    assert interval == pytest.approx((3 - 3.182446, 3 + 3.182446), rel=1e-5)
    assert mean_interval([7.0]) == (7.0, None)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


@pytest.mark.parametrize(
    ("differences", "matters", "verdict"),
    [
        ((1.0, 1.1, 0.9), 0.0, SHOWS),
        ((0.001, 0.0011, 0.0009), 1.0, SHOWS),  # small, but surely there
        ((-1.0, -1.1, -0.9), 0.0, NOT_SHOWN),
        ((0.0, 0.0, 0.0), 0.0, NOT_SHOWN),
        ((-0.1, 0.1, 0.05), 1.0, NOT_SHOWN),  # an advantage of 1 is excluded
        ((-0.1, 0.1, 0.05), 0.1, INCONCLUSIVE),
        ((-5.0, 6.0, 3.0), 1.0, INCONCLUSIVE),
        ((3.0,), 0.0, INCONCLUSIVE),
        ((), 0.0, INCONCLUSIVE),
    ],
)
def test_the_verdict_follows_the_interval(differences, matters, verdict):
    assert verdict_by_interval(differences, matters=matters) == verdict


def test_a_difference_that_is_no_number_is_no_verdict():
    with pytest.raises(ValueError, match="finite"):
        verdict_by_interval([1.0, float("nan")])
    with pytest.raises(ValueError, match="at least 0"):
        verdict_by_interval([1.0, 2.0], matters=-1.0)


def test_only_the_three_verdicts_exist():
    with pytest.raises(ValueError, match="proved"):
        Claim("a", "proved", "b")


@pytest.fixture
def proof(monkeypatch):
    """A proof called ``planted``; the settings it was given are kept in ``seen``."""
    seen: list[Settings] = []

    def planted(settings: Settings) -> ProofResult:
        seen.append(settings)
        settings.progress("half way")
        (settings.folder / "kept").write_text("x")
        rows = (
            Row("ours", "accuracy", tuple(90.0 + s for s in settings.seeds), "%", {"images": 100}),
            Row("theirs", "size", (1.0,)),
        )
        return ProofResult("planted", "a test", (Claim("it is better", SHOWS, "by 2 points"),), rows, ("a note",))

    monkeypatch.setitem(registry._objects, ("proof", "planted"), planted)
    return seen


def test_a_proof_is_run_with_its_settings(proof, tmp_path):
    said: list[str] = []
    result = run_proof("planted", quick=True, seeds=3, folder=tmp_path / "new", progress=said.append)
    assert proof[0].quick
    assert proof[0].seeds == (0, 1, 2)
    assert said == ["half way"]
    assert (tmp_path / "new" / "kept").exists()
    assert result.seconds > 0
    found = json.loads(json.dumps(result.to_json()))
    assert found["settings"] == {"quick": True, "seeds": [0, 1, 2]}
    assert found["rows"][0]["values"] == [90, 91, 92]
    assert found["rows"][0]["mean"] == 91
    assert found["rows"][0]["interval"] == pytest.approx(list(result.rows[0].interval))
    assert found["rows"][1]["interval"] is None
    assert found["claims"] == [{"text": "it is better", "verdict": SHOWS, "evidence": "by 2 points"}]


def test_the_table_holds_all_that_was_found(proof):
    text = str(run_proof("planted", seeds=(5, 6)))
    for part in ("planted: a test", "95.5 %", "89.15 to 101.9", "images 100", f"[{SHOWS}] it is better", "by 2 points",
                 "Note: a note"):  # fmt: skip
        assert part in text
    header, first, second = text.splitlines()[2:5]
    assert header.index("metric") == first.index("accuracy") == second.index("size")


def test_without_a_folder_nothing_is_kept(proof):
    run_proof("planted", seeds=1)
    assert not proof[0].folder.exists()


def test_what_run_proof_refuses(proof, tmp_path):
    with pytest.raises(LissomError, match="no proof is called 'unheard'"):
        run_proof("unheard")
    with pytest.raises(LissomError, match="at least one seed"):
        run_proof("planted", seeds=0)
    with pytest.raises(LissomError, match="twice"):
        run_proof("planted", seeds=(1, 1))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(LissomError, match="cannot be made"):
        run_proof("planted", folder=Path(file) / "inside")


def test_finished_parts_are_kept_and_a_line_cut_short_is_not(tmp_path) -> None:
    settings = Settings(True, (0, 1), lambda text: None, tmp_path)
    asked = []

    def figures(value: float):
        def made() -> dict[str, float]:
            asked.append(value)
            return {"error": value}

        return made

    kept = KeptFigures(settings, "kept.jsonl", "digits")
    assert [kept.get("a", 0, figures(1.5)), kept.get("a", 1, figures(2.5))] == [{"error": 1.5}, {"error": 2.5}]
    again = KeptFigures(settings, "kept.jsonl", "digits")
    assert again.get("a", 0, figures(9.0)) == {"error": 1.5}
    assert KeptFigures(settings, "kept.jsonl", "cifar10").get("a", 0, figures(3.5)) == {"error": 3.5}
    path = tmp_path / "kept.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:2])[:-5])  # a kill in the middle of a line
    cut = KeptFigures(settings, "kept.jsonl", "digits")
    assert cut.get("a", 0, figures(4.5)) == {"error": 4.5}
    assert KeptFigures(settings, "kept.jsonl", "digits").get("a", 0, figures(9.0)) == {"error": 4.5}
    assert asked == [1.5, 2.5, 3.5, 4.5]
