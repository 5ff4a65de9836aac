"""complexity: hand counts; fit_time: lines it must find, the relative error it minimises, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.meters.activations import (
    FIGURES,
    Complexity,
    TimeModel,
    complexity,
    correlations,
    fit_time,
    left_out,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.grouped = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.bn(self.conv(x)).relu())
        x = self.grouped(self.grouped(x))
        return self.head(self.up(x).mean((2, 3)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_layer_counts_as_the_paper_counts_it(device: str) -> None:
    with torch.device(device):
        model = Net()
    model.bn.eval()
    found = complexity(model, (3, 16, 12))
    conv = 8 * 8 * 6  # elements of its output
    pooled = 8 * 4 * 3
    risen = 4 * 8 * 6
    assert found.activations == conv + pooled + 2 * pooled + risen + 5
    macs = conv * 27 + pooled * 4 + 2 * pooled * (2 * 3 + 1) + pooled * 4 * 4 + 5 * (4 + 1)
    assert found.macs == macs
    assert found.params == 8 * 27 + 16 + 8 * 6 + 8 + 8 * 4 * 4 + 25
    assert model.training
    assert not model.bn.training  # modes are as they were, module by module
    assert not any(module._forward_hooks for module in model.modules())


def test_an_input_that_does_not_fit_is_told() -> None:
    model = Net()
    with pytest.raises(LissomError, match=r"does not run on an input of shape \(1, 4, 16, 16\)"):
        complexity(model, (4, 16, 16))
    assert not any(module._forward_hooks for module in model.modules())


def network(activations: int, macs: int = 7, params: int = 3) -> Complexity:
    return Complexity(macs, params, activations)


def test_a_line_is_found() -> None:
    costs = [network(n) for n in (10, 40, 90, 1000)]
    found = fit_time(costs, [2 + 0.5 * cost.activations for cost in costs])
    assert (found.intercept, found.slope) == (pytest.approx(2), pytest.approx(0.5))
    assert found.predict(network(7)) == pytest.approx(5.5)


def test_the_relative_error_is_what_is_least() -> None:
    costs = [network(n) for n in (10, 20, 300, 4000)]
    times = [3.0, 2.5, 40.0, 300.0]
    found = fit_time(costs, times)

    def error(model: TimeModel) -> float:
        return sum((model.predict(cost) / time - 1) ** 2 for cost, time in zip(costs, times, strict=True))

    for intercept, slope in ((1.02, 1.0), (0.98, 1.0), (1.0, 1.02), (1.0, 0.98), (1.05, 0.97)):
        assert error(found) <= error(TimeModel(found.by, found.intercept * intercept, found.slope * slope))


def test_neither_number_is_negative() -> None:
    costs = [network(n) for n in (10, 20, 40)]
    assert fit_time(costs, [1.0, 5.0, 13.0]).intercept == 0  # the best line would begin below 0
    falling = fit_time(costs, [13.0, 5.0, 1.0])
    assert falling.slope == 0
    assert falling.intercept > 0


def test_what_is_left_out_is_predicted_by_the_others_alone() -> None:
    costs = [network(n) for n in (10, 20, 40, 80)]
    times = [1.0, 2.0, 4.0, 100.0]
    assert left_out(costs, times)[3] == pytest.approx(8.0)  # its own time is not seen
    with pytest.raises(LissomError, match="leave one out"):
        left_out(costs[:3], times[:3])


def test_correlations_of_each_figure() -> None:
    costs = [Complexity(macs, params, n) for n, macs, params in ((1, 9, 4), (2, 7, 4), (4, 5, 3), (9, 4, 2))]
    times = [cost.activations**2 * 1.0 for cost in costs]
    by = {name: correlations(costs, times, name) for name in FIGURES}
    assert by["activations"]["rank"] == pytest.approx(1)
    assert by["activations"]["log"] == pytest.approx(1)
    assert by["activations"]["pearson"] < 1
    assert by["macs"]["rank"] == pytest.approx(-1)
    assert by["params"]["pearson"] == pytest.approx(np.corrcoef([4, 4, 3, 2], times)[0, 1])


def test_what_cannot_be_fitted_is_refused() -> None:
    costs = [network(n) for n in (10, 20, 40)]
    for arguments, reason in (
        ((costs[:2], [1.0, 2.0]), "too few"),
        ((costs, [1.0, 2.0]), "one time a network"),
        ((costs, [1.0, 0.0, 2.0]), "positive"),
        ((costs, [1.0, float("nan"), 2.0]), "positive"),
        ((costs, [1.0, 2.0, 3.0], "macs"), "same macs"),
        ((costs, [1.0, 2.0, 3.0], "flops"), "known: activations"),
    ):
        with pytest.raises(LissomError, match=reason):
            fit_time(*arguments)
    with pytest.raises(LissomError, match="same time"):
        correlations(costs, [1.0, 1.0, 1.0])


def test_ratios_of_two_networks() -> None:
    assert Complexity(8, 6, 4).over(Complexity(2, 3, 8)) == {"macs": 4.0, "params": 2.0, "activations": 0.5}
