"""The model card of an artifact: what it is, how good and how fast, how to load it, and what it was not tested for."""

from __future__ import annotations

from typing import Any

from lissom.report.text import NONE, best_or_baseline, big, figure, fixed, interval, known

__all__ = ["card"]

_CLASSES = 20


def _code(text: Any) -> str:
    """A foreign name as a code span on one line: nothing in it is read as Markdown or HTML."""
    flat = " ".join(str(text).replace("`", "'").split())
    return f"`{flat}`" if flat else NONE


def _quality(metrics: dict[str, Any]) -> str:
    if not known(metrics.get("quality")):
        return NONE
    return f"{fixed(metrics['quality'])} % {interval(metrics.get('quality_ci'), 1)}".strip()


def _speed(metrics: dict[str, Any]) -> str:
    if not known(metrics.get("speedup")):
        return NONE
    return f"{metrics['speedup']:.2f}x {interval(metrics.get('speedup_ci'))}".strip()


def _unit(value: Any, unit: str) -> str:
    return f"{figure(value)} {unit}" if known(value) else NONE


def card(result: dict[str, Any], plan: dict[str, Any] | None = None) -> str:
    """``card.md`` of the artifact that a run hands back, in Markdown.

    ``result`` is the dict of ``result.json``; ``plan`` the artifact's ``plan.json``, which adds classes, input and
    verification. Quality is on the ``report`` split, with its interval of 95 %.
    """
    plan = plan or {}
    best, task, target = result["best"] or {}, result["task"], result["target"]
    ours, baseline = best_or_baseline(result), result["baseline"]
    recipe = plan.get("recipe") or best.get("recipe") or ""
    samples, environment = task["splits"].get("report"), result["environment"]
    path = (best.get("artifact") or "path/to/artifact").replace("\\", "/").replace('"', "")

    rows = [
        (f"{task['metric']} on report", _quality(ours), _quality(baseline)),
        ("latency, median of a batch", _unit(ours.get("latency_ms"), "ms"), _unit(baseline.get("latency_ms"), "ms")),
        ("speed-up", _speed(ours), "1.00x"),
        ("size", _unit(ours.get("size_mb"), "MB"), _unit(baseline.get("size_mb"), "MB")),
        (
            "memory above an empty graph",
            _unit(ours.get("memory_above_empty_mb"), "MB"),
            _unit(baseline.get("memory_above_empty_mb"), "MB"),
        ),
        ("parameters", big(ours.get("params")), big(baseline.get("params"))),
        ("multiply-accumulates", big(ours.get("macs")), big(baseline.get("macs"))),
    ]
    shape = (plan.get("input") or {}).get("shape")
    lines = [
        f"# {_code(result['model'])}, made cheaper by lissom",
        "",
        f"A model for {task['kind']} with {task['classes']} classes, exported for {target['runtime']}, made from "
        f"{_code(result['model'])} " + (f"with the recipe {_code(recipe)}." if recipe else "as it was, in float32."),
        *([f"Input: float32, {' x '.join(str(n) for n in shape)} (batch, channels, height, width)."] if shape else []),
        "",
        "| | this model | float32 baseline |",
        "|---|---:|---:|",
        *(f"| {name} | {own} | {base} |" for name, own, base in rows),
        "",
        f"Measured on {_code(environment.get('cpu', NONE))}, batch {target['batch']}, {target['threads']} threads, "
        f"in {target['runtime']} {(environment.get('versions') or {}).get(target['runtime'], '')}".rstrip()
        + f"; quality on {samples} samples of {_code(result['data'])}. Intervals are of 95 %.",
        "",
        "## Use",
        "",
        "```python",
        "import lissom",
        f'model = lissom.load("{" ".join(path.split())}")',
        'print(model.predict(["a.png"]))',
        "```",
        "",
        f"It needs lissom, NumPy, Pillow and {target['runtime']}; no training framework."
        if target["runtime"] != "torch"
        else "It needs lissom, NumPy, Pillow and PyTorch.",
        "",
        "## Limits",
        "",
        f"- {task['metric'].capitalize()} was read once, on {samples} samples of {_code(result['data'])}; on other "
        "data it may differ, and single classes may have lost more than the whole.",
        "- Speed and memory hold for the device above. `lissom measure` tells them for another.",
        "- The licences of the original model and of its data go on to hold.",
    ]
    verification = plan.get("verification") or {}
    if known(verification.get("agreement")):
        lines.append(
            f"- Beside the model it was exported from, it gave the same answer on "
            f"{fixed(100 * verification['agreement'])} % of the inputs compared; the outputs differed by at most "
            f"{verification.get('max_error', float('nan')):.2g}."
        )
    lines += [f"- Fell back: {_code(line)}." for line in verification.get("fallbacks") or []]
    classes = plan.get("classes") or []
    if classes:
        more = f" and {len(classes) - _CLASSES} more, in `plan.json`" if len(classes) > _CLASSES else ""
        lines += ["", "## Classes", "", ", ".join(_code(name) for name in classes[:_CLASSES]) + more + "."]
    return "\n".join(lines) + "\n"
