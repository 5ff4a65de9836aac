"""``lissom reproduce``: a planted proof, as a table and as JSON."""

from __future__ import annotations

import json

import pytest

from lissom import registry
from lissom.cli import main
from lissom.proofs.base import NOT_SHOWN, Claim, ProofResult, Row, Settings


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    def proof(settings: Settings) -> ProofResult:
        settings.progress(f"quick is {settings.quick}")
        rows = (Row("ours", "size", tuple(float(s) for s in settings.seeds), "kB"),)
        return ProofResult("planted", "a test", (Claim("it is smaller", NOT_SHOWN, "it is not"),), rows)

    monkeypatch.setitem(registry._objects, ("proof", "planted"), proof)


def test_the_table_and_the_verdict_are_printed(capsys):
    assert main(["reproduce", "planted", "--quick"]) == 0
    said = capsys.readouterr()
    assert f"[{NOT_SHOWN}] it is smaller" in said.out
    assert "quick is True" in said.err


def test_json_goes_to_stdout_and_to_the_folder(capsys, tmp_path):
    assert main(["reproduce", "planted", "--seeds", "2", "--json", "--out", str(tmp_path / "kept")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["values"] == [0, 1]
    assert json.loads((tmp_path / "kept" / "result.json").read_text()) == found


def test_an_unknown_system_is_told(capsys):
    assert main(["reproduce", "unheard"]) == 2
    said = capsys.readouterr().err
    assert "unheard" in said
    assert "simq_nas" in said
