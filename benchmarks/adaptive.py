"""Every way to spend computation where the input needs it, beside smaller networks: accuracy against measured latency.

    python benchmarks/adaptive.py --data DATA --models FOLDER [--work FOLDER] [--seeds 3] [--jobs 1] [--stage STAGE]
                                  [--network NAME]

DATA is CIFAR-10, FOLDER holds the reference CNN with its weights (``models.py``, ``cnn_cifar10.safetensors``); the
reference vision transformer is the repository's own. Three stages, each resumable by running the same line again:

1. ``train``: each method on each network, once a seed (the networks themselves are given), with what a recovery lasts
   by default; the smaller networks are distilled from the reference for ten epochs (the CNN's twenty). Of each trained
   plan the classes and scores of all its exits on ``choose`` and ``report`` are kept, computed in float32 by PyTorch:
   benchmarks/answers has them, so that what is there is not trained again. ``--jobs`` processes train at once; where
   there is a GPU they share it.
2. ``measure``: each choice of exits is exported to OpenVINO in float32, batch 1, and timed in turns with the reference.
3. ``page``: thresholds are fitted on ``choose`` with those times as the costs, judged on ``report``; the operating
   points are timed once more beside the reference, as they would run. Writes the network's section of
   docs/benchmarks/adaptive.md, and its plot.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from trained_plans import DOCS, Maker, write_section

from lissom.errors import LissomError, NotApplicable
from lissom.export.calibration import apply, fit_thresholds
from lissom.export.joint import JointOutputs, joint_of
from lissom.export.plan import Plan
from lissom.meters.costs import layer_costs
from lissom.meters.devices import meter_for
from lissom.runtime.artifact import Artifact, write_atomic
from lissom.runtime.target import cpu_name, default_threads
from lissom.tasks.task import Split, batches
from lissom.techniques.recipe import Recipe
from lissom.training.loop import fit
from lissom.training.methods.distillation import Distillation

HERE = Path(__file__).resolve().parent
RISKS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)  # points: where curves are looked at
HEAD = """# Adaptive inference beside smaller networks

Written by `benchmarks/adaptive.py`; its text says how. CIFAR-10, thresholds and places chosen on the 5,000 images of
`choose`, judged on the 5,000 of `report`; OpenVINO, float32, batch 1. Speed is the reference's time over the method's,
timed in turns in one run, with its 95 % interval for the first seed; figures in brackets behind others are the smallest
and the largest of the seeds.
"""
TITLES = {"cnn": "The reference CNN", "vit": "The reference vision transformer"}
ALLOWED = 0.5  # points of drop at which methods are compared
DELTA = 0.05
STATIC = "smaller network"
REFERENCE = "reference"
FROZEN = "linear exits"  # a method, of both networks, that leaves the network as it is


@dataclass(frozen=True)
class Arm:
    """One method on one network: a recipe with all its exits, or a smaller network (a function of
    ``adaptive_networks.py``), or a cascade with such a network as its first member."""

    network: str
    title: str
    recipe: str = ""
    smaller: str = ""

    @property
    def name(self) -> str:
        return self._named(self.title)

    @property
    def timed_as(self) -> str:
        """The name of the arm whose times are this one's."""
        return self._named(TIMED_AS.get(self.title, self.title))

    def _named(self, title: str) -> str:
        words = title if not self.smaller else f"{title} {self.smaller}"
        return f"{self.network}-{words}".replace(" ", "_").replace(",", "")


# Arms whose structures are another's, so that one timing serves both.
TIMED_AS = {"LGViT, both stages": "LGViT heads", "MuE, not trained": "MuE"}
SMALLER = {"cnn": ("cnn_1x16", "cnn_2x16"), "vit": ("vit_1", "vit_2")}
METHODS = {
    "vit": (
        ("LGViT heads", "early_exit(at=('*',), heads='published')"),
        ("LGViT, both stages", "early_exit(at=('*',), heads='published', train='both')"),
        ("linear exits", "early_exit(at=('*',), heads='linear')"),
        ("MuE", "similarity_exit(at=('*',), train=True)"),
        ("MuE, not trained", "similarity_exit(at=('*',))"),
    ),
    "cnn": (
        ("convolutional exits", "early_exit(at=('*',))"),
        ("linear exits", "early_exit(at=('*',), heads='linear')"),
        ("Dyn-Perceiver", "dynamic_perceiver(latents=16, depths=(1, 1, 2, 1))"),
        ("MuE", "similarity_exit(at=('*',), train=True)"),
    ),
}
EPOCHS = {"vit": 10, "cnn": 20}
RATES = {"vit": ("muon", 3e-3), "cnn": ("sgd", 0.1)}


