"""A run's report: one HTML page that needs nothing but itself, written from the dict of ``result.json``.

Names in it (classes, recipes, files, reasons) come from users' data, so the template escapes everything, and the
page's own content policy allows its one style sheet and its one script, by their hashes, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lissom.report.plots import cost_axis, forest_svg, layers_svg, pareto_svg, waterline_svg
from lissom.report.text import (
    best_or_baseline,
    big,
    bound,
    figure,
    fixed,
    interval,
    known,
    recipe_of,
    reproduce,
    sentence,
    trained,
)
from lissom.runtime.artifact import write_atomic

__all__ = ["MOST_BYTES", "render", "write_report"]

MOST_BYTES = 1_500_000
WIDTHS = (1030, 366)  # of the charts: desktop, and a phone of 400 px less its margins
_LINES = 20  # warnings and conversions shown; the rest are in result.json
_LETTERS = 300


def _clip(text: Any) -> str:
    """A name as it is shown: a hostile or generated one may be megabytes long."""
    text = str(text)
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"


def _percent(share: Any) -> float | None:
    return 100 * share if known(share) else None


def _hash(text: str) -> Markup:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(f"'sha256-{digest}'")


def _cards(result: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The key figures, each beside the baseline's and plain int8's, and the remark below them."""
    ours, baseline = best_or_baseline(result), result["baseline"]
    plain = (result["plain_int8"] or {}).get("metrics") or {}
    rows = (
        ("Latency", "latency_ms", figure, " ms", lambda m: f"p95 {figure(m.get('p95_ms'))} ms"),
        ("Speed-up", "speedup", lambda v: fixed(v, 2), "x", lambda m: interval(m.get("speedup_ci"))),
        (
            result["task"]["metric"].capitalize(),
            "quality",
            fixed,
            " %",
            lambda m: interval(m.get("quality_ci"), 1),
        ),
        ("Size", "size_mb", figure, " MB", lambda m: "on disk"),
        (
            "Memory",
            "memory_above_empty_mb",
            figure,
            " MB",
            lambda m: f"process peak {figure(m.get('memory_mb'))} MB",
        ),
    )
    cards = []
    for name, field, shown, unit, ci in rows:
        others = [(n, m.get(field), shown(m.get(field))) for n, m in (("float32", baseline), ("plain int8", plain))]
        value = ours.get(field)
        cards.append(
            {"name": name, "value": value, "text": shown(value), "unit": unit, "ci": ci(ours), "others": others}
        )
    chosen = (result["best"] or {}).get("recipe")
    note = (
        f"{'' if chosen else 'No candidate was chosen: the large figures are those of the baseline. '}"
        f"Latency is the median of a batch of {result['target']['batch']}; memory is the peak of the process above an "
        f"empty graph in the same runtime; {result['task']['metric']} is on the report split."
    )
    return cards, note


def _peers(result: dict[str, Any]) -> list[dict[str, Any]]:
    plain, best = result["plain_int8"], result["best"]
    rows = [{"reason": "", "recipe": "", **peer, "metrics": peer.get("metrics") or {}} for peer in result["peers"]]
    rows.append({"name": "float32 baseline", "metrics": result["baseline"]})
    if plain:
        rows.append({"name": "plain int8", "metrics": plain["metrics"]})
    if best:
        rows.append({"name": "lissom", "metrics": best["metrics"], "recipe": best["recipe"], "best": True})
    return rows


def _profile(result: dict[str, Any], most: int) -> dict[str, Any] | None:
    profile = result.get("profile")
    if not profile or not profile.get("before"):
        return None
    sides = [(name, profile[key]) for name, key in (("Before", "before"), ("After", "after")) if profile.get(key)]

    def total(side: dict[str, Any]) -> str:
        return f"{figure(side.get('measured_ms'))} ms measured, bound {figure(side.get('bound_ms'))} ms"

    after = profile.get("after")
    return {
        "before_total": total(profile["before"]),
        "after_total": total(after) if after else "",
        "bars": [layers_svg(profile["before"]["rows"], after["rows"] if after else [], width) for width in WIDTHS],
        "sides": [
            {
                "name": name,
                "waterline": [waterline_svg({**side, "rows": side["rows"][:most]}, width) for width in WIDTHS],
                "rows": side["rows"][:most],
                "hidden": max(0, len(side["rows"]) - most),
            }
            for name, side in sides
        ],
    }


