"""crop beside Torch-Pruning's magnitude pruning on a trained CNN, at equal measured latency.

    python benchmarks/cropping.py [--work FOLDER] [--shares 0.8 0.65 0.5] [--seeds 3] [--steps N] [--jobs 1]
                                  [--stage measure|train|page] [--dry]

The network is the reference CNN on CIFAR-10 unless ``--model``, ``--weights`` and ``--data`` name others.
Torch-Pruning is used as its README has it: ``MagnitudePruner`` with the L2 norm of groups, all but the classifier, one
step; once with the same ratio in every layer and once with one ranking over all of them, widths in multiples of
``--round-to``. Three stages, each resumable by running the same line again:

1. ``measure``: every ratio's structure is listed, and for each share of the original's time the one is searched by
   halving whose time, in turns with the original (OpenVINO, float32, batch 1), comes nearest. What is found is timed
   once more, all in one run. Rankings of one cropping share their widths, hence their times.
2. ``train``: each structure, once a seed, learns from the original what a recovery of ``lissom slim`` would teach it:
   the same loss, steps, batches, rates and seeds for all. Where there is a GPU, it is used. ``--jobs`` train at once.
3. ``page``: accuracy on ``report`` with intervals over the seeds, to docs/benchmarks/cropping.md.

``--dry`` says how many structures and trainings there are and about how long they take, and ends.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trained_plans import DOCS, Maker

from lissom.errors import LissomError, NotApplicable
from lissom.export.capture import clone
from lissom.export.plan import Plan
from lissom.meters.costs import layer_costs
from lissom.meters.devices import meter_for
from lissom.meters.measurement import Measurement
from lissom.proofs.base import mean_interval
from lissom.runtime.artifact import Artifact, write_atomic
from lissom.runtime.target import cpu_name, default_threads
from lissom.slimming import RECOVERY_EPOCHS, RECOVERY_STEPS
from lissom.techniques.crop import Crop
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import BATCH, LEARNING_RATE
from lissom.training.loop import evaluate
from lissom.training.methods.recovery import Answers, Phase
from lissom.training.phases import fit_phases

SHARED = Path(__file__).resolve().parents[2] / "shared"
RATIOS = tuple(n / 50 for n in range(49, 2, -1))  # what is kept: of the multiplications, or of the channels
NEAR = 0.05  # of the share asked for: farther off is marked on the page
TOLERANCE = 0.02  # of the share of time that is searched for: nearer is within what a measurement tells
STEPS_TIMED = 3  # trainings' steps that the cost is told from


@dataclass(frozen=True)
class Arm:
    """One way to choose channels. ``family``: the way widths follow from a ratio; arms of one family have the same."""

    title: str
    family: str
    importance: str = ""

    @property
    def name(self) -> str:
        return self.title.replace(", ", "-").replace(" ", "_")


CROP, STREAMS, LOCAL, GLOBAL = "crop", "crop, streams too", "Torch-Pruning, each layer", "Torch-Pruning, one ranking"
ARMS = (
    Arm("crop, magnitude", CROP, "magnitude"),
    Arm("crop, activation", CROP, "activation"),
    Arm("crop, random", CROP, "random"),
    Arm("crop, streams too, magnitude", STREAMS, "magnitude"),
    Arm("crop, streams too, activation", STREAMS, "activation"),
    Arm(LOCAL, LOCAL),
    Arm(GLOBAL, GLOBAL),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=f"{SHARED / 'models' / 'models.py'}:cnn", help="as in lissom slim")
    parser.add_argument("--weights", default=str(SHARED / "models" / "cnn_cifar10.safetensors"))
    parser.add_argument("--arch", help="the timm name of a weight file's network")
    parser.add_argument("--data", default=str(SHARED / "data" / "cifar10"))
    parser.add_argument("--work", type=Path, default=Path("runs/cropping"))
    parser.add_argument("--shares", nargs="*", type=float, default=[0.8, 0.65, 0.5], help="of the original's time")
    parser.add_argument("--arms", nargs="*", default=[arm.title for arm in ARMS], choices=[arm.title for arm in ARMS])
    parser.add_argument("--round-to", type=int, default=4, help="multiples of channels for Torch-Pruning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=RECOVERY_STEPS, help="of each training, at most")
    parser.add_argument("--epochs", type=int, default=RECOVERY_EPOCHS, help="of each training, at most")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="of running each structure that is tried")
    parser.add_argument("--final-seconds", type=float, default=4.0, help="of running each structure that is found")
    parser.add_argument("--stage", choices=("measure", "train", "page"), help="only this one")
    parser.add_argument("--page", type=Path, default=DOCS / "cropping.md")
    parser.add_argument("--dry", action="store_true", help="say what it would cost, and end")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.shares or not all(0 < share < 1 for share in options.shares) or options.seeds < 1:
        raise LissomError("shares of time lie between 0 and 1, and there is at least one seed")
    options.recover = None  # limits are in steps
    options.work.mkdir(parents=True, exist_ok=True)
    if options.job:
        train_one(options)
        return 0
    if options.dry or options.stage in (None, "train"):
        print(cost(options), flush=True)
    if options.dry:
        return 0
    if options.stage in (None, "measure"):
        measure(options)
    if options.stage in (None, "train"):
        left = train(options)
        if left:
            print(f"{left} trainings are left; run the same line again")
            return 1
    if options.stage in (None, "page"):
        write_page(options)
    return 0


def chosen_arms(options: argparse.Namespace) -> list[Arm]:
    return [arm for arm in ARMS if arm.title in options.arms]


def families(options: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(arm.family for arm in chosen_arms(options)))


def cost(options: argparse.Namespace) -> str:
    """What a run takes, told before it is begun."""
    searches = len(families(options)) * len(options.shares)
    jobs = waiting(options)
    said = (
        f"{searches} searches for a structure of at most {len(RATIOS).bit_length()} measurements each, what other"
        f" searches or an earlier call measured left out; {len(jobs)} trainings of at most {options.steps} steps"
    )
    if not jobs:
        return said
    maker = Maker(options)
    assert maker.task.fit is not None
    seconds = seconds_a_step(maker, options)
    steps = min(options.steps, options.epochs * (len(maker.task.fit) // BATCH))
    judging = 2 * len(maker.task.report) / BATCH / 4  # in steps, of which a forward pass is a quarter
    whole = seconds * (steps + judging) * len(jobs) / options.jobs
    return (
        f"{said}: about {whole / 60:.0f} minutes with {options.jobs} at once, from a step of the whole network"
        f" ({seconds:.2f} s); narrower ones take less, and processes that share processors more"
    )


def seconds_a_step(maker: Maker, options: argparse.Namespace) -> float:
    """Of training the original from itself, on random images; the first step is not counted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    teacher, student = clone(maker.base.model).to(device).eval(), clone(maker.base.model).to(device).train()
    images = torch.randn(BATCH, *maker.task.shape, device=device)
    start = 0.0
    for step in range(1 + STEPS_TIMED):
        if step == 1:
            start = time.monotonic()
        with torch.no_grad():
            wanted = teacher(images)
        nn.functional.mse_loss(student(images), wanted + 1).backward()
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.monotonic() - start) / STEPS_TIMED


