"""fit: it learns, repeats itself, goes on after a kill, and refuses what cannot work."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError
from lissom.tasks.task import Task
from lissom.training.checkpoint import CHECKPOINT
from lissom.training.loop import FitEvent, evaluate, fit
from lissom.training.methods.base import Method
from lissom.usercode import load_function


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.detach().flatten().double() for v in model.state_dict().values()])


def curve(result) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["quality"]) for entry in result.history]


def perceptron(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3))


class Stop(Exception):
    """Stands for a kill: raised between two epochs."""


def stop_after(epoch: int):
    def progress(event: FitEvent) -> None:
        if event.epoch == epoch:
            raise Stop

    return progress


def test_it_learns_in_place_and_reports_each_epoch(task, network):
    model, events = network(), []
    before = evaluate(model, task, task.report).value
    result = fit(model, task, epochs=6, batch=16, lr=5e-3, progress=events.append)
    after = evaluate(model, task, task.report)
    assert result.model is model
    assert not model.training
    assert before < 60 < 85 < after.value
    assert after.low < after.value <= after.high
    assert [e.epoch for e in events] == [1, 2, 3, 4, 5, 6]
    assert [e.loss for e in events] == [h["loss"] for h in result.history]
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.history[-1]["quality"] == pytest.approx(evaluate(model, task, task.choose).value)
    best = max(result.history, key=lambda h: h["quality"])
    assert result.best_epoch == best["epoch"]
    assert result.stopped == ""


def test_the_same_seed_repeats_and_the_callers_random_numbers_stay(task, network):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = network(1)
    torch.manual_seed(5)
    a = fit(first, task, epochs=2, seed=3)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    b = fit(network(1), task, epochs=2, seed=3)
    c = fit(network(1), task, epochs=2, seed=4)
    assert curve(a) == curve(b)
    assert torch.equal(weights(a.model), weights(b.model))
    assert curve(a) != curve(c)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_resumed_is_uninterrupted(task, network, tmp_path, optimizer):
    settings = {"epochs": 4, "batch": 32, "optimizer": optimizer}
    network = perceptron if optimizer == "muon" else network  # muon is for hidden matrices
    whole = fit(network(), task, folder=tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        fit(network(), task, folder=tmp_path / "killed", progress=stop_after(2), **settings)
    torch.manual_seed(77)  # a new process would not have the old one's random numbers
    events = []
    resumed = fit(network(9), task, folder=tmp_path / "killed", resume=True, progress=events.append, **settings)
    assert [e.epoch for e in events] == [3, 4]
    assert curve(resumed) == curve(whole)
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_resuming_a_finished_run_trains_no_more(task, network, tmp_path):
    done = fit(network(), task, epochs=2, folder=tmp_path)
    events = []
    again = fit(network(5), task, epochs=2, folder=tmp_path, resume=True, progress=events.append)
    assert events == []
    assert again.history == done.history
    assert torch.equal(weights(again.model), weights(done.model))


def test_resume_in_an_empty_folder_starts(task, network, tmp_path):
    assert len(fit(network(), task, epochs=1, folder=tmp_path / "new", resume=True).history) == 1


def test_a_folder_in_use_is_refused_and_left_alone(task, network, tmp_path):
    fit(network(), task, epochs=1, folder=tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(LissomError, match="--resume"):
        fit(network(), task, epochs=1, folder=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_resume_names_the_setting_that_differs(task, network, tmp_path):
    base = {"epochs": 1, "folder": tmp_path}
    fit(network(), task, **base)
    for change, name in (
        ({"epochs": 2}, "epochs"),
        ({"lr": 0.5}, "lr"),
        ({"batch": 8}, "batch"),
        ({"seed": 1}, "seed"),
        ({"flip": True}, "flip"),
        ({"augment": False}, "augment"),
        ({"method": OnlyHead()}, "method"),
        ({"parameters": lambda n, p: n.startswith("6")}, "trained"),
    ):
        with pytest.raises(LissomError, match=f"was trained with {name} "):
            fit(network(), task, resume=True, **{**base, **change})
    with pytest.raises(LissomError, match="was trained with data "):
        fit(network(), replace(task, fit=task.choose), resume=True, **base)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(LissomError, match="was trained with model "):
        fit(other, task, resume=True, **base)


@pytest.mark.parametrize("damage", ["truncated", "pickle", "other"])
def test_a_damaged_checkpoint_is_told(task, network, tmp_path, damage):
    path = tmp_path / CHECKPOINT
    fit(network(), task, epochs=1, folder=tmp_path)
    marker = tmp_path / "executed"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "pickle":
        torch.save({"lissom": 1, "settings": Bomb(str(marker))}, path)
    else:
        torch.save([1, 2, 3], path)
    with pytest.raises(LissomError, match=CHECKPOINT):
        fit(network(), task, epochs=1, folder=tmp_path, resume=True)
    assert not marker.exists()


class Bomb:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_full_disk_leaves_the_earlier_checkpoint(task, network, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        fit(network(), task, epochs=3, folder=tmp_path, progress=stop_after(1))
    before = (tmp_path / CHECKPOINT).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lissom.training.checkpoint.os.fsync", full)
    with pytest.raises(LissomError, match="No space left"):
        fit(network(), task, epochs=3, folder=tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


@dataclass(frozen=True)
class Exploding(Method):
    def loss(self, model, inputs, targets, task):
        return task.loss(model(inputs), targets) * float("nan")


def test_a_loss_that_is_not_finite_is_told(task, network, tmp_path):
    with pytest.raises(LissomError, match="not finite in epoch 1; lower the learning rate"):
        fit(network(), task, method=Exploding(), epochs=2, folder=tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


@dataclass(frozen=True)
class OnlyHead(Method):
    """A method that trains the last layer."""

    def loss(self, model, inputs, targets, task):
        return task.loss(model(inputs), targets)

    def parameters(self, model):
        return model[-1].parameters()


def test_a_method_or_a_filter_says_what_trains(task, network):
    for how in ({"method": OnlyHead()}, {"parameters": lambda name, parameter: name.startswith("6.")}):
        model = network()
        model[0].bias.requires_grad_(False)
        before = {n: v.clone() for n, v in model.state_dict().items()}
        fit(model, task, epochs=1, **how)
        changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
        # The frozen BatchNorm keeps its running statistics too.
        assert changed == {"6.weight", "6.bias"}
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"0.bias"}
    with pytest.raises(LissomError, match="no parameter"):
        fit(network(), task, parameters=lambda name, parameter: False)


def test_a_norm_without_parameters_goes_with_the_layer_before_it(task):
    def model() -> nn.Module:
        torch.manual_seed(0)
        norm = partial(nn.BatchNorm2d, affine=False)
        front = nn.Sequential(norm(1), nn.Sequential(norm(1), nn.ReLU()), nn.Conv2d(1, 8, 3), norm(8))
        return nn.Sequential(
            front, nn.Sequential(nn.ReLU(), norm(8)), nn.Conv2d(8, 8, 3), nn.Sequential(norm(8)), nn.Flatten(),
            nn.Linear(128, 3), nn.BatchNorm1d(3, affine=False),
        )  # fmt: skip

    def moved(trained: str | None) -> set[str]:
        net = model()
        chosen = None if trained is None else lambda name, _: name.startswith(trained)
        fit(net, task, epochs=1, parameters=chosen)
        return {n for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
                and int(m.num_batches_tracked)}  # fmt: skip

    # Two stand in front of all layers and go with those that their module holds: theirs, or the one further up.
    front, between, behind, last = {"0.0", "0.1.0", "0.3"}, {"1.1"}, {"3.0"}, {"6"}
    assert moved(None) == front | between | behind | last
    assert moved("0.") == front | between
    assert moved("2.") == behind
    assert moved("5.") == last


def test_steps_and_time_shorten_the_schedule(task, network):
    few = fit(network(), task, epochs=5, batch=32, max_steps=7)  # 5 steps an epoch
    assert few.stopped == "steps"
    assert (few.steps, few.passes) == (7, 7 * 32 / len(task.fit))
    assert len(few.history) == 2
    assert few.history[-1]["lr"] < 0.2 * few.history[0]["lr"]
    short = fit(network(), task, epochs=10_000, batch=32, time_limit=0.5)
    assert short.stopped == "time"
    assert 1 <= len(short.history) < 10_000
    assert short.history[-1]["lr"] < 0.1 * max(h["lr"] for h in short.history)


def test_a_run_stopped_by_time_stays_stopped(task, network, tmp_path):
    settings = {"epochs": 10_000, "time_limit": 0.3, "folder": tmp_path}
    short = fit(network(), task, **settings)
    again = fit(network(), task, resume=True, **settings)
    assert again.history == short.history
    assert again.stopped == "time"


def test_every_sample_is_seen_and_the_order_changes(task, network):
    seen: list[np.ndarray] = []
    inner = task.fit

    class Spy(type(inner)):
        def inputs(self, indices):
            if not isinstance(indices, slice) and len(indices) == 40:
                seen.append(np.asarray(indices))
            return super().inputs(indices)

    fit(network(), replace(task, fit=Spy(inner.name, inner.x, inner.labels)), epochs=2, batch=40)
    first, second = np.concatenate(seen[:4]), np.concatenate(seen[4:])
    assert sorted(first) == sorted(second) == list(range(160))
    assert list(first) != list(second)


def test_a_batch_larger_than_the_data_is_the_data(task, network):
    assert fit(network(), task, epochs=1, batch=10_000).history[0]["loss"] > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 1}, "BatchNorm .* a batch of at least 2, and as many samples"),
        ({"batch": 3, "devices": 3}, "BatchNorm .* a batch of at least 6, and as many samples"),
        ({"lr": -1.0}, "learning rate"),
        ({"lr": math.nan}, "learning rate"),
        ({"warmup": 1.0}, "warmup"),
        ({"clip": 0.0}, "clip"),
        ({"time_limit": 0.0}, "time limit"),
        ({"max_steps": 0}, "max_steps"),
        ({"threads": 0}, "threads"),
        ({"devices": "many"}, "devices"),
        ({"devices": 3, "batch": 64}, "shared equally"),
        ({"precision": "fp8"}, "32-true, bf16-mixed"),
        ({"optimizer": "lion"}, "adamw, muon, sgd"),
        ({"accelerator": "abacus"}, "abacus"),
        ({"method": "alchemy"}, "known: .*distillation, dual_input, .*supervised"),
        ({"method": 3}, "not int"),
    ],
)
def test_settings_that_cannot_work_are_told(task, network, settings, sentence):
    model = network()
    before = weights(model)
    with pytest.raises(LissomError, match=sentence):
        fit(model, task, **{"epochs": 1, **settings})
    assert torch.equal(weights(model), before)


def test_models_and_data_that_do_not_fit_are_told(task, network):
    with pytest.raises(LissomError, match="5 outputs and the data have 3 classes"):
        fit(network(classes=5), task)
    with pytest.raises(LissomError, match=r"inputs of shape \(1, 8, 8\)"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(65, 3)), task)
    with pytest.raises(LissomError, match="no parameters"):
        fit(nn.Flatten(), task)
    with pytest.raises(LissomError, match="nothing to train on"):
        fit(network(), replace(task, fit=None))
    with pytest.raises(LissomError, match=r"BatchNorm .* a batch of at least 2, and as many samples"):
        fit(network(), replace(task, fit=task.fit.sample(1, 0)))
    with pytest.raises(LissomError, match=r"BatchNorm .* a batch of at least 4, and as many samples"):
        fit(network(), replace(task, fit=task.fit.sample(3, 0)), devices=2)
    with pytest.raises(LissomError, match="needs labels"):
        fit(network(), replace(task, fit=replace(task.fit, labels=None)))
    with pytest.raises(LissomError, match="augment=False"):
        fit(network(), replace(task, kind="segmentation"), augment=True)


def test_evaluate_keeps_each_modules_mode(task, network):
    model = network()
    model.train()
    model[1].eval()
    evaluate(model, task, task.report, batch=7)
    assert model.training
    assert not model[1].training
    assert model[5].training


def test_evaluate_without_labels_is_agreement(task, network):
    a, b = network(0), network(1)
    unlabelled = replace(task.report, labels=None)
    with torch.no_grad():
        x = torch.from_numpy(task.report.x)
        expected = 100 * float((a.eval()(x).argmax(-1) == b.eval()(x).argmax(-1)).double().mean())
    assert evaluate(a, task, unlabelled, original=b).value == pytest.approx(expected)
    with pytest.raises(LissomError, match="original"):
        evaluate(a, task, unlabelled)


def test_bf16_mixed_trains_and_leaves_float32_weights(task, network):
    model = network()
    result = fit(model, task, epochs=4, batch=16, lr=5e-3, precision="bf16-mixed")
    assert {v.dtype for v in model.state_dict().values() if v.is_floating_point()} == {torch.float32}
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_muon_moves_hidden_matrices_by_steps_of_like_singular_values(task):
    def moved(optimizer: str) -> dict[str, torch.Tensor]:
        model = perceptron()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        settings = {"lr": 1e-2, "warmup": 0.0, "weight_decay": 0.0, "max_steps": 1}
        fit(model, task, epochs=1, batch=32, optimizer=optimizer, **settings)
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}

    muon, adamw = moved("muon"), moved("adamw")
    for name in ("1.weight", "3.weight"):
        steps = torch.linalg.svdvals(muon[name]), torch.linalg.svdvals(adamw[name])
        ratios = [values.max() / values.median() for values in steps]
        assert ratios[0] < 2 < ratios[1]  # Newton and Schulz's five steps bring most near 1, the smallest not so far
        # The root mean square of a step is about 0.2 of the rate, as adamw's often is.
        assert muon[name].square().mean().sqrt() == pytest.approx(0.2 * 1e-2, rel=0.4)
    for name in ("5.weight", "1.bias"):
        assert torch.equal(muon[name], adamw[name])


SCRIPT = """
    import importlib.util, sys
    spec = importlib.util.spec_from_file_location("small_parts", {conftest!r})
    parts = importlib.util.module_from_spec(spec)
    sys.modules["small_parts"] = parts
    spec.loader.exec_module(parts)
    from lissom.training.loop import fit

    fit(parts.make_network(0), parts.make_task(), {arguments})