def _verification(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in result["verification"][:_LINES]:
        said = [f"fell back: {line}" for line in row.get("fallbacks") or []]
        said += [f"conversion: {line}" for line in row.get("conversions") or []]
        rows.append({**row, "said": said[:_LINES], "hidden": len(said) - _LINES})
    return rows


def _exits(result: dict[str, Any]) -> dict[str, Any] | None:
    """The winner's exits: what was promised of them, and a row each, the way to the end last."""
    exits = result.get("exits")
    if not exits:
        return None
    rows = [
        {"at": d.get("at"), "rule": d.get("rule"), "threshold": d.get("threshold"),
         "shown": "never" if d.get("threshold") is None else f"{d['threshold']:.4g}"}
        for d in exits["decisions"]
    ]  # fmt: skip
    rows.append({"at": "the end", "rule": "", "threshold": None, "shown": ""})
    shares = exits.get("shares") or [None] * len(rows)
    for row, share in zip(rows, shares, strict=False):
        row["share"] = _percent(share)
    # Rounded down: a promise is not made larger than what was proved.
    proved = exits.get("sure", 1 - exits["delta"] * exits["among"])
    sure, points = f"{math.floor(100 * proved + 1e-9):.0f} %", f"{100 * exits['risk']:g} points"
    promise = (
        f"With a probability of {sure} the exits cost at most {points} of {result['task']['metric']}, judged on "
        f"{exits['n_test']} samples (Learn then Test). {exits.get('note') or ''}"
    )
    return {"rows": rows, "promise": promise}


def _shift(result: dict[str, Any]) -> dict[str, Any] | None:
    """The exits on spoilt images: a row each, and how many images stand behind it."""
    found = result.get("shift")
    if not found:
        return None
    words = {True: "kept", False: "broken", None: "not decided"}
    rows = [
        {**row, "name": "as they are" if row["kind"] == "none" else f"{row['kind']} {row['strength']}",
         "left": [_percent(share) for share in row["shares"]], "verdict": words[row["kept"]],
         "class": {True: "good", False: "bad", None: "warn"}[row["kept"]]}
        for row in found
    ]  # fmt: skip
    places = [*(d.get("at") for d in result["exits"]["decisions"]), "the end"]
    return {"rows": rows, "places": places, "count": found[0]["count"]}


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    e, splits = result["environment"], result["task"]["splits"]
    facts = [
        ("Processor", f"{e.get('cpu', '–')}, {e.get('processors', '–')} processors"),
        ("Instruction sets", ", ".join(e.get("flags") or []) or "–"),
        ("System", f"{e.get('system', '–')}, Python {e.get('python', '–')}"),
        ("Versions", ", ".join(f"{name} {number}" for name, number in (e.get("versions") or {}).items()) or "–"),
        ("Samples", ", ".join(f"{name} {count if count is not None else '–'}" for name, count in splits.items())),
        ("Seed", str(result["seed"])),
    ]
    if known(e.get("empty_mb")):
        facts.append(("Empty graph", f"{figure(e['empty_mb'])} MB in this runtime"))
    if known(result.get("seconds")):
        minutes, seconds = divmod(round(result["seconds"]), 60)
        facts.append(("Duration", f"{minutes} min {seconds} s" if minutes else f"{seconds} s"))
    return [(name, _clip(value)) for name, value in facts]


def _counts(trials: list[dict[str, Any]]) -> str:
    count = {s: sum(t["status"] == s for t in trials) for s in ("ok", "not applicable", "failed")}
    return (
        f"{len(trials)} trials: {count['ok']} ok, {count['not applicable']} not applicable, {count['failed']} failed."
    )


def _first(result: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """At most about ``most`` trials, in order: the ones that the page speaks of, then the earliest."""
    named = {*result["pareto"], (result["best"] or {}).get("trial")}
    must = {
        t["number"]
        for t in result["trials"]
        if t["number"] in named or t["role"] in ("baseline", "plain int8") or t["role"].startswith("without ")
    }
    others = [t["number"] for t in result["trials"] if t["number"] not in must]
    shown = {*sorted(must)[:most], *others[: max(0, most - len(must))]}
    return [t for t in result["trials"] if t["number"] in shown]


def render(result: dict[str, Any], most: int = 500) -> str:
    """The page as text, with at most ``most`` trials, and layers, in its tables and charts."""
    files = resources.files("lissom.report")
    style = files.joinpath("page.css").read_text(encoding="utf-8")
    source = files.joinpath("page.html").read_text(encoding="utf-8")
    # A hash holds for the exact text between the tags; the script has no placeholders, so the template's is the page's.
    script = source.partition("<script>")[2].partition("</script>")[0]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(source)
    trials = _first(result, most)
    limits = result["budget"].get("limits") or []
    cards, cards_note = _cards(result)
    ablation = result["ablation"]
    peers = _peers(result)
    return template.render(
        r=result,
        style=Markup(style),  # ours, and in its tag nothing may be escaped
        style_hash=_hash(style),
        script_hash=_hash(script),
        # The recipe is set as code: (before it, recipe, after it).
        answer=sentence(result).partition((result["best"] or {}).get("recipe") or "\0"),
        limits=limits,
        has_limits=bool(limits),
        cards=cards,
        cards_note=cards_note,
        metric=result["task"]["metric"][:1].upper() + result["task"]["metric"][1:],
        pareto=[pareto_svg(result, width, trials) for width in WIDTHS],
        plot_note=cost_axis(result)[1],
        ablation=ablation,
        waterfall=result.get("waterfall") or [],
        exits=_exits(result),
        shift=_shift(result),
        timed=any(known(row.get("with_ms")) for row in ablation),
        forest=[forest_svg(ablation, min(width, 720)) for width in WIDTHS],
        peers=peers,
        energy=any(known(p["metrics"].get("energy_mj")) for p in peers),
        trials=trials,
        hidden=len(result["trials"]) - len(trials),
        counts=_counts(result["trials"]),
        profile=_profile(result, most),
        verification=_verification(result),
        warnings=result["warnings"][:_LINES],
        warnings_hidden=len(result["warnings"]) - _LINES,
        facts=_facts(result),
        again=reproduce(result),
        version=(result["environment"].get("versions") or {}).get("lissom", ""),
        known=known,
        figure=figure,
        fixed=fixed,
        interval=interval,
        bound=bound,
        big=big,
        small=lambda value: f"{value:.2g}" if known(value) else "",
        percent=_percent,
        clip=_clip,
        recipe_of=recipe_of,
        trained=trained,
        quoted=json.dumps,
    )


def write_report(folder: Path, result: dict[str, Any]) -> Path:
    """Write ``folder/report.html``, whole or not at all, under 1.5 MB, and return its path.

    A run of many hundreds of trials is cut to those the page speaks of and the first others; the page says so.
    """
    for most in (500, 200, 60, 20):
        page = render(result, most)
        if len(page.encode()) < MOST_BYTES:
            break
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    write_atomic(path, page)
    return path
