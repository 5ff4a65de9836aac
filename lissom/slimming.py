"""The main job: from a model, its data and a budget to the cheapest model that keeps its quality, with proof.

This is the one place that composes search, export, meters and report.
"""

from __future__ import annotations

import copy
import datetime
import errno
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import time as clock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lissom.data.sources import read
from lissom.errors import LissomError, NotApplicable
from lissom.export.capture import run_eager
from lissom.export.exits import fit_exits
from lissom.export.exporting import export_plan, run_artifact, run_stages
from lissom.export.plan import Plan
from lissom.layers.exits import exits_of, put_away_exits, remove_exits
from lissom.meters.costs import layer_costs, total
from lissom.meters.devices import meter_for
from lissom.meters.measurement import Measurement, Meter
from lissom.meters.profiling import profile
from lissom.models.factory import Loaded, load_model, num_outputs, with_head
from lissom.registry import parts
from lissom.report.card import card
from lissom.report.page import write_report
from lissom.report.shift import shift_table
from lissom.runtime.artifact import Artifact, replace_folder, write_atomic
from lissom.runtime.backends import Stages, inspect
from lissom.runtime.target import RUNTIMES, Target, default_threads
from lissom.search.budget import Budget, check_direction
from lissom.search.choosing import cost, pareto, promising, rank
from lissom.search.proposals import SEARCHES, batch_size, propose
from lissom.search.runs import Run
from lissom.search.trials import Metrics, Trial
from lissom.tasks.of_data import task_of
from lissom.tasks.task import Split, Task, batches
from lissom.techniques.probes import layer_probe
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer
from lissom.training.loop import FitEvent, fit
from lissom.usercode import is_reference, load_function

__all__ = ["Best", "Event", "Result", "slim"]

CALIBRATION = 300  # images: NNCF's own default
VERIFICATION = 32  # real images on which an export is compared with its model
TRIALS = 12
RECOVERY_EPOCHS, RECOVERY_STEPS = 5, 1000  # the shorter of both: steps, because minutes depend on the machine
LONGEST = 500  # epochs of a recovery that minutes limit
TUNED = "tuned"  # role of a trial whose recipe had the training that the search saved
FIRST = 2  # trials without exits that a run begins with: the baseline and plain int8
TUNINGS = 3  # of those at most: by halves they decide among seven
NEAR = 8.0  # points beyond the budget that such a training may bring back
PART = "part"  # role of a trial that is the beginning of the winner's recipe
DEMO_EPOCHS = 8
DEMO_TRAINING = {"batch": 16, "lr": 1e-3, "augment": False}  # 1,300 small digits: many short steps
DEMO_TRIALS = 7
DEMO_TECHNIQUES = ("fuse", "bf16", "int8")  # those that need no training: a newcomer waits for minutes only
DEMO_THREADS = 1  # what else runs on a newcomer's machine then disturbs the measurement least
DEMO_BUDGET = "latency<=0.7x, drop<=2.0"
DEFAULT_BUDGET = "drop<=1.0"


@dataclass(frozen=True)
class Event:
    """One step of progress. ``kind``: ``stage`` (a new part of the work), ``epoch``, ``trial`` (one is about to start)
    or ``done`` (one is finished: ``trial``). ``left`` is an estimate in seconds, None where there is none."""

    kind: str
    text: str
    number: int = 0
    of: int = 0
    trial: Trial | None = None
    best: Trial | None = None
    left: float | None = None


@dataclass(frozen=True)
class Best:
    """The winner: its recipe's text, its metrics (quality on ``report``) and its artifact's folder."""

    recipe: str
    metrics: Metrics
    artifact: Path


@dataclass(frozen=True)
class Result:
    """What ``slim`` found. ``pareto`` holds the trials that no other beats; ``report`` is the page's path.

    ``met``: every limit of the budget holds on the ``report`` split. ``json`` is what result.json holds.
    """

    best: Best
    pareto: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    report: Path
    met: bool
    folder: Path
    json: dict[str, Any]

    @property
    def artifact(self) -> Path:
        return self.best.artifact


