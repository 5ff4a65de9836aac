"""Proof: one published claim in small, the system beside its own baseline in the same run, with a verdict.

A proof is one function in a file of its own::

    @register("proof", "simq_nas")
    def simq_nas(settings: Settings) -> ProofResult: ...

``run_proof`` finds it by its id, runs it, and returns rows (mean and 95 % interval over the seeds) and claims.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lissom.errors import LissomError
from lissom.registry import load_part

__all__ = [
    "INCONCLUSIVE",
    "NOT_SHOWN",
    "SHOWS",
    "Claim",
    "KeptFigures",
    "ProofResult",
    "Row",
    "Settings",
    "mean_interval",
    "run_proof",
    "verdict_by_interval",
]

SHOWS = "shows"
NOT_SHOWN = "does not show at this scale"
INCONCLUSIVE = "inconclusive"
VERDICTS = (SHOWS, NOT_SHOWN, INCONCLUSIVE)


@dataclass(frozen=True)
class Settings:
    """How a proof is run: ``quick`` (at most two minutes on two cores), one repetition a seed, progress in sentences.

    ``folder`` is for files that the proof wants to keep between its steps, such as checkpoints.
    """

    quick: bool
    seeds: tuple[int, ...]
    progress: Callable[[str], None]
    folder: Path


class KeptFigures:
    """Finished parts of a proof in ``settings.folder / file``, a line each, so that a run that was killed goes on.

    ``what`` says in words what decides the figures beside a part's name and seed: data, sizes. A part that was kept
    under other words is computed anew. Figures are whatever JSON can hold.
    """

    def __init__(self, settings: Settings, file: str, what: str = "") -> None:
        self._path, self._what = settings.folder / file, what
        self._known: dict[tuple[str, str, int], dict[str, Any]] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else ():
            try:
                entry = json.loads(line)
                self._known[entry["what"], entry["part"], entry["seed"]] = entry["figures"]
            except (ValueError, KeyError, TypeError):  # a kill cut the line short
                continue

    def get(self, part: str, seed: int, figures: Callable[[], Mapping[str, Any]], what: str = "") -> dict[str, Any]:
        """The figures of a part by name, as they were kept, else as ``figures`` returns them. ``what`` is said of this
        part alone."""
        words = f"{self._what} {what}".strip()
        key = (words, part, seed)
        if key not in self._known:
            self._known[key] = found = dict(figures())
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"what": words, "part": part, "seed": seed, "figures": found}))
        return self._known[key]


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """The mean, and its 95 % interval by Student's t with n - 1 degrees of freedom (None below two values)."""
    from scipy import stats

    count = len(values)
    if count == 0:
        raise ValueError("a mean of no values")
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    half = float(stats.t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
    return mean, (mean - half, mean + half)


def verdict_by_interval(differences: Sequence[float], *, matters: float = 0.0) -> str:
    """Judge a claim "the system is better than its baseline" by paired differences, one a seed.

    A difference is signed so that positive is the claimed side, and both members of a pair share seed, data and
    effort. With the 95 % t-interval (low, high) of their mean:

    - ``shows``: low > 0. The whole interval lies on the claimed side.
    - ``does not show at this scale``: high <= ``matters``, the smallest advantage worth having, in the differences'
      own unit. Either the interval lies on the other side, or it is narrow enough to exclude an advantage that matters.
    - ``inconclusive``: all else (the interval holds 0 and an advantage that matters), and fewer than two seeds.
    """
    if matters < 0:
        raise ValueError(f"matters is {matters}; the smallest advantage worth having is at least 0")
    if not all(math.isfinite(d) for d in differences):
        raise ValueError("a difference is not finite")
    interval = mean_interval(differences)[1] if differences else None
    if interval is None:
        return INCONCLUSIVE
    low, high = interval
    if low > 0:
        return SHOWS
    return NOT_SHOWN if high <= matters else INCONCLUSIVE


@dataclass(frozen=True)
class Row:
    """One line of a proof's table: ``values`` holds one figure a seed, ``cost`` what it took (seconds, images, ...)."""

    name: str
    metric: str
    values: tuple[float, ...]
    unit: str = ""
    cost: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return mean_interval(self.values)[0]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % t-interval of the mean; None with one seed."""
        return mean_interval(self.values)[1]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "metric": self.metric,
            "unit": self.unit,
            "values": list(self.values),
            "mean": self.mean,
            "interval": list(self.interval) if self.interval else None,
            "cost": dict(self.cost),
        }


@dataclass(frozen=True)
class Claim:
    """A sentence from the paper, in the form that was tested, what came of it, and the figures behind that."""

    text: str
    verdict: str
    evidence: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"{self.verdict!r} is none of {', '.join(VERDICTS)}")

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "verdict": self.verdict, "evidence": self.evidence}


@dataclass(frozen=True)
class ProofResult:
    """What a proof found. ``seconds`` and ``settings`` are filled in by ``run_proof``."""

    system: str
    title: str
    claims: tuple[Claim, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "system": self.system,
            "title": self.title,
            "claims": [c.to_json() for c in self.claims],
            "rows": [r.to_json() for r in self.rows],
            "notes": list(self.notes),
            "seconds": self.seconds,
            "settings": dict(self.settings),
        }

    def __str__(self) -> str:
        """The title, the table of rows, then every claim with its verdict."""
        table = [("", "metric", "mean", "95 % interval", "seeds", "cost"), *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = [f"{self.system}: {self.title}", ""]
        lines += ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        for claim in self.claims:
            lines += ["", f"[{claim.verdict}] {claim.text}", f"  {claim.evidence}"]
        if self.notes:
            lines += ["", *(f"Note: {note}" for note in self.notes)]
        return "\n".join([*lines, "", f"{self.seconds:.0f} s"])


def _cells(row: Row) -> tuple[str, ...]:
    unit = f" {row.unit}" if row.unit else ""
    interval = f"{row.interval[0]:.4g} to {row.interval[1]:.4g}" if row.interval else "-"
    cost = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.cost.items())
    return row.name, row.metric, f"{row.mean:.4g}{unit}", interval, str(len(row.values)), cost


def run_proof(
    system: str,
    quick: bool = False,
    seeds: int | Sequence[int] = 3,
    *,
    folder: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> ProofResult:
    """Run the proof called ``system``; ``seeds`` is their number (0, 1, ...) or the seeds themselves.

    ``folder`` keeps the proof's files; without one they go to a temporary folder that is removed. Raises LissomError
    for an unknown id and for no seeds.
    """
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen:
        raise LissomError("a proof needs at least one seed, and three for an interval worth reading")
    if len(set(chosen)) != len(chosen):
        raise LissomError("a seed stands twice; the same run twice would make the interval too narrow")
    proof: Callable[[Settings], ProofResult] = load_part("proof", system)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"lissom-{system}-") as temporary:
        where = Path(folder) if folder is not None else Path(temporary)
        try:
            where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LissomError(f"the folder {where} cannot be made: {error.strerror}") from error
        result = proof(Settings(quick, chosen, progress or (lambda sentence: None), where))
    settings = {"quick": quick, "seeds": list(chosen), **result.settings}
    return replace(result, seconds=time.perf_counter() - start, settings=settings)
