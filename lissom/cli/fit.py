"""``lissom fit MODEL``: train a network, by itself or from a teacher, resumable after a kill."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from lissom.data.sources import DataSet
    from lissom.images import Preprocessing
    from lissom.tasks.task import Task
    from lissom.training.methods.base import Method


def fit(
    model: str = typer.Argument(help="A timm name, a weight file with --arch, or file.py:function."),
    data: str = typer.Option("digits", help="digits, a folder of images, a Parquet folder, or file.py:function."),
    method: str = typer.Option(
        "supervised", help="supervised, distillation or pela (lissom list method names them all)."
    ),
    teacher: str = typer.Option(None, help="The teacher: a timm name, or file.py:function."),
    teacher_weights: str = typer.Option(None, help="The teacher's weight file."),
    recipe: str = typer.Option(
        None, help="For pela: low_rank(ratio=2, ...) as text, or a slim run's result.json that holds one."
    ),
    epochs: int = typer.Option(10, min=1, help="Epochs."),
    then: str = typer.Option(
        None, help="Data to train on afterwards, supervised, with a new head where they have other classes."
    ),
    then_epochs: int = typer.Option(None, min=1, help="Epochs on --then. Default: --epochs."),
    batch: int = typer.Option(64, min=1, help="Samples a step."),
    optimizer: str = typer.Option("adamw", help="adamw, muon (fewer epochs for networks of linear layers) or sgd."),
    lr: float = typer.Option(None, help="Highest learning rate; by default it follows from the batch."),
    augment: bool = typer.Option(True, "--augment/--no-augment", help="Shift images; leave it out of short trainings."),
    flip: bool = typer.Option(False, "--flip", help="Mirror half of the images: not for digits or text."),
    out: str = typer.Option(None, help="Folder for weights, history and checkpoint. Default: trained/MODEL."),
    resume: bool = typer.Option(False, "--resume", help="Go on with an interrupted training in --out."),
    seed: int = typer.Option(0, help="Seed of every random choice."),
    weights: str = typer.Option(None, help="A weight file to start from, or 'pretrained' for timm's."),
    arch: str = typer.Option(None, help="The timm name of a weight file's network."),
    precision: str = typer.Option("32-true", help="32-true, bf16-mixed, 16-mixed, or auto (bf16 where it is fast)."),
    devices: str = typer.Option("auto", help="auto (one), or the number of devices, a process each."),
    threads: int = typer.Option(None, min=1, help="Threads. Default: torch's own choice."),
    time: float = typer.Option(None, min=0.01, help="Minutes at most; the learning rate falls to zero within them."),
    as_json: bool = typer.Option(False, "--json", help="Print the history as JSON."),
) -> None:
    """Train a model; the weights of the last epoch are written to OUT/model.safetensors.

    Data with masks train a network that answers with one map a class (vit_segmenter). Where a classifier has another
    number of outputs than the data have classes, it gets a new head. A tenth of the training data is kept out to judge
    each epoch; the test data are read once, at the end.

    The method pela makes the layers of a trained model low-rank and mends it, on the data that it was trained on; what
    it writes is then trained on other data like any model, with --weights.
    """
    import json
    import warnings
    from operator import methodcaller
    from pathlib import Path

    warnings.simplefilter("ignore")  # other libraries' remarks
    import torch
    from safetensors.torch import save

    from lissom.cli import console
    from lissom.data.sources import read
    from lissom.errors import LissomError
    from lissom.models.factory import load_model, num_outputs, with_head
    from lissom.runtime.artifact import write_atomic
    from lissom.tasks.of_data import task_of
    from lissom.training.checkpoint import write_file
    from lissom.training.loop import FitEvent, evaluate
    from lissom.training.loop import fit as train
    from lissom.training.methods.base import method_of
    from lissom.training.methods.distillation import Distillation

    remarks = console.remarks()
    if then is None and then_epochs is not None:
        raise LissomError("--then-epochs are given and no --then; name the data to train on afterwards")
    found = read(data)
    afterwards = None if then is None else read(then)
    loaded = load_model(model, arch=arch, weights=weights, num_classes=len(found.classes) or None, seed=seed)
    preprocessing = loaded.preprocessing(found.image_size)
    task = task_of(found, preprocessing=preprocessing, trained_here=found.trainable, seed=seed)
    network = loaded.model
    if recipe is not None and method != "pela":
        raise LissomError(f"--recipe is for --method pela, and the method is {method}")
    if method == "pela" and not loaded.trained:
        raise LissomError(f"pela starts from trained weights, and {model} has random ones; give its --weights")
    if task.kind == "classification" and found.classes and num_outputs(network, task.shape) != len(found.classes):
        if method == "pela":
            raise LissomError(
                f"the model has {num_outputs(network, task.shape)} outputs and the data {len(found.classes)} classes; "
                "pela trains on the data that the model was trained on: train on these afterwards"
            )
        network = with_head(network, len(found.classes), seed)
        remarks.print(f"the head is new: {len(found.classes)} outputs")
    target = None if afterwards is None else _following(task, afterwards, preprocessing, seed)

    chosen: str | Method = method
    technique = ""
    if teacher is not None:
        if method != "distillation":
            raise LissomError(f"--teacher is for --method distillation, and the method is {method}")
        taught = load_model(teacher, weights=teacher_weights)
        if not taught.trained:
            raise LissomError(f"the teacher {teacher} has random weights; give its --teacher-weights")
        if (taught.mean, taught.std) != (loaded.mean, loaded.std):
            raise LissomError("teacher and model normalise their images differently; give them the same mean and std")
        chosen = Distillation(teacher=taught.model)
    elif teacher_weights is not None:
        raise LissomError("--teacher-weights are given and no --teacher; name the teacher's network too")
    if method == "pela":
        network, chosen, technique = low_rank_stage(network, task, recipe, remarks.print)
    chosen = method_of(chosen)

    folder = Path(out) if out is not None else Path("trained") / Path(model.rpartition(":")[2]).stem

    def line(event: FitEvent) -> None:
        quality = "" if event.quality is None else f"  {task.metric} {event.quality:.2f} %"
        remarks.print(f"epoch {event.epoch}/{event.epochs}  loss {event.loss:.4f}{quality}  {event.seconds:.1f} s")

    trainings = [(task, chosen, data, epochs, folder if target is None else folder / "first")]
    if target is not None:
        trainings.append((target, method_of("supervised"), str(then), then_epochs or epochs, folder))
    histories: list[dict[str, Any]] = []
    for task, chosen, source, count, place in trainings:
        if histories and task.classes != trainings[0][0].classes:
            network = with_head(network, len(task.classes), seed)
            remarks.print(f"the head is new: {len(task.classes)} outputs")
        result = train(
            network,
            task,
            method=chosen,
            epochs=count,
            batch=batch,
            lr=lr,
            optimizer=optimizer,
            augment=None if augment else False,
            flip=flip,
            seed=seed,
            folder=place,
            resume=resume,
            precision=precision,
            devices=devices,
            threads=threads,
            time_limit=None if time is None else 60 * time,
            progress=line,
        )
        if result.stopped == "time":
            remarks.print(f"the time was up in epoch {len(result.history)} of {count}")
        original = getattr(chosen, "teacher", None)
        known = task.report.labels is not None or original is not None
        judged = evaluate(network, task, task.report, original=original) if known else None
        state = {name: value.contiguous().clone() for name, value in network.state_dict().items()}
        metadata = {"format": "pt", "network": model, "classes": json.dumps(list(task.classes))}
        if technique:
            metadata["recipe"] = technique
        content = save(state, metadata)
        write_file(place / "model.safetensors", methodcaller("write", content))
        history: dict[str, Any] = {
            "model": model,
            "data": source,
            "metric": task.metric,
            "history": list(result.history),
            "best_epoch": result.best_epoch,
            "report": None if judged is None else {"quality": judged.value, "quality_ci": [judged.low, judged.high]},
            "weights": str(place / "model.safetensors"),
            "seed": seed,
            "seconds": result.seconds,
            "stopped": result.stopped,
            "torch": torch.__version__,
            **({"recipe": technique} if technique else {}),
            **({"first": histories[0]} if histories else {}),
        }
        write_atomic(place / "history.json", json.dumps(history, indent=1))
        histories.append(history)
        if not as_json:
            results = console.results()
            if judged is not None:
                results.print(
                    f"{task.metric}: {judged.value:.2f} % ({judged.low:.2f} to {judged.high:.2f}) on held-out data"
                )
            results.print(f"weights: {place / 'model.safetensors'}")
    if as_json:
        print(json.dumps(histories[-1], indent=1))


def _following(task: Task, data: DataSet, preprocessing: Preprocessing | None, seed: int) -> Task:
    """The task of ``data``, whose images come as a network of ``task`` knows them. Raises LissomError where it is of
    another kind, or a network could not be given a head for it."""
    from lissom.errors import LissomError
    from lissom.tasks.of_data import task_of

    if data.kind != task.kind:
        raise LissomError(f"the data are for {task.kind}, and those of --then for {data.kind}; give two of one kind")
    found = task_of(data, preprocessing=preprocessing, trained_here=data.trainable, seed=seed)
    if found.fit is None or not len(found.fit):
        raise LissomError(f"the data {data.name!r} of --then have nothing to train on; give a train/ folder")
    if found.classes != task.classes and (task.kind != "classification" or not found.classes):
        raise LissomError("a network gets a new head for other classes of images alone; give --then the same classes")
    return found


def low_rank_stage(
    network: nn.Module, task: Task, recipe: str | None, remark: Callable[[str], None]
) -> tuple[nn.Module, Method, str]:
    """The network with low-rank layers, the method that mends it from the network as it was, the technique in words.

    ``recipe`` holds the technique ``low_rank``, as text or in a JSON file; what else it holds is not for training, and
    a remark says so. Raises LissomError where it holds none, and where no layer of the network can be replaced.
    """
    from lissom.errors import LissomError
    from lissom.export.plan import Plan
    from lissom.techniques.low_rank import LowRank
    from lissom.techniques.recipe import Recipe
    from lissom.training.methods.pela import Pela

    techniques = Recipe.of(recipe or "low_rank()").techniques
    found = [technique for technique in techniques if isinstance(technique, LowRank)]
    if not found:
        raise LissomError(f"the recipe {recipe} holds no low_rank, which pela starts with")
    if others := [technique.name for technique in techniques if technique is not found[0]]:
        remark(f"left out of the recipe: {', '.join(others)}; pela trains low-rank layers alone")
    low_rank = found[0]
    plan = low_rank.apply(Plan.of(network, task.shape), task)
    for note in plan.notes:
        remark(note)
    method = Pela(
        network,
        features=low_rank.features,
        feature_weight=low_rank.feature_weight,
        perturbation_weight=low_rank.perturbation_weight,
        eps=low_rank.eps,
    )
    return plan.model, method, str(low_rank)
