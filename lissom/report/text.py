"""A run's result in words: the answer in one sentence, the rows of its table, and the command that repeats it.

Everything here reads the dict that ``result.json`` holds. Numbers that are missing are shown as an en dash.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any, TypeGuard

__all__ = [
    "NONE",
    "TRIAL_COLUMNS",
    "best_or_baseline",
    "big",
    "bound",
    "figure",
    "fixed",
    "interval",
    "known",
    "recipe_of",
    "reproduce",
    "sentence",
    "trained",
    "trial_table",
]

NONE = "–"  # not available
TRIAL_COLUMNS = ("#", "role", "recipe", "status", "quality", "drop", "ms", "speed-up", "MB", "memory MB", "reason")

# What a search decides by itself: one recipe needs none of it, and must not be written into the same folder.
_OPTIONS_OF_A_SEARCH = {"--recipe", "--trials", "--time", "--techniques", "--out"}
_FLAGS_OF_A_SEARCH = {"--resume", "--json"}


def known(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def figure(value: Any, digits: int = 3) -> str:
    """A measured number with ``digits`` significant digits and no exponent; an en dash where there is none."""
    if not known(value):
        return NONE
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, digits + 3)}f}"


def fixed(value: Any, places: int = 1) -> str:
    """A number with a fixed count of decimals, for columns that are compared by eye; an en dash where there is none."""
    if not known(value):
        return NONE
    # Minus nought is a rounding artefact, not a finding.
    return f"{round(value, places) + 0.0:.{places}f}"


def has_interval(value: Any) -> TypeGuard[Sequence[float]]:
    """Whether ``value`` is a pair of finite numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(known(v) for v in value)


def interval(value: Any, places: int = 2) -> str:
    """``[low, high]``, or nothing where there is no interval."""
    return f"[{fixed(value[0], places)}, {fixed(value[1], places)}]" if has_interval(value) else ""


def big(value: Any) -> str:
    """A count with a suffix: 1.24 M, 83.1 M, 4.1 G."""
    if not known(value):
        return NONE
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{figure(value / size)}{suffix}"
    return f"{value:g}"


def bound(value: Any, unit: str) -> str:
    """A limit or what was reached of it, in the words of the budget: ``0.70x``, ``12.3 ms``, ``2.0 points``."""
    if not known(value):
        return NONE
    if unit == "x":
        return f"{value:.2f}x"
    if unit in ("points", "%"):
        return f"{fixed(value)} {unit}"
    text = big(value) if abs(value) >= 1e4 else figure(value)
    return f"{text}{unit}" if unit.startswith("/") else f"{text} {unit}".rstrip()


def best_or_baseline(result: dict[str, Any]) -> dict[str, Any]:
    """The metrics of what the run hands back: the best candidate's, or the baseline's where nothing was better."""
    return (result["best"] or {}).get("metrics") or result["baseline"]


def shortfall(limit: dict[str, Any]) -> str:
    """How near a limit that was not met came."""
    if not known(limit.get("reached")):
        return f"{limit['quantity']} is not available here"
    unit = limit.get("unit") or ""
    return f"{limit['quantity']} reached {bound(limit['reached'], unit)} of the {bound(limit['bound'], unit)} asked"


def _speed(metrics: dict[str, Any]) -> str:
    speedup, ci = metrics.get("speedup"), metrics.get("speedup_ci")
    if not known(speedup):
        latency = metrics.get("latency_ms")
        return f"takes {figure(latency)} ms" if known(latency) else "was exported"
    around = f" {interval(ci)}" if interval(ci) else ""
    if has_interval(ci) and ci[0] <= 1 <= ci[1]:
        return f"runs as fast as the baseline, within the error of measurement ({speedup:.2f}x{around}),"
    return f"runs {speedup:.2f}x as fast{around}"


