"""Kar2 and Kar3: the published steps, state that survives saving, weight decay, a training that is resumed."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from lissom.training.loop import evaluate, fit
from lissom.training.optimizers import Kar2, Kar3
from tests.models.families import fixture, needs_parity


def walk(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: list[list[float]]) -> list[list[float]]:
    found = []
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        found.append(parameter.tolist())
    return found


@needs_parity
def test_the_published_steps() -> None:
    for case in fixture("terminator", "cases")["kar3"]:
        parameter = nn.Parameter(torch.tensor(case["start"]))
        optimizer = Kar3([parameter], case["lr"], tuple(case["betas"]))
        for found, want in zip(
            walk(optimizer, parameter, case["grads"]), case["params_after_each_step"], strict=True
        ):  # fmt: skip
            assert found == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("make", [lambda p: Kar2(p, 0.1, 0.9), lambda p: Kar3(p, 0.1, (0.5, 0.9))])
def test_steps_by_hand(make) -> None:
    """Averages are those before the step, and a zero has no sign."""
    gradients = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double()
    gradients[3:6, 2] = 0
    parameter = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = make([parameter])
    betas = optimizer.param_groups[0]["betas"]
    value, averages = [0.0] * 5, [[0.0] * 5 for _ in betas]
    for gradient in gradients.tolist():
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            signs = [(v > 0) - (v < 0) for v in (g, *(average[i] for average in averages))]
            value[i] -= 0.1 * sum(signs)
            for beta, average in zip(betas, averages, strict=True):
                average[i] = beta * average[i] + (1 - beta) * g
        assert parameter.tolist() == pytest.approx(value)


def test_weight_decay_stands_apart_from_the_gradient() -> None:
    parameter = nn.Parameter(torch.tensor([2.0, -2.0]))
    optimizer = Kar3([parameter], 0.1, weight_decay=0.5)
    parameter.grad = torch.tensor([3.0, 0.0])
    optimizer.step()
    assert parameter.tolist() == pytest.approx([2 * 0.95 - 0.1, -2 * 0.95])


@pytest.mark.parametrize("kind", [Kar2, Kar3])
def test_saved_and_loaded_it_goes_on(kind: type[torch.optim.Optimizer]) -> None:
    gradients = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).tolist()
    whole = nn.Parameter(torch.ones(4))
    walk(kind([whole]), whole, gradients)
    first = nn.Parameter(torch.ones(4))
    optimizer = kind([first])
    walk(optimizer, first, gradients[:5])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = nn.Parameter(first.detach().clone())
    other = kind([second])
    other.load_state_dict(torch.load(file, weights_only=True))
    walk(other, second, gradients[5:])
    assert torch.equal(second, whole)


def test_a_closure_is_called_with_gradients() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = Kar2([parameter], 0.1)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = parameter.square().sum()
        value.backward()
        return value

    assert float(optimizer.step(loss).detach()) == 1
    assert parameter.tolist() == pytest.approx([0.9])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p: Kar3(p, lr=-1.0), "learning rate"),
        (lambda p: Kar3(p, betas=(0.5, 1.0)), "betas"),
        (lambda p: Kar2(p, beta=-0.1), "betas"),
        (lambda p: Kar2(p, weight_decay=-0.1), "weight_decay"),
    ],
)
def test_what_is_refused(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call([nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("name", ["kar2", "kar3"])
def test_fit_takes_them_by_name(task, network, tmp_path, name: str) -> None:
    whole = network()
    fit(whole, task, optimizer=name, epochs=4, batch=32, lr=5e-3, weight_decay=0.0)
    assert evaluate(whole, task, task.report).value > 80
    halves = network()
    settings = {"optimizer": name, "batch": 32, "lr": 5e-3, "weight_decay": 0.0, "folder": tmp_path}

    class Killed(Exception):
        pass

    def kill(event) -> None:
        if event.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        fit(halves, task, epochs=4, progress=kill, **settings)
    resumed = network()
    fit(resumed, task, epochs=4, resume=True, **settings)
    for own, want in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(own, want)