def arms() -> list[Arm]:
    found: list[Arm] = []
    for network, methods in METHODS.items():
        found += [Arm(network, STATIC, smaller=name) for name in SMALLER[network]]
        found += [Arm(network, title, recipe) for title, recipe in methods]
        found += [Arm(network, "cascade", smaller=name) for name in SMALLER[network]]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/adaptive"))
    answers = "classes and scores of what is trained; name another folder to train anew"
    parser.add_argument("--answers", type=Path, default=HERE / "answers", help=answers)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--until", type=float, default=math.inf, help="seconds after which no training is begun")
    parser.add_argument("--steps", type=int, help="of each training at most, to try this program")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--seconds", type=float, default=1.5, help="of running each artifact")
    parser.add_argument("--network", choices=tuple(METHODS), help="only this one")
    parser.add_argument("--stage", choices=("train", "measure", "page"), help="only this one")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["LISSOM_MODELS"] = str(options.models)
    for folder in (options.work, options.answers):
        folder.mkdir(parents=True, exist_ok=True)
    if options.job:
        train_one(options)
        return 0
    left = 0
    if options.stage in (None, "train"):
        left = train(options)
    if left:
        print(f"{left} trainings are left; run the same line again")
        return 1
    for network in METHODS if options.network is None else (options.network,):
        if options.stage in (None, "measure"):
            measure(network, options)
        if options.stage in (None, "page"):
            section = page(network, options)
            write_section(DOCS / "adaptive.md", HEAD, TITLES[network], section)
            print(section)
    return 0


# 1. Training.


def train(options: argparse.Namespace) -> int:
    """All trainings, ``jobs`` at a time, the first seed first; how many are left."""
    start = time.monotonic()
    waiting = [f"{arm.name}:{seed}" for seed in range(options.seeds) for arm in ordered() if seeded(arm, seed)]
    waiting = [job for job in waiting if options.network in (None, find(job)[0].network)]
    waiting = [job for job in waiting if not said_file(options, *job.split(":")).exists()]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = []
    while waiting or running:
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                print(
                    f"{time.monotonic() - start:6.0f} s {job} {'done' if not process.returncode else 'FAILED'}",
                    flush=True,
                )
                if process.returncode:
                    failed.append(job)
        while waiting and len(running) < options.jobs and time.monotonic() - start < options.until:
            job = next((job for job in waiting if ready(job, options)), None)
            if job is None:
                break
            waiting.remove(job)
            log = open(options.work / f"{job.replace(':', '-')}.log", "wb")  # noqa: SIM115 - the process writes to it
            running[job] = subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--job", job], stdout=log, stderr=log
            )
        if not running:
            break
        time.sleep(0.5)
    return len(waiting) + len(failed)


def ordered() -> list[Arm]:
    """Cascades first: each waits for its member only, and takes no training of its own."""
    return sorted(arms(), key=lambda arm: arm.title != "cascade")


def seeded(arm: Arm, seed: int) -> bool:
    """What trains nothing is the same for every seed."""
    return seed == 0 or "not trained" not in arm.title


def ready(job: str, options: argparse.Namespace) -> bool:
    arm, seed = find(job)
    if arm.title == "cascade":
        return weights_file(options, arm, seed).exists()
    # The first of the smaller networks asks the teacher for the others.
    first = replace(arm, smaller=SMALLER[arm.network][0])
    return arm.title != STATIC or arm == first or said_file(options, first.name, seed).exists()


