"""fit: train a model on a task, with a method, on one device or several, resumable after a kill.

Everything random is a pure function of (seed, epoch): the order of the samples, the augmentation, and torch's own
generator, which dropout reads. So nothing random needs to be saved, and a resumed run repeats the other exactly.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from lissom.errors import LissomError
from lissom.layers.exits import exits_of
from lissom.tasks.task import Quality, Split, Task, batches
from lissom.training.augmentation import augment_images, augment_masks, draw
from lissom.training.checkpoint import CHECKPOINT, check_settings, load_checkpoint, save_checkpoint
from lissom.training.methods.base import Method, method_of
from lissom.training.optimizers import Kar2, Kar3
from lissom.training.speed import channels_last, fast_precision, plain_attention, taught_in
from lissom.usercode import load_function

__all__ = ["FitEvent", "FitResult", "data_marks", "evaluate", "fit", "weights_mark"]

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
LEARNING_RATES = {"adamw": 1e-3, "muon": 1e-3, "sgd": 0.05, "kar2": 1.2e-3, "kar3": 1.215e-3}  # at a batch of 64
ORDER, AUGMENTATION, MODEL = range(3)  # the streams of random numbers


@dataclass(frozen=True)
class FitEvent:
    """One epoch is over. ``quality`` is on ``choose``, in points; None where it cannot be told."""

    epoch: int  # 1 to epochs
    epochs: int
    loss: float
    quality: float | None
    seconds: float


@dataclass(frozen=True)
class FitResult:
    """The trained model (the one given, trained in place, in eval mode) and one entry an epoch.

    An entry holds ``epoch``, ``loss`` (mean over the epoch), ``quality`` (on ``choose``, in points, or None), ``lr``
    at its end and ``seconds``. ``best_epoch`` is the entry of highest quality (lowest loss where there is none); the
    weights are the last epoch's. ``stopped`` says why training ended before its last epoch: "", "time" or "steps".
    ``steps`` are the optimizer's; ``passes`` says how often each sample of ``fit`` was seen on average.
    """

    model: nn.Module
    history: tuple[dict[str, Any], ...]
    seconds: float
    stopped: str = ""
    steps: int = 0
    passes: float = 0.0

    @property
    def best_epoch(self) -> int:
        if all(h["quality"] is not None for h in self.history):
            return max(self.history, key=lambda h: h["quality"])["epoch"]
        return min(self.history, key=lambda h: h["loss"])["epoch"]


@dataclass(frozen=True)
class _Job:
    """The settings that decide the result: a resumed run must have the same."""

    model: str
    data: str
    method: str
    epochs: int
    batch: int
    lr: float
    optimizer: str
    weight_decay: float
    warmup: float
    clip: float | None
    precision: str
    seed: int
    augment: bool
    flip: bool
    trained: str
    max_steps: int | None
    time_limit: float | None


def fit(
    model: nn.Module,
    task: Task,
    *,
    method: str | Method = "supervised",
    epochs: int = 10,
    batch: int = 64,
    lr: float | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    clip: float | None = 1.0,
    precision: str = "32-true",
    accelerator: str = "auto",
    devices: str | int = "auto",
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    time_limit: float | None = None,
    max_steps: int | None = None,
    parameters: Callable[[str, nn.Parameter], bool] | None = None,
    augment: bool | None = None,
    flip: bool = False,
    threads: int | None = None,
    progress: Callable[[FitEvent], None] | None = None,
) -> FitResult:
    """Train ``model`` in place on ``task.fit`` and return it with its history.

    The learning rate rises linearly over the share ``warmup`` of the steps and falls as half a cosine to zero. ``lr``
    is by default 1e-3 (adamw, muon), 1.2e-3 (kar2, kar3: ``lissom.training.optimizers``) or 0.05 (sgd, momentum 0.9) at
    a batch of 64, in proportion to the square root of the batch, or to the batch (sgd). "muon" (torch.optim.Muon)
    orthogonalises the steps of the hidden layers' matrices, scaled so that adamw's rates fit (arXiv 2502.16982); all
    else, and the last linear layer, is left to adamw. Biases, norms and other vectors get no ``weight_decay``.
    ``clip`` bounds the gradient's norm.

    ``parameters(name, parameter)`` says which parameters train (all); a BatchNorm without any stays in eval mode (one
    that has none goes with the layer before it), and where the heads of exits train alone, so does all of the rest.
    ``augment`` shifts images by up to an eighth of their side, ``flip`` mirrors half of them as well (leave it off
    where left and right carry meaning, as in digits); masks move with their images. None means: for classification of
    images, and segmentation with masks of the images' size.

    ``time_limit`` in seconds (over all resumed parts) and ``max_steps`` shorten the schedule itself, so that the
    learning rate has reached zero when they end training. A run with a time limit depends on the machine's speed.

    ``precision`` is "32-true", or mixed: "bf16-mixed", "16-mixed", weights and their steps in float32; a method's
    ``teacher`` computes in the same. "auto" is bf16-mixed where the device multiplies matrices of it fast (a GPU; a
    processor with AMX or avx512_bf16, unless most of the model's spatial convolutions are depthwise), else 32-true.

    ``devices`` is "auto" (one) or a number; several are several processes, each with its share of every batch.
    ``batch`` is that of all together. Then model, task, method and ``parameters`` are pickled to the processes.

    ``folder`` keeps a checkpoint of every epoch; with ``resume`` training goes on from there, and the result is that
    of an uninterrupted run. A kill loses the epoch under way and nothing else.

    Raises LissomError for data without a ``fit`` split, settings that cannot work, a folder that holds a checkpoint
    without ``resume``, ``resume`` with other settings, and a loss that is not finite.
    """
    if task.fit is None or len(task.fit) == 0:
        raise LissomError(f"the data {task.name!r} have nothing to train on; give a train/ folder or a fit split")
    method = method_of(method)
    processes = _processes(devices)
    if augment is None:
        augment = _can_move(task, task.fit)
    elif augment and not _can_move(task, task.fit):
        raise LissomError("augmentation moves images; for another task augment inside the split and give augment=False")
    for wrong, sentence in (
        (epochs < 1, f"epochs is {epochs}; it is at least 1"),
        (batch < 1, f"batch is {batch}; it is at least 1"),
        (batch % processes, f"a batch of {batch} cannot be shared equally by {processes} processes"),
        (len(task.fit) < processes, f"{len(task.fit)} samples are too few for {processes} processes"),
        (lr is not None and not lr > 0, f"the learning rate is {lr}; it is greater than 0"),
        (not weight_decay >= 0, f"weight_decay is {weight_decay}; it is at least 0"),
        (not 0 <= warmup < 1, f"warmup is {warmup}; it is a share of the steps, at least 0 and below 1"),
        (clip is not None and not clip > 0, f"clip is {clip}; it is greater than 0, or None"),
        (time_limit is not None and not time_limit > 0, f"the time limit is {time_limit} s; it is greater than 0"),
        (max_steps is not None and max_steps < 1, f"max_steps is {max_steps}; it is at least 1"),
        (threads is not None and threads < 1, f"threads is {threads}; it is at least 1"),
        (
            precision not in ("auto", *PRECISIONS),
            f"precision {precision!r} is none of {', '.join(PRECISIONS)} and auto",
        ),
        (optimizer not in LEARNING_RATES, f"optimizer {optimizer!r} is none of {', '.join(LEARNING_RATES)}"),
    ):
        if wrong:
            raise LissomError(sentence)
    if precision == "auto":
        precision = fast_precision(model, accelerator)
    if lr is None:
        lr = LEARNING_RATES[optimizer] * (batch / 64) ** (1.0 if optimizer == "sgd" else 0.5)
    _check_model(model, task, batch, processes)
    method.prepare(model, task)
    wanted = {id(p) for p in method.parameters(model)}
    names = [n for n, p in model.named_parameters() if id(p) in wanted and (parameters is None or parameters(n, p))]
    if not names:
        raise LissomError("no parameter of the model is left to train; widen `parameters`")

    job = _Job(
        model=_digest(f"{n} {tuple(v.shape)} {v.dtype}" for n, v in model.state_dict().items()),
        data=f"{task.name} {len(task.fit)} {_digest(data_marks(task.fit))}",
        method=_describe(method),
        epochs=epochs, batch=batch, lr=lr, optimizer=optimizer, weight_decay=weight_decay, warmup=warmup, clip=clip,
        precision=precision, seed=seed, augment=augment, flip=flip, trained=f"{len(names)} {_digest(names)}",
        max_steps=max_steps, time_limit=time_limit,
    )  # fmt: skip
    place = Path(folder) if folder is not None else None
    state = load_checkpoint(place) if place is not None else None
    if state is not None and place is not None:
        if not resume:
            raise LissomError(f"{place / CHECKPOINT} is an earlier run's; resume it (--resume), or take another folder")
        check_settings(place / CHECKPOINT, state["settings"], asdict(job))

    before = {n: p.requires_grad for n, p in model.named_parameters()}
    home = next(model.parameters()).device
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in set(names))
        run = _Run(model, task, method, job, place, state, threads)
        if processes == 1:
            outcome = _train(_fabric(accelerator, 1, precision), run, progress)
        else:
            outcome = _train_in_processes(_fabric(accelerator, processes, precision), run, progress)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        model.to(home)
    model.eval()
    history, rest = tuple(outcome["history"]), ("seconds", "stopped", "steps", "passes")
    return FitResult(model, history, **{name: outcome[name] for name in rest})


def _can_move(task: Task, split: Split) -> bool:
    """Whether augmentation knows how the inputs move, and the targets with them."""
    if len(task.shape) != 3:
        return False
    if task.kind == "segmentation":
        return split.labels is None or split.labels.shape[1:] == tuple(task.shape[1:])
    return task.kind == "classification"


@dataclass(frozen=True)
class _Run:
    """What a process needs to train."""

    model: nn.Module
    task: Task
    method: Method
    job: _Job
    folder: Path | None
    state: dict[str, Any] | None  # the checkpoint to go on from
    threads: int | None


def _train(fabric: Fabric, run: _Run, progress: Callable[[FitEvent], None] | None) -> dict[str, Any]:
    """Train the model in place, in one process. Returns what FitResult holds beside it."""
    with _threads(run.threads):
        if fabric.device.type != "cpu" or len(run.task.shape) != 3:
            return _loop(fabric, run, progress)
        assert run.task.fit is not None
        few = run.task.fit.sample(2, 0)
        inputs = torch.from_numpy(few.inputs(slice(0, len(few))))
        teacher = getattr(run.method, "teacher", None)
        with channels_last([run.model, *([teacher] if isinstance(teacher, nn.Module) else [])], inputs):
            return _loop(fabric, run, progress)


def _loop(fabric: Fabric, run: _Run, progress: Callable[[FitEvent], None] | None) -> dict[str, Any]:
    model, task, method, job = run.model, run.task, run.method, run.job
    assert task.fit is not None
    count = len(task.fit)
    size = min(job.batch, count // fabric.world_size * fabric.world_size)  # samples a step, over all processes
    steps_an_epoch = count // size  # what is left over comes up in another epoch: the order differs
    steps = job.epochs * steps_an_epoch
    if job.max_steps is not None:
        steps = min(steps, job.max_steps)
    labels = torch.from_numpy(np.asarray(task.fit.labels)) if task.fit.labels is not None else None
    teacher = getattr(method, "teacher", None)

    module, *optimizers = fabric.setup(model, *_optimizers(model, job))
    history: list[dict[str, Any]] = []
    step, spent, stopped = 0, 0.0, ""
    if run.state is not None:
        model.load_state_dict(run.state["model"])
        for optimizer, kept in zip(optimizers, run.state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        fabric.strategy.precision.load_state_dict(run.state["precision"])
        method.load_state(run.state.get("method", {}), model)
        history, step, spent, stopped = (run.state[k] for k in ("history", "step", "seconds", "stopped"))

    def save() -> None:
        if run.folder is not None and fabric.is_global_zero:
            state = {
                "settings": asdict(job),
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "precision": fabric.strategy.precision.state_dict(),
                "method": method.state(model),
                "history": history,
                "step": step,
                "seconds": spent,
                "stopped": stopped,
            }
            save_checkpoint(run.folder, state)

    with _quiet_randomness(), plain_attention(fabric.device, job.precision):
        for epoch in range(len(history), job.epochs):
            if stopped or step >= steps:
                break
            start = time.perf_counter()
            order = torch.randperm(count, generator=_generator(job.seed, epoch, ORDER))
            moves = _generator(job.seed, epoch, AUGMENTATION)
            torch.manual_seed(_number(job.seed, epoch, MODEL, fabric.global_rank))
            module.train()
            _hold_frozen(model)
            total, done, rate = torch.zeros((), device=fabric.device), 0, 0.0
            for position in range(0, steps_an_epoch * size, size):
                elapsed = spent + time.perf_counter() - start
                share = max(step / steps, elapsed / job.time_limit if job.time_limit else 0.0)
                share = fabric.broadcast(share) if fabric.world_size > 1 else share  # clocks differ
                if share >= 1:
                    stopped = "time" if step < steps else "steps"
                    break
                rate = job.lr * _schedule(share, job.warmup)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = rate

                mine = slice(fabric.global_rank, None, fabric.world_size)
                indices = order[position : position + size][mine]
                inputs = torch.from_numpy(task.fit.inputs(indices.numpy()))
                targets = labels[indices] if labels is not None else None
                if job.augment:
                    # Drawn for the whole batch, so that the number of processes changes nothing.
                    draws = draw(size, inputs.shape[-2], inputs.shape[-1], job.flip, moves)
                    own = draws[0][mine], draws[1][mine], draws[2][mine]
                    inputs = augment_images(inputs, own)
                    if targets is not None and targets.ndim == 3:
                        targets = augment_masks(targets, own)
                inputs = inputs.to(fabric.device, non_blocking=True)
                targets = targets.to(fabric.device) if targets is not None else None

                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                with taught_in(job.precision, teacher, fabric.device):
                    loss = method.at(share).loss(module, inputs, targets, task)
                fabric.backward(loss)
                if job.clip is not None:
                    for optimizer in optimizers:
                        fabric.clip_gradients(module, optimizer, max_norm=job.clip, error_if_nonfinite=False)
                for optimizer in optimizers:
                    optimizer.step()
                total += loss.detach()
                step, done = step + 1, done + 1
                if done % 20 == 0:
                    _check_finite(fabric, total, epoch, job)
            if done == 0:
                if history:
                    save()  # that time is over is part of the result: a resumed run must not find some left
                break
            mean = _check_finite(fabric, total, epoch, job) / done
            quality = _quality(fabric, model, task, method, max(size, 64))
            seconds = time.perf_counter() - start
            spent += seconds
            if not stopped and step >= steps and epoch + 1 < job.epochs:
                stopped = "steps"
            history.append({"epoch": epoch + 1, "loss": mean, "quality": quality, "lr": rate, "seconds": seconds})
            save()
            fabric.barrier()
            if progress is not None and fabric.is_global_zero:
                progress(FitEvent(epoch + 1, job.epochs, mean, quality, seconds))
    if not history:
        raise LissomError(f"the time limit of {job.time_limit} s ended before the first step; give more time")
    return {"history": history, "seconds": spent, "stopped": stopped, "steps": step, "passes": step * size / count}


def evaluate(
    model: nn.Module, task: Task, split: Split, batch: int = 64, *, original: nn.Module | None = None
) -> Quality:
    """The task's metric of a torch model on a split, in eval mode and float32; the model's own mode is put back.

    ``original`` answers in place of labels where the split has none. Raises LissomError where both are missing.
    """
    if split.labels is None and original is None:
        raise LissomError("without labels quality is agreement with the original model: give original=")
    outputs = _outputs(model, split, batch, task.reduce)
    answers = outputs
    if split.labels is None and original is not None:
        answers = _outputs(original, split, batch, task.reduce)
    return task.quality(outputs, task.targets(split, answers))


def _outputs(model: nn.Module, split: Split, batch: int, reduce: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The model's answers to a split, of each part what ``reduce`` keeps."""
    device = next(model.parameters()).device
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    parts = []
    try:
        with torch.no_grad():
            for x in batches(split, batch):
                output = model(torch.from_numpy(x).to(device))
                if exits_of(model) is not None:
                    output = output[-1]  # the model's own answer stands behind its exits'
                if not isinstance(output, torch.Tensor):
                    raise LissomError(
                        f"the model answers with {type(output).__name__}; wrap it to answer with one tensor"
                    )
                parts.append(reduce(output.float().cpu().numpy()))
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
    return np.concatenate(parts)


def _quality(fabric: Fabric, model: nn.Module, task: Task, method: Method, batch: int) -> float | None:
    """Quality on ``choose``, the same in every process; None without labels and without a teacher."""
    original = getattr(method, "teacher", None)
    if task.choose.labels is None and original is None:
        return None
    value = evaluate(model, task, task.choose, batch, original=original).value if fabric.is_global_zero else None
    return fabric.broadcast(value) if fabric.world_size > 1 else value


def _check_finite(fabric: Fabric, total: torch.Tensor, epoch: int, job: _Job) -> float:
    """The loss so far, averaged over the processes; all raise together where it is not finite."""
    value = float(fabric.all_reduce(total, reduce_op="mean"))
    if not math.isfinite(value):
        raise LissomError(
            f"the loss is not finite in epoch {epoch + 1}; lower the learning rate (now {job.lr:g})"
            + ("" if job.precision == "32-true" else ", or train in precision 32-true")
        )
    return value


def _schedule(share: float, warmup: float) -> float:
    """Share of the learning rate: linear to 1 over ``warmup``, then half a cosine to 0. Never 0 before the end."""
    if share < warmup:
        return max(share, 1e-3) / max(warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def _optimizers(model: nn.Module, job: _Job) -> list[torch.optim.Optimizer]:
    """One, or Muon for the hidden matrices and AdamW for the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = _hidden_matrices(model) if job.optimizer == "muon" else set()
    groups = [
        {"params": [p for p in trained if p.ndim >= 2 and id(p) not in hidden], "weight_decay": job.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if job.optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=job.lr, momentum=0.9, nesterov=True)]
    if job.optimizer in ("kar2", "kar3"):
        return [(Kar2 if job.optimizer == "kar2" else Kar3)(groups, lr=job.lr)]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=job.lr)] if groups else []
    matrices = [p for p in trained if id(p) in hidden]
    if matrices:
        found.append(
            torch.optim.Muon(matrices, lr=job.lr, weight_decay=job.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return found


def _hidden_matrices(model: nn.Module) -> set[int]:
    """The weights of linear layers, but for the last one's, whose rows are classes and no directions to keep apart."""
    return {id(m.weight) for m in [m for m in model.modules() if isinstance(m, nn.Linear)][:-1]}


def _hold_frozen(model: nn.Module) -> None:
    """Eval mode for what does not train: a BatchNorm keeps its running statistics, which belong to frozen weights.

    Where the heads of exits train alone, all of the rest: they learn from what the model computes and answers in use,
    without its dropout and stochastic depth.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    exits = exits_of(model)
    if exits is not None and trained <= {id(p) for p in exits.parameters()}:
        model.eval()
        exits.train()
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = _parameters_of_norm(model, path)
            if own and trained.isdisjoint(map(id, own)):
                module.eval()


def _parameters_of_norm(model: nn.Module, path: str) -> list[nn.Parameter]:
    """Of a BatchNorm without parameters (affine=False) those that it goes with: the layer's before it in the module
    that holds it, or all of that module's where it is the first; of a module further up where that one has none."""
    norm = model.get_submodule(path)
    own = list(norm.parameters(recurse=False))
    while path and not own:
        path = path.rpartition(".")[0]
        holder = model.get_submodule(path)
        own = list(holder.parameters())
        for module in list(holder.modules())[1:]:
            if module is norm:
                break
            own = list(module.parameters(recurse=False)) or own
    return own


def _number(*key: int) -> int:
    """A seed that is a pure function of the key, and unlike those of neighbouring keys."""
    return int(np.random.SeedSequence([k % 2**32 for k in key]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(_number(*key))


@contextmanager
def _quiet_randomness() -> Iterator[None]:
    """Leave the caller's own random numbers as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digest(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def data_marks(split: Split) -> Iterator[str]:
    """What tells one data set from another of the same size, without reading it all: labels, first and last input."""
    if split.labels is not None:
        yield hashlib.sha256(np.asarray(split.labels).tobytes()).hexdigest()
    yield hashlib.sha256(split.inputs(np.array([0, len(split) - 1])).tobytes()).hexdigest()


def weights_mark(model: nn.Module) -> str:
    """A hash of the model's weights and buffers, and of their names."""
    return _digest(
        f"{n} {hashlib.sha256(v.detach().cpu().float().numpy().tobytes()).hexdigest()}"
        for n, v in model.state_dict().items()
    )


def _describe(method: Method) -> str:
    """A method as text; a module among its fields as the hash of its weights. What it has found itself is left out."""
    marks = {}
    for name, value in vars(method).items():
        if name.startswith("_"):
            continue
        if isinstance(value, nn.Module):
            value = weights_mark(value)
        marks[name] = value
    return f"{type(method).__name__}({', '.join(f'{k}={v}' for k, v in marks.items())})"


def _processes(devices: str | int) -> int:
    """The number of processes, one a device."""
    if devices == "auto":
        return 1
    try:
        count = int(devices)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise LissomError(f"devices is {devices!r}; it is 'auto' or the number of devices, at least 1")
    return count


def _fabric(accelerator: str, processes: int, precision: str) -> Fabric:
    from lightning_fabric.strategies import DDPStrategy

    strategy: Any = "auto"
    if processes > 1:
        # Spawned, not forked: a fork after torch has started its threads may hang. Modules with branches that a step
        # leaves out (exits, sampled sub-networks) are common here, hence the search for unused parameters.
        strategy = DDPStrategy(start_method="spawn", find_unused_parameters=True)
    try:
        return Fabric(accelerator=accelerator, devices=processes, strategy=strategy, precision=precision)  # type: ignore[arg-type]
    except Exception as error:  # Fabric raises its own kinds for an accelerator or a number that is not there
        raise LissomError(f"training on {processes} x {accelerator!r} is not possible here: {error}") from error


def _train_in_processes(fabric: Fabric, run: _Run, progress: Callable[[FitEvent], None] | None) -> dict[str, Any]:
    """Train in spawned processes; the weights come back into the model of this one."""
    import threading

    import torch.multiprocessing as mp

    try:
        parcel = pickle.dumps(run)
    except Exception as error:  # a lambda or an open file in the user's own split raises anything
        raise LissomError(f"the model, the data or the method cannot be sent to several processes: {error}") from error
    events = mp.get_context("spawn").SimpleQueue()

    def pass_on() -> None:
        while (event := events.get()) is not None:
            if progress is not None:
                progress(event)

    listener = threading.Thread(target=pass_on, daemon=True)
    listener.start()
    try:
        outcome = fabric.launch(_in_process, _user_files(), parcel, events)
    except LissomError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        raise LissomError(f"training in several processes failed: {reason}") from error
    finally:
        events.put(None)
        listener.join()
    if "error" in outcome:
        raise LissomError(outcome["error"])
    run.model.load_state_dict(torch.load(io.BytesIO(outcome.pop("model")), weights_only=True))
    return outcome


def _user_files() -> list[str]:
    """A reference to each file of the user's own that was loaded: a spawned process must load them too."""
    files = [m for name, m in sys.modules.items() if name.startswith("lissom_user_")]
    return [f"{m.__file__}:{next(n for n, v in vars(m).items() if callable(v))}" for m in files]


def _in_process(fabric: Fabric, files: list[str], parcel: bytes, events: Any) -> dict[str, Any]:
    """One spawned process. An error that a user can act on is carried home as text: all processes raise it together."""
    try:
        for reference in files:
            load_function(reference)
        run: _Run = pickle.loads(parcel)  # made by the parent process a moment ago, never read from a file
        outcome = _train(fabric, run, events.put)
    except LissomError as error:
        return {"error": str(error)}
    # As bytes: tensors would be shared with a process that is about to end.
    weights = io.BytesIO()
    torch.save({k: v.cpu() for k, v in run.model.state_dict().items()}, weights)
    return {**outcome, "model": weights.getvalue()}


def _check_model(model: nn.Module, task: Task, batch: int, processes: int) -> None:
    """Run one input, so that a model of another shape or of other classes is told before training starts."""
    if not any(True for _ in model.parameters()):
        raise LissomError("the model has no parameters; there is nothing to train")
    assert task.fit is not None
    alone = min(batch, len(task.fit)) // processes == 1  # what a process has of a step: no more than there is
    if alone and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise LissomError(
            "a model with BatchNorm cannot train on one sample at a time; give a batch of at least "
            f"{2 * processes}, and as many samples"
        )
    try:
        outputs = _outputs(model, task.fit.sample(1, 0), 1, lambda answers: answers)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LissomError(f"the model does not take inputs of shape {tuple(task.shape)}: {reason}") from error
    task.check_answer(outputs.shape)
