from __future__ import annotations

from lissom.report.card import card


def test_card_says_what_it_is_and_how_to_load_it(make_result):
    plan = {
        "recipe": "fuse() + int8()",
        "classes": [str(i) for i in range(30)],
        "input": {"shape": [1, 3, 32, 32]},
        "verification": {"agreement": 0.992, "max_error": 0.31, "fallbacks": ["Softmax"]},
    }
    text = card(make_result(), plan)
    assert "recipe `fuse() + int8()`" in text
    assert "| top-1 accuracy on report | 97.2 % [95.8, 98.1] | 97.5 % [96.1, 98.4] |" in text
    assert "| latency, median of a batch | 2.11 ms | 3.12 ms |" in text
    assert "Measured on `AMD EPYC 9R14`, batch 1, 2 threads, in openvino 2026.4.0" in text
    assert 'import lissom\nmodel = lissom.load("runs/demo/best")\nprint(model.predict(["a.png"]))' in text
    assert "1 x 3 x 32 x 32" in text
    assert "same answer on 99.2 %" in text
    assert "`19` and 10 more, in `plan.json`" in text


def test_card_without_a_winner_or_values(make_result):
    result = make_result() | {"best": None, "baseline": {}}
    text = card(result)
    assert "as it was, in float32" in text
    assert "| size | – | – |" in text
    assert "None" not in text
    assert "nan" not in text


def test_card_keeps_hostile_names_in_code(make_result):
    result = make_result()
    result["model"] = "a`<script>alert(1)</script>`\n# heading | x"
    text = card(result, {"classes": ["`<b>`\n- item"]})
    assert "`a'<script>alert(1)</script>' # heading | x`" in text
    assert "`'<b>' - item`" in text
    assert "\n# heading" not in text
