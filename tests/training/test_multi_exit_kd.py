"""multi_exit_kd: the published sums, who teaches whom, and training of networks that answer several times."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError
from lissom.layers.exits import Exits, attach_exits, attach_own_exits
from lissom.tasks.task import Task
from lissom.training.loop import fit
from lissom.training.methods.distillation import Distillation
from lissom.training.methods.multi_exit_kd import MultiExitKD, OwnExits, kd_term, multi_exit_loss
from lissom.training.methods.recovery import Answers, Recovery
from lissom.training.methods.supervised import Supervised
from tests.models.tiny_perceiver import SHAPE, patterns, tiny

NAMES = ("y_early3", "y_att", "y_cnn", "y_merge")


def made(count: int = 256) -> Task:
    splits = {name: ArraySplit(name, *patterns(count, seed)) for name, seed in (("fit", 1), ("choose", 2))}
    return Task(**splits, report=splits["choose"], shape=SHAPE, classes=tuple("abcd"), name="patterns")


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_published_loss() -> None:
    folder = os.environ.get("LISSOM_PARITY")
    if folder is None:
        pytest.skip("set LISSOM_PARITY to the folder of published figures")
    cases = json.loads((Path(folder) / "dyn_perceiver" / "cases.json").read_text())["loss"]
    assert cases
    for case in cases:
        answers = [torch.tensor(case[name]) for name in NAMES]
        att, maps, merged = (case[f"loss_{name}_factor"] for name in ("att", "cnn", "merge"))
        t, alpha = case["T_kd"], case["alpha_kd"]
        loss = multi_exit_loss(answers, torch.tensor(case["target"]), made(8), (att, att, maps, merged), alpha, t)
        assert float(loss) == pytest.approx(case["total"], rel=1e-5)
        assert float(kd_term(answers[:-1], answers[-1], t)) == pytest.approx(case["kd_term"], rel=1e-5)


def test_the_last_answer_learns_from_labels_alone() -> None:
    y, task = torch.tensor([0, 2, 1]), made(8)
    for alpha in (0.0, 0.5, 3.0):
        answers = [logits(3, 4, seed=s).requires_grad_() for s in range(4)]
        multi_exit_loss(answers, y, task, (0.5, 0.5, 1.0, 1.0), alpha, 2.0).backward()
        own = answers[-1].detach().requires_grad_()
        functional.cross_entropy(own, y).backward()
        torch.testing.assert_close(answers[-1].grad, own.grad)
        early = answers[0].detach().requires_grad_()
        (0.5 * functional.cross_entropy(early, y)).backward()
        assert torch.allclose(answers[0].grad, early.grad) == (alpha == 0)


def test_gradients_of_the_whole() -> None:
    y, task = torch.tensor([0, 2, 1]), made(8)
    last = logits(3, 4, seed=9)  # taken as given: the loss stops its gradient in the distilled part

    def loss(*early: torch.Tensor) -> torch.Tensor:
        return multi_exit_loss([*early, last], y, task, (0.5, 0.5, 1.0), 0.7, 3.0)

    assert torch.autograd.gradcheck(loss, tuple(logits(3, 4, seed=s).requires_grad_() for s in range(2)))


def test_it_trains_a_dyn_perceiver() -> None:
    task, model = made(), tiny()
    result = fit(model, task, method=MultiExitKD(), epochs=3, batch=32, lr=4e-3, augment=False)
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < 0.8 * losses[0]
    assert result.history[-1]["quality"] > 40  # of four classes; the merged answer's


def test_by_name_it_is_dyn_perceivers() -> None:
    method = MultiExitKD()
    assert (method.weights, method.alpha, method.temperature) == ((0.5, 0.5, 1.0, 1.0), 0.5, 1.0)
    x, y = (torch.from_numpy(a) for a in patterns(8, 0))
    model, task = tiny().eval(), made(8)
    want = multi_exit_loss(tuple(model.answers(x)), y, task, method.weights)
    for m in model.modules():
        m.training = not isinstance(m, nn.modules.batchnorm._BatchNorm)
    torch.testing.assert_close(method.loss(model, x, y, task), want)


def test_it_trains_exits_that_were_hung_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    attach_exits(model, Exits(["0"], [head], detached=False))
    x, y = (torch.from_numpy(a) for a in patterns(8, 0))
    MultiExitKD(weights=(0.5, 1.0)).loss(model.train(), x, y, made(8)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_refused() -> None:
    task, x = made(8), torch.zeros(2, *SHAPE)
    with pytest.raises(LissomError, match="4 answers in training and there are 2 weights"):
        MultiExitKD(weights=(0.5, 1.0)).loss(tiny().train(), x, torch.zeros(2).long(), task)
    with pytest.raises(LissomError, match="needs labels"):
        MultiExitKD().loss(tiny().train(), x, None, task)
    unlabelled = task.with_splits(fit=ArraySplit("fit", patterns(8, 0)[0], None))
    with pytest.raises(LissomError, match="needs labels"):
        MultiExitKD().prepare(tiny(), unlabelled)
    for settings, sentence in (
        ({"alpha": -1}, "alpha is -1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"weights": ()}, "weights are"),
        ({"weights": (1.0, 0.0)}, "the last answer's is above"),
    ):
        with pytest.raises(LissomError, match=sentence):
            MultiExitKD(**settings)


def test_other_methods_train_every_answer() -> None:
    x, y = (torch.from_numpy(a) for a in patterns(8, 0))
    task, model, teacher = made(8), tiny().train(), tiny(1)
    supervised = Supervised().loss(model, x, y, task)
    torch.testing.assert_close(supervised, torch.stack([functional.cross_entropy(a, y) for a in model(x)]).mean())
    supervised.backward()
    assert all(p.grad is not None for p in model.parameters())
    method = Distillation(teacher, alpha=1.0)
    method.prepare(model, task)
    assert float(method.loss(model, x, None, task).detach()) > 0
    assert float(Distillation(teacher, alpha=1.0).loss(_Copy(teacher), x, None, task)) == pytest.approx(0, abs=1e-5)


class _Copy(nn.Module):
    """Answers several times, each time as the teacher does."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.teacher(x), self.teacher(x))


def test_recovering_with_own_exits_is_the_sum() -> None:
    x, y = (torch.from_numpy(a) for a in patterns(8, 0))
    task, original, model = made(8), tiny(1).eval(), attach_own_exits(tiny().eval())
    term = OwnExits(weight=0.3, alpha=0.7, temperature=2.0)
    loss = Recovery(original, (Answers(), term)).loss(model, x, y, task)
    *early, last = model(x)
    given = original(x).detach()
    want = Answers().loss(model, _seen(last), _seen(given), y, task)
    for answer in early:
        want = want + 0.3 * functional.cross_entropy(answer, y)
        p = (given / 2).softmax(1)
        want = want + 0.7 * 4 * (p * (p.log() - (answer / 2).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(loss, want)
    plain = Recovery(original, (OwnExits(),))
    with pytest.raises(LissomError, match="the model answers once"):
        plain.loss(tiny().eval(), x, y, task)
    alone = float(Recovery(original, (term,)).loss(model, x, None, task).detach())
    assert np.isfinite(alone)


def _seen(answer: torch.Tensor):
    from lissom.training.methods.recovery import Seen

    return Seen((answer,), {})
