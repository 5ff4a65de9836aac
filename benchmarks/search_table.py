"""LINAS, NSGA-II and random search on a complete table of measured recipes for one vision transformer.

    python benchmarks/search_table.py record MODEL --data DATA [--weights FILE] [--arch NAME] [--work FOLDER]
    python benchmarks/search_table.py search

``record`` makes every recipe over nine knobs and writes docs/benchmarks/search_table.csv: accuracy on 1,000 images
that nothing was trained, calibrated or fitted on, and latency at batch 1 relative to the model's float32 export. It can
be killed and run again. ``search`` lets the three searches of ``lissom slim`` find their way over that table, five
seeds each, and writes docs/benchmarks/search.md and search.svg.

How a row comes about: every choice of low rank, clustering and precision is exported twice, without exits and with
four, whose heads are trained once on the model as it is. Both artifacts answer the images, and all artifacts are timed
in turns in one process. From these follow the rows of its 15 choices of exits, 2 rules and 5 promises: the thresholds
are fitted on other images, the 1,000 leave where these say, and an exit that is left out saves its share of what four
exits add to the whole run. So accuracies are measured, and the latencies of rows with one to three exits are composed
from measured stages.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lissom.data.sources import read
from lissom.errors import LissomError
from lissom.export.calibration import apply, fit_thresholds
from lissom.export.exporting import export_plan, run_artifact, run_stages
from lissom.export.joint import Score
from lissom.export.plan import Plan
from lissom.layers.exits import exits_of
from lissom.meters.devices import meter_for
from lissom.models.factory import load_model
from lissom.proofs.base import mean_interval
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import Stages
from lissom.runtime.target import Target, default_threads
from lissom.search.linas import Found, linas, measured_nsga2, random_search
from lissom.search.nsga2 import hypervolume, non_dominated
from lissom.search.proposals import INNER, batch_size
from lissom.slimming import RECOVERY_EPOCHS, RECOVERY_STEPS
from lissom.tasks.classification import make_task
from lissom.tasks.task import Task, batches
from lissom.techniques.early_exit import EarlyExit
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
RATIOS = (None, 1.5, 3.0)  # low_rank
AFTER = (None, 4, 8)  # token_clustering: blocks that see all tokens
GRID = (4, 4)
PRECISIONS = ("", "int8(linear='conv', products=32)")
EXITS = (2, 4, 7, 9)  # blocks behind which exits stand
RULES = ("confidence", "entropy")
RISKS = (0.25, 0.5, 1.0, 2.0, 4.0)
JUDGED, FITTED = 1000, 2000  # images
CALIBRATION = 128
ROUNDS = 200
BUDGET, SEEDS = 200, 5
COLUMNS = ("ratio", "after", "precision", "exits", "rule", "risk", "accuracy", "latency")


@dataclass(frozen=True)
class Structure:
    """The knobs that change a graph, as indices into RATIOS, AFTER and PRECISIONS."""

    ratio: int
    after: int
    precision: int

    @property
    def recipe(self) -> str:
        parts = []
        if RATIOS[self.ratio] is not None:
            parts.append(f"low_rank(ratio={RATIOS[self.ratio]}, skip=())")
        if AFTER[self.after] is not None:
            parts.append(f"token_clustering(after={AFTER[self.after]}, grid={GRID})")
        return " + ".join([*parts, *filter(None, [PRECISIONS[self.precision]])])

    @property
    def name(self) -> str:
        return f"{self.ratio}{self.after}{self.precision}"


def structures() -> Iterator[Structure]:
    for choice in itertools.product(*(range(len(v)) for v in (RATIOS, AFTER, PRECISIONS))):
        yield Structure(*choice)


def subsets() -> Iterator[tuple[int, ...]]:
    """Choices of exits, by number; none of them first."""
    for count in range(len(EXITS) + 1):
        yield from itertools.combinations(range(len(EXITS)), count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    recording = parts.add_parser("record")
    recording.add_argument("model", help="as in lissom slim; a vision transformer of at least 11 blocks")
    recording.add_argument("--data", required=True)
    recording.add_argument("--weights")
    recording.add_argument("--arch")
    recording.add_argument("--threads", type=int, default=default_threads())
    recording.add_argument("--work", type=Path, default=Path("runs/search_table"), help="artifacts and answers")
    recording.add_argument("--answers-only", action="store_true", help="stop before anything is timed")
    parts.add_parser("search")
    options = parser.parse_args()
    if options.part == "search":
        return search()
    return record(options)


def record(options: argparse.Namespace) -> int:
    loaded = load_model(options.model, weights=options.weights, arch=options.arch)
    data = read(options.data)
    task = make_task(data, preprocessing=loaded.preprocessing(data.image_size), trained_here=False)
    if len(task.choose) < JUDGED + FITTED or task.fit is None:
        raise LissomError(f"{options.data} needs a training split and {JUDGED + FITTED} images to choose by")
    target = Target("openvino", threads=options.threads,
                    capabilities=frozenset(meter_for("cpu").capabilities("openvino")["precisions"]))  # fmt: skip
    recorder = Recorder(Plan.of(loaded.model.eval(), task.shape), task, target, options.work)
    for structure in structures():
        recorder.answers(structure)
        print(structure.recipe or "as it is", flush=True)
    if options.answers_only:
        return 0
    times = recorder.times()
    write_table(row for structure in structures() for row in recorder.rows(structure, times))
    return 0


class Recorder:
    """Artifacts, answers and times; what is in ``work`` already is not made again."""

    def __init__(self, plan: Plan, task: Task, target: Target, work: Path) -> None:
        self.plan, self.task, self.target, self.work = plan, task, target, work
        assert task.fit is not None
        few = task.fit.sample(CALIBRATION, 0)
        self.calibration = few.inputs(slice(0, len(few)))
        self.images = task.choose.sample(JUDGED + FITTED, 0)
        self.exits = Recipe((EarlyExit(at=EXITS),))
        recoverer = Recoverer(
            plan, task, target, work / "recovery", epochs=RECOVERY_EPOCHS, steps=RECOVERY_STEPS, seconds=None, seed=0,
            threads=target.threads,
            progress=lambda event: print(f"heads, epoch {event.epoch}: loss {event.loss:.3f}", flush=True),
        )  # fmt: skip
        self.heads = exits_of(recoverer.recover(self.exits, self.exits.apply(plan, task, target)).model)

    def artifacts(self, structure: Structure) -> tuple[Artifact, Artifact]:
        """Without exits and with four."""
        made = []
        for kind, exits in (("whole", Recipe()), ("staged", self.exits)):
            path = self.work / "artifacts" / f"{structure.name}-{kind}"
            if not path.exists():
                recipe = Recipe.parse(structure.recipe)
                late = [t for t in recipe.techniques if t.stage == "precision"]
                early = [t for t in recipe.techniques if t.stage != "precision"]
                whole = Recipe((*early, *exits.techniques, *late))
                plan = whole.apply(self.plan, self.task, self.target)
                own = exits_of(plan.model)
                if own is not None:  # the heads of the model as it is, on the grids of this one
                    heads = copy.deepcopy(self.heads.select(own.positions).heads)
                    for head, other in zip(heads, own.heads, strict=True):
                        head.grid = other.grid
                    own.heads = heads
                export_plan(plan, self.target, path, shape=self.task.shape, calibration=self.calibration,
                            recipe=str(whole))  # fmt: skip
            made.append(Artifact.open(path))
        return made[0], made[1]

    def answers(self, structure: Structure) -> dict[str, np.ndarray]:
        """Which answers are right, of the ``whole`` (JUDGED,) and of all ``stages`` (N, 5), and each rule's scores
        (N, 4): a rule reads an exit's answer only, so that one artifact tells both."""
        path = self.work / f"{structure.name}.npz"
        if not path.exists():
            whole, staged = self.artifacts(structure)
            labels, threads = self.images.labels, self.target.threads
            assert labels is not None
            alone = run_artifact(whole, self.images.inputs(slice(0, JUDGED)), threads)
            found, scores = run_stages(staged, batches(self.images, 64), threads)
            kept = {
                "whole": alone.argmax(-1) == labels[:JUDGED],
                "stages": np.stack([answer.argmax(-1) == labels for answer in found], 1),
                "confidence": scores,
                "entropy": np.stack([Score("entropy")(torch.from_numpy(a)).numpy() for a in found[:-1]], 1),
            }
            fresh = path.with_suffix(".new.npz")
            np.savez(fresh, **kept)
            fresh.replace(path)
        with np.load(path) as known:
            return dict(known)

    def times(self) -> dict[str, tuple[float, list[float]]]:
        """Median seconds of every structure, whole and until each decision of the staged one, all taken in turns."""
        opened = {}
        for structure in structures():
            whole, staged = self.artifacts(structure)
            opened[structure.name] = Stages(whole, self.target.threads), Stages(staged, self.target.threads)
        x = self.images.inputs(slice(0, 1))
        found: dict[str, list[list[float]]] = {name: [] for name in opened}
        for turn in range(ROUNDS + 5):
            for name, (whole, staged) in opened.items():
                whole.run(x)  # caches as in a run of its own
                times = whole.time_exits(x)
                staged.run_to(x, len(staged.graphs) - 1)
                if turn >= 5:
                    found[name].append(times + staged.time_exits(x))
                else:
                    staged.time_exits(x)
        medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)]
                   for name, rows in found.items()}  # fmt: skip
        return {name: (row[0], row[1:]) for name, row in medians.items()}

    def rows(self, structure: Structure, times: dict[str, tuple[float, list[float]]]) -> Iterator[tuple[Any, ...]]:
        known = self.answers(structure)
        unit = times[Structure(0, 0, 0).name][0]  # the model as it is, in float32
        whole, reached = times[structure.name]
        more = max(0.0, (reached[-1] - whole) / len(EXITS))  # what an exit adds to a run
        fixed = (
            RATIOS[structure.ratio] or "",
            AFTER[structure.after] or "",
            PRECISIONS[structure.precision] or "float32",
        )
        for exits in subsets():
            if not exits:
                yield *fixed, "", "", "", 100 * known["whole"].mean(), whole / unit
                continue
            stages = [*exits, len(EXITS)]
            costs = np.array([reached[s] - more * sum(e not in exits for e in range(s)) for s in stages])
            costs = np.maximum.accumulate(costs)
            right = known["stages"][:, stages]
            harm = right[:, -1:] & ~right[:, :-1]
            for rule, risk in itertools.product(RULES, RISKS):
                scores = known[rule][:, list(exits)]
                fitted = fit_thresholds(scores[JUDGED:], harm[JUDGED:], costs, risk=risk / 100)
                left = apply(scores[:JUDGED], np.array(fitted.thresholds))
                accuracy = 100 * right[np.arange(JUDGED), left].mean()
                names = " ".join(str(EXITS[e]) for e in exits)
                yield *fixed, names, rule, risk, accuracy, costs[left].mean() / unit


