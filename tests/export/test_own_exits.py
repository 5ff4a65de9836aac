"""A network's own exits: opened, cut, and fitted by the mechanism that hung ones go through; on a tiny Dyn-Perceiver,
whose boundaries are several tensors, and on a network of a user's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import NotApplicable
from lissom.export.cuts import own_exit_costs
from lissom.export.exits import fit_exits
from lissom.export.exporting import export_plan, run_stages
from lissom.export.joint import JointOutputs
from lissom.export.openvino import joint_graph
from lissom.export.openvino_cut import cut_graph
from lissom.export.plan import Plan
from lissom.layers.exits import OwnExit, attach_own_exits, exits_of, own_exits, remove_exits
from lissom.meters.costs import total
from lissom.models.dyn_perceiver import DynPerceiver
from lissom.runtime.predictor import load
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.early_exit import EarlyExit
from lissom.techniques.int8 import Int8
from lissom.techniques.low_rank import LowRank
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer
from lissom.training.methods.multi_exit_kd import OwnExits
from tests.export.cutting import Compiled, differences
from tests.models.tiny_perceiver import SHAPE, patterns, tiny, trained

TARGET = Target("openvino", "cpu", 4, 1)
CONFIG = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
EXITS = ("heads.early", "heads.late", "heads.maps")


def task(choose: int = 600) -> Task:
    parts = {
        name: ArraySplit(name, *patterns(n, seed)) for name, n, seed in (("fit", 64, 900), ("choose", choose, 901))
    }
    return Task(**parts, report=parts["choose"], shape=SHAPE, classes=tuple("abcd"), name="patterns")


@pytest.fixture(scope="module")
def model() -> DynPerceiver:
    return trained()


@pytest.fixture(scope="module")
def plan(model: DynPerceiver) -> Plan:
    return EarlyExit(risk=5.0).apply(Plan.of(model, SHAPE), task())


def test_the_plan_answers_as_the_network_does_at_its_exits(model: DynPerceiver, plan: Plan) -> None:
    assert exits_of(model) is None
    x = torch.from_numpy(patterns(5, 7)[0])
    with torch.no_grad():
        found = plan.model(x)
        assert torch.equal(found[-1], model(x))
        for exit in (1, 2, 3):
            assert torch.equal(found[exit - 1], model(x, exit=exit))
    assert [e.at for e in plan.decisions] == list(EXITS)
    assert [e.boundary for e in plan.decisions] == [e.carries for e in own_exits(model)]
    assert plan.recovery == ()
    assert "early_exit at its own heads.early" in plan.notes[-1]


def test_costs_are_those_of_what_an_exit_runs(model: DynPerceiver, plan: Plan) -> None:
    class At(nn.Module):
        def __init__(self, exit: int) -> None:
            super().__init__()
            self.model, self.exit = model, exit

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x, exit=self.exit)

    whole = total(model, SHAPE)[1]
    # The analysis of cuts leaves out products of two activations, of which attention has a few.
    for number, exit in enumerate(plan.decisions):
        assert exit.cost == pytest.approx(total(At(number + 1), SHAPE)[1] / whole, rel=0.05)
    assert [e.heads for e in plan.decisions[:2]] == [0.0, 0.0]  # the merged answer needs both of them
    assert plan.decisions[2].heads == pytest.approx(24 * 4 / whole, rel=0.05)


def test_some_of_the_exits_by_number_or_by_path(model: DynPerceiver) -> None:
    base, of = Plan.of(model, SHAPE), task()
    for at, chosen in ((None, [0, 1, 2]), (("*",), [0, 1, 2]), ((3, 1), [0, 2]), (("heads.late",), [1])):
        assert EarlyExit(at=at)._chosen(EXITS) == chosen
    for wrong in (0, 4, "stages.1"):
        with pytest.raises(NotApplicable, match=r"no exit of its own .*; it has 1 \(heads\.early\), 2"):
            EarlyExit(at=(wrong,)).apply(base, of)
    space = EarlyExit.space(base, TARGET)
    assert len(space["at"]) == 7
    assert ("heads.early", "heads.maps") in space["at"]


@pytest.mark.parametrize("quantised", [False, pytest.param(True, marks=pytest.mark.full)])
def test_cut_equals_joint(model: DynPerceiver, plan: Plan, quantised: bool) -> None:
    """In float32 with all exits; in int8 with two of them, first with the quantisers computed as written, then by
    OpenVINO's int8 kernels. Those choose number formats by all that reads a tensor, which a cut changes, so that they
    may round otherwise."""
    inputs = patterns(8, 3)[0]
    if quantised:
        plan = EarlyExit(at=(3, 1)).apply(Plan.of(model, SHAPE), task())
        assert [e.at for e in plan.decisions] == ["heads.early", "heads.maps"]
        plan = Int8(model_type="plain", linear="matmul", products=8).apply(plan, None)  # type: ignore[arg-type]
    graph, _ = joint_graph(plan, TARGET, SHAPE, inputs)
    assert ("FakeQuantize" in {op.get_type_name() for op in graph.get_ops()}) == quantised
    outputs = JointOutputs.of(plan.decisions)
    cut = cut_graph(graph, outputs)
    assert [len(stage.inputs) for stage in cut] == [1, *(len(e.boundary) for e in plan.decisions)]
    for kernels in (False, True) if quantised else (True,):
        config = {**CONFIG, "LP_TRANSFORMS_MODE": kernels}
        tolerance = 0.05 if quantised and kernels else 0.0
        joint, *stages = (Compiled(g, config) for g in (graph, *cut))
        for x in (inputs[:4], inputs[4:]):
            assert max(differences(joint, stages, outputs, x)) <= tolerance


@pytest.fixture(scope="module")
def staged(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "artifact"
    export_plan(plan, TARGET, path, shape=SHAPE, verify=patterns(8, 4)[0], classes=list("abcd"))
    return path


def test_the_artifacts_stages_answer_as_the_network_stops(model: DynPerceiver, staged: Path) -> None:
    artifact = load(staged).artifact
    assert artifact.plan["verification"]["relative_error"] < 1e-4
    inputs = patterns(10, 5)[0]
    answers, scores = run_stages(artifact, inputs, 1)
    with torch.no_grad():
        for number, answer in enumerate(answers):
            want = model(torch.from_numpy(inputs), exit=number + 1)
            np.testing.assert_allclose(answer, want.numpy(), atol=1e-4)
            if number < 3:
                np.testing.assert_allclose(scores[:, number], want.softmax(-1).amax(-1).numpy(), atol=1e-5)


def test_thresholds_are_fitted_on_the_artifacts_own_scores(plan: Plan, staged: Path) -> None:
    artifact, of = load(staged).artifact, task(1200)
    inputs, labels = of.choose.inputs(slice(0, 1200)), of.choose.labels
    answers, scores = run_stages(artifact, inputs, 1)
    right = [(answer.argmax(-1) == labels).mean() for answer in answers]
    assert min(right) > 0.6  # or there is nothing to leave by
    fitted, chosen, calibration = fit_exits(
        artifact, plan.decisions, answers, scores, lambda a: of.scores(a, labels), seed=0
    )
    assert sum(calibration.shares[:-1]) > 0.1
    assert [d["at"] for d in fitted.plan["decisions"]] == list(EXITS)
    got, left = load(staged).answer(inputs)
    np.testing.assert_array_equal(got, chosen)
    np.testing.assert_allclose(np.bincount(left, minlength=4) / len(left), calibration.shares)
    assert right[-1] - (got.argmax(-1) == labels).mean() <= 0.05
    predictor = load(staged)
    assert predictor.place(0) == "left at exit 1 of 3, after heads.early"


@pytest.mark.full
def test_alone_it_trains_nothing_and_beside_a_training_the_exits_learn(model: DynPerceiver, tmp_path: Path) -> None:
    base, of = Plan.of(model, SHAPE), task()
    recoverer = Recoverer(base, of, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
    alone = Recipe((EarlyExit(),))
    plan = alone.apply(base, of, TARGET)
    assert recoverer.recover(alone, plan) is plan
    both = Recipe((LowRank(ratio=2.0), EarlyExit(at=(1,))))
    changed = both.apply(base, of, TARGET)
    assert any(isinstance(term, OwnExits) for term in changed.recovery)
    found = recoverer.recover(both, changed)
    before, after = changed.model.state_dict(), found.model.state_dict()
    assert not torch.equal(before["heads.early.bias"], after["heads.early.bias"])
    x = torch.from_numpy(patterns(3, 6)[0])
    with torch.no_grad():
        assert len(found.model(x)) == 2


class Branches(nn.Module):
    """A network of a user's: a map and a token go on side by side, and both exits say so, or ``lie``."""

    def __init__(self, lie: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.token, self.more = nn.Linear(6, 5), nn.Linear(5, 5)
        self.early, self.middle, self.last = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(11, 3)
        self.lie = lie

    def own_exits(self) -> list[OwnExit]:
        return [
            OwnExit("early", ("token",) if self.lie else ("first", "token")),
            OwnExit("middle", ("more", "second")),
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        z = self.token(x.mean((2, 3)))
        opened = exits_of(self)
        if opened is not None:
            self.early(z)
        x = self.second(x.relu())
        z = self.more(z.relu())
        if opened is not None:
            self.middle(z)
        return self.last(torch.cat((x.mean((2, 3)), z), 1))


def test_any_network_may_declare_its_exits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    inputs = np.random.default_rng(0).standard_normal((6, 3, 12, 12)).astype(np.float32)
    of = replace(task(), shape=(3, 12, 12))
    plan = EarlyExit().apply(Plan.of(model, (3, 12, 12)), of)
    assert [e.at for e in plan.decisions] == ["early", "middle"]
    artifact = export_plan(plan, TARGET, tmp_path / "a", shape=(3, 12, 12))
    answers, _ = run_stages(artifact, inputs, 1)
    with torch.no_grad():
        want = plan.model(torch.from_numpy(inputs))
        np.testing.assert_allclose(answers[-1], model(torch.from_numpy(inputs)).numpy(), atol=1e-5)
    for own, other in zip(answers, want, strict=True):
        np.testing.assert_allclose(own, other.numpy(), atol=1e-5)
    assert len(remove_exits(plan.model)(torch.from_numpy(inputs))) == 6


def test_an_exit_that_carries_too_little_is_refused() -> None:
    with pytest.raises(NotApplicable, match=r"cannot be cut at its exit 'early': a later answer is reached .* second"):
        EarlyExit().apply(Plan.of(Branches(lie=True).eval(), (3, 12, 12)), replace(task(), shape=(3, 12, 12)))
    model = attach_own_exits(tiny().eval())
    exits = own_exits(model)
    broken = (replace(exits[0], carries=("exchanges.2",)), *exits[1:])
    with pytest.raises(NotApplicable, match=r"carries 'exchanges\.2', which hands on 2 tensors"):
        own_exit_costs(model, SHAPE, broken)
    with pytest.raises(ValueError, match="attach_own_exits first"):
        own_exit_costs(remove_exits(model), SHAPE, exits)
