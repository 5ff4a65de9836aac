"""Recovery: the sum of terms over one forward pass of each model, what it trains, what it refuses, and resuming."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.layers.exits import Exits, attach_exits
from lissom.training.loop import FitEvent, fit
from lissom.training.methods.base import answers_of
from lissom.training.methods.recovery import Answers, Recovery, Seen, Term, kl


@dataclass(frozen=True)
class Scaled(Term):
    """The mean of the answers, times a factor; reads two modules."""

    factor: float = 1.0

    def student(self):
        return ("0",)

    def teacher(self):
        return ("3",)

    def loss(self, model, student, teacher, targets, task):
        assert student.features["0"].requires_grad
        assert not teacher.features["3"].requires_grad
        assert not teacher.answer.requires_grad
        return self.factor * student.answer.mean()


@dataclass(frozen=True)
class HeadOnly(Term):
    def parameters(self, model):
        return model[-1].parameters()

    def loss(self, model, student, teacher, targets, task):
        return functional.mse_loss(student.answer, teacher.answer)


class Outputs(NamedTuple):
    """As torchvision's GoogLeNet gives in training."""

    logits: torch.Tensor
    aux2: torch.Tensor
    aux1: torch.Tensor


class Auxiliary(nn.Module):
    """Two auxiliary heads answer beside it in training."""

    def __init__(self, inside: nn.Module, kind=Outputs) -> None:
        super().__init__()
        self.inside, self.kind = inside, kind

    def forward(self, x: torch.Tensor):
        answer = self.inside(x)
        return self.kind(answer, answer + 1, answer + 2) if self.training else answer