def find(job: str) -> tuple[Arm, int]:
    name, seed = job.split(":")
    return next(arm for arm in arms() if arm.name == name), int(seed)


def said_file(options: argparse.Namespace, name: str, seed: int | str) -> Path:
    return options.answers / f"{name}-{seed}.npz"


def refused_file(options: argparse.Namespace, arm: Arm) -> Path:
    return options.answers / f"{arm.name}.refused"


def weights_file(options: argparse.Namespace, arm: Arm, seed: int) -> Path:
    return options.work / f"{arm.smaller}-{seed}.safetensors"


def maker_of(network: str, options: argparse.Namespace) -> Maker:
    model = {"cnn": f"{options.models / 'models.py'}:cnn", "vit": "cifar_vit"}[network]
    weights = {
        "cnn": options.models / "cnn_cifar10.safetensors", "vit": HERE / "weights" / "cifar_vit.safetensors",
    }[network]  # fmt: skip
    given = argparse.Namespace(
        model=model, weights=str(weights), arch=None, data=options.data, work=options.work / network, recover=None,
        threads=options.threads,
    )  # fmt: skip
    return Maker(given, steps=options.steps)


def recipe_of(arm: Arm, weights: Path) -> str:
    """The arm's recipe; a cascade's with the weights of its first member."""
    if arm.title != "cascade":
        return arm.recipe
    network = f"{HERE / 'adaptive_networks.py'}:{arm.smaller}"
    return f"cascade(first_model={network!r}, first_weights={str(weights)!r})"


def train_one(options: argparse.Namespace) -> None:
    """One job: the trained plan's classes and scores, and a smaller network's weights."""
    arm, seed = find(options.job)
    maker = maker_of(arm.network, options)
    if arm.title == STATIC:
        plan = smaller(arm, maker, options, seed)
    else:
        recipe = Recipe.of(recipe_of(arm, weights_file(options, arm, seed)))
        try:
            plan = maker.plan(recipe, maker.target(), seed=seed)
        except NotApplicable as error:
            write_atomic(refused_file(options, arm), str(error))
            np.savez_compressed(said_file(options, arm.name, seed))
            return
    found: dict[str, np.ndarray] = {}
    for name, split in (("choose", maker.task.choose), ("report", maker.task.report)):
        classes, scores = said(plan, split)
        # Half precision of what a score lacks of 1: scores crowd there, and thresholds part them.
        lacks = (1 - scores.astype(np.float64)).astype(np.float16)
        labels = np.asarray(split.labels, np.uint8)
        found |= {f"{name}_classes": classes, f"{name}_lacks": lacks, f"{name}_labels": labels}
    fresh = said_file(options, arm.name, seed).with_suffix(".new.npz")
    np.savez_compressed(fresh, **found)
    fresh.replace(said_file(options, arm.name, seed))
    accuracy = [100 * float((c == found["report_labels"]).mean()) for c in found["report_classes"].T]
    print(f"{arm.name} seed {seed}: {', '.join(f'{a:.2f}' for a in accuracy)} %")


def smaller(arm: Arm, maker: Maker, options: argparse.Namespace, seed: int) -> Plan:
    """A smaller network, distilled from the reference."""
    import adaptive_networks

    torch.manual_seed(seed)
    model = getattr(adaptive_networks, arm.smaller)()
    optimizer, rate = RATES[arm.network]
    teacher = Remembering(maker.base.model, options.work / f"{arm.network}-teacher-{seed}.npz")
    fit(
        model,
        maker.task,
        method=Distillation(teacher=teacher, temperature=2.0, alpha=0.5),
        epochs=EPOCHS[arm.network],
        max_steps=options.steps,
        batch=128,
        lr=rate,
        optimizer=optimizer,
        weight_decay=5e-4 if optimizer == "sgd" else 0.05,
        seed=seed,
        flip=True,
        folder=options.work / f"{arm.smaller}-{seed}",
        resume=True,
        precision="auto",
        threads=options.threads,
    )
    teacher.keep()
    write_weights(model, weights_file(options, arm, seed))
    return Plan.of(model.eval(), maker.task.shape)