def slim(
    model: str | nn.Module | None = None,
    data: Any = None,
    *,
    task: str | Task | None = None,
    budget: str | None = None,
    techniques: str | Sequence[str] | None = None,
    recipe: str | Path | Recipe | None = None,
    trials: int | None = None,
    search: str = "linas",
    time: float | None = None,
    runtime: str = "openvino",
    device: str = "cpu",
    batch: int = 1,
    threads: int | None = None,
    train: int | None = None,
    recover: float | None = None,
    arch: str | None = None,
    weights: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: Callable[[Event], None] | None = None,
    meter: Meter | None = None,
    command: str = "",
) -> Result:
    """Find the cheapest form of a model that keeps its quality within a budget on a device.

    ``model``: a timm name, a weight file with ``arch``, ``file.py:function``, or an ``nn.Module``. ``data``:
    ``digits``, a folder of images, a Parquet folder, ``file.py:function``, or data sets (see lissom.data.sources).
    Without both, a small ViT is trained on scikit-learn's digits. ``task``: a ``Task``, or ``file.py:function``
    that takes the data set and returns one, for losses and metrics of your own.

    ``budget`` as in lissom.search.budget (default: one point of drop). ``techniques`` limits the search to some,
    ``recipe`` applies one recipe without a search. ``trials`` (12) and ``time`` (minutes) bound the search, which is
    "linas" (predictors decide what is worth measuring), "joint" (the same, with every size of a sub-network and every
    layer's precision searched by itself), "nsga2" or "random". Up to three more trials follow: recipes that lack little
    quality get the training that a search saves (sub-networks of a shared one, each by itself). ``train`` epochs of
    training come first where the model arrives untrained. ``recover`` is how many minutes each training that a recipe
    needs takes, in place of five epochs or 1,000 steps; with it results depend on the machine's speed. A training that
    ended within its first epoch is among the result's warnings. ``weights`` is a
    weight file, or ``pretrained`` for timm's own, fetched from its hub. ``out`` is the run's folder; ``resume``
    continues one. ``meter`` replaces the device's own.

    Raises LissomError for bad input; a technique that fails becomes a row of the result instead.
    """
    if runtime not in RUNTIMES:
        raise LissomError(f"there is no runtime {runtime!r}; known: {', '.join(RUNTIMES)}")
    if (
        batch < 1
        or (threads is not None and threads < 1)
        or (trials is not None and trials < 1)
        or (train is not None and train < 0)
        or (recover is not None and recover <= 0)
    ):
        raise LissomError("batch, threads and trials are at least 1, train is not negative, and recover is above 0")
    demo = model is None and data is None and task is None
    if demo:
        model, data = "digits_vit", "digits"
        train = DEMO_EPOCHS if train is None else train
        budget = DEMO_BUDGET if budget is None else budget
        trials = DEMO_TRIALS if trials is None else trials
        techniques = DEMO_TECHNIQUES if techniques is None else techniques
        threads = DEMO_THREADS if threads is None else threads
    if model is None:
        raise LissomError("there is no MODEL: give a timm name, a weight file with --arch, or file.py:function")
    if data is None and not isinstance(task, Task):
        raise LissomError("there is no --data: give a folder of images, a Parquet folder, digits, or file.py:function")
    if search not in SEARCHES:
        raise LissomError(f"there is no search {search!r}; known: {', '.join(SEARCHES)}")
    limits = Budget.parse(DEFAULT_BUDGET if budget is None else budget)
    check_direction(limits)
    names = _technique_names(techniques)
    given = None if recipe is None else Recipe.of(recipe)
    target = Target(runtime, device, batch, threads or default_threads())
    folder = Path(out) if out is not None else _new_folder()
    job = _Job(limits, names, given, target, trials or TRIALS, time, seed, folder, resume, progress, command)
    job.training = DEMO_TRAINING if demo else {}
    job.recover, job.how = recover, search
    return job.run(model, data, task, train or 0, arch, weights, meter or meter_for(device))


def _technique_names(techniques: str | Sequence[str] | None) -> tuple[str, ...]:
    known = [part.name for part in parts("technique")]
    if techniques is None:
        return tuple(known)
    if isinstance(techniques, str):
        techniques = [name.strip() for name in techniques.split(",") if name.strip()]
        unknown = [name for name in techniques if name not in known]
        if unknown or not techniques:
            raise LissomError(f"there is no technique {', '.join(unknown) or 'named'}; known: {', '.join(known)}")
    return tuple(dict.fromkeys(techniques))


def _new_folder() -> Path:
    """runs/1, runs/2, ...: the first that is free."""
    return next(path for n in itertools.count(1) if not (path := Path("runs") / str(n)).exists())


