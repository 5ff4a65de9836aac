"""Densities: closed forms against their optimality conditions, SynFlow's conservation, and the published cases."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.training.densities import (
    closed_form,
    erk,
    filter_masks,
    grasp_scores,
    kept_masks,
    magnitude_masks,
    masked,
    masks_densities,
    residual_form,
    shuffled_masks,
    snip_scores,
    synflow_masks,
    synflow_scores,
    uniform,
    weighted_layers,
)

WEIGHTS = [1728.0, 36864.0, 73728.0, 147456.0, 294912.0, 589824.0, 589824.0]
MACS = [1769472.0, 37748736.0, 18874368.0, 37748736.0, 18874368.0, 37748736.0, 37748736.0]


@pytest.fixture(scope="module")
def cases() -> dict:
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set")
    return json.loads((Path(folder) / "precropping" / "cases.json").read_text())


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set")
    spec = importlib.util.spec_from_file_location("parity", Path(folder) / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The published cases


def test_one_budget(cases):
    for case in cases["one_budget"]:
        weights = case["weights_per_layer"]
        found = closed_form(weights, case["budget_fraction"] * sum(weights))
        assert found == pytest.approx(case["density"], abs=1e-8)
        assert float(np.dot(weights, found)) == pytest.approx(case["kept"], rel=1e-9)


def test_two_budgets(cases):
    for case in cases["two_budgets"]:
        weights, macs = case["weights_per_layer"], case["macs_per_layer"]
        found = closed_form(weights, case["param_fraction"] * sum(weights), macs, case["mac_fraction"] * sum(macs))
        assert found == pytest.approx(case["density"], abs=1e-5)
        assert float(np.log(found).sum()) == pytest.approx(case["objective_sum_log"], abs=1e-4)


def test_synflow(cases, parity):
    for case in cases["synflow"]:
        linears = []
        for i, shape in enumerate([(8, 6), (10, 8), (4, 10)]):
            linear = nn.Linear(shape[1], shape[0], bias=False)
            linear.weight.data = torch.as_tensor(parity.make_input(shape, f"pc0_{i}")).abs()
            linears.append(linear)
        net = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])
        scores, total = synflow_scores(net, (6,))
        assert total == pytest.approx(case["R"], rel=1e-6)
        assert [float(s.sum()) for s in scores.values()] == pytest.approx(case["layer_score_sums"], rel=1e-6)
        masks = kept_masks(scores, case["one_shot_density"])
        assert list(masks_densities(masks).values()) == pytest.approx(case["layer_density"])


# The closed forms


def test_a_budget_for_everything_keeps_everything():
    assert (closed_form(WEIGHTS, sum(WEIGHTS)) == 1).all()
    assert (closed_form(WEIGHTS, 2 * sum(WEIGHTS)) == 1).all()


def test_a_small_budget_keeps_equal_counts():
    found = closed_form(WEIGHTS, 700.0)
    assert np.array(WEIGHTS) * found == pytest.approx([100.0] * 7)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.7, 0.99])
def test_one_budget_is_met_and_optimal(share):
    a = np.array(WEIGHTS)
    p = closed_form(WEIGHTS, share * a.sum())
    assert float(a @ p) == pytest.approx(share * a.sum(), rel=1e-9)
    # KKT: p_l = 1 / (lambda a_l) where the layer is not full, and 1 <= 1 / (lambda a_l) where it is.
    part = p < 1 - 1e-12
    price = 1 / (p * a)[part].max()
    assert (p * a)[part] == pytest.approx(1 / price, rel=1e-9)
    assert (a[~part] * price <= 1 + 1e-9).all()
    # No feasible perturbation does better.
    rng = np.random.default_rng(0)
    for _ in range(200):
        other = np.clip(p * np.exp(0.05 * rng.standard_normal(7)), 1e-6, 1)
        other *= min(1.0, share * a.sum() / (a @ other))
        assert np.log(other).sum() <= np.log(p).sum() + 1e-12
    assert closed_form([7 * w for w in WEIGHTS], 7 * share * a.sum()) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(("share", "other"), [(0.3, 0.3), (0.1, 0.25), (0.5, 0.2), (0.05, 0.06)])
def test_two_budgets_are_met_and_optimal(share, other):
    a, b = np.array(WEIGHTS), np.array(MACS)
    p = closed_form(WEIGHTS, share * a.sum(), MACS, other * b.sum())
    used = np.array([a @ p / (share * a.sum()), b @ p / (other * b.sum())])
    assert (used <= 1 + 1e-9).all()
    assert used.max() == pytest.approx(1.0, abs=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(300):
        q = np.clip(p * np.exp(0.05 * rng.standard_normal(7)), 1e-9, 1)
        q *= min(1.0, share * a.sum() / (a @ q), other * b.sum() / (b @ q))
        assert np.log(q).sum() <= np.log(p).sum() + 1e-9


def test_a_slack_budget_changes_nothing():
    one = closed_form(WEIGHTS, 0.2 * sum(WEIGHTS))
    assert closed_form(WEIGHTS, 0.2 * sum(WEIGHTS), MACS, sum(MACS)) == pytest.approx(one)
    other = closed_form(MACS, 0.2 * sum(MACS))
    assert closed_form(WEIGHTS, sum(WEIGHTS), MACS, 0.2 * sum(MACS)) == pytest.approx(other)


def test_an_upper_bound_above_one_widens_cheap_layers():
    p = closed_form(WEIGHTS, 0.8 * sum(WEIGHTS), MACS, sum(MACS), upper=4.0)
    assert p.max() > 1
    assert p.max() <= 4
    assert float(np.dot(WEIGHTS, p)) <= 0.8 * sum(WEIGHTS) * (1 + 1e-9)
    assert float(np.dot(MACS, p)) <= sum(MACS) * (1 + 1e-9)


def test_fixed_layers_count_for_the_budget():
    p = closed_form(WEIGHTS, 0.5 * sum(WEIGHTS), fixed=(0, 5))
    assert (p[0], p[5]) == (1, 1)
    assert float(np.dot(WEIGHTS, p)) == pytest.approx(0.5 * sum(WEIGHTS))
    assert (closed_form([2.0, 3.0], 1.0, fixed=(0, 1)) == 1).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([1.0, -1.0], 1.0), "one positive number"),
        (([1.0, 2.0], 1.0, [1.0], 1.0), "one number of each"),
        (([1.0, 2.0], 1.0, [1.0, 1.0]), "go together"),
        (([1.0, 2.0], 0.0), "spent"),
    ],
)
def test_wrong_numbers_are_told(arguments, says):
    with pytest.raises(LissomError, match=says):
        closed_form(*arguments)
    with pytest.raises(LissomError, match="spent"):
        closed_form([1.0, 2.0], 1.0, fixed=(0,))


def test_the_expectation_depends_on_the_densities_alone():
    """E[R] = C prod p_l for masks of single weights and of whole filters: (1), by simulation."""
    rng = np.random.default_rng(0)
    shapes, p = [(8, 6), (10, 8), (4, 10)], (0.5, 0.3, 0.7)
    whole, single, rows = 0.0, 0.0, 0.0
    for _ in range(3000):
        weights = [np.abs(rng.standard_normal(s)) for s in shapes]
        whole += np.linalg.multi_dot([np.ones(4), weights[2], weights[1], weights[0], np.ones(6)])
        for filters in (False, True):
            masks = [rng.random((s[0], 1) if filters else s) < q for s, q in zip(shapes, p, strict=True)]
            left = [w * m for w, m in zip(weights, masks, strict=True)]
            value = np.linalg.multi_dot([np.ones(4), left[2], left[1], left[0], np.ones(6)])
            rows, single = (rows + value, single) if filters else (rows, single + value)
    assert single / whole == pytest.approx(0.5 * 0.3 * 0.7, rel=0.05)
    assert rows / whole == pytest.approx(0.5 * 0.3 * 0.7, rel=0.05)


def test_a_residual_networks_own_objective():
    a, blocks, strengths = [100.0, 400.0, 400.0, 800.0, 800.0, 50.0], [[1, 2], [3, 4]], [0.5, 2.0]

    def objective(p: np.ndarray) -> float:
        branches = [np.log1p(c * p[block].prod()) for c, block in zip(strengths, blocks, strict=True)]
        return float(np.log(p[0]) + np.log(p[5]) + sum(branches))

    budget = 0.2 * sum(a)
    found = residual_form(a, budget, blocks, strengths)
    assert float(np.dot(a, found)) <= budget * (1 + 1e-9)
    assert (found > 0).all()
    assert (found <= 1).all()
    assert objective(found) >= max(objective(closed_form(a, budget)), objective(uniform(a, budget))) - 1e-9
    assert (residual_form(a, sum(a), blocks, strengths) == 1).all()


def test_erk_and_uniform():
    shapes = [(64, 3, 3, 3), (64, 64, 3, 3), (10, 64)]
    sizes = [64 * 27, 64 * 64 * 9, 640]
    p = erk(shapes, 0.1 * sum(sizes))
    assert p[2] == 1  # it asks for more than all
    assert p[0] / p[1] == pytest.approx((73 / 1728) / (134 / 36864))
    assert float(np.dot(sizes, p)) == pytest.approx(0.1 * sum(sizes))
    assert (uniform(sizes, 0.3 * sum(sizes)) == 0.3).all()
    for budget in (-1.0, 0.0, math.nan):
        for call in (lambda b: uniform(sizes, b), lambda b: erk(shapes, b)):
            with pytest.raises(LissomError, match=rf"the budget is {budget}; it is above 0"):
                call(budget)


# Scores


class Small(nn.Module):
    """A chain with a norm and activations that are no ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(inplace=True), nn.Conv2d(6, 8, 3, bias=False), nn.GELU()
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