def write_weights(model: nn.Module, path: Path) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    fresh = path.with_suffix(".new")
    save_file(state, fresh)
    fresh.replace(path)


class Remembering(nn.Module):
    """A teacher that is asked once for each image as it comes, shifted and mirrored. Networks of one seed see the same
    images: the second to be trained finds all answers in the file."""

    def __init__(self, teacher: nn.Module, file: Path) -> None:
        super().__init__()
        self.teacher, self.file = teacher, file
        self.rows: dict[bytes, int] = {}
        self.answers: list[np.ndarray] = []
        if file.exists():
            known = np.load(file)
            assert len(known["keys"]) == len(known["answers"])
            self.rows = {key.tobytes(): row for row, key in enumerate(known["keys"])}
            self.answers = list(known["answers"])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        images = inputs.cpu().contiguous().numpy()
        keys = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
        asked = list({key: i for i, key in enumerate(keys) if key not in self.rows}.values())
        if asked:
            found = self.teacher(inputs[asked]).detach().float().cpu().numpy()
            for i, answer in zip(asked, found, strict=True):
                self.rows[keys[i]] = len(self.answers)
                self.answers.append(answer)
        return torch.from_numpy(np.stack([self.answers[self.rows[key]] for key in keys])).to(inputs.device)

    def keep(self) -> None:
        """Write what was answered, in the place of what was known."""
        keys = np.frombuffer(b"".join(self.rows), np.uint8).reshape(-1, 16)  # in the order of their rows
        fresh = self.file.with_suffix(".new.npz")
        np.savez(fresh, keys=keys, answers=np.stack(self.answers))
        fresh.replace(self.file)