def write_table(rows: Iterator[tuple[Any, ...]]) -> None:
    DOCS.mkdir(parents=True, exist_ok=True)
    with (DOCS / "search_table.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for *knobs, accuracy, latency in rows:
            writer.writerow([*knobs, f"{accuracy:.1f}", f"{latency:.4f}"])


class Table:
    """The recorded recipes as a space of nine entries: ratio, after, precision, a switch for each exit, rule, risk.

    Without exits the last two are dead, as what belongs to an absent technique is in ``RecipeSpace``.
    """

    def __init__(self, rows: Sequence[dict[str, str]]) -> None:
        columns = ("ratio", "after", "precision", "rule", "risk")
        values = {c: list(dict.fromkeys(row[c] for row in rows if row["exits"] or c not in ("rule", "risk")))
                  for c in columns}  # fmt: skip
        exits = sorted({e for row in rows for e in row["exits"].split()}, key=int)
        sizes = [len(values[c]) for c in columns]
        self.sizes = np.array([*sizes[:3], *[2] * len(exits), *sizes[3:]], np.int64)
        self.measured: dict[tuple[int, ...], dict[str, float]] = {}
        for row in rows:
            places = [values[c].index(row[c]) if row[c] in values[c] else 0 for c in columns]
            vector = [*places[:3], *(int(e in row["exits"].split()) for e in exits), *places[3:]]
            figures = {"error": 1 - float(row["accuracy"]) / 100, "latency": float(row["latency"])}
            self.measured[self.live(np.array(vector))] = figures
        if len(self.measured) != len(rows):
            raise LissomError("two rows of the table are of the same recipe")

    def decode(self, vector: np.ndarray) -> tuple[int, ...]:
        return self.live(vector)

    def live(self, vector: np.ndarray) -> tuple[int, ...]:
        ratio, after, precision, *exits, rule, risk = (int(v) for v in vector)
        return (ratio, after, precision, *exits, *((1 + rule, 1 + risk) if any(exits) else (0, 0)))

    def features(self, vectors: np.ndarray) -> np.ndarray:
        return np.array([self.live(vector) for vector in vectors], np.int64).reshape(len(vectors), len(self.sizes))


def search() -> int:
    path = DOCS / "search_table.csv"
    if not path.exists():
        raise LissomError(f"there is no {path}; record it first")
    with path.open(newline="") as file:
        table = Table(list(csv.DictReader(file)))
    every = np.array([[row["error"], row["latency"]] for row in table.measured.values()])
    corner = every.max(0) * 1.001
    best = hypervolume(every, corner)
    population = batch_size(BUDGET)

    def curve(found: Found) -> np.ndarray:
        """The share of the whole table's hypervolume after each measurement."""
        points = np.array([[r.measured["error"], r.measured["latency"]] for r in found.records if r.measured])
        return np.array([hypervolume(points[: n + 1], corner) for n in range(len(points))]) / best

    curves: dict[str, list[np.ndarray]] = {"LINAS": [], "NSGA-II": [], "random": []}
    for seed in range(SEEDS):
        common: dict[str, Any] = {"population": population, "seed": seed, "key": table.live}
        asked = (table, table.measured.__getitem__, ("error", "latency"), BUDGET)
        features = {"inner": INNER, "features": table.features, "coarse": True}  # as lissom slim calls it
        curves["LINAS"].append(curve(linas(*asked, **common, **features)))
        curves["NSGA-II"].append(curve(measured_nsga2(*asked, **common)))
        curves["random"].append(curve(random_search(*asked, **common)))
        print(f"seed {seed}: " + ", ".join(f"{k} {v[-1][-1]:.4f}" for k, v in curves.items()), flush=True)
    front = len(non_dominated(every))
    (DOCS / "search.md").write_text(page(table, curves, population, front))
    draw(curves, DOCS / "search.svg")
    return 0


def page(table: Table, curves: dict[str, list[np.ndarray]], population: int, front: int) -> str:
    marks = [n for n in (population, BUDGET // 2, BUDGET * 3 // 4, BUDGET) if n]
    lines = [
        "# The searches on a complete table",
        "",
        f"Written by `benchmarks/search_table.py`; its text says how. {len(table.measured)} recipes over"
        f" {len(table.sizes)} knobs ({', '.join(map(str, table.sizes))} values), {front} of them not dominated;"
        f" objectives: error on {JUDGED} images, latency relative to float32. {BUDGET} measurements in batches of"
        f" {population}, {SEEDS} seeds; with the same seed all three begin with the same batch. Hypervolume as a share"
        " of the whole table's, mean and 95 % interval over the seeds.",
        "",
        "| measured | " + " | ".join(curves) + " |",
        "| ---: |" + " ---: |" * len(curves),
    ]
    for n in marks:
        cells = [cell([c[min(n, len(c)) - 1] for c in each]) for each in curves.values()]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    lines += ["", "![hypervolume](search.svg)", ""]
    for name in ("LINAS", "NSGA-II"):
        shares = [needed(own, other[-1]) / BUDGET for own, other in zip(curves[name], curves["random"], strict=True)]
        mean, interval = mean_interval(shares)
        assert interval is not None
        text = ", ".join(f"{share:.2f}" for share in shares)
        lines.append(
            f"{name} reaches random search's final hypervolume with {mean:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
            f" of the measurements (by seed: {text}). That it needs at most half of them"
            f" {'shows' if interval[1] <= 0.5 else 'does not show' if interval[0] > 0.5 else 'is inconclusive'}."
        )
    return "\n".join(lines) + "\n"


def needed(curve: np.ndarray, aim: float) -> int:
    """Measurements until the curve reaches ``aim``; all where it never does, and one more."""
    reached = np.flatnonzero(curve >= aim)
    return int(reached[0]) + 1 if len(reached) else len(curve) + 1


def cell(values: Sequence[float]) -> str:
    mean, interval = mean_interval(values)
    return f"{mean:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def draw(curves: dict[str, list[np.ndarray]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, each) in enumerate(curves.items()):
        length = min(map(len, each))
        table = np.stack([c[:length] for c in each])
        bands = [mean_interval(column) for column in table.T.tolist()]
        steps = np.arange(1, length + 1)
        axes.plot(steps, table.mean(0), color=f"C{number}", label=name)
        low, high = ([(band[1] or (band[0], band[0]))[side] for band in bands] for side in (0, 1))
        axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
    axes.set_xlabel("recipes measured")
    axes.set_ylabel("hypervolume, share of the whole table's")
    axes.set_ylim(0.8, 1.005)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
