"""From which batch size on early exits no longer pay, on this machine.

    python benchmarks/adaptive_batches.py MODEL --data DATA --weights FILE --recipe "early_exit(...) + int8(...)"

exports the recipe with its exits and without them at each batch size, and times both over the same stream of the
report split's images, in turns (``lissom.meters.batches``); with exits also batch by batch, each run until the last of
its images has left. Thresholds are fitted once, at batch 1, and hold for all.
Written to docs/benchmarks/batches.md, one section a NAME.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from trained_plans import DOCS, Maker, add_arguments, split_recipe, write_section

from lissom.meters.batches import BatchRow, break_even, measure_batches
from lissom.runtime.artifact import Artifact
from lissom.runtime.target import RUNTIMES, cpu_name

PAGE = DOCS / "batches.md"
HEAD = "# Early exits in batches\n\nWritten by `benchmarks/adaptive_batches.py`; its text says how.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--runtime", default="openvino", choices=RUNTIMES)
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--count", type=int, default=512, help="images in the stream")
    parser.add_argument("--seconds", type=float, default=20.0, help="of running for each batch size")
    options = parser.parse_args()
    maker = Maker(options)
    adaptive, static = split_recipe(options.recipe, ("exits",))
    plans = {recipe: maker.plan(recipe, maker.target(options.runtime)) for recipe in (adaptive, static)}
    pairs: list[tuple[Artifact, Artifact]] = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in (int(b) for b in options.batches.split(",")):
            target = maker.target(options.runtime, batch)
            made = [
                maker.export(recipe, plan, target, Path(folder) / f"{batch}-{number}")
                for number, (recipe, plan) in enumerate(plans.items())
            ]
            if not pairs:
                fitted = maker.fitted(made[0], plans[adaptive])
            made[0] = made[0].with_decisions(fitted.plan["decisions"], fitted.plan["exits"])
            pairs.append((made[1], made[0]))
        inputs = maker.inputs(options.count)
        rows = measure_batches(pairs, inputs, threads=options.threads, seconds=options.seconds)
    section = written(rows, options, len(inputs), fitted)
    write_section(PAGE, HEAD, options.name or f"{maker.name}: {options.recipe}", section)
    print(section)
    return 0


def written(rows: list[BatchRow], options: argparse.Namespace, count: int, fitted: Artifact) -> str:
    """The section's text."""
    verdicts = [
        verdict(rows, apart, subject)
        for apart, subject in ((False, "With a stream of images"), (True, "With batches that are each answered alone"))
    ]
    places = [decision["at"] for decision in fitted.plan["decisions"]]
    lines = [
        f"Recipe `{options.recipe}` with its exits and without, in {options.runtime} on {cpu_name()}, "
        f"{options.threads} threads; a stream of {count} images of the report split. Speed is the static model's time "
        "over the adaptive one's, with its 95 % interval: of the stream as a whole, in which images that wait for a "
        "stage are gathered until there is a batch of them, and of batches that are each answered by themselves.",
        "",
        "| batch | speed, stream | speed, each batch alone | static, ms an image | with exits, ms an image | "
        "each batch alone, ms an image | "
        + " | ".join(f"leave behind {place}" for place in places) + " | run to the end |",
        "| ---: |" + " ---: |" * (len(places) + 6),
    ]  # fmt: skip
    for row in rows:
        shares = " | ".join(f"{100 * share:.1f} %" for share in row.shares)
        figures = [
            f"{ratio:.2f}x [{low:.2f}, {high:.2f}]"
            for ratio, (low, high) in ((row.ratio, row.interval), (row.apart_ratio, row.apart_interval))
        ]
        figures += [f"{each:.3f}" for each in (row.static_ms, row.adaptive_ms, row.apart_ms)]
        lines.append(f"| {row.batch} | {' | '.join(figures)} | {shares} |")
    return "\n".join([*lines, "", *verdicts])


def verdict(rows: list[BatchRow], apart: bool, subject: str) -> str:
    """One sentence: up to which batch the exits win."""
    best = break_even(rows, apart=apart)
    if best is None:
        return f"{subject} the exits do not win at the smallest batch measured."
    last = max(row.batch for row in rows)
    return f"{subject} the exits win up to batch {best}" + (", the largest measured." if best == last else ".")


if __name__ == "__main__":
    sys.exit(main())