@torch.no_grad()
def said(plan: Plan, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Of each stage the class, uint8 (N, K + 1), and of each exit the score, float32 (N, K); nobody leaves."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    outputs, joint = JointOutputs.of(plan.decisions), joint_of(plan).to(device).eval()
    classes, scores = [], []
    for part in batches(split, 256):
        found = joint(torch.from_numpy(part).to(device))
        tensors = [found] if isinstance(found, torch.Tensor) else list(found)
        answers = [tensors[outputs.answer(stage)].argmax(-1) for stage in range(outputs.exits + 1)]
        own = [tensors[outputs.score(exit)].reshape(-1) for exit in range(outputs.exits)]
        classes.append(torch.stack(answers, 1).to(torch.uint8).cpu().numpy())
        scores.append(torch.stack(own, 1).cpu().numpy() if own else np.empty((len(part), 0), np.float32))
    joint.to("cpu")
    return np.concatenate(classes), np.concatenate(scores)


# 2. Times.


def measure(network: str, options: argparse.Namespace) -> None:
    """Times of every choice of exits, in milliseconds until each stage's decision, and of the reference; kept in one
    file a network. All are in one interleaved run, so weights are those that the structure begins with."""
    kept = options.work / f"times-{network}.json"
    if kept.exists():
        return
    maker = maker_of(network, options)
    reference = maker.export(Recipe(), maker.base, maker.target(), options.work / "artifacts" / f"{network}-reference")
    names, artifacts, sizes = [REFERENCE], [reference], {REFERENCE: {"macs": [1.0]}}
    whole = macs(maker.base)
    for arm in arms():
        refused = refused_file(options, arm).exists()
        if arm.network != network or refused or arm.timed_as != arm.name:
            continue
        for places, plan in choices(arm, maker, options):
            name = f"{arm.name}|{' '.join(places)}"
            path = options.work / "artifacts" / f"{network}-{len(names)}"
            artifact = maker.export(Recipe(), plan, maker.target(), path)
            if plan.decisions:
                # Each stage is timed, whatever the shares; a threshold that is there keeps the exits in the artifact.
                even = [1 / (len(plan.decisions) + 1)] * (len(plan.decisions) + 1)
                decisions = [{**d, "threshold": 2.0} for d in artifact.plan["decisions"]]
                artifact = artifact.with_decisions(decisions, {"shares": even})
            cost = [e.cost for e in plan.decisions]
            end = [1 + plan.decisions[-1].heads] if plan.decisions else [macs(plan) / whole]
            names.append(name)
            artifacts.append(artifact)
            sizes[name] = {"macs": [*cost, *end]}
            print(f"{name} exported", flush=True)
    found = meter_for("cpu").measure(artifacts, threads=options.threads, seconds=options.seconds, memory=False)
    table = {
        name: {**sizes[name], "ms": list(one.stages_ms or (one.latency_ms,)), "path": str(artifact.path)}
        for name, artifact, one in zip(names, artifacts, found, strict=True)
    }
    write_atomic(kept, json.dumps({"cpu": cpu_name(), "threads": options.threads, "rows": table}, indent=1))


def choices(arm: Arm, maker: Maker, options: argparse.Namespace) -> Iterator[tuple[tuple[str, ...], Plan]]:
    """The structures that are timed for an arm: each choice of exits that a search would try."""
    import adaptive_networks

    if arm.title == STATIC:
        yield (), Plan.of(getattr(adaptive_networks, arm.smaller)().eval(), maker.task.shape)
        return
    untrained = options.work / f"{arm.smaller}-untrained.safetensors"
    if arm.title == "cascade":
        write_weights(getattr(adaptive_networks, arm.smaller)(), untrained)
    recipe = Recipe.of(recipe_of(arm, untrained))
    whole = recipe.apply(maker.base, maker.task, maker.target())
    every = tuple(exit.at for exit in whole.decisions)
    yield every, whole
    if len(every) == 1:
        return
    (technique,) = recipe.techniques
    tried = [tuple(places) for places in technique.space(maker.base, maker.target()).get("at", ())]
    some = [c for n in range(1, len(every)) for c in itertools.combinations(every, n)]
    for places in dict.fromkeys(tried or some):
        if places != every and set(places) <= set(every):
            fewer = replace(recipe, techniques=(technique.only(places),))
            yield places, fewer.apply(maker.base, maker.task, maker.target())


def macs(plan: Plan) -> int:
    return sum(cost.macs for cost in layer_costs(plan.model, plan.shape) if not cost.path.startswith("exits."))


# 3. Thresholds and the page.


@dataclass(frozen=True)
class Point:
    """Where one seed of an arm can be run: ``drop`` on ``choose`` and what ``report`` says of it."""

    name: str  # of the artifact
    risk: float
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]  # on report
    drop: float  # points, on choose
    time: float  # expected, as a share of the reference's, on choose
    accuracy: float  # on report, per cent
    ms: float  # expected on report
    macs: float  # expected on report, as a share of the reference's


def points(
    arm: Arm, seed: int, times: dict[str, Any], options: argparse.Namespace, risks: Sequence[float]
) -> list[Point]:
    """All points of one seed: each choice of exits with thresholds fitted at each risk."""
    data = np.load(said_file(options, arm.name, seed if seeded(arm, seed) else 0))
    if "report_classes" not in data:
        return []
    base = times[REFERENCE]["ms"][-1]
    own = {name: row for name, row in times.items() if name.partition("|")[0] == arm.timed_as}
    every = max((name.partition("|")[2].split() for name in own), key=len)
    # A drop is one from the reference: what training did to the answer at the end counts too.
    right = {s: data[f"{s}_classes"] == data[f"{s}_labels"][:, None] for s in ("choose", "report")}
    found = []
    for name, row in own.items():
        places = name.partition("|")[2].split()
        columns = [every.index(place) for place in places]
        cost, share = np.array(row["ms"]) / base, np.array(row["macs"])
        full = reference_right(arm.network, "choose", options)
        for risk in risks if places else (math.inf,):
            if places:
                end = right["choose"][:, -1:]
                harm = end & ~right["choose"][:, columns]
                scores = scores_in(data, "choose")[:, columns]
                fitted = fit_thresholds(
                    scores, harm, np.maximum.accumulate(cost), risk=risk / 100, delta=DELTA, levels=200
                )
                thresholds = np.array(fitted.thresholds)
            else:
                thresholds = np.empty(0)
            taken = {}
            for split in ("choose", "report"):
                scores = scores_in(data, split)[:, columns] if places else np.empty((len(right[split]), 0))
                left = apply(scores, thresholds)
                stage = np.array([*columns, right[split].shape[1] - 1])[left]
                taken[split] = left, right[split][np.arange(len(left)), stage].mean()
            shares = np.bincount(taken["report"][0], minlength=len(places) + 1) / len(taken["report"][0])
            found.append(
                Point(
                    name,
                    risk,
                    tuple(thresholds.tolist()),
                    tuple(shares.tolist()),
                    drop=100 * float(full.mean() - taken["choose"][1]),
                    time=float(cost[taken["choose"][0]].mean()),
                    accuracy=100 * float(taken["report"][1]),
                    ms=float(np.dot(shares, row["ms"])),
                    macs=float(np.dot(shares, share)),
                )
            )
    return found


