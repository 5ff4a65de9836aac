"""A recovery in phases: what each trains, how long it lasts, and that a killed one goes on as it would have."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.training.loop import FitEvent
from lissom.training.methods.recovery import Answers, Phase, Term
from lissom.training.phases import fit_phases


class Model(nn.Module):
    """A front and a classifier behind it."""

    def __init__(self, network) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.front = nn.Conv2d(1, 1, 3, padding=1)
        self.light = network(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.light(self.front(x))


@dataclass(frozen=True)
class Front(Term):
    """Trains the front by what the classifier's weights were when the phase began."""

    seen: list[torch.Tensor] = field(default_factory=list, repr=False, compare=False)

    def prepare(self, model, original, task):
        self.seen[:] = [model.light[6].weight.detach().clone()]

    def parameters(self, model):
        return model.front.parameters()

    def loss(self, model, student, teacher, targets, task):
        return (student.answer - student.answer.detach().roll(1, 0)).square().mean() * self.seen[0].square().mean()


def phases() -> tuple[Phase, ...]:
    return (
        Phase((Answers(part="6"),), of="light"),
        Phase((Front(),), length=2.0),
        Phase((Answers(part="light"),), length=0.5),
    )


def state(model: nn.Module) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((name, value.clone()) for name, value in model.state_dict().items())


def changed(before, after) -> set[str]:
    return {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}


SETTINGS = {"epochs": 2, "batch": 32, "augment": False}


def test_each_phase_trains_its_own_part_in_turn(task, network) -> None:
    model, original = Model(network), network(1)
    expected = ({"light.6"}, {"front"}, {"light.0", "light.1", "light.6"})
    for number, part in enumerate(expected):
        before = state(model)
        (result,) = fit_phases(model, task, phases()[number : number + 1], original=original, **SETTINGS)
        assert changed(before, state(model)) == part
        assert len(result.history) == (2, 4, 1)[number]
        assert not model.training


def test_lengths_and_limits(task, network, monkeypatch) -> None:
    told: list[FitEvent] = []
    results = fit_phases(
        Model(network), task, phases(), original=network(1), max_steps=5, progress=told.append,
        **{**SETTINGS, "epochs": 4},
    )  # fmt: skip
    # 160 samples are 5 steps an epoch of 32: steps end the phases before epochs do.
    assert [len(r.history) for r in results] == [1, 2, 1]
    assert [(e.epoch, e.epochs) for e in told] == [(1, 14), (5, 14), (6, 14), (13, 14)]
    given: list[float] = []
    monkeypatch.setattr("lissom.training.phases.fit", lambda *args, time_limit, **rest: given.append(time_limit))
    fit_phases(Model(network), task, phases(), original=network(1), time_limit=7.0, **SETTINGS)
    assert given == pytest.approx([2.0, 4.0, 1.0])  # all together have what was given


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 6, 7])  # in the first phase, in the second, behind it, behind the last
def test_resumed_is_uninterrupted(task, network, tmp_path, at) -> None:
    whole = Model(network)
    fit_phases(whole, task, phases(), original=network(1), folder=tmp_path / "whole", **SETTINGS)

    def stop(event: FitEvent) -> None:
        if event.epoch == at:
            raise Stop

    with pytest.raises(Stop):
        fit_phases(
            Model(network), task, phases(), original=network(1), folder=tmp_path / "killed", progress=stop, **SETTINGS
        )
    resumed, told = Model(network), []
    torch.manual_seed(99)
    fit_phases(
        resumed, task, phases(), original=network(1), folder=tmp_path / "killed", progress=told.append, **SETTINGS
    )
    assert [event.epoch for event in told] == list(range(at + 1, 8))
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_what_is_refused(task, network) -> None:
    with pytest.raises(LissomError, match="without phases"):
        fit_phases(Model(network), task, (), original=network(1), **SETTINGS)
    with pytest.raises(LissomError, match="'head', which the model lacks"):
        fit_phases(Model(network), task, (Phase((Answers(),), of="head"),), original=network(1), **SETTINGS)
    with pytest.raises(LissomError, match="length above 0"):
        Phase((Answers(),), length=0)
    with pytest.raises(LissomError, match="has terms"):
        Phase(())
