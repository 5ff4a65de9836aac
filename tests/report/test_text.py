from __future__ import annotations

import math

import pytest

from lissom.report.text import (
    TRIAL_COLUMNS,
    big,
    bound,
    figure,
    fixed,
    interval,
    reproduce,
    sentence,
    trained,
    trial_table,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "–"), (math.inf, "–"), (True, "–"), (0, "0"), (2.105, "2.10"), (31.46, "31.5"),
     (1234.5, "1234"), (0.0123, "0.0123"), (-0.5, "-0.500"), (4e-9, "0.000000")],
)  # fmt: skip
def test_figure_keeps_three_significant_digits(value, text):
    assert figure(value) == text


def test_numbers():
    assert fixed(-0.001) == "0.0"
    assert fixed(None) == "–"
    assert interval([1.448, 1.512]) == "[1.45, 1.51]"
    assert interval((96.04, 98.1), 1) == "[96.0, 98.1]"
    assert interval(None) == interval([1.0, None]) == interval([1.0]) == ""
    assert [big(v) for v in (1_806_346, 117e6, 4.2e9, 950, None)] == ["1.81 M", "117 M", "4.20 G", "950", "–"]
    assert [bound(*v) for v in ((0.66, "x"), (12.3, "ms"), (2.0, "points"), (80, "/s"), (None, "ms"), (5e6, ""))] == [
        "0.66x", "12.3 ms", "2.0 points", "80.0/s", "–", "5.00 M",
    ]  # fmt: skip


def test_how_long_a_trial_was_trained():
    trainings = [{"steps": 40, "passes": 0.4, "seconds": 60.0}, {"steps": 1200, "passes": 12.0, "seconds": 720.0}]
    assert trained({"trainings": trainings}) == "trained for 0.40 epochs, then 12 epochs"
    assert trained({"trainings": []}) == trained({}) == ""


def test_sentence_of_a_budget_that_was_met(make_result):
    result = make_result()
    result["best"]["metrics"] |= {"speedup": 1.484, "speedup_ci": (1.452, 1.508), "quality": 97.2, "drop": 0.31,
                                  "quality_ci": (96.0, 98.1)}  # fmt: skip
    result["best"]["recipe"] = "fuse() + int8()"
    assert sentence(result) == (
        "digits_vit runs 1.48x as fast [1.45, 1.51] at 0.3 points less top-1 accuracy (97.2 % [96.0, 98.1]) "
        "with the recipe fuse() + int8(). Budget met."
    )
    result["best"]["metrics"]["drop"] = -0.31
    assert "at 0.3 points more top-1 accuracy" in sentence(result)
    result["best"]["metrics"]["drop"] = 0.04
    assert "at the same top-1 accuracy (97.2 %" in sentence(result)


def test_sentence_of_a_budget_that_was_not_met_says_how_near_it_came(make_result):
    result = make_result()
    result["met"] = False
    result["budget"]["limits"][0] |= {"reached": 0.74, "met": False}
    assert sentence(result).startswith("Budget not met: latency reached 0.74x of the 0.70x asked. digits_vit runs")
    result["budget"]["limits"][1] |= {"reached": None, "quantity": "energy", "met": False}
    assert "of the 0.70x asked; energy is not available here. " in sentence(result)


def test_a_gain_within_the_error_is_not_called_one(make_result):
    result = make_result()
    result["best"]["metrics"] |= {"speedup": 1.01, "speedup_ci": [0.98, 1.04]}
    assert "runs as fast as the baseline, within the error of measurement (1.01x [0.98, 1.04])" in sentence(result)


@pytest.mark.parametrize("best", [None, {"recipe": "", "trial": 0, "metrics": {}, "artifact": "x"}])
def test_sentence_where_nothing_was_better_than_the_baseline(make_result, best):
    result = make_result()
    result["best"] = best
    said = sentence(result)
    assert said.startswith("digits_vit stays as it is: ")
    assert "takes 3.12 ms at 97.5 % [96.1, 98.4] top-1 accuracy. Budget met." in said


def test_sentence_with_nothing_measured(make_result):
    result = make_result()
    result["best"]["metrics"] = {}
    result["budget"]["limits"] = []
    assert sentence(result).startswith("digits_vit was exported with top-1 accuracy not available with the recipe")


def test_trial_table_has_a_row_a_trial_and_its_reason(make_result):
    result = make_result(trials=14)
    rows = trial_table(result)
    assert len(rows) == 14
    assert {len(row) for row in rows} == {len(TRIAL_COLUMNS)}
    assert all(isinstance(cell, str) for row in rows for cell in row)
    assert rows[0][:4] == ("0", "baseline", "unchanged, float32", "ok")
    assert rows[3][3:] == ("not applicable", "–", "–", "–", "–", "–", "–", "this processor has no bf16 arithmetic")
    assert rows[6][7] == "1.48x " + interval(result["trials"][6]["metrics"]["speedup_ci"])


def test_reproduce_leaves_the_search_out(make_result):
    result = make_result()
    result["best"]["recipe"] = "int8(keep=('head',))"
    result["command"] = (
        "lissom slim 'my model.py:net' --trials=9 --out runs/a --techniques fuse,int8 --resume --batch 4"
    )
    assert reproduce(result) == ("lissom slim 'my model.py:net' --batch 4 --seed 0 --recipe \"int8(keep=('head',))\"")
    result["command"] = "lissom slim --seed 7"
    result["best"]["recipe"] = "x(a='$(rm -rf .)')"
    assert reproduce(result) == "lissom slim --seed 7 --recipe 'x(a='\"'\"'$(rm -rf .)'\"'\"')'"


@pytest.mark.parametrize("command", ["", "lissom.slim(model, data)", "lissom slim 'unfinished", "rm -rf lissom slim"])
def test_reproduce_says_nothing_where_there_is_no_command_to_repeat(make_result, command):
    assert reproduce(make_result() | {"command": command}) == ""
    assert reproduce(make_result() | {"best": None}) == ""