def scores_in(data: Any, split: str) -> np.ndarray:
    return 1 - data[f"{split}_lacks"].astype(np.float32)


def reference_right(network: str, split: str, options: argparse.Namespace) -> np.ndarray:
    """Which samples the reference answers rightly, bool (N,): the last answer of exits whose network is frozen."""
    arm = next(a for a in arms() if a.network == network and a.title == FROZEN)
    data = np.load(said_file(options, arm.name, 0))
    return data[f"{split}_classes"][:, -1] == data[f"{split}_labels"]


def chosen(found: list[Point]) -> Point | None:
    """The fastest point whose drop on ``choose`` is allowed; a smaller network has but one point."""
    if len(found) == 1:
        return found[0]
    good = [point for point in found if point.drop <= ALLOWED]
    return min(good, key=lambda p: p.time, default=None)


def front(found: list[Point]) -> list[Point]:
    """The points that ``choose`` would pick: none other there is as fast with as small a drop."""
    ordered = sorted(found, key=lambda p: (p.time, p.drop))
    kept: list[Point] = []
    for point in ordered:
        if not kept or point.drop < kept[-1].drop:
            kept.append(point)
    return kept


def page(network: str, options: argparse.Namespace) -> str:
    """The network's section; draws its plot."""
    measured = json.loads((options.work / f"times-{network}.json").read_text())
    times = measured["rows"]
    whole = 100 * float(reference_right(network, "report", options).mean())
    rows: list[tuple[str, list[Point | None] | None, str]] = []
    curves = [(REFERENCE, [Point(REFERENCE, 0, (), (1.0,), 0.0, 1.0, whole, times[REFERENCE]["ms"][0], 1.0)])]
    for arm, own in gathered(network):
        seeds = [s for s in range(options.seeds) if seeded(own[0], s)]
        seeds = [s for s in seeds if all(said_file(options, a.name, s).exists() for a in own)]
        per_seed = [[p for a in own for p in points(a, s, times, options, RISKS)] for s in seeds]
        if not seeds:
            raise LissomError(f"no seed of {own[0].name} is trained; run the stage train first")
        if not any(per_seed):
            rows.append((arm, None, refused_file(options, own[0]).read_text()))
            continue
        curves.append((arm, front(per_seed[0])))
        rows.append((arm, [chosen(found) for found in per_seed], ""))
    best = timed(rows, times, options, network)
    plot = f"adaptive-{network}.svg"
    draw(TITLES[network], curves, DOCS / plot)
    lines = [f"{measured['cpu']}, {measured['threads']} threads.", "", *table(rows, best, whole)]
    return "\n".join([*lines, "", f"![accuracy against measured latency]({plot})"])


def gathered(network: str) -> list[tuple[str, list[Arm]]]:
    """Arms by title: cascades with different first members are one method, smaller networks one each."""
    found: dict[str, list[Arm]] = {}
    for arm in arms():
        if arm.network == network:
            found.setdefault(f"{STATIC} {arm.smaller}" if arm.title == STATIC else arm.title, []).append(arm)
    return list(found.items())


