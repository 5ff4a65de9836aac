"""What proofs of operators and networks share: data, arms trained on one budget, interleaved timing, and their claims.

An arm is a name and a function that builds a network. All arms of a proof see the same images in the same order, with
the same steps and learning rates, and start from the same seed; so figures are paired by seed, and a claim is judged
by the interval of paired differences. A proof made of these parts is short::

    data = data_set("cifar10", quick=settings.quick)
    found = run_arms(settings, arms, lambda seed: image_task(data, 32, seed, train=10_000, held_out=2000), budget)
    claims = (no_worse("...", found["system"], found["baseline"], margin=0.5),)
    rows = accuracy_rows(found)
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lissom.data.sources import DataSet, read, stratified
from lissom.data.splits import Images
from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.meters.costs import total
from lissom.proofs.base import (
    INCONCLUSIVE,
    NOT_SHOWN,
    SHOWS,
    Claim,
    KeptFigures,
    Row,
    Settings,
    mean_interval,
    verdict_by_interval,
)
from lissom.tasks.classification import make_task
from lissom.tasks.task import Task
from lissom.training.loop import evaluate, fit

__all__ = [
    "Budget",
    "Sample",
    "Trained",
    "accuracy_rows",
    "better",
    "built",
    "data_set",
    "faster",
    "figure_rows",
    "forward_call",
    "generator",
    "image_task",
    "interleaved",
    "no_worse",
    "one_thread",
    "peak_memory",
    "pooled",
    "ratios",
    "run_arms",
    "run_stream",
    "spread",
    "step_call",
    "time_rows",
    "together",
    "train_arm",
    "train_on_stream",
]

SEEN = 32  # training images that fit() looks at after every epoch; nothing is chosen by them
KEPT = "arms.jsonl"  # in the proof's folder: one line a finished arm


# Data


def data_set(*names: str, quick: bool = False) -> DataSet:
    """The first of ``names`` that is a folder in LISSOM_DATA; scikit-learn's digits in quick runs, and without any."""
    folder = os.environ.get("LISSOM_DATA")
    for name in names if folder and not quick else ():
        if (Path(folder) / name).is_dir():  # type: ignore[arg-type]
            return read(Path(folder) / name)  # type: ignore[arg-type]
    return read("digits")


def pooled(data: DataSet) -> DataSet:
    """The same data with all splits in ``train``, from which ``image_task`` then takes a part and judges by the rest.

    For data so few that the proof trains on a small part of them. Raises LissomError where the splits are not drawn
    from one list of images.
    """
    splits = list(data.splits.values())
    if not all(isinstance(s, Images) and s.items is splits[0].items for s in splits):  # type: ignore[union-attr]
        raise LissomError(f"the splits of {data.name} come from different files; they cannot be divided anew")
    rows = np.sort(np.concatenate([s.rows for s in splits]))  # type: ignore[union-attr]
    return replace(data, train=replace(splits[0], rows=rows), val=None, test=None)  # type: ignore[type-var]


def image_task(
    data: DataSet, side: int, seed: int, *, train: int | None = None, held_out: int | None = None, channels: int = 3
) -> Task:
    """A classification task on images of ``side`` x ``side`` pixels, from -1 to 1.

    ``fit`` is a stratified part of ``train`` images, drawn by the seed (None: all); ``report`` is ``held_out`` images
    of the test split, the same for every seed (None: all), and where there is none (see ``pooled``), what ``fit``
    leaves. ``choose`` is a few images of ``fit``: nothing is chosen. Raises LissomError where there is nothing left to
    judge by.
    """
    source, judged = data.train, data.test if data.test is not None else data.val
    assert isinstance(source, Images)
    count = len(source) if train is None else min(train, len(source))
    taken, rest = stratified(source.labels, len(source), count / len(source), seed)
    fit_part = source.take(taken)
    report = judged if judged is not None else source.take(rest)
    if len(report) == 0:
        raise LissomError(f"all {count} images of {data.name} are trained on; none are left to judge by")
    assert isinstance(report, Images)
    divided = DataSet(data.name, data.classes, train=fit_part, val=fit_part.take(np.arange(SEEN)), test=report)
    wanted = Preprocessing(side, side, channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    task = make_task(divided, preprocessing=wanted, trained_here=False, seed=seed)
    return task if held_out is None else task.with_splits(report=task.report.sample(held_out, 0))


def generator(seed: int, stream: int = 0) -> torch.Generator:
    """Random numbers for generated tasks; other streams of a seed are independent (0 trains, 1 judges by habit)."""
    key = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key >> np.uint64(1)))


# Training


