"""What a decision costs beside the graphs, in each runtime, on a tiny network: a few microseconds, or exits lie.

    python benchmarks/overhead.py [--calls 10000]

Two exits in a small convolutional network that no sample takes, so that each run makes both decisions; the plan's
time less that of its three graphs, medians over the calls, for each decision (``lissom.meters.overhead``). Prints a
table, and ends with 1 where a runtime needs more than 30 microseconds a decision.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lissom.export.exporting import export_plan
from lissom.export.plan import Exit, Plan
from lissom.layers.exits import Exits, attach_exits
from lissom.meters.overhead import Overhead, decision_overhead
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import Stages
from lissom.runtime.target import RUNTIMES, Target, cpu_name

MOST = 30.0  # microseconds
SHAPE = (3, 8, 8)
NEVER = 2.0  # no share of a softmax is above it


def tiny() -> Plan:
    """Three convolutions of four channels, an exit behind the first two."""
    torch.manual_seed(0)

    def head() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))

    convolutions = [nn.Conv2d(3 if n == 0 else 4, 4, 3, padding=1) for n in range(3)]
    model = nn.Sequential(*convolutions, *head()).eval()
    attach_exits(model, Exits(("0", "1"), [head(), head()]))
    return replace(Plan.of(model, SHAPE), decisions=(Exit("0"), Exit("1")))


def measure(runtime: str, calls: int, folder: Path) -> Overhead:
    """The overhead in one runtime."""
    artifact: Artifact = export_plan(tiny(), Target(runtime, threads=1), folder / runtime, shape=SHAPE)
    decisions = [{**decision, "threshold": NEVER} for decision in artifact.plan["decisions"]]
    stages = Stages(artifact.with_decisions(decisions, {}), 1)
    x = np.random.default_rng(0).standard_normal((1, *SHAPE), dtype=np.float32)
    return decision_overhead(stages, x, calls)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {runtime: measure(runtime, options.calls, Path(folder)) for runtime in RUNTIMES}
    print(f"{cpu_name()}, 1 thread, medians of {options.calls} calls, microseconds\n")
    print("| runtime | plan | its graphs | a decision |\n| --- | ---: | ---: | ---: |")
    for runtime, o in found.items():
        print(f"| {runtime} | {o.plan_us:.1f} | {o.graphs_us:.1f} | {o.decision_us:.2f} |")
    return int(any(o.decision_us > MOST for o in found.values()))


if __name__ == "__main__":
    sys.exit(main())
