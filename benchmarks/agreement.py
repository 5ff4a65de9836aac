"""Whether the three runtimes say the same as the torch plan, and as each other: the class, and the exit.

    python benchmarks/agreement.py MODEL --data DATA --weights FILE --recipe "early_exit(...)" [--count 10000]

exports the recipe to each runtime at batch 1, with thresholds fitted once on the OpenVINO artifact's own scores, and
runs all on the same images: those of the report split, and where these are too few those of the choose split too. The
torch runtime has no int8; there a recipe's precision is left out, and the page says so. Written to
docs/benchmarks/agreement.md, one section a NAME.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
from trained_plans import DOCS, Maker, add_arguments, split_recipe, write_section

from lissom.errors import NotApplicable
from lissom.export.agreement import Said, compare, said_by_artifact, said_by_plan
from lissom.runtime.target import RUNTIMES, cpu_name

PAGE = DOCS / "agreement.md"
HEAD = "# The runtimes beside each other\n\nWritten by `benchmarks/agreement.py`; its text says how.\n"
FLOAT = "torch, the plan in float32"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--count", type=int, default=10_000, help="images")
    options = parser.parse_args()
    maker = Maker(options)
    inputs = maker.inputs(options.count)
    given, plain = split_recipe(options.recipe, ("precision", "memory"))
    said: dict[str, Said] = {}
    notes = []
    fitted = None
    with tempfile.TemporaryDirectory() as folder:
        for runtime in RUNTIMES:
            target = maker.target(runtime)
            recipe = given
            try:
                recipe.check(maker.base, target)
            except NotApplicable as error:
                recipe = plain
                notes.append(f"In {runtime} the recipe is `{plain}`: {error}.")
            plan = maker.plan(recipe, target)
            artifact = maker.export(recipe, plan, target, Path(folder) / runtime)
            if fitted is None:
                fitted = maker.fitted(artifact, plan)
            artifact = artifact.with_decisions(fitted.plan["decisions"], fitted.plan["exits"])
            if not said:
                thresholds = [decision["threshold"] for decision in fitted.plan["decisions"]]
                said[FLOAT] = said_by_plan(plan, thresholds, inputs)
            said[f"{runtime} runtime"] = said_by_artifact(artifact, inputs, options.threads)
    section = written(said, notes, options, maker)
    write_section(PAGE, HEAD, options.name or f"{maker.name}: {options.recipe}", section)
    print(section)
    return 0


def written(said: dict[str, Said], notes: list[str], options: argparse.Namespace, maker: Maker) -> str:
    """The section's text."""
    count = len(next(iter(said.values())).classes)
    lines = [
        f"Recipe `{options.recipe}`, {count} images of report and choose, {cpu_name()}, {options.threads} threads.",
        "",
        "| | and | same class | same exit | same both |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (first, one), (second, other) in itertools.combinations(said.items(), 2):
        found = compare(one, other)
        shares = " | ".join(f"{100 * s:.2f} %" for s in (found.same_class, found.same_exit, found.same))
        lines.append(f"| {first} | {second} | {shares} |")
    labels = maker.labels(count)
    if labels is not None:
        lines += ["", "Accuracy, and where images leave:", ""]
        for name, each in said.items():
            right = 100 * float((each.classes == labels).mean())
            shares = np.bincount(each.exits) / count
            lines.append(f"- {name}: {right:.2f} %; {', '.join(f'{100 * s:.1f} %' for s in shares)}")
    return "\n".join([*lines, *([""] if notes else []), *notes])


if __name__ == "__main__":
    sys.exit(main())