@dataclass(frozen=True)
class Budget:
    """What every arm of a proof may use: ``steps`` of ``batch`` samples by AdamW, and nothing else.

    In ``train_arm`` the rate rises over the share ``warmup`` of the steps and falls as half a cosine to zero; in
    ``train_on_stream`` it stays. ``augment`` shifts images, ``flip`` mirrors half of them as well.
    """

    steps: int
    batch: int
    lr: float
    weight_decay: float = 0.05
    warmup: float = 0.1
    augment: bool = False
    flip: bool = False


@dataclass(frozen=True)
class Trained:
    """One arm of one seed: accuracy in points (or ``run_stream``'s score) over ``count`` held-out samples, and cost.

    ``macs`` are multiply-accumulates of one image's forward pass, ``seconds`` those of training on this machine, by
    its clock, beside whatever else ran. ``figures`` are what the proof itself looked at (see ``run_arms``).
    """

    name: str
    seed: int
    accuracy: float
    count: int
    parameters: int
    macs: int
    steps: int
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)


def built(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The network that ``make`` builds, its weights drawn by the seed; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def train_arm(
    name: str, make: Callable[[], nn.Module], task: Task, budget: Budget, seed: int
) -> tuple[nn.Module, Trained]:
    """The trained network (in eval mode), and its figures on ``task.report``."""
    assert task.fit is not None
    model = built(make, seed)
    batch = min(budget.batch, len(task.fit))
    done = fit(
        model, task, epochs=math.ceil(budget.steps / (len(task.fit) // batch)), max_steps=budget.steps, batch=batch,
        lr=budget.lr, weight_decay=budget.weight_decay, warmup=budget.warmup, augment=budget.augment, flip=budget.flip,
        seed=seed, accelerator="cpu",
    )  # fmt: skip
    model.eval()
    quality = evaluate(model, task, task.report, 250)
    parameters, macs = total(model, task.shape)
    return model, Trained(name, seed, quality.value, quality.count, parameters, macs, budget.steps, done.seconds)


def run_arms(
    settings: Settings,
    arms: Mapping[str, Callable[[], nn.Module]],
    task_of: Callable[[int], Task],
    budget: Budget,
    look: Callable[[str, nn.Module, Task], Mapping[str, float]] | None = None,
    part: str = "",
) -> dict[str, list[Trained]]:
    """Every arm trained once a seed, by its name, in the order of the seeds.

    ``task_of(seed)`` is the task, ``look(name, model, task)`` what else to read from a trained network (kept in
    ``Trained.figures``), ``part`` tells several calls of one proof apart (say, the number of images).

    Finished arms are kept in the proof's folder (``KEPT``), so that a run that was killed goes on where it was when it
    is started with the same folder; an arm whose network, budget or data differ is trained anew.
    """
    kept = _Kept(settings)
    found: dict[str, list[Trained]] = {name: [] for name in arms}
    for seed in settings.seeds:
        task = task_of(seed)
        assert task.fit is not None
        data = f"{task.name} {len(task.fit)} {len(task.report)} {task.shape}"
        for name, make in arms.items():

            def train(
                name: str = name, make: Callable[[], nn.Module] = make, task: Task = task, seed: int = seed
            ) -> Trained:
                model, done = train_arm(name, make, task, budget, seed)
                return replace(done, figures=dict(look(name, model, task)) if look else {})

            found[name].append(kept.get(part, name, built(make, seed), data, budget, seed, train))
    return found


class _Kept:
    """The finished arms in a proof's folder, by a digest of all that decides their result but lissom's own code."""

    def __init__(self, settings: Settings) -> None:
        self._figures, self._progress = KeptFigures(settings, KEPT), settings.progress

    def get(
        self, part: str, name: str, start: nn.Module, data: str, budget: Budget, seed: int, train: Callable[[], Trained]
    ) -> Trained:
        """The arm that begins as ``start``: as it was kept, else as ``train`` returns it."""
        digest = hashlib.sha256(f"{start} {data} {budget}".encode())
        for weight, value in start.state_dict().items():
            digest.update(f"{weight} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().numpy().tobytes())
        whole = f"{part}, " * bool(part) + name
        done = Trained(**self._figures.get(whole, seed, lambda: asdict(train()), what=digest.hexdigest()[:16]))
        self._progress(f"seed {seed}: {whole} {done.accuracy:.4g}")
        return done


class Sample(Protocol):
    """A generated task: ``sample(batch, generator)`` draws (inputs, targets), float32 (batch, ...) and any tensor."""

    __qualname__: str

    def __call__(self, batch: int, numbers: torch.Generator, /) -> tuple[torch.Tensor, torch.Tensor]: ...


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def run_stream(
    settings: Settings,
    arms: Mapping[str, Callable[[], nn.Module]],
    sample: Sample,
    loss: Loss,
    score: Callable[[torch.Tensor, torch.Tensor], float],
    budget: Budget,
    *,
    judged: int = 1000,
    part: str = "",
) -> dict[str, list[Trained]]:
    """``run_arms`` on a generated task: ``train_on_stream``, then ``score(outputs, targets)`` on ``judged`` samples.

    The score stands in ``Trained.accuracy``, whatever it is. Samples to judge by are the same for all arms of a seed.
    """
    kept = _Kept(settings)
    found: dict[str, list[Trained]] = {name: [] for name in arms}
    for seed in settings.seeds:
        inputs, targets = sample(judged, generator(seed, 1))
        data = f"{sample.__module__}.{sample.__qualname__} {tuple(inputs.shape)}"
        for name, make in arms.items():

            def train(
                name: str = name, make: Callable[[], nn.Module] = make, seed: int = seed,
                inputs: torch.Tensor = inputs, targets: torch.Tensor = targets,
            ) -> Trained:  # fmt: skip
                model = built(make, seed)
                seconds = train_on_stream(model, sample, loss, budget, seed)
                with torch.no_grad():
                    outputs = torch.cat([model(x) for x in inputs.split(100)])
                value = score(outputs, targets)
                return Trained(name, seed, value, judged, *total(model, tuple(inputs.shape[1:])), budget.steps, seconds)

            found[name].append(kept.get(part, name, built(make, seed), data, budget, seed, train))
    return found


def train_on_stream(model: nn.Module, sample: Sample, loss: Loss, budget: Budget, seed: int) -> float:
    """Train ``model`` in place on a generated task, every batch new; the seconds it took. It is left in eval mode.

    ``sample(batch, generator)`` draws (inputs, targets), the same for all arms of a seed. AdamW at a constant rate.
    """
    numbers = generator(seed, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.lr, weight_decay=budget.weight_decay)
    model.train()
    start = time.perf_counter()
    for _ in range(budget.steps):
        inputs, targets = sample(budget.batch, numbers)
        optimizer.zero_grad(set_to_none=True)
        loss(model(inputs), targets).backward()
        optimizer.step()
    model.eval()
    return time.perf_counter() - start


# Time and memory


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: what else runs on the machine then disturbs a comparison least."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forward_call(model: nn.Module, *inputs: torch.Tensor) -> Callable[[], Any]:
    """One forward pass in eval mode without gradients, as a call without arguments."""
    model.eval()

    def call() -> Any:
        with torch.no_grad():
            return model(*inputs)

    return call


def step_call(model: nn.Module, *inputs: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward pass in training mode, weights and inputs with gradients, as a call without arguments."""
    model.train()
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]

    def call() -> None:
        model.zero_grad(set_to_none=True)
        for x in leaves:
            x.grad = None
        model(*leaves).sum().backward()

    return call


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repetitions: int, rounds: int, *, threads: int | None = 1
) -> dict[str, list[float]]:
    """Milliseconds of each call: the median over ``rounds``, once a repetition; make repetitions one a seed.

    In a round every call runs once, in an order that turns from round to round, so that what else happens on the
    machine meets all alike. Two rounds before are not counted. ``threads`` None leaves torch's number of threads.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        for _ in range(repetitions):
            runs: dict[str, list[float]] = {name: [] for name in names}
            for number in range(-2, rounds):
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    start = time.perf_counter()
                    calls[name]()
                    if number >= 0:
                        runs[name].append(1000 * (time.perf_counter() - start))
            for name in names:
                times[name].append(statistics.median(runs[name]))
    finally:
        torch.set_num_threads(before)
    return times


def ratios(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> list[float]:
    """How many times as fast ``fast`` is, one figure a repetition."""
    return [a / b for a, b in zip(times[slow], times[fast], strict=True)]


def peak_memory(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made during ``call`` held at one time; what an operation needs inside is not seen.

    Weights and inputs, which were there before, do not count. Exact and repeatable: it counts tensors, not pages.
    """
    meter = _Storages()
    with meter:
        call()
    return meter.peak


class _Storages(TorchDispatchMode):
    """Follows the storages of all tensors that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, counted=False)  # already counted, unless it was there before
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            self._follow(tensor, counted=True)
        self.peak = max(self.peak, self.held)
        return output

    def _follow(self, tensor: torch.Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            size = storage.nbytes() if counted else 0
            self.held += size
            weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# Claims and rows


def spread(values: Sequence[float], places: int = 2) -> str:
    """The mean and its interval as text: ``1.20 [0.90, 1.50]``; ``1.20 (one seed)``."""
    mean, interval = mean_interval(values)
    if interval is None:
        return f"{mean:.{places}f} (one seed)"
    return f"{mean:.{places}f} [{interval[0]:.{places}f}, {interval[1]:.{places}f}]"


def together(verdicts: Sequence[str]) -> str:
    """A claim about all of several things shows where each does, and does not show where one does not."""
    return next((verdict for verdict in (NOT_SHOWN, INCONCLUSIVE) if verdict in verdicts), SHOWS)


Figures = Sequence[Trained | float]


def better(
    text: str, system: Figures, baseline: Figures, *, matters: float, unit: str = "points", sign: int = 1
) -> Claim:
    """The claim that ``system`` is above ``baseline``, judged by paired differences (``verdict_by_interval``).

    Figures are arms, whose accuracies count, or numbers, one a seed; ``sign`` -1 where the lower is the better.
    ``matters`` is the smallest advantage worth having, in the figures' ``unit``.
    """
    gained = _gains(system, baseline, sign)
    verdict = verdict_by_interval(gained, matters=matters)
    return Claim(text, verdict, f"better by {spread(gained)} {unit}, paired over {len(gained)} seeds")


def no_worse(
    text: str, system: Figures, baseline: Figures, *, margin: float, unit: str = "points", sign: int = 1
) -> Claim:
    """The claim that ``system`` loses less than ``margin`` against ``baseline``, by paired differences.

    ``shows``: the whole interval of the loss is below the margin. ``does not show``: all of it is above. Figures and
    ``sign`` as in ``better``.
    """
    lost = [-gain for gain in _gains(system, baseline, sign)]
    verdict = verdict_by_interval([margin - loss for loss in lost])
    evidence = f"behind by {spread(lost)} {unit}, paired over {len(lost)} seeds; the margin is {margin:g}"
    return Claim(text, verdict, evidence)


def faster(
    text: str, times: Mapping[str, Sequence[float]], slow: str, fast: str, *, at_least: float = 1.0, more: str = ""
) -> Claim:
    """The claim that ``fast`` takes less than the time of ``slow`` over ``at_least``, by ratios of interleaved times.

    ``shows``: the whole interval of the ratio is above ``at_least``; ``does not show``: all of it is below, or within
    2 % above. ``more`` is added to the evidence.
    """
    times_as_fast = ratios(times, slow, fast)
    verdict = verdict_by_interval([ratio - at_least for ratio in times_as_fast], matters=0.02)
    asked = f", {at_least:g} asked" if at_least != 1 else ""
    evidence = f"{fast} is {spread(times_as_fast)} times as fast as {slow}{asked}, {len(times_as_fast)} repetitions"
    return Claim(text, verdict, evidence + (f"; {more}" if more else ""))


def _gains(system: Figures, baseline: Figures, sign: int) -> list[float]:
    return [sign * (_value(a) - _value(b)) for a, b in zip(system, baseline, strict=True)]


def _value(figure: Trained | float) -> float:
    return figure.accuracy if isinstance(figure, Trained) else float(figure)


def accuracy_rows(
    found: Mapping[str, Sequence[Trained]], part: str = "", metric: str = "accuracy", unit: str = "%"
) -> list[Row]:
    """A row an arm: its score on held-out samples, with parameters, multiplications, steps and seconds of training."""
    rows = []
    for name, arms in found.items():
        cost = {
            "parameters": arms[0].parameters,
            "10^6 MACs": arms[0].macs / 1e6,
            "steps": arms[0].steps,
            "seconds": statistics.fmean(arm.seconds for arm in arms),
        }
        values = tuple(arm.accuracy for arm in arms)
        rows.append(Row(f"{part}, {name}" if part else name, metric, values, unit, cost))
    return rows


def figure_rows(found: Mapping[str, Sequence[Trained]], figure: str, unit: str = "", part: str = "") -> list[Row]:
    """A row for each arm that has ``figure`` among its own (``Trained.figures``)."""
    return [
        Row(f"{part}, {name}" if part else name, figure, tuple(arm.figures[figure] for arm in arms), unit)
        for name, arms in found.items()
        if all(figure in arm.figures for arm in arms)
    ]


def time_rows(
    times: Mapping[str, Sequence[float]], metric: str = "time", cost: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Row]:
    """A row a timed call, in ms; ``cost`` by the call's name."""
    return [Row(name, metric, tuple(values), "ms", (cost or {}).get(name, {})) for name, values in times.items()]