def test_synflow_conserves_its_sum_in_every_layer():
    torch.manual_seed(0)
    net = Small()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    scores, total = synflow_scores(net, (3, 8, 8))
    assert set(scores) == {"features.0", "features.3", "head"}
    assert [float(s.sum()) for s in scores.values()] == pytest.approx([total] * 3, rel=1e-9)
    again, same = synflow_scores(net, (3, 8, 8))
    assert same == total
    assert all(torch.equal(scores[p], again[p]) for p in scores)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training


def test_synflow_keeps_its_density_and_never_a_dead_layer():
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for n in (8, 16, 32) for layer in (nn.LazyLinear(n), nn.ReLU())], nn.LazyLinear(4))
    net(torch.zeros(1, 6))
    masks = synflow_masks(net, (6,), 0.05, steps=30)
    kept = sum(int(m.sum()) for m in masks.values())
    assert kept == round(0.05 * sum(m.numel() for m in masks.values()))
    assert all(m.any() for m in masks.values())
    fixed = synflow_masks(net, (6,), 0.2, steps=5, layers=["2", "4"])
    assert set(fixed) == {"2", "4"}
    with pytest.raises(LissomError, match="density"):
        synflow_masks(net, (6,), 0.0)
    with pytest.raises(LissomError, match="no convolution and no linear layer '9'"):
        synflow_masks(net, (6,), 0.5, layers=["9"])


