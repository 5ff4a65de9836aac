"""The page's charts as inline SVG: crisp at any size, coloured by the page's own light and dark variables, with text
that can be selected and read aloud. Every mark carries its numbers in a ``<title>``.

A chart is drawn for a width in pixels rather than scaled, so that its text has the same size on a phone: the page
holds a narrow and a wide form and shows one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from lissom.report.text import big, figure, fixed, has_interval, interval, known, recipe_of

__all__ = ["COSTS", "cost_axis", "forest_svg", "layers_svg", "pareto_svg", "waterline_svg"]

CHAR = 6.7  # width of a character at the charts' 12 px, on average, rounded up

# Quantity of a budget -> (field of the metrics, axis label, whether more is better).
COSTS = {
    "latency": ("latency_ms", "latency, ms a batch", False),
    "p95": ("p95_ms", "95th percentile of latency, ms a batch", False),
    "throughput": ("throughput", "throughput, samples a second", True),
    "memory": ("memory_above_empty_mb", "memory above an empty graph, MB", False),
    "size": ("size_mb", "size on disk, MB", False),
    "energy": ("energy_mj", "energy, mJ a batch", False),
    "macs": ("macs", "multiply-accumulates", False),
    "params": ("params", "parameters", False),
}
# Fields are in these units; a limit in another unit is not drawn rather than drawn in the wrong place.
_UNITS = {"ms", "/s", "MB", "mJ", ""}


def el(tag: str, *children: Any, **attributes: Any) -> Markup:
    """One element, its attributes (``class_``, ``text_anchor``) and children escaped; Markup stays as it is."""
    written = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), f"{v:.1f}" if isinstance(v, float) else v)
        for name, v in attributes.items()
        if v is not None
    )
    body = Markup("").join(escape(child) for child in children)
    return Markup("<{}{}>{}</{}>").format(Markup(tag), written, body, Markup(tag))


def _svg(width: int, height: int, title: str, parts: Iterable[Markup]) -> Markup:
    return el(
        "svg",
        *parts,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=title,
        class_="chart",
    )


def shorten(text: str, length: int) -> str:
    """At most ``length`` characters, the middle left out: both ends of a module's path matter."""
    if len(text) <= length:
        return text
    head = max(1, (length - 1) // 2)
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


@dataclass(frozen=True)
class Scale:
    """From values ``low..high`` to pixels ``start..end``, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        """Round values inside the range."""
        if not self.log:
            rough = (self.high - self.low) / about
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
            first = math.ceil(self.low / step - 1e-9)
            return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
            if len(found) >= min(about, 5):
                break
        return found


def _number(value: float) -> str:
    """A tick: no needless zeros."""
    return big(value) if abs(value) >= 1e4 else f"{value:.4g}"


def cost_axis(result: dict[str, Any]) -> tuple[str, str]:
    """(quantity, remark): the budget's first cost, or latency where that one was not measured here."""
    costs = [limit["quantity"] for limit in result["budget"].get("limits") or [] if limit["quantity"] in COSTS]
    quantity = costs[0] if costs else "latency"
    if not any(known((t.get("metrics") or {}).get(_field(result, quantity))) for t in result["trials"]):
        return "latency", f"{quantity} is not available here; latency is shown." if quantity != "latency" else ""
    return quantity, ""


def _field(result: dict[str, Any], quantity: str) -> str:
    """The metric that a limit on ``quantity`` is about: an absolute limit on memory means the whole process's peak."""
    for limit in result["budget"].get("limits") or []:
        if limit["quantity"] == quantity == "memory" and limit.get("unit") != "x":
            return "memory_mb"
    return COSTS[quantity][0]


@dataclass(frozen=True)
class Point:
    """A candidate in the Pareto plot. ``kind`` is a class of the style sheet."""

    x: float
    y: float
    kind: str
    label: str
    title: str
    front: bool = False


def _points(result: dict[str, Any], field: str, trials: Sequence[dict[str, Any]]) -> list[Point]:
    best = (result["best"] or {}).get("trial")
    front = set(result["pareto"])
    names = {"baseline": ("baseline", "float32 baseline"), "plain int8": ("plain", "plain int8")}
    found = []
    for trial in trials:
        m = trial.get("metrics") or {}
        if trial["status"] != "ok" or not known(m.get(field)) or not known(m.get("quality")) or m[field] <= 0:
            continue
        kind, label = names.get(trial["role"], ("front" if trial["number"] in front else "trial", ""))
        if trial["number"] == best:
            kind, label = "best", "lissom"
        title = (
            f"trial {trial['number']}, {trial['role']}: {shorten(recipe_of(trial), 120)}\n"
            f"{fixed(m['quality'], 2)} % {interval(m.get('quality_ci'), 1)}, drop {fixed(m.get('drop'), 2)}\n"
            f"{figure(m.get('latency_ms'))} ms, {fixed(m.get('speedup'), 2)}x {interval(m.get('speedup_ci'))}"
        )
        found.append(Point(m[field], m["quality"], kind, label, title, trial["number"] in front))
    start = next((p for p in found if p.kind == "baseline"), None)
    for peer in result["peers"]:
        m = peer.get("metrics") or {}
        if start is None or peer.get("status") != "ok" or not known(m.get(field)) or m[field] <= 0:
            continue
        # Quality of peers is not read on choose: the same weights give the baseline's, less what is known to be lost.
        quality = start.y - (m["drop"] if known(m.get("drop")) else 0.0)
        title = f"{peer['name']}: {figure(m.get('latency_ms'))} ms, {fixed(m.get('speedup'), 2)}x"
        found.append(Point(m[field], quality, "peer", peer["name"], title))
    return found


def _mark(point: Point, x: float, y: float) -> Markup:
    """The symbol of a point: the named ones differ in shape, not in colour only."""
    title = el("title", point.title)
    if point.kind == "baseline":
        return el("rect", title, x=x - 5, y=y - 5, width=10, height=10, class_="m-baseline")
    if point.kind == "plain":
        return el("path", title, d=f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z", class_="m-plain")
    if point.kind == "peer":
        return el("path", title, d=f"M{x:.1f} {y - 6:.1f}l6 11h-12z", class_="m-peer")
    radius = {"best": 7.5, "front": 4.0}.get(point.kind, 3.2)
    return el("circle", title, cx=x, cy=y, r=radius, class_=f"m-{point.kind}")


_PLACES = (
    (12, 4, "start"),
    (-12, 4, "end"),
    (0, -13, "middle"),
    (0, 22, "middle"),
    (10, -14, "start"),
    (-10, -14, "end"),
    (10, 24, "start"),
    (-10, 24, "end"),
    (0, -28, "middle"),
    (0, 38, "middle"),
)


def _labels(
    named: Sequence[tuple[Point, float, float]],
    others: Sequence[tuple[float, float]],
    inside: tuple[float, float, float, float],
) -> list[Markup]:
    """Names beside their marks, where they cover the fewest other marks and no other name; else the legend must do."""
    taken = [(x - 8, y - 8, x + 8, y + 8) for _, x, y in named]
    parts = []
    for point, x, y in sorted(named, key=lambda n: n[0].kind != "best"):
        length = len(point.label) * CHAR
        free = []
        for order, (dx, dy, anchor) in enumerate(_PLACES):
            left = x + dx - {"start": 0.0, "middle": length / 2, "end": length}[anchor]
            box = (left, y + dy - 11, left + length, y + dy + 3)
            if box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]:
                continue
            if any(box[2] > t[0] and box[0] < t[2] and box[3] > t[1] and box[1] < t[3] for t in taken):
                continue
            covered = sum(box[0] < px < box[2] and box[1] < py < box[3] for px, py in others)
            free.append((covered, order, dx, dy, anchor, box))
        if free:
            _, _, dx, dy, anchor, box = min(free)
            taken.append(box)
            name = "label strong" if point.kind == "best" else "label"
            parts.append(el("text", point.label, x=x + dx, y=y + dy, text_anchor=anchor, class_=name))
    return parts


def _limits(result: dict[str, Any], quantity: str, start: Point | None) -> tuple[Any, Any]:
    """The budget's limits on the two axes, as (value, text) or None: (cost, quality)."""
    cost = quality = None
    metric = result["task"]["metric"]
    for limit in result["budget"].get("limits") or []:
        value, unit, text = limit.get("bound"), limit.get("unit") or "", limit["text"]
        if not known(value):
            continue
        if limit["quantity"] == quantity:
            if unit == "x" and start is not None:
                cost = (value * start.x, text)
            elif unit in _UNITS:
                cost = (value, text)
        elif limit["quantity"] == "drop" and start is not None:
            quality = (start.y - value, text)
        elif limit["quantity"] in ("quality", metric) and unit != "x":
            quality = (value, text)
    return cost, quality


def pareto_svg(result: dict[str, Any], width: int, trials: Sequence[dict[str, Any]] | None = None) -> Markup:
    """Quality on ``choose`` against the budget's first cost: every ok trial, baseline, peers, front, limits.

    ``trials`` are the ones to draw (all of them by default). Points far below the rest stand at the lower edge, as
    downward triangles, so that one ruined model does not flatten the plot.
    """
    quantity, _ = cost_axis(result)
    field, name, more = _field(result, quantity), *COSTS[quantity][1:]
    points = _points(result, field, result["trials"] if trials is None else trials)
    height = 420 if width > 500 else 340
    top, bottom, left, right = 28, height - 46, 46, width - 14
    if not points:
        nothing = el("text", "No candidate was measured.", x=width / 2, y=60.0, text_anchor="middle", class_="label")
        return _svg(width, 110, "No candidate was measured", [nothing])
    start = next((p for p in points if p.kind == "baseline"), None)
    cost, quality = _limits(result, quantity, start)

    allowed = abs(start.y - quality[0]) if start is not None and quality else 0.0
    best = max(p.y for p in points)
    lowest = best - max(10.0, 3 * allowed)
    floor = min(p.y for p in points if p.y >= lowest)
    if quality and quality[0] >= lowest:
        floor = min(floor, quality[0])
        best = max(best, quality[0])
    pad = max(0.06 * (best - floor), 0.25)
    y = Scale(floor - pad, best + pad, bottom, top)

    xs = [p.x for p in points] + ([cost[0]] if cost and cost[0] > 0 else [])
    log = max(xs) / min(xs) > 3
    if log:
        margin = (max(xs) / min(xs)) ** 0.06
        x = Scale(min(xs) / margin, max(xs) * margin, left, right, log=True)
    else:
        margin = 0.08 * (max(xs) - min(xs)) or 0.1 * max(xs)
        x = Scale(min(xs) - margin, max(xs) + margin, left, right)

    parts = []
    if cost or quality:
        edges = [x(cost[0]) if cost else (left if more else right)]
        edges.append(right if more else left)
        low = y(quality[0]) if quality and quality[0] > y.low else bottom
        area = el("title", f"meets the budget: {result['budget'].get('text', '')}")
        parts.append(
            el("rect", area, x=float(min(edges)), y=float(top), width=float(abs(edges[1] - edges[0])),
               height=float(max(0, low - top)), class_="feasible")
        )  # fmt: skip
    for tick in y.ticks(6):
        parts.append(el("line", x1=left, x2=right, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(el("text", _number(tick), x=left - 8, y=y(tick) + 4, text_anchor="end", class_="tick"))
    previous = -math.inf
    for tick in x.ticks(width // 90):
        if x(tick) - previous < 34:
            continue
        previous = x(tick)
        parts.append(el("line", x1=x(tick), x2=x(tick), y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(el("text", _number(tick), x=x(tick), y=bottom + 18, text_anchor="middle", class_="tick"))
    parts.append(el("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    axis = f"{name}{', log scale' if log else ''} {'→ better' if more else '← better'}"
    parts.append(el("text", axis, x=(left + right) / 2, y=float(height - 8), text_anchor="middle", class_="label"))

    metric = result["task"]["metric"]
    parts.append(el("text", f"↑ {metric} on choose, %", x=4, y=12, class_="label"))

    if cost:
        parts.append(el("line", x1=x(cost[0]), x2=x(cost[0]), y1=top, y2=bottom, class_="limit"))
        side = -6 if x(cost[0]) > (left + right) / 2 else 6
        parts.append(
            el("text", cost[1], x=x(cost[0]) + side, y=bottom - 16.0, text_anchor="end" if side < 0 else "start",
               class_="limit-text")
        )  # fmt: skip
    if quality and quality[0] > y.low:
        parts.append(el("line", x1=left, x2=right, y1=y(quality[0]), y2=y(quality[0]), class_="limit"))
        parts.append(el("text", quality[1], x=right - 4, y=y(quality[0]) - 6, text_anchor="end", class_="limit-text"))

    path, highest = "", -math.inf
    for p in sorted((p for p in points if p.front), key=lambda p: (-p.x if more else p.x, -p.y)):
        if p.y > highest and p.y >= y.low:
            path += f"M{x(p.x):.1f} {y(p.y):.1f}" if not path else f"H{x(p.x):.1f}V{y(p.y):.1f}"
            highest = p.y
    if path:
        parts.append(el("path", el("title", "Pareto front"), d=path, class_="front-line"))

    named = []
    for p in sorted(points, key=lambda p: ["trial", "front", "peer", "plain", "baseline", "best"].index(p.kind)):
        px, py = x(p.x), y(p.y)
        if p.y < y.low:
            parts.append(
                el("path", el("title", p.title), d=f"M{px:.1f} {bottom - 1}l-5 -8h10z", class_=f"m-below m-{p.kind}")
            )
            continue
        parts.append(_mark(p, px, py))
        if p.label:
            named.append((p, px, py))
    others = [(x(p.x), y(p.y)) for p in points if not p.label]
    parts += _labels(named, others, (left, top, right, bottom))
    return _svg(width, height, f"{metric} on choose against {name}, {len(points)} candidates", parts)


def forest_svg(rows: Sequence[dict[str, Any]], width: int) -> Markup:
    """What each technique brought: time without it over time with it, with its interval; right of 1 it pays."""
    rows = [row for row in rows if known(row.get("ratio"))]
    if not rows:
        return Markup("")
    label = min(220, width // 3)
    height = 30 * len(rows) + 50
    ends = [1.0]
    for row in rows:
        ends += [row["ratio"], *(v for v in row.get("ratio_ci") or [] if known(v))]
    pad = 0.08 * (max(ends) - min(ends)) or 0.1
    x = Scale(min(ends) - pad, max(ends) + pad, label, width - 16)
    bottom = height - 40
    parts = [el("line", x1=x(1.0), x2=x(1.0), y1=4, y2=bottom, class_="axis")]
    for i, row in enumerate(rows):
        y = 20.0 + 30 * i
        ci = row.get("ratio_ci") or []
        kept = "kept" if row["kept"] else "rejected"
        title = el("title", f"{row['technique']}: {row['ratio']:.3f} {interval(ci, 3)}, {kept}")
        name = shorten(row["technique"], int((label - 10) / (1.2 * CHAR)))
        parts.append(el("text", el("title", row["technique"]), name, x=label - 10, y=y + 4, text_anchor="end",
                        class_="label"))  # fmt: skip
        if has_interval(ci):
            parts.append(el("line", title, x1=x(ci[0]), x2=x(ci[1]), y1=y, y2=y, class_=f"whisker {kept}"))
        parts.append(el("circle", title, cx=x(row["ratio"]), cy=y, r=5.0, class_=f"dot {kept}"))
    for tick in x.ticks(width // 110):
        parts.append(el("text", f"{_number(tick)}x", x=x(tick), y=bottom + 16.0, text_anchor="middle", class_="tick"))
    parts.append(
        el("text", "time without / time with; right of 1x it pays", x=width / 2, y=height - 6.0, text_anchor="middle",
           class_="label")
    )  # fmt: skip
    return _svg(width, height, "Time without each technique over time with it", parts)


def _grouped(paths: Iterable[str], most: int) -> dict[str, str]:
    """Each path's group: the longest prefix of equal depth for all that leaves at most ``most`` groups, else itself."""
    paths = list(paths)
    deepest = max((path.count(".") + 1 for path in paths), default=1)
    for depth in range(deepest, 0, -1):
        groups = {path: ".".join(path.split(".")[:depth]) for path in paths}
        if len(set(groups.values())) <= most:
            return groups
    return {path: path for path in paths}


def layers_svg(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], width: int, most: int = 24) -> Markup:
    """Milliseconds of each module before and after, in the network's order.

    Where there are more than ``most`` modules, those of one block are added up; where there are still too many, the
    slowest are drawn and the rest are one pair of bars.
    """
    timed = [(side, row) for side, rows in enumerate((before, after)) for row in rows if known(row.get("ms"))]
    groups = _grouped((str(row["path"]) for _, row in timed), most)
    times: dict[str, list[float]] = {}
    for side, row in timed:
        times.setdefault(groups[str(row["path"])], [0.0, 0.0])[side] += row["ms"]
    if not times:
        return Markup("")
    pairs = [(path, first, second) for path, (first, second) in times.items()]
    if len(pairs) > most:
        pairs.sort(key=lambda pair: -max(pair[1:]))
        rest = pairs[most - 1 :]
        pairs = [*pairs[: most - 1], (f"{len(rest)} others", sum(p[1] for p in rest), sum(p[2] for p in rest))]
    label = min(230, int(width * 0.38))
    height = 30 * len(pairs) + 8
    x = Scale(0, max(max(a, b) for _, a, b in pairs) or 1.0, label, width - 52)
    parts = []
    for i, (path, first, second) in enumerate(pairs):
        y = 30.0 * i + 6
        name = shorten(path, int((label - 10) / CHAR))
        parts.append(el("text", el("title", path), name, x=label - 8, y=y + 15, text_anchor="end", class_="label"))
        for value, top, kind in ((first, y, "before"), (second, y + 11, "after")):
            if value <= 0:
                continue
            title = el("title", f"{path}, {kind}: {figure(value)} ms")
            parts.append(el("rect", title, x=label, y=top, width=max(1.0, x(value) - label), height=9,
                            class_=f"bar-{kind}"))  # fmt: skip
            parts.append(el("text", figure(value), x=x(value) + 5, y=top + 8.5, class_="small"))
    return _svg(width, height, "Milliseconds of each module before and after", parts)


def _ridge(profile: dict[str, Any], row: dict[str, Any]) -> float | None:
    """The balance, operations a byte, of the machine at the precision the layer ran in; None where not measured."""
    machines = {m.get("bits"): m for m in profile.get("machines") or []}
    machine = machines.get(row.get("bits")) or profile.get("machine") or {}
    peak, bandwidth = machine.get("peak"), machine.get("bandwidth")
    return peak / bandwidth if known(peak) and known(bandwidth) and bandwidth > 0 else None


def waterline_svg(profile: dict[str, Any], width: int) -> Markup:
    """Layers as columns: width is bytes moved, height is operations a byte, so that area is operations.

    The water stands at the machine's balance I* = peak / bandwidth (arXiv 2404.03617): a column under it is bound by
    memory and takes time in proportion to its width, one above it by arithmetic, in proportion to its area. Columns
    are coloured by measured efficiency. Those far above the water are cut at the top. Where layers run in different
    precisions, each has the water of its own peak.
    """
    rows = [r for r in profile["rows"] if known(r.get("bytes")) and known(r.get("intensity")) and r["bytes"] > 0]
    if not rows:
        return Markup("")
    levels = [_ridge(profile, row) for row in rows]
    balances = [level for level in levels if level is not None]
    height, left, right, top = 240, 46, width - 8, 10
    bottom = height - 34
    tallest = max(r["intensity"] for r in rows) or 1.0
    high = max(min(tallest, 8 * max(balances)), 1.4 * max(balances)) if balances else tallest
    y = Scale(0, high, bottom, top)
    x = Scale(0, sum(r["bytes"] for r in rows), left, right)
    parts = []
    surface, done = "", 0.0
    for row, level in zip(rows, levels, strict=True):
        start, end = x(done), x(done + row["bytes"])
        done += row["bytes"]
        if level is not None:
            parts.append(el("rect", x=start, y=y(level), width=end - start, height=bottom - y(level), class_="water"))
            surface += f"M{start:.1f} {y(level):.1f}H{end:.1f}"
    for tick in y.ticks(5):
        parts.append(el("text", _number(tick), x=left - 8, y=y(tick) + 4, text_anchor="end", class_="tick"))
    done = 0.0
    for row in rows:
        efficiency = row.get("efficiency")
        step = min(4, max(0, int(efficiency * 5))) if known(efficiency) else None
        cut = row["intensity"] > high
        percent = f"{100 * efficiency:.0f} % of the peak" if known(efficiency) else "efficiency not available"
        title = el(
            "title",
            f"{row['path']} ({row['kind']}): {big(2 * (row.get('macs') or 0))} operations, {big(row['bytes'])}B, "
            f"{figure(row['intensity'])} operations a byte, {figure(row.get('ms'))} ms, {percent}",
        )
        upper = y(min(row["intensity"], high))
        parts.append(el("rect", title, x=x(done), y=upper, width=max(0.5, x(done + row["bytes"]) - x(done)),
                        height=max(0.8, bottom - upper), class_="col " + ("e-none" if step is None else f"e-{step}") +
                        (" cut" if cut else "")))  # fmt: skip
        done += row["bytes"]
    if balances:
        parts.append(el("path", el("title", "waterline: peak / bandwidth"), d=surface, class_="waterline"))
        lowest, highest = figure(min(balances)), figure(max(balances))
        level_text = lowest if lowest == highest else f"{lowest} to {highest}"
        text = f"waterline: {level_text} operations a byte"
        parts.append(el("text", text, x=right - 4, y=12, text_anchor="end", class_="water-text"))
    parts.append(el("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    axis = f"bytes moved, layer after layer ({big(done)}B in all)"
    parts.append(el("text", axis, x=(left + right) / 2, y=height - 8.0, text_anchor="middle", class_="label"))
    return _svg(width, height, "Operations a byte of each layer, and the machine's waterline", parts)
