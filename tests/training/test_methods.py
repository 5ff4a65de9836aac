"""Methods: distillation against its formula, and what each refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.registry import parts
from lissom.training.loop import evaluate, fit
from lissom.training.methods.base import method_of
from lissom.training.methods.distillation import Distillation
from lissom.training.methods.supervised import Supervised


class Fixed(nn.Module):
    """Answers with its weights, whatever the input."""

    def __init__(self, answers: torch.Tensor):
        super().__init__()
        self.answers = nn.Parameter(answers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answers[: len(x)]


def test_methods_are_found_by_name():
    assert {"supervised", "distillation"} <= {p.name for p in parts("method")}
    assert method_of("supervised") == Supervised()
    method = Distillation(teacher=nn.Identity(), alpha=0.5)
    assert method_of(method) is method


@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 4.0), (0.3, 1.0), (1.0, 2.0), (0.0, 3.0)])
def test_the_loss_is_the_papers(task, alpha, temperature):
    torch.manual_seed(0)
    z, v = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    targets = torch.tensor([0, 2, 1, 1, 0])
    student, teacher = Fixed(z), Fixed(v)
    loss = Distillation(teacher, temperature, alpha).loss(student, torch.zeros(5, 1, 8, 8), targets, task)
    p, q = (v / temperature).softmax(-1), (z / temperature).softmax(-1)
    divergence = sum(float(p[i, j] * (p[i, j] / q[i, j]).log()) for i in range(5) for j in range(3)) / 5
    labels = -sum(float(z[i].log_softmax(-1)[t]) for i, t in enumerate(targets)) / 5
    assert float(loss.detach()) == pytest.approx(alpha * temperature**2 * divergence + (1 - alpha) * labels)
    loss.backward()
    assert student.answers.grad is not None
    assert teacher.answers.grad is None


def test_without_labels_the_teacher_alone_counts(task):
    torch.manual_seed(0)
    student, teacher = (Fixed(torch.randn(4, 3)).requires_grad_(False) for _ in range(2))
    x = torch.zeros(4, 1, 8, 8)
    unlabelled = Distillation(teacher, alpha=0.2).loss(student, x, None, task)
    assert float(unlabelled) == pytest.approx(float(Distillation(teacher, alpha=1.0).loss(student, x, None, task)))


def test_a_student_learns_a_teacher_without_labels(task, network):
    teacher = network(3)
    fit(teacher, task, epochs=6, batch=16, lr=5e-3)
    teacher.train()
    before = {n: v.clone() for n, v in teacher.state_dict().items()}
    blind = task.with_splits(**{s: replace(getattr(task, s), labels=None) for s in ("fit", "choose", "report")})
    student = network(8)
    result = fit(student, blind, method=Distillation(teacher), epochs=6, batch=16, lr=5e-3)
    assert evaluate(student, task, task.report).value > 80
    assert result.history[-1]["quality"] > 80  # agreement with the teacher
    assert teacher.training
    assert all(torch.equal(v, before[n]) for n, v in teacher.state_dict().items())


def test_what_distillation_refuses(task, network):
    model = network()
    for method, sentence in (
        (Distillation(), "needs a teacher"),
        (Distillation(model), "the model itself"),
        (Distillation(network(classes=4)), "same classes"),
        (Distillation(nn.Sequential(nn.Flatten(), nn.Linear(9, 3))), "does not take inputs"),
    ):
        with pytest.raises(LissomError, match=sentence):
            fit(model, task, method=method, epochs=1)
    for settings in ({"alpha": 1.5}, {"alpha": -0.1}, {"temperature": 0.0}):
        with pytest.raises(LissomError, match=next(iter(settings))):
            Distillation(model, **settings)


def test_another_teacher_is_another_setting(task, network, tmp_path):
    fit(network(), task, method=Distillation(network(1)), epochs=1, folder=tmp_path)
    fit(network(), task, method=Distillation(network(1)), epochs=1, folder=tmp_path, resume=True)
    with pytest.raises(LissomError, match="was trained with method "):
        fit(network(), task, method=Distillation(network(2)), epochs=1, folder=tmp_path, resume=True)