class Counting(nn.Module):
    """Counts the forward passes of what it holds."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.calls = inside, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inside(x)


@pytest.fixture
def batch(task):
    return torch.from_numpy(task.fit.inputs(slice(0, 8))), torch.from_numpy(task.fit.labels[:8])


def test_the_loss_is_the_sum_of_its_terms(task, network, batch):
    x, y = batch
    model, original = network(1), network(2)
    recovery = Recovery(original, (Scaled(2.0), Scaled(-0.5), Answers()))
    recovery.prepare(model, task)
    torch.manual_seed(0)
    loss = recovery.loss(model, x, y, task)
    torch.manual_seed(0)
    own = Seen((model(x),), {})
    with torch.no_grad():
        given = Seen((original(x),), {})
    expected = 1.5 * own.answer.mean() + Answers().loss(model, own, given, y, task)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in original.parameters())
    assert not original.training
    # Its hooks are gone.
    assert not any(m._forward_hooks for net in (model, original) for m in net.modules())


def test_one_forward_pass_of_each_model_serves_all_terms(task, network, batch):
    x, y = batch
    model, original = Counting(network(1)), Counting(network(2))
    Recovery(original, (Answers(), Answers(1.0, 0.2), Answers(3.0, 1.0))).loss(model, x, y, task)
    assert (model.calls, original.calls) == (1, 1)


@dataclass(frozen=True)
class Given(Term):
    """Keeps what it is given."""

    seen: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    def loss(self, model, student, teacher, targets, task):
        self.seen.append(student.answers)
        return student.answer.mean()


def test_a_term_sees_the_models_own_answer_and_no_auxiliary_heads(task, network, batch):
    inside, term = network(1), Given()
    inside[5] = nn.Identity()  # no dropout: one answer twice
    Recovery(network(2), (term,)).loss(Auxiliary(inside), batch[0], None, task)
    ((answer,),) = term.seen
    assert torch.equal(answer, inside(batch[0]))
    method = Recovery(network(2), (Given(),))
    with pytest.raises(LissomError, match="Auxiliary gives 3 answers at once, and which of them is its own cannot be"):
        fit(Auxiliary(network(1), lambda *answers: answers), task, method=method, epochs=1)


def test_the_own_answer_of_a_named_tuple_comes_last():
    own, second, first = torch.zeros(2), torch.ones(2), torch.ones(2)
    assert [id(a) for a in answers_of(Outputs(own, second, first))] == [id(a) for a in (second, first, own)]
    assert answers_of((first, own)) == (first, own)
    assert answers_of(own) == (own,)


def test_the_hooks_are_gone_after_a_failure(task, network, batch):
    model, original = network(1), network(2)
    with pytest.raises(RuntimeError):
        Recovery(original, (Scaled(),)).loss(model, batch[0].repeat(1, 2, 1, 1), None, task)
    assert not any(m._forward_hooks for net in (model, original) for m in net.modules())


def test_answers_are_distilled_by_the_formula(task):
    torch.manual_seed(0)
    z, v = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1, 0])
    own, given = Seen((z,), {}), Seen((v,), {})
    p, q = (v / 2).softmax(1), (z / 2).softmax(1)
    divergence = sum(float(p[i, j] * (p[i, j] / q[i, j]).log()) for i in range(5) for j in range(3)) / 5
    labelled = float(functional.cross_entropy(z, y))
    model = nn.Identity()
    assert float(Answers().loss(model, own, given, y, task)) == pytest.approx(0.7 * 4 * divergence + 0.3 * labelled)
    assert float(Answers().loss(model, own, given, None, task)) == pytest.approx(4 * divergence)
    assert float(Answers(alpha=1.0).loss(model, own, given, y, task)) == pytest.approx(4 * divergence)


def test_the_divergence_of_maps_is_the_mean_over_places():
    torch.manual_seed(0)
    z, v = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    flat = [t.permute(0, 2, 3, 1).reshape(-1, 3) for t in (v, z)]
    torch.testing.assert_close(kl(v, z), kl(*flat))
    assert float(kl(v, v)) == pytest.approx(0, abs=1e-7)


def test_what_is_trained_is_what_the_terms_want(task, network):
    model, original = network(1), network(1)
    recovery = Recovery(original, (HeadOnly(),))
    assert [id(p) for p in recovery.parameters(model)] == [id(p) for p in model[-1].parameters()]
    assert len(list(replace(recovery, terms=(HeadOnly(), Answers())).parameters(model))) == len(
        list(model.parameters())
    )
    before = {n: v.clone() for n, v in model.state_dict().items()}
    teacher = {n: v.clone() for n, v in original.state_dict().items()}
    with torch.no_grad():
        model[-1].weight.add_(1)
    fit(model, task, method=recovery, epochs=1, batch=32)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"6.weight", "6.bias"}  # the frozen BatchNorm's statistics are kept too
    assert all(torch.equal(v, teacher[n]) for n, v in original.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@dataclass(frozen=True)
class Reading(Term):
    where: str = "student"
    path: str = "0"

    def student(self):
        return (self.path,) if self.where == "student" else ()

    def teacher(self):
        return (self.path,) if self.where == "teacher" else ()

    def loss(self, model, student, teacher, targets, task):
        return student.answer.mean()


@dataclass(frozen=True)
class Looking(Reading):
    """Finds its paths in the models."""

    def reads(self, model, original):
        return [list(dict(model.named_modules()))[-1]], [next(n for n, _ in original.named_children())]

    def loss(self, model, student, teacher, targets, task):
        assert list(student.features) == ["6"]
        assert list(teacher.features) == ["0"]
        return student.answer.mean()


def test_terms_find_their_paths_in_the_models_also_under_fabric(task, network):
    fit(network(), task, method=Recovery(network(1), (Looking(),)), epochs=1, batch=32, max_steps=2)


def test_what_a_recovery_refuses(task, network):
    model = network()
    for method, sentence in (
        (Recovery(model), "learns from the original model: give original="),
        (Recovery(), "only exits can learn from the model they stand on"),
        (Recovery(network(1), ()), "a recovery without terms has nothing to learn"),
        (
            Recovery(network(1), (Reading(path="blocks.3"),)),
            r"Reading reads 'blocks\.3', which the changed model lacks",
        ),
        (Recovery(network(1), (Reading("teacher", "a.b"),)), r"Reading reads 'a\.b', which the original model lacks"),
    ):
        with pytest.raises(LissomError, match=sentence) as error:
            fit(model, task, method=method, epochs=1)
        assert "\n" not in str(error.value)


@dataclass(frozen=True)
class ToOwn(Term):
    """Exits learn the model's own answer; a feature of the model stands for the original's."""

    def parameters(self, model):
        return model.exits.parameters()

    def teacher(self):
        return ("0",)

    def loss(self, model, student, teacher, targets, task):
        assert not teacher.answer.requires_grad
        assert not teacher.features["0"].requires_grad
        assert len(student.answers) == 2
        return functional.mse_loss(student.answers[0], teacher.answer)


def test_exits_alone_may_learn_from_the_model_they_stand_on(task, network, batch):
    model = network()
    attach_exits(model, Exits(["4"], [nn.Linear(128, 3)]))
    Recovery(terms=(ToOwn(),)).loss(model, *batch, task).backward()
    assert model.exits.heads[0].weight.grad is not None
    assert model[0].weight.grad is None
    before = model[6].weight.clone()
    result = fit(model, task, method=Recovery(terms=(ToOwn(),)), epochs=3, batch=16)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert torch.equal(model[6].weight, before)


@dataclass(frozen=True)
class Checked(ToOwn):
    """Sees that the model answers in training as it does in use; ``seen``: how often it looked."""

    seen: list[int] = field(default_factory=list, repr=False, compare=False)

    def teacher(self):
        return ("4",)

    def loss(self, model, student, teacher, targets, task):
        inside = {"exits", *(f"exits.{name}" for name, _ in model.exits.named_modules() if name)}
        assert {name for name, module in model.named_modules() if module.training} == inside
        with torch.no_grad():
            used = model[6](teacher.features["4"])  # without the dropout between
        assert torch.equal(teacher.answer, used)
        self.seen.append(len(used))
        return functional.mse_loss(student.answers[0], teacher.answer)


def test_a_model_whose_exits_train_alone_teaches_what_it_answers_in_use(task, network, tmp_path):
    def exited() -> nn.Module:
        return attach_exits(network(), Exits(["4"], [nn.Sequential(nn.Dropout(0.1), nn.Linear(128, 3))]))

    settings = {"epochs": 3, "batch": 32, "folder": tmp_path}
    first, resumed = Checked(), Checked()
    with pytest.raises(Stop):
        fit(exited(), task, method=Recovery(terms=(first,)), progress=stop_after(2), **settings)
    model = fit(exited(), task, method=Recovery(terms=(resumed,)), resume=True, **settings).model
    assert (first.seen, resumed.seen) == ([32] * 10, [32] * 5)
    assert not any(module.training for module in model.modules())


class Stop(Exception):
    pass


def stop_after(count: int):
    def progress(event: FitEvent) -> None:
        if event.epoch == count:
            raise Stop

    return progress


def test_resumed_is_uninterrupted(task, network, tmp_path):
    settings = {"epochs": 4, "batch": 32, "method": Recovery(network(5), (Answers(), HeadOnly()))}
    whole = fit(network(), task, folder=tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        fit(network(), task, folder=tmp_path / "killed", progress=stop_after(2), **settings)
    torch.manual_seed(77)
    resumed = fit(network(9), task, folder=tmp_path / "killed", resume=True, **settings)
    assert [h["loss"] for h in resumed.history] == [h["loss"] for h in whole.history]
    assert all(math.isfinite(h["loss"]) for h in whole.history)
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_another_term_is_another_setting(task, network, tmp_path):
    fit(network(), task, method=Recovery(network(1)), epochs=1, folder=tmp_path)
    with pytest.raises(LissomError, match="was trained with method "):
        fit(network(), task, method=Recovery(network(1), (Answers(alpha=0.5),)), epochs=1, folder=tmp_path, resume=True)