class _Job:
    """One call of ``slim``: its settings, and what is known so far."""

    def __init__(
        self,
        budget: Budget,
        techniques: tuple[str, ...],
        given: Recipe | None,
        target: Target,
        trials: int,
        minutes: float | None,
        seed: int,
        folder: Path,
        resume: bool,
        progress: Callable[[Event], None] | None,
        command: str,
    ) -> None:
        self.budget, self.techniques, self.given, self.target = budget, techniques, given, target
        self.most, self.minutes, self.seed, self.command = trials, minutes, seed, command
        self.folder, self.resume = folder, resume
        self.progress = progress or (lambda event: None)
        self.begun = clock.monotonic()
        self.warnings: list[str] = []
        self.training: dict[str, Any] = {}  # settings of fit that differ from its defaults
        self.recover: float | None = None  # minutes
        self.how = "linas"

    # The path of a run, from top to bottom.

    def run(
        self, model: Any, data: Any, task: Any, train: int, arch: str | None, weights: str | None, meter: Meter
    ) -> Result:
        self.stage("reading model and data")
        self.meter = meter
        capabilities = meter.capabilities(self.target.runtime)
        self.target = replace(self.target, capabilities=frozenset(capabilities["precisions"]))
        loaded = self.prepare(model, data, task, train, arch, weights)
        fits = self.most + TUNINGS + len(self.techniques) if self.given is None else 1
        with Run(self.folder, self.settings(loaded, data, train, weights), self.resume, fits=fits) as run:
            self.on = run
            self.train(loaded.model, train)
            self.plan = Plan.of(loaded.model.eval(), self.task.shape)
            self.read_splits()
            self.recoverer = Recoverer(
                self.plan,
                self.task,
                self.target,
                self.folder / "recovery",
                epochs=RECOVERY_EPOCHS if self.recover is None else LONGEST,
                steps=RECOVERY_STEPS if self.recover is None else None,
                seconds=None if self.recover is None else 60 * self.recover,
                seed=self.seed,
                progress=self.recovering,
                threads=default_threads(),
            )
            self.search()
            self.tune()
            winner, ablation = self.without_each(self.shoot_out())
            return self.conclude(winner, ablation, self.waterfall(winner), loaded, capabilities)

    def prepare(self, model: Any, data: Any, task: Any, train: int, arch: str | None, weights: str | None) -> Loaded:
        """Model and task. Everything that the user may have got wrong is found out here, before the first trial."""
        source = None if data is None else read(data)
        model = copy.deepcopy(model) if isinstance(model, nn.Module) and train else model  # the user's stays as it is
        classes = len(source.classes) if source is not None else len(task.classes)
        loaded = load_model(model, arch=arch, weights=weights, num_classes=classes if train and classes else None)
        if exits_of(loaded.model) is not None:  # the baseline answers once; early_exit takes trained exits out again
            take_off = put_away_exits if loaded.trained and not train else remove_exits
            loaded = replace(loaded, model=take_off(copy.deepcopy(loaded.model)))
        if not loaded.trained and not train:
            raise LissomError(
                f"{loaded.name} comes without trained weights: give --weights FILE, --weights pretrained "
                "(fetched from timm's hub), or --train EPOCHS"
            )
        if isinstance(task, Task):
            self.task = task
        elif task is not None:
            if not is_reference(str(task)):
                raise LissomError(
                    f"--task {task!r} is not of the form file.py:function; classification needs no --task"
                )
            made = load_function(str(task))(source)
            if not isinstance(made, Task):
                raise LissomError(f"{task} returned a {type(made).__name__}, not a lissom.Task")
            self.task = made
        else:
            assert source is not None
            self.task = task_of(
                source, preprocessing=loaded.preprocessing(source.image_size), trained_here=bool(train), seed=self.seed
            )
        if self.task.kind == "classification":
            if train and loaded.trained and num_outputs(loaded.model, self.task.shape) != classes:
                loaded = replace(loaded, model=with_head(loaded.model, classes, self.seed))
            self.task.check_outputs(num_outputs(loaded.model, self.task.shape))
        else:
            try:
                answer = run_eager(loaded.model, torch.zeros(1, *self.task.shape))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise LissomError(f"{loaded.name} does not take inputs of shape {self.task.shape}: {reason}") from error
            if not isinstance(answer, torch.Tensor):
                raise LissomError(f"{loaded.name} answers with several tensors; wrap it to answer with one")
            self.task.check_answer(tuple(answer.shape))
        if train and self.task.fit is None:
            raise LissomError("there is nothing to train on: the data have no train/ split")
        self.data_name = source.name if source is not None else self.task.name
        return loaded

    def settings(self, loaded: Loaded, data: Any, train: int, weights: str | None) -> dict[str, Any]:
        """What decides a run's trials: a resumed one must have the same."""
        return {
            "model": loaded.name,
            # Random initial weights differ from process to process; what training makes of them is kept in the run.
            "weights": "trained in the run" if train else _weights_hash(loaded.model),
            "data": self.data_name,
            "train": train,
            "recover": self.recover,
            "budget": self.budget.text,
            "techniques": list(self.techniques),
            "search": self.how,
            "recipe": None if self.given is None else str(self.given),
            "runtime": self.target.runtime,
            "device": self.target.device,
            "batch": self.target.batch,
            "threads": self.target.threads,
            "seed": self.seed,
        }

    def train(self, model: nn.Module, epochs: int) -> None:
        """Train the baseline where asked, once: a resumed run loads what training left."""
        if not epochs:
            return
        from safetensors.torch import load_file, save_file

        path = self.folder / "baseline.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
            return
        self.stage(f"training the baseline, {epochs} epochs")

        def report(event: FitEvent) -> None:
            quality = "" if event.quality is None else f", {self.task.metric} {event.quality:.1f} %"
            left = event.seconds * (event.epochs - event.epoch)
            text = f"epoch {event.epoch} of {event.epochs}: loss {event.loss:.3f}{quality}"
            self.progress(Event("epoch", text, event.epoch, event.epochs, left=left))

        fit(
            model,
            self.task,
            epochs=epochs,
            seed=self.seed,
            folder=self.folder / "training",
            resume=(self.folder / "training").exists(),
            progress=report,
            threads=default_threads(),
            **self.training,
        )
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, self.folder / ".baseline.safetensors")
        os.replace(self.folder / ".baseline.safetensors", path)
        shutil.rmtree(self.folder / "training")

    def read_splits(self) -> None:
        """The inputs the trials need, decoded once."""
        self.stage("decoding images")
        task = self.task
        source = task.fit if task.fit is not None and len(task.fit) else task.choose
        few = source.sample(CALIBRATION, self.seed)
        self.calibration = few.inputs(slice(0, len(few)))
        self.verify = task.choose.inputs(slice(0, min(VERIFICATION, len(task.choose))))
        self.layers = [cost.to_json() for cost in layer_costs(self.plan.model, task.shape)]
        skipped = [*few.skipped, *task.choose.skipped]
        if skipped:
            names = ", ".join(f"{name} ({reason})" for name, reason in skipped[:5])
            self.warnings.append(f"{len(skipped)} images could not be read and were left out: {names}")

    def search(self) -> None:
        """Trials until their number, the time or the space is exhausted."""
        self.stage("measuring")
        self.targets: np.ndarray | None = None
        while True:
            proposal = self.next_proposal()
            if proposal is None:
                break
            role, recipe = proposal
            self.trial(role, recipe)

    def next_proposal(self) -> tuple[str, Recipe] | None:
        searched = self.searched()
        if self.given is not None:
            first = [("baseline", Recipe()), ("plain int8", _plain_int8()), ("given", self.given)]
            return first[len(searched)] if len(searched) < len(first) else None
        over = len(searched) >= self.most or self.out_of_time()
        if over and any(t.role == self.how for t in searched):
            return None
        proposal = propose(
            self.seed,
            searched,
            self.techniques,
            self.plan,
            self.target,
            self.best(),
            search=self.how,
            population=batch_size(self.most),
            quantities=self.quantities(),
        )
        # The first trials are always made; only then do the number and the time decide.
        return None if proposal is not None and proposal[0] == self.how and over else proposal

    def quantities(self) -> tuple[str, ...]:
        """The costs that the search makes small: those the budget limits, else latency."""
        limited = (limit.quantity for limit in self.budget.limits if limit.quantity not in ("drop", "quality"))
        return tuple(dict.fromkeys(limited)) or ("latency",)

    def tune(self) -> None:
        """Train by itself what a search only ranks (``Technique.finished``), where the best could become cheaper by it.

        Those that would be better if they kept a little more quality stand in the order of what they lack; which of
        them a training brings within the budget is found by halves.
        """
        if self.given is not None:
            return
        near = promising(self.searched(), self.budget, self.baseline.metrics, NEAR)
        recipes = [r for r in (Recipe.parse(t.resolved).finished() for t in near) if r is not None]
        low, high = 0, len(recipes)
        for _ in range(TUNINGS):
            if low == high or self.out_of_time(60 * (self.recover or 0.0)):
                return
            middle = (low + high) // 2
            trial = self.find(TUNED, recipes[middle]) or self.trial(TUNED, recipes[middle])
            if trial.ok and self.budget.met(trial.metrics, self.baseline.metrics):
                low = middle + 1
            else:
                high = middle

    def out_of_time(self, least: float = 0.0) -> bool:
        """Whether another trial, of ``least`` seconds or more, would not fit: a quarter of the time is kept for the
        final measurements."""
        if self.minutes is None:
            return False
        longest = max([least, *(t.seconds for t in self.on.trials)])
        return clock.monotonic() - self.begun + longest > 0.75 * 60 * self.minutes

    def find(self, role: str, recipe: Recipe) -> Trial | None:
        return next((t for t in self.on.trials if t.role == role and t.recipe == str(recipe)), None)

    def searched(self) -> list[Trial]:
        """The trials of the search, without those that follow it."""
        return [t for t in self.on.trials if not t.role.startswith((TUNED, "without", PART))]

    @property
    def baseline(self) -> Trial:
        return self.on.trials[0]

    def best(self) -> Trial | None:
        """The best searched trial so far; None before there is one."""
        if not self.on.trials:
            return None
        searched = self.searched()
        return rank(searched, self.budget, self.baseline.metrics)[0]

    # One trial.

    def trial(self, role: str, recipe: Recipe) -> Trial:
        """Make, measure and record one trial. What fails becomes a row, except a full disk and the user's own stop."""
        number = len(self.on.trials)
        text = str(recipe) or "the model as it is, in float32"
        left = self.time_left(number)
        self.progress(
            Event("trial", f"{role}: {text}", number + 1, max(self.most, number + 1), best=self.best(), left=left)
        )
        started = clock.monotonic()
        blank = Trial(number, role, str(recipe), "ok")
        try:
            trial = self.measure_recipe(blank, recipe)
        except NotApplicable as error:
            trial = replace(blank, status="not applicable", reason=str(error))
        except Exception as error:  # whatever a technique, an exporter or a runtime raises is that trial's reason
            self.stop_on_full_disk(error)
            if role == "baseline":
                raise LissomError(f"the model as it is cannot be measured: {_reason(error)}") from error
            trial = replace(blank, status="failed", reason=_reason(error))
        trial = replace(trial, seconds=round(clock.monotonic() - started, 2))
        try:
            self.on.add(trial)
        except OSError as error:
            self.stop_on_full_disk(error)
            raise
        self.progress(Event("done", text, number + 1, max(self.most, number + 1), trial, self.best(), left))
        return trial

    def time_left(self, number: int) -> float | None:
        spent = [t.seconds for t in self.on.trials if t.seconds]
        if not spent:
            return None
        estimate = (self.most - number) * sum(spent) / len(spent)
        if self.minutes is not None:
            estimate = min(estimate, 60 * self.minutes - (clock.monotonic() - self.begun))
        return max(0.0, estimate)

    def stop_on_full_disk(self, error: BaseException) -> None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # The runtimes and exporters say it in words of their own: ask the disk.
        if full or shutil.disk_usage(self.folder).free < 2**20:
            raise LissomError(
                f"the disk that holds {self.folder} is full; free some space, then go on with --resume"
            ) from error

    def measure_recipe(self, blank: Trial, recipe: Recipe) -> Trial:
        """Every setting of the undecided knobs, exported and measured side by side; the best one stays."""
        recipe.check(self.plan, self.target)
        settings = _settings(recipe, self.plan, self.target)
        known = {t.resolved: t for t in self.on.trials if t.ok}
        made: dict[str, tuple[Artifact, Metrics]] = {}
        trainings: dict[str, tuple[dict[str, float], ...]] = {}
        failures: list[tuple[str, Exception]] = []
        notes: tuple[str, ...] = ()
        settings = [self.settled(setting) for setting in settings]
        self.among = len(settings) * self.fits_like(blank.number)
        for n, setting in enumerate(settings):
            if str(setting) in known:
                continue
            try:
                final, plan, artifact, metrics = self.make(setting, f"{blank.number:03d}-{n}")
                made[str(final)] = artifact, metrics
                trainings[str(final)] = tuple(asdict(training) for training in self.recoverer.trainings)
                notes = plan.notes
            except Exception as error:  # one setting's reason, NotApplicable among them; another may do
                self.stop_on_full_disk(error)
                failures.append((str(setting), error))
        if not made and failures:
            raise failures[0][1]
        rows = [replace(row, trainings=trainings[row.resolved]) for row in self.measure_all(made, blank)]
        rows += [replace(known[str(s)], number=blank.number) for s in settings if str(s) in known]
        base = rows[0].metrics if blank.role == "baseline" else self.baseline.metrics
        winner = rank(rows, self.budget, base)[0]
        remarks = [f"{text} failed: {_reason(error)}" for text, error in failures]
        if len(rows) > 1:
            remarks += [f"{row.resolved}: {_in_words(row.metrics)}" for row in rows]
        for row in rows:
            if row is not winner and row.artifact.startswith(f"{_ARTIFACTS}/{blank.number:03d}-"):
                shutil.rmtree(self.folder / row.artifact)
        return replace(winner, role=blank.role, recipe=blank.recipe, notes=(*notes, *remarks))

    def fits_like(self, number: int) -> int:
        """Among how many trials like this one the promise of exits is shared, as any of them may be chosen.

        The trials that a run begins with, and those that follow its search, share all that may fail. Where a resumed
        run makes more, so many again share half as much, then a quarter: what they add is said (``exits``). A given
        recipe is chosen whatever comes of it.
        """
        if self.given is not None:
            return 1
        again = number // (self.on.fits + FIRST)
        return self.on.fits if not again else (self.on.fits + FIRST) * 2**again

    def make(self, recipe: Recipe, name: str) -> tuple[Recipe, Plan, Artifact, Metrics]:
        """Apply, recover, export, judge. Exits that no sample may take within the promise are left out, and the rest is
        made anew: a stage costs time even where nobody leaves."""
        plan = self.recoverer.recover(recipe, recipe.apply(self.plan, self.task, self.target))
        artifact, metrics = self.judged(self.export(plan, recipe, name), plan)
        used = tuple(d["at"] for d in artifact.plan["decisions"] if d["threshold"] is not None)
        if len(used) == len(plan.decisions):
            return recipe, plan, artifact, metrics
        if not used:
            shutil.rmtree(artifact.path)
            note = artifact.plan["exits"].get("note") or "their answers are too often worse than the model's own"
            raise NotApplicable(
                f"no exit can be taken within {plan.decisions[0].risk:g} points of risk on the "
                f"{len(self.task.choose)} samples of choose: {note}"
            )
        own = next(t for t in recipe.techniques if t.stage == "exits")
        fewer = own.only(used)
        if fewer == own:  # exits at which nobody leaves count for those behind them
            return recipe, plan, artifact, metrics
        return self.make(recipe.replace(own, fewer), name)

    def settled(self, recipe: Recipe) -> Recipe:
        """The recipe with what only the device can decide: which layers gain from a technique."""
        precision = Recipe(tuple(t for t in recipe.techniques if t.stage == "precision"))
        policy = precision.apply(self.plan, self.task, self.target).precision
        probe = layer_probe(self.target, self.meter, policy)
        return Recipe(tuple(t.settle(self.plan, self.task, probe) for t in recipe.techniques))

    def recovering(self, event: FitEvent) -> None:
        left = event.seconds * (event.epochs - event.epoch)
        text = f"recovery, epoch {event.epoch} of {event.epochs}: loss {event.loss:.3f}"
        self.progress(Event("epoch", text, event.epoch, event.epochs, left=left))

    def export(self, plan: Plan, recipe: Recipe, name: str) -> Artifact:
        return export_plan(
            plan,
            self.target,
            self.on.artifact(name),
            shape=self.task.shape,
            calibration=self.calibration,
            recipe=str(recipe),
            classes=self.task.classes,
            preprocessing=self.task.preprocessing,
            verify=self.verify,
            layers=self.layers if plan.model is self.plan.model else self.layers_of(plan),
        )

    def layers_of(self, plan: Plan) -> list[dict[str, Any]]:
        return [cost.to_json() for cost in layer_costs(plan.model, self.task.shape)]

    def judged(self, artifact: Artifact, plan: Plan) -> tuple[Artifact, Metrics]:
        """The artifact, its exits' thresholds fitted, and what needs no clock: its quality on ``choose``, by itself;
        size, parameters, operations."""
        params, macs = total(plan.model, self.task.shape)
        if plan.decisions:
            split = self.task.choose
            answers, scores = run_stages(artifact, batches(split, 64 * self.target.batch), self.target.threads)
            # Right and wrong are counted against the labels, or the original's answers where there are none.
            targets = self.known_targets(answers[-1])
            artifact, outputs, fitted = fit_exits(
                artifact,
                plan.decisions,
                answers,
                scores,
                (lambda a: self.task.scores(a, targets)) if self.task.labelled else None,
                seed=self.seed,
                among=self.among,
            )
            _, own = total(self.plan.model, self.task.shape)
            costs = [e.cost for e in plan.decisions] + [1 + plan.decisions[-1].heads]
            macs = round(own * float(np.dot(fitted.shares, costs)))
        else:
            outputs = self.answers(artifact, self.task.choose)
        return artifact, self.quality(artifact, outputs, params, macs)

    def known_targets(self, outputs: np.ndarray) -> np.ndarray:
        if self.targets is None:
            self.targets = self.task.targets(self.task.choose, self.original_outputs(outputs))
        return self.targets

    def quality(self, artifact: Artifact, outputs: np.ndarray, params: int, macs: int) -> Metrics:
        quality = self.task.quality(outputs, self.known_targets(outputs))
        base = quality.value if not self.on.trials else self.baseline.metrics.quality
        return Metrics(
            quality=quality.value,
            quality_ci=(quality.low, quality.high),
            drop=None if base is None else base - quality.value,
            size_mb=artifact.size / 1e6,
            params=params,
            macs=macs,
        )

    def original_outputs(self, outputs: np.ndarray) -> np.ndarray:
        """The baseline's answers on ``choose``: those at hand while the baseline itself is measured."""
        if not self.on.trials:
            return outputs
        return self.answers(self.open(self.baseline), self.task.choose)

    def answers(self, artifact: Artifact, split: Split) -> np.ndarray:
        """The artifact's answers to a split, a part at a time: only the decoded pixels stay in memory."""
        parts = batches(split, 64 * self.target.batch)
        return run_artifact(artifact, parts, self.target.threads, reduce=self.task.reduce)

    def open(self, trial: Trial) -> Artifact:
        return Artifact.open(self.folder / trial.artifact)

    def measure_all(self, made: Mapping[str, tuple[Artifact, Metrics]], blank: Trial) -> list[Trial]:
        if not made:
            return []
        artifacts = [artifact for artifact, _ in made.values()]
        reference = [] if blank.role == "baseline" else [self.open(self.baseline)]
        measured = self.meter.measure([*reference, *artifacts], threads=self.target.threads, seconds=1.0)
        rows = []
        for (text, (artifact, metrics)), measurement in zip(made.items(), measured[len(reference) :], strict=True):
            path = str(artifact.path.relative_to(self.folder))
            rows.append(replace(blank, resolved=text, metrics=_with_cost(metrics, measurement), artifact=path))
        return rows

    # After the search.

    def shoot_out(self) -> Trial:
        """The most promising trials and plain int8, measured once more side by side; the best of them."""
        tuned = [t for t in self.on.trials if t.role == TUNED]
        ranked = rank([*self.searched(), *tuned], self.budget, self.baseline.metrics)
        if self.given is not None:
            chosen = [t for t in self.on.trials if t.role == "given" and t.ok]
            if not chosen:
                failed = next(t for t in self.on.trials if t.role == "given")
                raise LissomError(f"the recipe {failed.recipe} is {failed.status}: {failed.reason}")
            return chosen[0]
        finalists = _distinct([*ranked[:3], *(t for t in ranked if t.role == "plain int8")])
        if len(finalists) == 1:
            return finalists[0]
        self.stage("measuring the finalists side by side")
        again = rank(self.remeasure(finalists), self.budget, self.baseline.metrics)
        return self.of_equals(again)

    def of_equals(self, ranked: Sequence[Trial]) -> Trial:
        """The first of ``ranked``; or, of those that cost the same within the error of the measurement, the best."""
        first, base = ranked[0], self.baseline.metrics
        if self.budget.cost not in ("latency", "throughput") or not self.budget.met(first.metrics, base):
            return first
        speed = first.metrics.speedup or 0.0
        equal = [t for t in ranked if self.budget.met(t.metrics, base) and (t.metrics.speedup_ci or (0, 0))[1] >= speed]
        return max([first, *equal], key=lambda t: t.metrics.quality or 0.0)

    def remeasure(self, trials: Sequence[Trial], seconds: float = 2.0) -> list[Trial]:
        """The same trials with the costs of a new, longer measurement against the baseline."""
        artifacts = [self.open(self.baseline), *(self.open(t) for t in trials)]
        measured = self.meter.measure(artifacts, threads=self.target.threads, seconds=seconds)
        return [replace(t, metrics=_with_cost(t.metrics, m)) for t, m in zip(trials, measured[1:], strict=True)]

    def without_each(self, winner: Trial) -> tuple[Trial, list[dict[str, Any]]]:
        """Never slower: take each technique out of the winner in turn; what pays no measured time is removed."""
        rows: list[dict[str, Any]] = []
        if self.given is not None:
            return winner, rows
        for technique in Recipe.parse(winner.resolved).techniques:
            recipe = Recipe.parse(winner.resolved)
            own = next(t for t in recipe.techniques if t.name == technique.name)
            less = recipe.without(own)
            role = f"without {technique.name}"
            self.stage(f"measuring the winner {role}")
            other = self.baseline if not len(less) else self.find(role, less) or self.trial(role, less)
            row: dict[str, Any] = {"technique": str(own), "role": role, "ratio": None, "ratio_ci": None}
            if not other.ok:
                rows.append({**row, "kept": True, "reason": f"without it the model cannot be measured: {other.reason}"})
                continue
            pair = [self.open(winner), self.open(other)]
            first, second = self.meter.measure(pair, threads=self.target.threads, seconds=2.0, memory=False)
            low, high = (1 / second.speedup_ci[1], 1 / second.speedup_ci[0]) if second.speedup_ci else (1.0, 1.0)
            row |= {"ratio": 1 / (second.speedup or 1.0), "ratio_ci": [low, high]}
            row |= {"with_ms": first.latency_ms, "without_ms": second.latency_ms}
            pays, needed = low > 1, self.needed(winner, other)
            if pays or needed:
                reason = "pays in measured time" if pays else f"pays no time, but without it {needed}"
                rows.append({**row, "kept": True, "reason": reason})
            else:
                reason = f"removed: the model is not slower without it ({row['ratio']:.2f}x, {low:.2f} to {high:.2f})"
                rows.append({**row, "kept": False, "reason": reason})
                winner = other
        return winner, rows

    def waterfall(self, winner: Trial) -> list[dict[str, Any]]:
        """What each technique of the winner brought on top of those before it, in the order they are applied; all
        measured together against the baseline. Empty where the winner has fewer than two."""
        whole = Recipe.parse(winner.resolved).techniques
        if len(whole) < 2:
            return []
        parts: list[Trial] = []
        for n in range(1, len(whole)):
            recipe = Recipe(whole[:n])
            role = f"{PART} {n}"
            known = next((t for t in self.on.trials if t.ok and t.resolved == str(recipe) and t.artifact), None)
            self.stage(f"measuring the winner's first {n}")
            parts.append(known or self.find(role, recipe) or self.trial(role, recipe))
        made = [t for t in parts if t.ok] + [winner]
        measured = {t.resolved: t for t in self.remeasure(made)}
        rows = []
        for technique, trial in zip(whole, [*parts, winner], strict=True):
            found = measured[trial.resolved].metrics if trial.ok else Metrics()
            rows.append({
                "technique": str(technique),
                "recipe": trial.resolved or trial.recipe,
                "speedup": found.speedup,
                "speedup_ci": found.speedup_ci,
                "drop": found.drop,
                "reason": trial.reason,
            })  # fmt: skip
        return rows

    def needed(self, winner: Trial, other: Trial) -> str:
        """Why a technique that saves no time must stay: the limit that fails without it; "" where none does."""
        base = self.baseline.metrics
        for limit in self.budget.limits:
            if limit.holds(winner.metrics, base) and not limit.holds(other.metrics, base):
                return f"{limit.text} does not hold"
        own, less = (cost(self.budget.cost, t.metrics, base) for t in (winner, other))
        if self.budget.cost not in ("latency", "p95", "throughput") and own < less:
            return f"the {self.budget.cost} grows by {less / own - 1:.0%}"
        return ""

    def conclude(
        self,
        winner: Trial,
        ablation: list[dict[str, Any]],
        waterfall: list[dict[str, Any]],
        loaded: Loaded,
        capabilities: dict[str, Any],
    ) -> Result:
        """The final measurement and the one reading of ``report``; result.json, the page, the cards."""
        self.stage("final measurement")
        plain = next((t for t in self.on.trials if t.role == "plain int8" and t.ok), None)
        finalists = _distinct([winner, *([plain] if plain else [])])
        measured = self.final(finalists)
        if self.given is None:
            # The last word on "never slower" than the baseline and plain int8 is this measurement, the longest.
            winner = rank(measured, self.budget, measured[0].metrics)[0]
        else:
            winner = next(t for t in measured if t.number == winner.number)
        plain = next((t for t in measured if plain and t.resolved == plain.resolved), None)
        base = measured[0]
        peers = self.peers()
        qualities = self.report_qualities([t for t in (base, winner, plain) if t is not None])
        final = {t.number: replace(t, metrics=replace(t.metrics, **qualities[t.number])) for t in measured
                 if t.number in qualities}  # fmt: skip
        reference = final[base.number].metrics
        metrics = final[winner.number].metrics
        artifact = self.keep(winner).with_metrics(metrics.to_json())
        met = self.budget.met(metrics, reference)
        trials = self.on.trials
        self.warnings += self.short_trainings(trials)
        front = pareto([t for t in trials if t.ok], self.budget.cost, self.baseline.metrics)
        result: dict[str, Any] = {
            "model": loaded.name,
            "data": self.data_name,
            "task": {
                "kind": self.task.kind,
                "metric": self.task.metric,
                "classes": len(self.task.classes),
                "splits": {
                    "fit": len(self.task.fit) if self.task.fit is not None else 0,
                    "choose": len(self.task.choose),
                    "report": len(self.task.report),
                },
            },
            "target": {k: v for k, v in asdict(self.target).items() if k != "capabilities"},
            "baseline": reference.to_json(),
            "plain_int8": (
                {"recipe": plain.resolved, "metrics": final[plain.number].metrics.to_json()} if plain else None
            ),
            "peers": peers,
            "best": {
                "recipe": winner.resolved,
                "trial": winner.number,
                "metrics": metrics.to_json(),
                "artifact": str(artifact.path),
            },
            "pareto": front,
            "trials": [t.to_json() for t in trials],
            "ablation": ablation,
            "waterfall": waterfall,
            "exits": self.exits(artifact),
            "shift": self.shift(artifact),
            "budget": self.budget.to_json(metrics, reference),
            "met": met,
            "profile": self.profiles(base, winner),
            "verification": self.verification(winner),
            "warnings": self.warnings,
            "environment": {**capabilities, "versions": _versions()},
            "command": self.command,
            "seed": self.seed,
            "seconds": round(clock.monotonic() - self.begun, 1),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_atomic(self.folder / "result.json", json.dumps(result, indent=1))
        write_atomic(artifact.path / "card.md", card(result, artifact.plan))
        report = write_report(self.folder, result)
        return Result(
            Best(winner.resolved, metrics, artifact.path),
            tuple(t for t in trials if t.number in front),
            tuple(trials),
            report,
            met,
            self.folder,
            result,
        )

    def short_trainings(self, trials: Sequence[Trial]) -> list[str]:
        """A warning where a training ended before it had seen each image once."""
        trained = [t for t in trials if t.trainings]
        passes = {t.number: min(each["passes"] for each in t.trainings) for t in trained}
        short = [t for t in trained if passes[t.number] < 1]
        if not short:
            return []
        least = min(short, key=lambda t: passes[t.number])
        more = f"{RECOVERY_STEPS:,} steps are few for these data: give --recover MINUTES"
        if self.recover is not None:
            more = f"--recover {self.recover:g} is too short for these data: give it more minutes"
        return [
            f"{len(short)} of {len(trained)} trained recipes had less than one epoch of training, {least.resolved} the "
            f"least, {passes[least.number]:.2g} of one. {more}"
        ]

    def exits(self, artifact: Artifact) -> dict[str, Any] | None:
        """Where the winner's samples leave, and what was promised; None where it has no exits."""
        decisions = artifact.plan["decisions"]
        if not decisions:
            return None
        known = artifact.plan["exits"]
        whole_numbers = any(t.name == "int8" for t in Recipe.parse(artifact.plan.get("recipe") or "").techniques)
        if whole_numbers and not self.task.fit:
            self.warnings.append(
                "there is nothing to train on, so that the ranges of whole numbers were taken from samples that the "
                "promise of the exits was judged on, which may make it too good; give a train/"
            )
        again = 0 if self.given is not None else (len(self.on.trials) - 1) // (self.on.fits + FIRST)
        failing = known["delta"] * known["among"] * (2 - 0.5**again)
        return {"decisions": decisions, **known, "sure": 1 - failing}

    def shift(self, artifact: Artifact) -> list[dict[str, Any]] | None:
        """How the winner's exits do on spoilt images; None where it has none, or the data are no images."""
        if not artifact.plan["decisions"]:
            return None
        self.stage("looking at the exits on spoilt images")
        rows = shift_table(artifact, self.task, self.target.threads, seed=self.seed)
        return None if rows is None else [row.to_json() for row in rows]

    def keep(self, winner: Trial) -> Artifact:
        """The winner's artifact at a place that can be told in advance: OUT/best, whole or not at all."""
        place, fresh = self.folder / "best", self.folder / "artifacts" / ".best"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(self.folder / winner.artifact, fresh)
        replace_folder(fresh, place)
        return Artifact.open(place)

    def final(self, finalists: Sequence[Trial]) -> list[Trial]:
        """Baseline first, then the finalists that are not the baseline, measured together at length."""
        others = [t for t in finalists if t.number != self.baseline.number]
        artifacts = [self.open(self.baseline), *(self.open(t) for t in others)]
        measured = self.meter.measure(artifacts, threads=self.target.threads, seconds=3.0)
        first = replace(measured[0], speedup=1.0, speedup_ci=(1.0, 1.0))
        return [
            replace(t, metrics=_with_cost(t.metrics, measurement))
            for t, measurement in zip([self.baseline, *others], [first, *measured[1:]], strict=True)
        ]

    def report_qualities(self, trials: Sequence[Trial]) -> dict[int, dict[str, Any]]:
        """Quality, interval and drop on ``report`` by trial number; the baseline comes first. Read once, here."""
        split = self.task.report
        answers = {t.number: self.answers(self.open(t), split) for t in trials}
        if split.skipped:
            self.warnings.append(f"{len(split.skipped)} images of the report split could not be read and were left out")
        targets = self.task.targets(split, answers[trials[0].number])
        found = {number: self.task.quality(outputs, targets) for number, outputs in answers.items()}
        base = found[trials[0].number].value
        return {
            number: {"quality": q.value, "quality_ci": (q.low, q.high), "drop": base - q.value}
            for number, q in found.items()
        }

    def peers(self) -> list[dict[str, Any]]:
        """What else a user could do with the model: PyTorch eager and torch.compile, beside the baseline."""
        self.stage("measuring PyTorch eager and torch.compile")
        names = {"PyTorch eager": False, "torch.compile": True}
        try:
            artifacts = [self.peer(compiled) for compiled in names.values()]
            measured = self.measure_peers(artifacts)
        except Exception as error:  # one that does not run here must not hide the other
            self.stop_on_full_disk(error)
            return [self.lone_peer(name, compiled) for name, compiled in names.items()]
        return [_peer_row(*row) for row in zip(names, artifacts, measured, strict=True)]

    def lone_peer(self, name: str, compiled: bool) -> dict[str, Any]:
        """A peer's row measured by itself; one that does not run here is a row with its reason, as a trial is."""
        try:
            artifact = self.peer(compiled)
            return _peer_row(name, artifact, self.measure_peers([artifact])[0])
        except Exception as error:
            self.stop_on_full_disk(error)
            return {"name": name, "status": "failed", "reason": _reason(error), "metrics": Metrics().to_json()}

    def measure_peers(self, artifacts: Sequence[Artifact]) -> list[Measurement]:
        every = [self.open(self.baseline), *artifacts]
        return self.meter.measure(every, threads=self.target.threads, seconds=1.5)[1:]

    def peer(self, compiled: bool) -> Artifact:
        path = self.on.artifact("torch-compiled" if compiled else "torch-eager")
        artifact = export_plan(self.plan, replace(self.target, runtime="torch"), path, shape=self.task.shape)
        if compiled:
            artifact.plan["stages"][0]["options"]["compile"] = True
            artifact = artifact.with_metrics({})
        return artifact

    def profiles(self, base: Trial, winner: Trial) -> dict[str, Any] | None:
        """Where the time goes, before and after; None where the device or the runtime tells no layer times."""
        if self.target.device != "cpu" or self.target.runtime != "openvino":
            return None
        self.stage("profiling")
        try:
            before = profile(self.open(base), threads=self.target.threads)
            after = profile(self.open(winner), threads=self.target.threads, machine=before.machines)
            return {"before": before.to_json(), "after": after.to_json()}
        except LissomError as error:
            self.warnings.append(f"no profile: {error}")
            return None

    def verification(self, winner: Trial) -> list[dict[str, Any]]:
        rows = []
        for name, trial in (("baseline", self.baseline), ("best", winner)):
            artifact = self.open(trial)
            fallbacks, conversions = _inspect(artifact, self.target.threads)
            checked = artifact.plan.get("verification", {})
            rows.append({"artifact": name, **checked, "fallbacks": fallbacks, "conversions": conversions})
        return rows

    def stage(self, text: str) -> None:
        self.progress(Event("stage", text))


_ARTIFACTS = "artifacts"


def _plain_int8() -> Recipe:
    from lissom.techniques.int8 import Int8

    return Recipe((Int8.plain(),))


def _settings(recipe: Recipe, plan: Plan, target: Target) -> list[Recipe]:
    """The recipe with every undecided knob settled, in every combination."""
    choices = [technique.variants(plan, target) for technique in recipe.techniques]
    return [Recipe(tuple(chosen)) for chosen in itertools.product(*choices)]


def _with_cost(metrics: Metrics, measurement: Measurement) -> Metrics:
    """The metrics with a measurement's figures in place of the former ones."""
    figures = asdict(measurement)
    figures.pop("stages_ms")  # of an artifact's parts, where a trial is of the whole
    return replace(metrics, **figures)


def _peer_row(name: str, artifact: Artifact, measurement: Measurement) -> dict[str, Any]:
    metrics = _with_cost(Metrics(size_mb=artifact.size / 1e6), measurement)
    return {"name": name, "status": "ok", "reason": "", "metrics": metrics.to_json()}


def _in_words(metrics: Metrics) -> str:
    speed = "" if metrics.speedup is None else f"{metrics.speedup:.2f}x as fast as the baseline, "
    return f"{speed}quality {metrics.quality:.2f}"


def _distinct(trials: Sequence[Trial]) -> list[Trial]:
    """The first trial of each resolved recipe."""
    return list({t.resolved: t for t in reversed(trials)}.values())[::-1]


def _reason(error: BaseException) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if isinstance(error, LissomError) else f"{type(error).__name__}: {first}"


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _inspect(artifact: Artifact, threads: int) -> tuple[list[str], list[str]]:
    """Operators that run as a slow reference form, and conversions between them, where the runtime tells."""
    found = [inspect(graph) for graph in Stages(artifact, threads).graphs]
    told = [each for each in found if each is not None]
    return [name for each in told for name in each.reference], [name for each in told for name in each.conversions]


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("lissom", "torch", "timm", "openvino", "nncf", "onnxruntime", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