"""


def run_script(tmp_path: Path, arguments: str) -> subprocess.Popen:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(SCRIPT).format(conftest=str(Path(__file__).parent / "conftest.py"), arguments=arguments)
    )
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)


@pytest.mark.full
def test_after_sigkill_the_curve_is_that_of_an_uninterrupted_run(task, network, tmp_path):
    settings = {"epochs": 6, "batch": 16, "threads": 1}
    whole = fit(network(), task, folder=tmp_path / "whole", **settings)
    child = run_script(
        tmp_path,
        f"folder={str(tmp_path / 'killed')!r}, progress=lambda e: print(e.epoch, flush=True), **{settings!r}",
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "3":
            os.kill(child.pid, signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    events = []
    resumed = fit(network(4), task, folder=tmp_path / "killed", resume=True, progress=events.append, **settings)
    assert 6 in [e.epoch for e in events]  # the kill came before the end
    assert 3 not in [e.epoch for e in events]
    assert curve(resumed) == curve(whole)
    assert torch.equal(weights(resumed.model), weights(whole.model))


@pytest.mark.full
def test_two_processes_train_as_one(task, tmp_path):
    # Data of a class that the processes can import: a test file is none.
    splits = {name: ArraySplit(name, s.x, s.labels) for name, s in vars(task).items() if hasattr(s, "x")}
    task = task.with_splits(**splits)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))

    settings = {"epochs": 3, "batch": 32, "accelerator": "cpu"}
    one = fit(model(), task, **settings)
    events = []
    two = fit(model(), task, devices=2, folder=tmp_path, progress=events.append, **settings)
    assert [e.epoch for e in events] == [1, 2, 3]
    assert [h["loss"] for h in two.history] == pytest.approx([h["loss"] for h in one.history], rel=1e-4)
    assert torch.allclose(weights(two.model), weights(one.model), atol=1e-4)
    with pytest.raises(LissomError, match="not finite"):
        fit(model(), task, devices=2, lr=1e30, clip=None, **settings)


@pytest.mark.full
def test_a_users_own_model_trains_in_two_processes(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from torch import nn\n\n\nclass Own(nn.Sequential):\n    pass\n\n\n"
        "def build():\n    return Own(nn.Flatten(), nn.Linear(64, 3))\n"
    )
    model = load_function(f"{file}:build")()
    x = np.random.default_rng(0).normal(size=(32, 1, 8, 8)).astype(np.float32)
    split = ArraySplit("all", x, (x.mean((1, 2, 3)) > 0).astype(np.int64))
    own = Task(fit=split, choose=split, report=split, shape=(1, 8, 8), classes=("a", "b", "c"))
    before = weights(model)
    result = fit(model, own, devices=2, epochs=1, batch=16, accelerator="cpu")
    assert not torch.equal(weights(model), before)
    assert len(result.history) == 1