def test_synflow_says_where_its_sum_overflows():
    deep = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).double()
    for layer in deep:
        layer.weight.data.fill_(1e100)
    with pytest.raises(LissomError, match="SynFlow's sum over all paths is inf"):
        synflow_scores(deep, (64,))


def test_snip_and_grasp_against_their_definitions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randint(0, 2, (16,))
    snip = snip_scores(net, x, y, functional.cross_entropy)
    weights = [net[0].weight, net[2].weight]
    gradients = torch.autograd.grad(functional.cross_entropy(net(x), y), weights)
    for score, weight, gradient in zip(snip.values(), weights, gradients, strict=True):
        assert torch.allclose(score, (weight * gradient).abs())
    found = grasp_scores(net, x, y, functional.cross_entropy)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        state = dict(zip(("0.weight", "2.weight"), values, strict=True))
        return functional.cross_entropy(torch.func.functional_call(net, state, (x,)), y)

    (_, product) = torch.autograd.functional.hvp(loss, tuple(weights), tuple(g.detach() for g in gradients))
    for score, weight, column in zip(found.values(), weights, product, strict=True):
        assert torch.allclose(score, -weight * column)
    lowest = kept_masks(found, 0.25, "lowest")
    flat, kept = (torch.cat([t.flatten() for t in d.values()]) for d in (found, lowest))
    assert float(flat[kept].max()) <= float(flat[~kept].min())


# Masks


def test_masks_of_the_same_densities():
    torch.manual_seed(0)
    net = Small()
    masks = magnitude_masks(net, 0.3)
    assert sum(int(m.sum()) for m in masks.values()) == round(0.3 * sum(m.numel() for m in masks.values()))
    shuffled = shuffled_masks(masks, 1)
    assert masks_densities(shuffled) == masks_densities(masks)
    assert any(not torch.equal(shuffled[p], masks[p]) for p in masks)
    filters = filter_masks(masks, 1)
    for path, mask in filters.items():
        rows = mask.flatten(1)
        assert (rows.all(1) | ~rows.any(1)).all()
        assert abs(float(mask.double().mean()) - masks_densities(masks)[path]) <= 1 / len(mask)


def test_a_masked_network_stays_masked_while_it_trains():
    torch.manual_seed(0)
    net = Small()
    masks = magnitude_masks(net, 0.3)
    masked(net, masks)
    optimiser = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        net(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimiser.step()
    for path, mask in masks.items():
        weight = net.get_submodule(path).weight
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).any()


def test_layers_by_name():
    assert list(weighted_layers(Small())) == ["features.0", "features.3", "head"]
    assert list(weighted_layers(Small(), ["head"])) == ["head"]