def timed(
    rows: list[tuple[str, list[Point | None] | None, str]],
    times: dict[str, Any],
    options: argparse.Namespace,
    network: str,
) -> dict[tuple[str, int], Any]:
    """The operating points beside the reference in one run, as they run on ``report``: by method and seed."""
    keys, artifacts = [], [Artifact.open(times[REFERENCE]["path"])]
    for title, found, _ in rows:
        for seed, point in enumerate(found or []):
            if point is None:
                continue
            # A copy for each: thresholds and shares lie in an artifact's own plan, and seeds have one structure.
            path = options.work / "artifacts" / f"{network}-point-{len(keys)}"
            shutil.rmtree(path, ignore_errors=True)
            artifact = Artifact.open(shutil.copytree(times[point.name]["path"], path))
            if point.thresholds:
                decisions = [
                    {**d, "threshold": None if math.isinf(t) else t}
                    for d, t in zip(artifact.plan["decisions"], point.thresholds, strict=True)
                ]
                artifact = artifact.with_decisions(decisions, {"shares": list(point.shares)})
            keys.append((title, seed))
            artifacts.append(artifact)
    kept = options.work / f"points-{network}.json"
    wanted = [
        [title, seed, artifact.plan.get("exits")] for (title, seed), artifact in zip(keys, artifacts[1:], strict=True)
    ]
    if kept.exists() and (known := json.loads(kept.read_text()))["of"] == json.loads(json.dumps(wanted)):
        return {(title, seed): row for (title, seed, _), row in zip(known["of"], known["rows"], strict=True)}
    found_rows = meter_for("cpu").measure(artifacts, threads=options.threads, seconds=options.seconds, memory=False)[1:]
    found_json = [{"speedup": one.speedup, "ci": one.speedup_ci} for one in found_rows]
    write_atomic(kept, json.dumps({"of": wanted, "rows": found_json}))
    return dict(zip(keys, found_json, strict=True))


def table(
    rows: list[tuple[str, list[Point | None] | None, str]], best: dict[tuple[str, int], Any], whole: float
) -> list[str]:
    lines = [
        f"{whole:.2f} % on `report`. Each method where it is fastest with a drop on `choose` of at most {ALLOWED}"
        " points from the reference:",
        "",
        "| method | seeds | speed | drop on report | average MACs | exits of the first seed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found, refused in rows:
        if found is None:
            lines.append(f"| {name} | | not applicable: {refused} | | | |")
            continue
        good = [(seed, point) for seed, point in enumerate(found) if point is not None]
        if not good:
            lines.append(f"| {name} | {len(found)} | no point within {ALLOWED} points | | | |")
            continue
        speeds = [best[name, seed]["speedup"] for seed, _ in good]
        low, high = best[name, good[0][0]]["ci"]
        first = good[0][1]
        places = first.name.partition("|")[2].split()
        leaves = ", ".join(f"{100 * s:.0f} % {at}" for s, at in zip(first.shares, [*places, "end"], strict=True))
        count = f"{len(found)}" if len(good) == len(found) else f"{len(good)} of {len(found)}"
        lines.append(
            f"| {name} | {count} | {spread(speeds, '{:.2f}x')}, CI [{low:.2f}, {high:.2f}] | "
            f"{spread([whole - p.accuracy for _, p in good], '{:.2f}')} | "
            f"{spread([p.macs for _, p in good], '{:.2f}')} | {leaves if places else ''} |"
        )
    return lines


def spread(values: list[float], form: str) -> str:
    middle = form.format(statistics.mean(values))
    return middle if len(values) == 1 else f"{middle} [{form.format(min(values))}, {form.format(max(values))}]"


def draw(name: str, curves: list[tuple[str, list[Point]]], path: Path) -> None:
    """Accuracy on report against expected latency, the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lissom"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for title, found in curves:
        x, y = [p.ms for p in found], [p.accuracy for p in found]
        axis.plot(x, y, "s" if title.startswith((STATIC, REFERENCE)) else ".-", label=title)
    axis.set_title(name)
    axis.set_xlabel("expected latency, ms")
    axis.set_ylabel("accuracy on report, %")
    top = max(p.accuracy for _, found in curves for p in found)
    axis.set_ylim(top - 12, top + 1)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LissomError as error:
        sys.exit(f"error: {error}")
