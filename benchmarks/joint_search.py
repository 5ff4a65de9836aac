"""Architecture and precision searched together, against each alone, at equal numbers of measured candidates.

    python benchmarks/joint_search.py MODEL --data DATA [--weights FILE] [--arch NAME] [--work FOLDER] [--seeds 5]

SimQ-NAS (arXiv 2312.13301) in the main job's own parts. The model becomes a super-network, which is trained once. A
candidate is one of its sub-networks with a precision (int8 or float32) for every layer, exported and quantised as
``lissom slim`` does; measured are its error on images that nothing was trained or calibrated on, and its latency at
batch 1 as a share of the float32 original's, in one interleaved run with it. Three searches with LINAS:

- ``joint``: the sizes of the sub-network and the precision of every layer;
- ``architecture``: the sizes, every layer in int8 (the paper's baseline);
- ``precision``: the precision of every layer of the whole network.

All begin with the whole network in int8, have the same number of candidates, and read one record of measurements, so
that a candidate that two searches ask for is measured once and is the same to both. The form of int8 (scheme, linear
layers as they are or as convolutions) is decided once, by measurement on the whole network. Fronts are chosen on the
images that choose, and their hypervolume is read on others, within the box between the float32 original's latency and
``--points`` more error than it has.

Everything lies in ``--work`` as soon as it is known: run the same line again after a kill. How long it will take is
told before the training, and again with every candidate. Writes docs/benchmarks/joint_search.md, or ``--page``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lissom.data.sources import read
from lissom.errors import LissomError
from lissom.export.exporting import export_plan, run_artifact
from lissom.export.plan import Plan
from lissom.meters.devices import meter_for
from lissom.models.factory import load_model
from lissom.proofs.base import mean_interval, verdict_by_interval
from lissom.runtime.artifact import Artifact
from lissom.runtime.target import Target, default_threads
from lissom.search.linas import Found, linas
from lissom.search.nsga2 import hypervolume
from lissom.search.proposals import INNER
from lissom.search.recipes import RecipeSpace
from lissom.slimming import CALIBRATION, RECOVERY_EPOCHS, RECOVERY_STEPS
from lissom.tasks.classification import make_task
from lissom.tasks.task import Task
from lissom.techniques.int8 import Int8
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import BATCH, Recoverer
from lissom.techniques.subnet import Subnet
from lissom.training.methods.shared_recovery import SharedRecovery

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "joint_search.md"
KNOBS = {"joint": ("sizes", "keep"), "architecture": ("sizes",), "precision": ("keep",)}
NAMES = {
    "joint": "architecture and precision together",
    "architecture": "architecture, all layers in int8",
    "precision": "precision, whole network",
}
OBJECTIVES = ("error", "latency")
MATTERS = 0.01  # share of the box: the smallest gain of hypervolume worth having
ALLOWED = 1.0  # points of error more than the original: what the fastest candidate may lose


class Half:
    """Those entries of a fine ``RecipeSpace`` that are searched; the others are as in ``fixed``."""

    def __init__(self, space: RecipeSpace, fixed: np.ndarray, knobs: Sequence[str]) -> None:
        self.space, self.fixed = space, fixed
        self.free = np.array([bool(item) and knob in knobs for _, knob, item in space.names])

    @property
    def sizes(self) -> np.ndarray:
        return self.space.sizes[self.free]

    def whole(self, vectors: np.ndarray) -> np.ndarray:
        """(n, searched entries) -> (n, all entries)."""
        found = np.repeat(self.fixed[None], len(vectors), 0)
        found[:, self.free] = vectors
        return found

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        return self.space.draw(count, generator)[:, self.free]

    def decode(self, vector: np.ndarray) -> Recipe:
        return self.space.decode(self.whole(vector[None])[0])

    def key(self, vector: np.ndarray) -> tuple[int, ...]:
        return self.space.live(self.whole(vector[None])[0])

    def features(self, vectors: np.ndarray) -> np.ndarray:
        return self.space.features(self.whole(vectors))


class Bench:
    """Makes and measures candidates; what ``work`` knows already is read there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.work.mkdir(parents=True, exist_ok=True)
        loaded = load_model(options.model, weights=options.weights, arch=options.arch)
        if not loaded.trained:
            raise LissomError(f"{loaded.name} comes without trained weights: give --weights FILE")
        data = read(options.data)
        task = make_task(data, preprocessing=loaded.preprocessing(data.image_size), trained_here=False)
        if task.fit is None or not len(task.fit):
            raise LissomError(f"{options.data} has nothing to train the super-network on")
        if task.choose.labels is None or task.report.labels is None:
            raise LissomError("errors are counted against labels, and the data have none")
        self.task: Task = task.with_splits(
            choose=task.choose.sample(options.images, 0), report=task.report.sample(options.images, 1)
        )
        self.meter = meter_for("cpu")
        about = self.meter.capabilities("openvino")
        self.cpu = f"{about['cpu']} ({', '.join(about['flags'])})"
        self.target = Target("openvino", threads=options.threads, capabilities=frozenset(about["precisions"]))
        self.plan = Plan.of(loaded.model.eval(), task.shape)
        self._same(loaded.name)
        assert task.fit is not None
        few = task.fit.sample(CALIBRATION, 0)
        self.calibration = few.inputs(slice(0, len(few)))
        self.images = [s.inputs(slice(0, len(s))) for s in (self.task.choose, self.task.report)]
        self.recoverer = Recoverer(
            self.plan, self.task, self.target, self.work / "recovery", epochs=options.epochs, steps=options.steps,
            seconds=None, seed=0, threads=options.threads,
            progress=lambda e: say(f"super-network, epoch {e.epoch} of {e.epochs}: loss {e.loss:.3f}, "
                                   f"{e.seconds:.0f} s"),
        )  # fmt: skip
        self.log = self.work / "candidates.jsonl"
        self.known: dict[str, dict[str, Any]] = {}
        self.left = 0  # candidates still to come, at most
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # cut off in the middle of a line
                continue
            self.known[row["recipe"]] = row
        self.reference = self._exported(Recipe(), "reference")

    def _same(self, name: str) -> None:
        """Raise LissomError where the folder holds another comparison's figures."""
        state = self.plan.model.state_dict().values()
        weights = hashlib.sha256(b"".join(v.cpu().contiguous().numpy().tobytes() for v in state)).hexdigest()[:16]
        own = {
            "model": name, "weights": weights, "data": self.task.name, "images": self.options.images,
            "threads": self.options.threads, "epochs": self.options.epochs, "steps": self.options.steps,
            "seconds": self.options.seconds, "cpu": self.cpu,
        }  # fmt: skip
        path = self.work / "settings.json"
        if path.exists() and (other := json.loads(path.read_text())) != own:
            changed = [key for key in own if other.get(key) != own[key]]
            raise LissomError(f"{self.work} holds figures of another {', '.join(changed)}; take another --work")
        path.write_text(json.dumps(own, indent=1) + "\n")

    def _exported(self, recipe: Recipe, name: str) -> Artifact:
        path = self.work / "artifacts" / name
        if path.exists():
            if name == "reference":
                return Artifact.open(path)
            shutil.rmtree(path)
        plan = self.recoverer.recover(recipe, recipe.apply(self.plan, self.task, self.target))
        return export_plan(
            plan, self.target, path, shape=self.task.shape, calibration=self.calibration, recipe=str(recipe)
        )

    def expected_training(self) -> float:
        """Seconds that the training of the super-network will take, from three of its steps; 0 where it is done."""
        if any((self.work / "recovery").glob("*.safetensors")):
            return 0.0
        task = self.task
        assert task.fit is not None
        network = Subnet(shared=True).super_network(self.plan, task).train()
        method = SharedRecovery(original=copy.deepcopy(self.plan.model)).at(0.5)
        method.prepare(network, task)
        rows = slice(0, min(BATCH, len(task.fit)))
        x, y = torch.from_numpy(task.fit.inputs(rows)), torch.from_numpy(np.asarray(task.fit.labels[rows]))
        torch.set_num_threads(self.options.threads)
        with torch.random.fork_rng(devices=[]):
            method.loss(network, x, y, task).backward()
            start = time.perf_counter()
            for _ in range(3):
                method.loss(network, x, y, task).backward()
        step = (time.perf_counter() - start) / 3
        return step * min(self.options.steps, self.options.epochs * max(1, len(task.fit) // BATCH))

    def int8(self) -> Int8:
        """The form of int8 that is fastest on the whole network, of those within a point of the most accurate."""
        path = self.work / "int8.json"
        if path.exists():
            (chosen,) = Recipe.parse(json.loads(path.read_text())["recipe"]).techniques
            assert isinstance(chosen, Int8)
            return chosen
        variants = Int8().variants(self.plan, self.target)
        rows = [(self.measured(Recipe((variant,))), variant) for variant in variants]
        works = [(row, variant) for row, variant in rows if row is not None]
        if not works:
            raise LissomError(
                "the whole network cannot be quantised: " + self.known[str(Recipe((variants[0],)))]["reason"]
            )
        best = min(row["error"] for row, _ in works)
        _, int8 = min(((r, v) for r, v in works if r["error"] <= best + 0.01), key=lambda pair: pair[0]["latency"])
        path.write_text(json.dumps({"recipe": str(int8)}) + "\n")
        return int8

    def measured(self, recipe: Recipe) -> dict[str, float] | None:
        """``error`` on the images that choose and ``reported`` on the others, in [0, 1]; ``latency`` as a share of the
        float32 original's; None where it cannot be made."""
        text = str(recipe)
        if text not in self.known:
            self._keep(self._made(recipe, text))
        row = self.known[text]
        return None if row.get("reason") else {k: row[k] for k in ("error", "reported", "latency")}

    def _made(self, recipe: Recipe, text: str) -> dict[str, Any]:
        start = time.perf_counter()
        name = hashlib.sha256(text.encode()).hexdigest()[:16] if text else "reference"
        row: dict[str, Any] = {"recipe": text}
        try:
            artifact = self._exported(recipe, name)
            splits = ("error", self.task.choose), ("reported", self.task.report)
            for (key, split), images in zip(splits, self.images, strict=True):
                answers = run_artifact(artifact, images, self.options.threads)
                row[key] = 1 - self.task.quality(answers, np.asarray(split.labels)).value / 100
            _, found = self.meter.measure(
                [self.reference, artifact], threads=self.options.threads, seconds=self.options.seconds, memory=False
            )
            assert found.speedup is not None
            row |= {"latency": 1 / found.speedup, "ms": found.latency_ms, "megabytes": artifact.size / 1e6}
        except LissomError as error:
            row["reason"] = str(error)
        if name != "reference":
            shutil.rmtree(self.work / "artifacts" / name, ignore_errors=True)
        return row | {"seconds": time.perf_counter() - start}

    def _keep(self, row: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.known[row["recipe"]] = row
        self.left = max(0, self.left - 1)
        each = sum(r["seconds"] for r in self.known.values()) / len(self.known)
        told = row.get("reason") or f"error {row['error']:.3f}, latency {row['latency']:.3f} of float32"
        say(f"{told} ({row['seconds']:.0f} s; at most {self.left} more of {each:.0f} s: {in_words(self.left * each)})")


def say(text: str) -> None:
    print(text, flush=True)


def in_words(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as in lissom slim, trained")
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--arch")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/joint_search"), help="weights and figures")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=30, help="candidates of each search")
    parser.add_argument("--population", type=int, default=6)
    parser.add_argument("--images", type=int, default=1000, help="of each of the two splits")
    parser.add_argument("--points", type=float, default=10.0, help="of error more than the original: the box's side")
    parser.add_argument("--seconds", type=float, default=1.0, help="of running, for a measurement")
    parser.add_argument("--epochs", type=int, default=RECOVERY_EPOCHS)
    parser.add_argument("--steps", type=int, default=RECOVERY_STEPS)
    options = parser.parse_args()
    try:
        bench = Bench(options)
        text = compare(bench)
    except LissomError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(text)
    say(f"wrote {options.page}")
    return 0


def compare(bench: Bench) -> str:
    """Train, search, and say what came of it."""
    options = bench.options
    searches = [(seed, name) for seed in range(options.seeds) for name in KNOBS]
    bench.left = len(searches) * options.budget
    say(f"training the super-network: {in_words(bench.expected_training())} expected, then at most {bench.left} "
        "candidates, whose time is told with the first")  # fmt: skip
    base = bench.measured(Recipe())
    if base is None:
        raise LissomError(f"the model as it is cannot be measured: {bench.known['']['reason']}")
    int8 = bench.int8()
    say(f"int8 is {int8}")
    space = RecipeSpace(("subnet", "int8"), bench.plan, bench.target, fine=True)
    fixed = space.encode(Recipe((int8,)))
    fixed[space.names.index(("subnet", "", ""))] = 1
    halves = {name: Half(space, fixed, knobs) for name, knobs in KNOBS.items()}
    if not halves["architecture"].free.any():
        raise LissomError("subnet has nothing to choose on this model")
    uniform = [replace_sizes(int8, sizes) for sizes in Subnet.space(bench.plan, bench.target)["sizes"].always]
    for recipe in uniform:
        bench.measured(recipe)
    found: dict[str, list[Found]] = {name: [] for name in KNOBS}
    for number, (seed, name) in enumerate(searches):
        bench.left = (len(searches) - number) * options.budget
        half = halves[name]
        others = half.draw(options.population - 1, np.random.default_rng(seed))
        start = np.concatenate([np.zeros((1, half.free.sum()), np.int64), others])  # the whole network in int8
        found[name].append(
            linas(
                half, bench.measured, OBJECTIVES, options.budget, options.population, INNER, seed, half.key,
                features=half.features, coarse=True, start=start,
            )
        )  # fmt: skip
        say(f"seed {seed}, {name}: {len(found[name][-1].records)} candidates, "
            f"{len(found[name][-1].front)} of them not dominated")  # fmt: skip
    return page(bench, base, int8, uniform, halves, found)


def replace_sizes(int8: Int8, sizes: tuple[tuple[str, Any], ...]) -> Recipe:
    return Recipe((Subnet(shared=True, sizes=sizes), int8))


def page(
    bench: Bench,
    base: Mapping[str, float],
    int8: Int8,
    uniform: Sequence[Recipe],
    halves: Mapping[str, Half],
    found: Mapping[str, Sequence[Found]],
) -> str:
    options = bench.options

    def rows_of(one: Found, name: str) -> list[dict[str, float]]:
        rows = [bench.measured(halves[name].decode(np.array(r.vector))) for r in one.front]
        return [row for row in rows if row is not None]

    def area(rows: Sequence[Mapping[str, float]], key: str) -> float:
        """Hypervolume, as a share of the box above the original's error: 1 is its error at no time."""
        corner = (base[key] + options.points / 100, 1.0)
        points = [(max(row[key], base[key]), row["latency"]) for row in rows]
        inside = [p for p in points if p[0] < corner[0] and p[1] < corner[1]]
        if not inside:
            return 0.0
        shifted = [(error - base[key], latency) for error, latency in inside]
        return hypervolume(shifted, (options.points / 100, 1.0)) / (options.points / 100)

    chosen = {name: [area(rows_of(one, name), "error") for one in each] for name, each in found.items()}
    judged = {name: [area(rows_of(one, name), "reported") for one in each] for name, each in found.items()}
    fastest = {name: [quickest(rows_of(one, name), base) for one in each] for name, each in found.items()}
    lines = [
        "# Architecture and precision searched together",
        "",
        "Written by `benchmarks/joint_search.py`; its text says how.",
        "",
        f"{options.model} on {bench.task.name}: {bench.cpu}, OpenVINO, {options.threads} threads, batch 1. One "
        f"super-network, trained for at most {options.epochs} epochs or {options.steps} steps; {len(bench.known)} "
        f"candidates measured in all. {options.budget} candidates a search in batches of {options.population}, "
        f"{options.seeds} seeds, which are the searches' alone. Errors are of {len(bench.task.choose)} images that "
        f"choose and {len(bench.task.report)} others. The original in float32 has {100 * base['error']:.1f} % and "
        f"{100 * base['reported']:.1f} %. int8 is `{int8}`.",
        "",
        f"Hypervolume of (error, latency) as a share of the box from the original's error to {options.points:g} points "
        "more, and from no time to the original's in float32. Means with 95 % intervals over the seeds. The last two "
        f"columns are of the fastest candidate that has lost at most {ALLOWED:g} point on the images that choose.",
        "",
        "| searched | entries | hypervolume, images that choose | hypervolume, others | latency | error, others |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in KNOBS:
        quick = [row for row in fastest[name] if row is not None]
        missing = len(fastest[name]) - len(quick)
        none = f" ({missing} seeds have none)" if missing else ""
        lines.append(
            f"| {NAMES[name]} | {int(halves[name].free.sum())} | {cell(chosen[name])} | {cell(judged[name])} | "
            + (f"{cell([row['latency'] for row in quick])}{none} | {cell([100 * row['reported'] for row in quick])} % |"
               if quick else "none | none |")
        )  # fmt: skip
    lines += ["", "Gained by the joint search, paired by seed, on the images that did not choose:", ""]
    for name in ("architecture", "precision"):
        gains = [a - b for a, b in zip(judged["joint"], judged[name], strict=True)]
        lines.append(f"- against {NAMES[name]}: {cell(gains)} of the box; that it finds a larger hypervolume "
                     f"*{verdict_by_interval(gains, matters=MATTERS)}*")  # fmt: skip
    taus = [batch for one in found["joint"] for batch in one.kendall]
    means = [mean_of([tau[i] for tau in taus]) for i in range(len(OBJECTIVES))]
    said = ", ".join(f"{tau:.2f} ({name})" for name, tau in zip(OBJECTIVES, means, strict=True) if tau is not None)
    lines += ["", f"Kendall's tau of what the joint search's predictors said of a batch and what was then measured: "
              f"{said or 'no order to compare'}."]  # fmt: skip
    lines += [
        "",
        "For comparison, without a search:",
        "",
        "| recipe | error, others | latency |",
        "| --- | ---: | ---: |",
    ]
    rows = [("float32, against itself", Recipe()), ("int8", Recipe((int8,)))]
    rows += [(f"uniform sub-network {in_shares(recipe)}, int8", recipe) for recipe in uniform]
    for text, recipe in rows:
        row = bench.measured(recipe)
        lines.append(
            f"| {text} | " + (f"{100 * row['reported']:.1f} % | {row['latency']:.3f} |" if row else "failed | |")
        )
    return "\n".join(lines) + "\n"


def in_shares(recipe: Recipe) -> str:
    """A uniform sub-network in words: the share of the widths and how many blocks fewer."""
    subnet = next(t for t in recipe.techniques if isinstance(t, Subnet))
    shares = sorted({value for name, value in subnet.sizes or () if not name.endswith("depth")})
    fewer = -sum(value for name, value in subnet.sizes or () if name.endswith("depth") and value < 0)
    return f"(widths {', '.join(f'{s:g}' for s in shares) or '1'}; {fewer} blocks fewer)"


def quickest(rows: Sequence[dict[str, float]], base: Mapping[str, float]) -> dict[str, float] | None:
    good = [row for row in rows if row["error"] <= base["error"] + ALLOWED / 100]
    return min(good, key=lambda row: row["latency"]) if good else None


def mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def cell(values: Sequence[float]) -> str:
    mean, interval = mean_interval(values)
    return f"{mean:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


if __name__ == "__main__":
    sys.exit(main())