def _quality(metrics: dict[str, Any], metric: str) -> str:
    quality, drop = metrics.get("quality"), metrics.get("drop")
    if not known(quality):
        return f"with {metric} not available"
    ci = interval(metrics.get("quality_ci"), 1)
    value = f"{fixed(quality)} %{' ' + ci if ci else ''}"
    if not known(drop):
        return f"at {value} {metric}"
    if fixed(drop) == "0.0":
        return f"at the same {metric} ({value})"
    return f"at {fixed(abs(drop))} points {'less' if drop > 0 else 'more'} {metric} ({value})"


def sentence(result: dict[str, Any]) -> str:
    """The answer of a run, with intervals of 95 %; where the budget was not met, how near it came stands first.

    For example: ``digits_vit runs 1.48x as fast [1.45, 1.51] at 0.3 points less top-1 accuracy (97.2 % [96.0, 98.1])
    with the recipe fuse() + int8(). Budget met.``
    """
    best, metric = result["best"], result["task"]["metric"]
    limits = result["budget"].get("limits") or []
    if best and best.get("recipe"):
        metrics = best["metrics"]
        answer = f"{result['model']} {_speed(metrics)} {_quality(metrics, metric)} with the recipe {best['recipe']}."
    else:
        baseline = {**result["baseline"], "drop": None, "speedup": None}
        answer = (
            f"{result['model']} stays as it is: no recipe of this run made it cheaper at the quality asked. "
            f"In float32 it {_speed(baseline)} {_quality(baseline, metric)}."
        )
    if result["met"]:
        return f"{answer} Budget met." if limits else answer
    near = "; ".join(shortfall(limit) for limit in limits if not limit.get("met"))
    return f"Budget not met: {near or 'nothing could be measured'}. {answer}"


def recipe_of(trial: dict[str, Any]) -> str:
    """A trial's recipe with its knobs settled, or as it was asked; the baseline's is empty and is called so."""
    return trial.get("resolved") or trial.get("recipe") or "unchanged, float32"


def trained(trial: dict[str, Any]) -> str:
    """The trainings that a trial's weights had, in epochs of the data; "" where there is none."""
    epochs = [f"{figure(each.get('passes'), 2)} epochs" for each in trial.get("trainings") or []]
    return f"trained for {', then '.join(epochs)}" if epochs else ""


def trial_table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a trial, as text, in the order of ``TRIAL_COLUMNS``."""
    rows: list[tuple[str, ...]] = []
    for trial in result["trials"]:
        m = trial.get("metrics") or {}
        speed = f"{fixed(m.get('speedup'), 2)}{'x' if known(m.get('speedup')) else ''} {interval(m.get('speedup_ci'))}"
        rows.append(
            (
                str(trial["number"]),
                trial["role"],
                recipe_of(trial),
                trial["status"],
                fixed(m.get("quality")),
                fixed(m.get("drop")),
                figure(m.get("latency_ms")),
                speed.strip(),
                figure(m.get("size_mb")),
                figure(m.get("memory_above_empty_mb")),
                trial.get("reason", ""),
            )
        )
    return rows


def reproduce(result: dict[str, Any]) -> str:
    """The command that applies the best recipe again without a search; empty where there is nothing to repeat."""
    best, command = result["best"], result.get("command") or ""
    if not best or not best.get("recipe"):
        return ""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    if words[:2] != ["lissom", "slim"]:
        return ""
    kept, skip = [], False
    for word in words:
        option, given, _ = word.partition("=")
        if skip:
            skip = False
        elif option in _OPTIONS_OF_A_SEARCH:
            skip = not given
        elif word not in _FLAGS_OF_A_SEARCH:
            kept.append(word)
    if not any(word.partition("=")[0] == "--seed" for word in kept):
        kept += ["--seed", str(result["seed"])]
    recipe = best["recipe"]
    # A recipe is full of single quotes: double ones around it read better, where the shell leaves the text alone.
    quoted = shlex.quote(recipe) if set(recipe) & set('"$`\\!\n') else f'"{recipe}"'
    return f"{shlex.join(kept)} --recipe {quoted}"
