"""The proof of DepS: costs and steps, one budget for all, a quick run, and one that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lissom.layers.elastic import largest, smallest
from lissom.meters.costs import total
from lissom.models.ofa import OFAMobileNetV3
from lissom.proofs import deps
from lissom.proofs.base import run_proof
from lissom.training.methods.delayed_shrinking import DelayedShrinking, Sandwich
from lissom.training.methods.supervised import Supervised


def a_network() -> OFAMobileNetV3:
    torch.manual_seed(0)
    return deps._maker(deps.QUICK, 10)()


def test_costs_are_those_of_the_networks() -> None:
    network = a_network().eval()
    costs = deps.costs_of(network, (3, 8, 8), draws=4)
    assert costs.whole == total(network.extract(largest(network)), (3, 8, 8))[1]
    assert costs.smallest == total(network.extract(smallest(network)), (3, 8, 8))[1]
    assert costs.smallest < costs.random < costs.whole
    assert costs.sandwich == pytest.approx(1 + (costs.smallest + 2 * costs.random) / costs.whole)
    each = [macs for _, macs in costs.stages]
    assert each == sorted(each, reverse=True)  # what is opened is smaller
    assert [stage.count for stage, _ in costs.stages] == [1, 2, 2, 4]


def test_every_arm_spends_one_budget() -> None:
    costs = deps.Costs(100, 20, 50, deps.costs_of(a_network().eval(), (3, 8, 8), draws=1).stages)
    assert costs.sandwich == pytest.approx(2.2)
    assert deps.steps_of(Supervised(), 1000, costs) == 1000
    assert deps.steps_of(Sandwich(), 1000, costs) == int(1000 / 2.2)
    assert deps.steps_of(DelayedShrinking(), 1000, costs) == int(1000 / 1.6)
    assert deps.steps_of(DelayedShrinking(start=1.0), 1000, costs) == 1000
    real = deps.costs_of(a_network().eval(), (3, 8, 8), draws=4)
    spent = sum(steps * real.stage(i) for i, steps in enumerate(deps._stage_steps(500, real)))
    assert 500 - sum(real.stage(i) for i in range(len(real.stages))) <= spent <= 500


def test_the_network_of_the_full_run_is_of_the_planned_size() -> None:
    with torch.device("meta"):
        network: nn.Module = deps._maker(deps.CIFAR, 10)()
    assert 60_000 < sum(p.numel() for p in network.parameters()) < 140_000


@pytest.mark.full
def test_quick(tmp_path: Path) -> None:
    said: list[str] = []
    result = run_proof("deps", quick=True, seeds=1, folder=tmp_path, progress=said.append)
    arms = list(dict.fromkeys(row.name for row in result.rows))
    assert len(arms) == 7
    assert len(result.rows) == 21
    assert len(result.claims) == 7
    costs = {row.name: row.cost["GMACs of training"] for row in result.rows}
    assert costs["(c) DepS"] == costs["(b) once-for-all"] == costs["(a) sandwich"]
    assert costs["(c) at 1/1.5 of the cost"] == pytest.approx(costs["(c) DepS"] / 1.5)
    assert all(0 <= value <= 100 for row in result.rows for value in row.values)
    assert len(said) == 7
    again = run_proof("deps", quick=True, seeds=1, folder=tmp_path)
    assert again.seconds < result.seconds
    assert [row.values for row in again.rows] == [row.values for row in result.rows]
    assert str(result).count("sub-networks") > 3