# Structures


def made(arm: Arm, ratio: float, maker: Maker, options: argparse.Namespace, seed: int = 0) -> Plan:
    """The original without some of its channels, as ``arm`` chooses them; its weights are those of the original."""
    if arm.family in (CROP, STREAMS):
        streams = True if arm.family == STREAMS else None
        crop = Crop(keep=ratio, importance=arm.importance, streams=streams, seed=seed)
        return crop.settle(maker.base, maker.task, nothing).apply(maker.base, maker.task)
    model = pruned(
        maker.base.model, maker.task.shape, ratio, everywhere=arm.family == GLOBAL, round_to=options.round_to
    )
    return Plan.of(model, maker.task.shape)


def nothing(pairs: Sequence[Any]) -> list[float]:
    raise LissomError("crop settles from images and measures nothing")


def pruned(model: nn.Module, shape: tuple[int, ...], keep: float, *, everywhere: bool, round_to: int) -> nn.Module:
    """A copy of ``model`` from which Torch-Pruning has taken the share 1 - ``keep`` of the channels: of each layer, or
    of all layers in one ranking (``everywhere``)."""
    import torch_pruning

    model = clone(model).cpu().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    example = torch.randn(1, *shape)
    with torch.no_grad():
        classes = model(example).shape[1]
    ends = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[0] == classes]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=everywhere,
        pruning_ratio=1 - keep,
        ignored_layers=ends[-1:],
        round_to=round_to,
        # Left out, these are dictionaries that all pruners of a process share.
        in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},
    )  # fmt: skip
    pruner.step()
    return model.eval()


