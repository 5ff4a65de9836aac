from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from lissom.report.page import MOST_BYTES, WIDTHS, render, write_report
from lissom.report.plots import pareto_svg, waterline_svg

HOSTILE = "</code></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{ 7*7 }}{% raw %}"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """The page as a reader sees it: elements with their attributes, text, and whether tags match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def count(self, tag: str, **wanted: str) -> int:
        return sum(t == tag and all(a.get(k.rstrip("_")) == v for k, v in wanted.items()) for t, a in self.elements)


def svg_of(chart: str) -> ET.Element:
    return ET.fromstring(str(chart))


def marks(chart, kind: str) -> list[ET.Element]:
    return [e for e in svg_of(chart).iter() if f"m-{kind}" in e.get("class", "").split()]


def test_write_report_gives_one_whole_page(make_result, tmp_path):
    path = write_report(tmp_path / "run", json.loads(json.dumps(make_result())))
    assert path == tmp_path / "run" / "report.html"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "digits_vit runs 1.48x as fast" in page.text
    assert "Budget met." in page.text
    headings = ["Top-1 accuracy against cost", "What each technique brought", "Trials",
                "Beside what you would get elsewhere", "Where the time goes", "Checks and warnings",
                "How this was made"]  # fmt: skip
    places = [page.text.index(heading) for heading in headings]
    assert places == sorted(places)
    for said in ("this processor has no bf16 arithmetic", "removed: the model is not slower without it",
                 "onnxruntime is not installed", "fell back: Softmax in float32: blocks.0.attn",
                 "conversion: int8 to float32 before head", "3 of 1,800 images were skipped", "AMD EPYC 9R14",
                 "--recipe", 'lissom.load("runs/demo/best")', "blocks.11.mlp.fc2"):  # fmt: skip
        assert said in page.text, said


def test_the_page_asks_for_nothing_from_outside(make_result):
    text = render(make_result())
    page = Page(text)
    for _, attributes in page.elements:
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_hostile_names_are_text(make_result):
    result = make_result()
    result["model"] = result["data"] = result["command"] = HOSTILE
    result["task"]["metric"] = result["task"]["kind"] = HOSTILE
    result["best"]["recipe"] = result["best"]["artifact"] = HOSTILE
    result["budget"]["text"] = result["budget"]["limits"][0]["text"] = HOSTILE
    result["warnings"] = [HOSTILE]
    result["environment"] |= {"cpu": HOSTILE, "flags": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
    for row in [*result["peers"], *result["trials"], *result["ablation"], *result["verification"]]:
        for key, value in row.items():
            if isinstance(value, str) and key != "status":
                row[key] = HOSTILE
        for key in ("fallbacks", "conversions"):
            if key in row:
                row[key] = [HOSTILE]
    for side in result["profile"].values():
        side["rows"][0] |= {"path": HOSTILE, "kind": HOSTILE, "inside": HOSTILE, "warning": HOSTILE}
    text = render(result)
    page = Page(text)
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(HOSTILE) > 20


def test_300_trials_stay_small_and_are_all_there(make_result, tmp_path):
    result = make_result(trials=300, seed=3)
    path = write_report(tmp_path, result)
    assert path.stat().st_size < MOST_BYTES / 2
    page = Page(path.read_text(encoding="utf-8"))
    assert "300 trials: " in page.text
    assert "left out of this page" not in page.text
    drawn = sum(len(marks(pareto_svg(result, WIDTHS[0]), k)) for k in ("trial", "front", "best", "baseline", "plain"))
    assert drawn == sum(t["status"] == "ok" for t in result["trials"])


def test_thousands_of_long_trials_are_cut_and_the_page_says_so(make_result, tmp_path):
    result = make_result(trials=3000, profile=False)
    for t in result["trials"]:
        t["reason"] = "<no & rule> " * 400
    path = write_report(tmp_path, result)
    assert path.stat().st_size < MOST_BYTES
    page = Page(path.read_text(encoding="utf-8"))
    assert "3000 trials: " in page.text
    (hidden,) = re.findall(r"(\d+) trials are left out of this page; all are in result.json", page.text)
    shown = page.text.count("fuse() + int8(keep=('head', 'blocks.11.mlp'), model_type='transformer')")
    assert 2000 < int(hidden) < 3000
    assert shown  # the winner is among those kept


def test_everything_failed_but_the_baseline(make_result, tmp_path):
    result = make_result(trials=10)
    result["trials"] = [result["trials"][0], *(t for t in result["trials"] if t["status"] != "ok")]
    result |= {"best": None, "plain_int8": None, "pareto": [0], "ablation": [], "met": False, "profile": None,
               "verification": [], "warnings": []}  # fmt: skip
    result["budget"]["limits"][0] |= {"reached": 1.0, "met": False}
    for peer in result["peers"]:
        peer |= {"metrics": None, "status": "failed", "reason": "out of memory"}
    page = Page(write_report(tmp_path, result).read_text(encoding="utf-8"))
    assert "Budget not met: latency reached 1.00x of the 0.70x asked." in page.text
    assert "No candidate was chosen: the large figures are those of the baseline." in page.text
    assert "No technique was taken out and measured" in page.text
    assert "Where the time goes" not in page.text
    assert page.count("span", class_="badge bad") >= 2
    assert len(marks(pareto_svg(result, WIDTHS[0]), "baseline")) == 1


def test_not_even_the_baseline_was_measured(make_result, tmp_path):
    result = make_result(trials=10, profile=False)
    result |= {"trials": [], "best": None, "plain_int8": None, "baseline": {}, "pareto": [], "peers": [], "met": False}
    page = Page(write_report(tmp_path, result).read_text(encoding="utf-8"))
    assert "No candidate was measured." in page.text


def test_missing_values_are_dashes_that_say_so(make_result):
    result = make_result(profile=False)
    before = Page(render(result)).count("abbr", title="not available")
    for m in (result["best"]["metrics"], result["plain_int8"]["metrics"], result["baseline"]):
        m |= dict.fromkeys(m, None) | {"p95_ms": math.nan}
    text = render(result)
    page = Page(text)
    assert page.count("abbr", title="not available") >= before + 5 * 3 + 7 * 3
    assert "None" not in page.text
    assert "nan" not in page.text.lower()


def test_energy_has_a_column_only_where_it_was_measured(make_result):
    result = make_result()
    assert "Energy, mJ" not in Page(render(result)).text
    result["baseline"]["energy_mj"] = 41.5
    page = Page(render(result))
    assert "Energy, mJ" in page.text
    assert "41.5" in page.text


def test_long_lists_are_cut(make_result):
    result = make_result()
    result["warnings"] = [f"image {i} was skipped" for i in range(1000)]
    result["verification"][0]["conversions"] = [f"before layer {i}" for i in range(70)]
    page = Page(render(result))
    assert "image 19 was skipped" in page.text
    assert "image 20 was skipped" not in page.text
    assert "and 980 more warnings" in page.text
    assert "and 50 more lines" in page.text


@pytest.mark.parametrize("width", WIDTHS)
def test_pareto_plot_draws_each_kind_inside_its_frame(make_result, width):
    result = make_result(trials=60, seed=1)
    root = svg_of(pareto_svg(result, width))
    chart = pareto_svg(result, width)
    assert len(marks(chart, "baseline")) == len(marks(chart, "plain")) == len(marks(chart, "best")) == 1
    assert len(marks(chart, "peer")) == 2
    wide, high = float(root.get("width")), float(root.get("height"))
    for e in root.iter():
        for name, most in (("x", wide), ("cx", wide), ("x1", wide), ("x2", wide), ("y", high), ("cy", high)):
            if e.get(name) is not None:
                assert -0.1 <= float(e.get(name)) <= most + 0.1
    words = {e.text for e in root.iter("text")}
    assert {"latency<=0.7x", "drop<=2.0", "lissom", "↑ top-1 accuracy on choose, %"} <= words
    (line,) = [e for e in root.iter("path") if e.get("class") == "front-line"]
    assert line.get("d").startswith("M")
    titles = [e.text for e in root.iter("title")]
    assert any(t.startswith("trial 6, random: fuse() + int8(") and "1.48x" in t for t in titles)


def test_better_is_up_and_to_the_left(make_result):
    chart = pareto_svg(make_result(), 1000)
    (best,), (baseline,) = marks(chart, "best"), marks(chart, "baseline")
    assert float(best.get("cx")) < float(baseline.get("x"))
    assert float(best.get("cy")) > float(baseline.get("y"))  # a little below: 0.3 points less


def test_limits_stand_where_the_budget_puts_them(make_result):
    result = make_result()
    trials = result["trials"]
    # One trial exactly on both limits.
    trials[1]["metrics"] |= {"latency_ms": 0.7 * 3.12, "quality": 95.5}
    root = svg_of(pareto_svg(result, 1000))
    first, second = [e for e in root.iter("line") if e.get("class") == "limit"]
    (plain,) = marks(pareto_svg(result, 1000), "plain")
    x, top = map(float, re.match(r"M([\d.]+) ([\d.]+)", plain.get("d")).groups())
    assert x == pytest.approx(float(first.get("x1")), abs=0.11)
    assert top + 7 == pytest.approx(float(second.get("y1")), abs=0.11)


def test_one_ruined_model_does_not_flatten_the_plot(make_result):
    result = make_result(trials=9)
    tall = float(marks(pareto_svg(result, 1000), "best")[0].get("cy"))
    result["trials"][8]["metrics"]["quality"] = 9.7
    chart = pareto_svg(result, 1000)
    (below,) = [e for e in svg_of(chart).iter() if "m-below" in e.get("class", "")]
    assert "9.70 %" in below.find("title").text
    assert float(marks(chart, "best")[0].get("cy")) == pytest.approx(tall, abs=40)


def test_the_first_cost_of_the_budget_is_the_axis(make_result):
    result = make_result()
    result["budget"]["limits"][0] |= {"text": "size<=3MB", "quantity": "size", "unit": "MB", "bound": 3.0}
    assert any((e.text or "").startswith("size on disk, MB") for e in svg_of(pareto_svg(result, 1000)).iter("text"))
    result["budget"]["limits"][0] |= {"text": "energy<=3mJ", "quantity": "energy", "unit": "mJ"}
    page = Page(render(result))
    assert "energy is not available here; latency is shown." in page.text
    result["budget"]["limits"][0] |= {"text": "throughput>=2x", "quantity": "throughput", "unit": "x", "bound": 2.0}
    chart = pareto_svg(result, 1000)
    (best,), (baseline,) = marks(chart, "best"), marks(chart, "baseline")
    assert float(best.get("cx")) > float(baseline.get("x"))


def test_waterline_drowns_what_is_memory_bound():
    machine = {"peak": 100.0, "bandwidth": 10.0, "bits": 32}
    rows = [
        {"path": "deep", "kind": "conv", "macs": 10, "bytes": 10, "intensity": 2.0, "ms": 1.0, "efficiency": 0.1},
        {"path": "high", "kind": "conv", "macs": 300, "bytes": 30, "intensity": 20.0, "ms": 1.0, "efficiency": 0.95},
        {"path": "tower", "kind": "conv", "macs": 9000, "bytes": 20, "intensity": 900.0, "ms": 1.0, "efficiency": None},
    ]
    root = svg_of(waterline_svg({"rows": rows, "machine": machine}, 500))
    deep, high, tower = [e for e in root.iter("rect") if e.get("class").startswith("col")]
    (level,) = {float(e.get("y")) for e in root.iter("rect") if e.get("class") == "water"}
    assert float(deep.get("y")) > level > float(high.get("y"))
    assert float(high.get("width")) == pytest.approx(3 * float(deep.get("width")), abs=0.2)
    assert deep.get("class") == "col e-0"
    assert high.get("class") == "col e-4"
    assert tower.get("class") == "col e-none cut"
    assert float(tower.get("y")) >= 0
    assert "900 operations a byte" in tower.find("title").text


def test_water_stands_at_the_peak_of_each_layers_precision():
    row = {"path": "a", "kind": "linear", "macs": 10, "bytes": 10, "intensity": 2.0, "ms": 1.0, "efficiency": 0.5}
    machines = [{"peak": p, "bandwidth": 10.0, "bits": b} for b, p in ((8, 400.0), (32, 100.0))]
    root = svg_of(waterline_svg({"rows": [row | {"bits": 8}, row | {"bits": 32}], "machines": machines}, 500))
    quick, plain = [float(e.get("height")) for e in root.iter("rect") if e.get("class") == "water"]
    assert quick == pytest.approx(4 * plain, abs=0.3)
    assert any(e.text == "waterline: 10.0 to 40.0 operations a byte" for e in root.iter("text"))
