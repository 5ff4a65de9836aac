"""How often the promise of an artifact's exits is kept: fitted on one half of the test data, judged on the other.

    python benchmarks/calibrate_exits.py ARTIFACT --data DATA [--name NAME] [--draws 100]

runs every stage of an artifact with exits (OUT/best of ``lissom slim``) over the data's test split once, then divides
it at random ``--draws`` times. A draw keeps the promise when the model with exits is at most ``risk`` points worse than
without on the half that the thresholds have not seen. That half is finite: a true drop within the promise may look
larger on it, so the share counts both the fitting's chance and this one's. Written to docs/benchmarks/exits.md, one
section a NAME.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from lissom.data.sources import read
from lissom.data.splits import PixelSplit
from lissom.errors import LissomError
from lissom.export.calibration import apply, fit_thresholds
from lissom.export.exporting import run_stages
from lissom.images import Preprocessing
from lissom.runtime.artifact import Artifact
from lissom.tasks.task import batches

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "exits.md"
RISKS = (0.25, 0.5, 1.0, 2.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", help="the section's title; default: the artifact's recipe")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    artifact = Artifact.open(options.artifact)
    if not artifact.plan["decisions"]:
        raise LissomError(f"{options.artifact} has no exits")
    data = read(options.data)
    test = data.test or data.val
    if test is None or test.labels is None:
        raise LissomError(f"{options.data} has no labelled test split")
    split = PixelSplit(test, Preprocessing.from_json(artifact.plan["input"]["preprocessing"]))
    answers, scores = run_stages(artifact, batches(split, 64), options.threads)
    right = np.stack([a.argmax(-1) == split.labels for a in answers], 1)  # (N, K + 1)
    rows = [judge(right, scores, risk, options.draws) for risk in RISKS]
    lines = [
        f"Recipe `{artifact.plan['recipe']}`, {len(right)} test images, {options.draws} random halves. Accuracy at each"
        f" stage: {', '.join(f'{100 * r:.2f} %' for r in right.mean(0))} (the last is the model without exits).",
        "",
        "| promised drop, points | kept on the other half | mean drop there | largest | expected cost |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ]
    write(options.name or artifact.plan["recipe"], "\n".join(lines))
    print("\n".join(lines))
    return 0


def judge(right: np.ndarray, scores: np.ndarray, risk: float, draws: int) -> str:
    """One row: right (N, K + 1) says which stage is right about which image; scores (N, K)."""
    n, stages = right.shape
    harm = right[:, -1:] & ~right[:, :-1]
    costs = np.arange(1, stages + 1) / stages  # stages of equal cost: the promise does not depend on it
    rng = np.random.default_rng(0)
    drops, spent = [], []
    for draw in range(draws):
        order = rng.permutation(n)
        fitted, judged = order[: n // 2], order[n // 2 :]
        found = fit_thresholds(scores[fitted], harm[fitted], costs, risk=risk / 100, seed=draw)
        left = apply(scores[judged], np.array(found.thresholds))
        drops.append(100 * float(right[judged, -1].mean() - right[judged, left].mean()))
        spent.append(float(costs[left].mean()))
    kept = float(np.mean(np.array(drops) <= risk))
    return f"| {risk:g} | {100 * kept:.0f} % | {np.mean(drops):.2f} | {np.max(drops):.2f} | {np.mean(spent):.2f}x |"


def write(name: str, section: str) -> None:
    """Put the section in its place on the page."""
    head = "# The promise of exits\n\nWritten by `benchmarks/calibrate_exits.py`; its text says how.\n"
    page = PAGE.read_text() if PAGE.exists() else head
    block = f"\n## {name}\n\n{section}\n"
    pattern = re.compile(rf"\n## {re.escape(name)}\n.*?(?=\n## |\Z)", re.S)
    page = pattern.sub(lambda _: block, page) if pattern.search(page) else page + block
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page)


if __name__ == "__main__":
    sys.exit(main())