def signature(model: nn.Module) -> str:
    """The same for two networks of the same widths."""
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


def figures(plan: Plan) -> dict[str, Any]:
    costs = layer_costs(plan.model, plan.shape)
    return {
        "signature": signature(plan.model),
        "macs": sum(one.macs for one in costs),
        "parameters": sum(p.numel() for p in plan.model.parameters()),
    }


def structures(arm: Arm, maker: Maker, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The structures of an arm's family from the mildest ratio on, each with fewer multiplications than all before it.

    Torch-Pruning leaves a layer whole where rounding would leave nothing of it, so that a harsher ratio may remove
    less: nobody would take that one.
    """
    found: list[dict[str, Any]] = []
    for ratio in RATIOS:
        try:
            plan = made(arm, ratio, maker, options)
        except NotApplicable:
            continue  # less than can be kept
        with torch.no_grad():
            plan.model(torch.zeros(1, *maker.task.shape))  # what does not run is no structure
        one = {"ratio": ratio, **figures(plan)}
        if not found or one["macs"] < found[-1]["macs"]:
            found.append(one)
    return found


# 1. Times


def measure(options: argparse.Namespace) -> None:
    """Search a structure for every family and share; then time all that were found, in one run."""
    maker = Maker(options)
    reference = export(maker, maker.base, options, "original")
    known = loaded(options.work / "tried.json", {})
    found = loaded(options.work / "structures.json", {"original": figures(maker.base), "found": {}})
    if found["original"] != figures(maker.base):
        raise LissomError(f"{options.work} holds structures of another network; name another --work")
    for family in families(options):
        arm = next(a for a in chosen_arms(options) if a.family == family)
        missing = [share for share in options.shares if place(family, share, options) not in found["found"]]
        if not missing:
            continue
        listed = structures(arm, maker, options)
        if not listed:
            raise LissomError(f"{family} makes no structure of this network")
        print(f"{family}: {len(listed)} structures", flush=True)
        for share in missing:

            def timed(one: dict[str, Any], arm: Arm = arm) -> float:
                if one["signature"] not in known:
                    artifact = export(maker, made(arm, one["ratio"], maker, options), options, one["signature"])
                    result = run([reference, artifact], options, options.seconds)[1]
                    known[one["signature"]] = time_share(result)
                    write_atomic(options.work / "tried.json", json.dumps(known, indent=1))
                return float(known[one["signature"]]["share"])

            best = nearest(listed, share, timed)
            found["found"][place(family, share, options)] = best
            write_atomic(options.work / "structures.json", json.dumps(found, indent=1))
            print(f"{family}, {share:g} of the time: ratio {best['ratio']:g}, {timed(best):.3f}", flush=True)
    final(maker, reference, found["found"], options)


def nearest(listed: Sequence[dict[str, Any]], share: float, timed: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """The structure whose time, of those that halving tries, is nearest to ``share``; times fall along the list."""
    low, high = -1, len(listed)  # the whole network, and nothing
    tried: dict[int, float] = {}
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = timed(listed[middle])
        if abs(tried[middle] / share - 1) <= TOLERANCE:
            break
        low, high = (middle, high) if tried[middle] > share else (low, middle)
    return dict(listed[min(tried, key=lambda i: abs(tried[i] - share))])


def final(maker: Maker, reference: Artifact, found: dict[str, Any], options: argparse.Namespace) -> None:
    """All structures and the original in one run, each once."""
    wanted = {}
    for family in families(options):
        for share in options.shares:
            one = found[place(family, share, options)]
            wanted[one["signature"]] = family, one["ratio"]
    path = options.work / "times.json"
    if set(wanted) == set(loaded(path, {})):
        return
    artifacts = [reference]
    for name, (family, ratio) in wanted.items():
        arm = next(a for a in chosen_arms(options) if a.family == family)
        artifacts.append(export(maker, made(arm, ratio, maker, options), options, name))
    results = run(artifacts, options, options.final_seconds)[1:]
    times = {name: time_share(result) for name, result in zip(wanted, results, strict=True)}
    write_atomic(path, json.dumps(times, indent=1))


def place(family: str, share: float, options: argparse.Namespace) -> str:
    """The key of what was found."""
    return f"{family}|{share:g}" + (f"|{options.round_to}" if family in (LOCAL, GLOBAL) else "")


def export(maker: Maker, plan: Plan, options: argparse.Namespace, name: str) -> Artifact:
    path = options.work / "artifacts" / name
    if (path / "plan.json").exists():
        return Artifact.open(path)
    return maker.export(Recipe(), plan, maker.target(), path)


def run(artifacts: Sequence[Artifact], options: argparse.Namespace, seconds: float) -> list[Measurement]:
    return meter_for("cpu").measure(artifacts, threads=options.threads, seconds=seconds, memory=False)


def time_share(result: Measurement) -> dict[str, Any]:
    """Time as a share of the original's, with its 95 % interval."""
    assert result.speedup is not None
    low, high = result.speedup_ci or (result.speedup, result.speedup)
    return {"share": 1 / result.speedup, "interval": [1 / high, 1 / low], "ms": result.latency_ms}


def loaded(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else otherwise


# 2. Training


def waiting(options: argparse.Namespace) -> list[str]:
    """Trainings that are not done, the first seed first."""
    jobs = [
        f"{arm.name}:{share:g}:{seed}"
        for seed in range(options.seeds)
        for share in options.shares
        for arm in chosen_arms(options)
    ]
    return [job for job in jobs if not result_file(options, job).exists()]


def result_file(options: argparse.Namespace, job: str) -> Path:
    name, share, seed = job.split(":")
    arm = next(a for a in ARMS if a.name == name)
    step = f"-round{options.round_to}" if arm.family in (LOCAL, GLOBAL) else ""
    return options.work / f"{name}-{share}-{seed}-{options.steps}x{options.epochs}{step}.json"


def train(options: argparse.Namespace) -> int:
    """All trainings, ``jobs`` at a time; how many are left."""
    if not (options.work / "structures.json").exists():
        raise LissomError(f"{options.work} has no structures yet; run the stage measure first")
    start, left, failed = time.monotonic(), waiting(options), 0
    whole = len(left)
    running: dict[str, subprocess.Popen[bytes]] = {}
    while left or running:
        for job, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[job]
            failed += bool(process.returncode)
            seconds, done = time.monotonic() - start, whole - len(left) - len(running)
            rest = seconds / done * (whole - done)
            how = "done" if not process.returncode else f"FAILED, see {log_file(options, job)}"
            print(f"{seconds:6.0f} s {job} {how}; {whole - done} left, about {rest / 60:.0f} minutes", flush=True)
        while left and len(running) < options.jobs:
            job = left.pop(0)
            log = open(log_file(options, job), "wb")  # noqa: SIM115 - the process writes to it
            running[job] = subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--job", job], stdout=log, stderr=log, env=environment()
            )
            log.close()
        time.sleep(0.2)
    return failed


def environment() -> dict[str, str]:
    """That of a job: the package of this very tree."""
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def log_file(options: argparse.Namespace, job: str) -> Path:
    return options.work / f"{job.replace(':', '-')}.log"


def train_one(options: argparse.Namespace) -> None:
    """One job: accuracy on ``report`` before and behind the training."""
    name, share, number = options.job.split(":")
    arm, seed = next(a for a in ARMS if a.name == name), int(number)
    maker = Maker(options)
    found = loaded(options.work / "structures.json", None)["found"][place(arm.family, float(share), options)]
    plan = made(arm, found["ratio"], maker, options, seed)
    if signature(plan.model) != found["signature"]:
        raise LissomError(f"{arm.title} at the ratio {found['ratio']:g} is no longer the network that was measured")
    before = evaluate(plan.model, maker.task, maker.task.report, 256)
    folder = result_file(options, options.job).with_suffix("")
    fit_phases(
        plan.model,
        maker.task.with_splits(choose=maker.task.choose.sample(32, 0)),  # judged every epoch, and nobody reads that
        [Phase((Answers(),))],
        original=maker.base.model,
        epochs=options.epochs,
        max_steps=options.steps,
        batch=BATCH,
        lr=LEARNING_RATE,
        seed=seed,
        folder=folder,
        threads=options.threads,
        precision="auto",
    )
    plan.model.cpu()
    after = evaluate(plan.model, maker.task, maker.task.report, 256)
    result = {
        "before": before.value, "after": after.value, "count": after.count,
        "device": "GPU" if torch.cuda.is_available() else "CPU",
    }  # fmt: skip
    write_atomic(result_file(options, options.job), json.dumps(result))
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{options.job}: {before.value:.2f} % before, {after.value:.2f} % behind the training")


# 3. The page


def write_page(options: argparse.Namespace) -> None:
    missing = waiting(options)
    if missing:
        raise LissomError(f"{len(missing)} trainings are not done ({missing[0]} among them); run the stage train first")
    maker = Maker(options)
    whole = evaluate(maker.base.model, maker.task, maker.task.report, 256)
    text = page(options, maker, whole.value)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(text, encoding="utf-8")
    print(text)


def page(options: argparse.Namespace, maker: Maker, whole: float) -> str:
    kept = loaded(options.work / "structures.json", None)
    original, found, times = kept["original"], kept["found"], loaded(options.work / "times.json", None)
    results = {
        (arm, share): [
            loaded(result_file(options, f"{arm.name}:{share:g}:{seed}"), None) for seed in range(options.seeds)
        ]
        for arm in chosen_arms(options)
        for share in options.shares
    }
    devices = sorted({one["device"] for rows in results.values() for one in rows})
    count = next(iter(results.values()))[0]["count"]
    lines = [
        "# crop beside Torch-Pruning, at equal measured latency",
        "",
        f"Written by `benchmarks/cropping.py`; its text says how. {maker.name}, {whole:.2f} % on the {count} images of"
        f" `report`; {original['parameters']:,} parameters, {original['macs'] / 1e6:.1f} million multiplications."
        f" OpenVINO, float32, batch 1, {cpu_name()}, {options.threads} thread{'s' * (options.threads != 1)}: time is a"
        " share of the original's, all timed in turns in one run, with the 95 % interval of the paired ratio."
        f" Every network is trained from the original for at most {options.steps} steps of {BATCH} images"
        f" ({' and '.join(devices)}), once for each of {options.seeds} seed{'s' * (options.seeds != 1)}; accuracy is"
        " the mean over the seeds, with its 95 % interval by Student's t."
        f" Torch-Pruning {torch_pruning_version()}: `MagnitudePruner`, L2 norm of groups, round_to={options.round_to}."
        " Rankings of one cropping have the same widths, hence one time. †: more than"
        f" {100 * NEAR:.0f} % from the time asked; no structure that was tried is nearer.",
        "",
        "| time asked | method | ratio | time | multiplications | parameters | before training, % | after, % | drop |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for share in options.shares:
        for arm in chosen_arms(options):
            one = found[place(arm.family, share, options)]
            timed = times[one["signature"]]
            low, high = timed["interval"]
            rows = results[arm, share]
            far = " †" if abs(timed["share"] / share - 1) > NEAR else ""
            before = sum(row["before"] for row in rows) / len(rows)
            after = [row["after"] for row in rows]
            lines.append(
                f"| {share:g} | {arm.title} | {one['ratio']:.2f} | {timed['share']:.3f} [{low:.3f}, {high:.3f}]{far} |"
                f" {one['macs'] / original['macs']:.2f} | {one['parameters'] / original['parameters']:.2f} |"
                f" {before:.1f} | {with_interval(after)} | {whole - sum(after) / len(after):.2f} |"
            )
    return "\n".join([*lines, "", *differences(results, options)]) + "\n"


def differences(results: dict[tuple[Arm, float], list[dict[str, Any]]], options: argparse.Namespace) -> list[str]:
    """crop less each of Torch-Pruning's two, seed by seed."""
    ours = [arm for arm in chosen_arms(options) if arm.family in (CROP, STREAMS)]
    theirs = [arm for arm in chosen_arms(options) if arm.family in (LOCAL, GLOBAL)]
    if not ours or not theirs:
        return []
    lines = [
        "Points by which crop is better, paired by seeds; an interval that holds 0 shows no difference.",
        "",
        f"| time asked | crop's ranking | {' | '.join(f'less {arm.title}' for arm in theirs)} |",
        f"| ---: | --- |{' ---: |' * len(theirs)}",
    ]
    for share in options.shares:
        for arm in ours:
            cells = []
            for other in theirs:
                pairs = zip(results[arm, share], results[other, share], strict=True)
                cells.append(with_interval([one["after"] - two["after"] for one, two in pairs], "+"))
            lines.append(f"| {share:g} | {arm.title} | {' | '.join(cells)} |")
    return lines


def with_interval(values: Sequence[float], sign: str = "") -> str:
    mean, interval = mean_interval(values)
    if interval is None:
        return f"{mean:{sign}.2f} (one seed)"
    return f"{mean:{sign}.2f} [{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]"


def torch_pruning_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("torch-pruning")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LissomError as error:
        sys.exit(f"error: {error}")
