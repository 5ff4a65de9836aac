"""within_budget: the largest networks that a device of known speed allows, and what it says where none fits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import nn

import lissom
from lissom.errors import LissomError
from lissom.meters.activations import complexity
from lissom.techniques.scaling_budget import within_budget

ALPHAS = (1 / 3, 1.0)


class Device:
    """A device whose time is a line of a network's activations (or another count), and nothing else."""

    def __init__(self, by: str = "activations", slope: float = 1e-5, intercept: float = 0.5) -> None:
        self.by, self.slope, self.intercept = by, slope, intercept
        self.asked: list[int] = []

    def __call__(self, networks: Sequence[nn.Module], shapes: Sequence[tuple[int, int, int]]) -> list[float]:
        self.asked.append(len(networks))
        costs = [complexity(network, shape) for network, shape in zip(networks, shapes, strict=True)]
        return [self.intercept + self.slope * getattr(cost, self.by) for cost in costs]


@pytest.mark.full
@pytest.mark.parametrize("by", ["activations", "macs"])
def test_the_budget_is_used_and_kept(by: str) -> None:
    device = Device(by, slope=1e-7 if by == "activations" else 1e-9)
    # Of small images the last maps have so few places that one more is half as much again, and a budget is left unused.
    cost = lissom.scale("regnetx_002", 1).cost_before
    budget = device.intercept + 2 * device.slope * getattr(cost, by)
    found = within_budget("regnetx_002", budget, alphas=ALPHAS, factors=(0.25, 0.5), measure=device)
    assert {one.alpha for one in found} == set(ALPHAS)
    for one in found:
        assert one.fits
        assert one.measured_ms == pytest.approx(one.predicted_ms, rel=1e-6)
        assert device.intercept + 1.4 * device.slope * getattr(cost, by) < one.measured_ms <= budget
    assert found[0].scaled.cost_after.macs >= found[1].scaled.cost_after.macs
    if by == "activations":  # then width, which costs the fewest, buys the most multiply-adds
        assert found[0].alpha == 1.0
    assert device.asked[-2] <= 4
    assert device.asked[-1] == 2


@pytest.mark.full
def test_the_measured_time_decides() -> None:
    """A device that slows down once it has been asked: predictions are too low, and nothing is said to fit."""
    device = Device()

    def slow(networks: Sequence[nn.Module], shapes: Sequence[tuple[int, int, int]]) -> list[float]:
        factor = 3.0 if device.asked else 1.0
        return [factor * ms for ms in device(networks, shapes)]

    found = within_budget("regnetx_002", 1.5, alphas=ALPHAS, factors=(0.25, 0.5), image_size=32, measure=slow)
    assert not any(one.fits for one in found)
    assert all(one.measured_ms > one.predicted_ms for one in found)


def test_what_cannot_be_is_refused() -> None:
    device = Device(intercept=5.0)
    with pytest.raises(LissomError, match="no scaled regnetx_002 is predicted to answer within 1 ms"):
        within_budget("regnetx_002", 1.0, alphas=ALPHAS, factors=(0.25, 0.5), image_size=32, measure=device)
    with pytest.raises(LissomError, match="greater than 0"):
        within_budget("regnetx_002", 0.0)
    with pytest.raises(LissomError, match="at least one alpha"):
        within_budget("regnetx_002", 1.0, alphas=())
    with pytest.raises(LissomError, match="more factors or alphas"):
        within_budget("regnetx_002", 9.0, alphas=(1.0,), factors=(0.5,), image_size=32, measure=device)


@pytest.mark.full
def test_the_processor_is_asked() -> None:
    settings = {"alphas": (1.0,), "factors": (0.02, 0.05, 0.1, 0.2), "image_size": 32, "num_classes": 3}
    found = within_budget("regnetx_002", 20.0, threads=1, seconds=0.1, **settings)
    assert found[0].measured_ms > 0
    assert found[0].scaled.cost_after.macs > 0
