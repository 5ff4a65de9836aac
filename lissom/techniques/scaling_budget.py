"""The largest network within a budget of milliseconds, the share of width chosen by measurement (arXiv 2103.06877).

Scaling rules say how to spend a factor of multiply-adds; how large a factor a device allows, it must be asked. A few
scaled networks are measured beside each other, a line from one of their counts to time is fitted
(``lissom.meters.activations``; the count that predicts the left-out networks best, which on hardware that waits for
memory is activations), and for every alpha the largest factor that the line places within the budget is built and
measured. The measured times decide, not the predicted ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lissom.errors import LissomError
from lissom.meters.activations import FIGURES, Complexity, TimeModel, complexity, fit_time, left_out
from lissom.models.factory import create_model
from lissom.models.stages import Stages, in_channels, with_stages
from lissom.techniques.scaling import Scaled, scale_config, scale_network, type_of_alpha

__all__ = ["ALPHAS", "Candidate", "within_budget"]

ALPHAS = (1 / 3, 0.6, 0.8, 1.0)  # the paper's new regime lies between the first and the last
FACTORS = (1.0, 2.0, 4.0)  # of the networks that are measured first
LARGEST = 256.0
STEPS = 24  # factors tried between one and its double; rounding makes fewer networks of them
Measure = Callable[[Sequence[nn.Module], Sequence[tuple[int, int, int]]], Sequence[float]]


@dataclass(frozen=True, eq=False)
class Candidate:
    """The largest network of one ``alpha``: what was predicted of it and what was measured, in ms a batch."""

    alpha: float
    scaled: Scaled
    predicted_ms: float
    measured_ms: float
    fits: bool


def within_budget(
    model: str,
    budget_ms: float,
    *,
    alphas: Sequence[float] = ALPHAS,
    factors: Sequence[float] = FACTORS,
    image_size: int | None = None,
    device: str = "cpu",
    runtime: str = "openvino",
    threads: int | None = None,
    batch: int = 1,
    seconds: float = 1.0,
    measure: Measure | None = None,
    **kwargs: Any,
) -> tuple[Candidate, ...]:
    """For each of ``alphas`` the network that ``model`` scaled becomes within ``budget_ms``, the most multiply-adds
    among those that fit first, then those that do not (the prediction was too low).

    ``factors`` are measured first, at every alpha; ``image_size`` and ``kwargs`` as in ``lissom.scale``. ``measure``
    takes networks and the shapes of their inputs to milliseconds; by default ``lissom.measure`` on ``device``, with
    ``runtime``, ``threads``, ``batch`` and ``seconds``.

    Which of them is the most accurate only training tells; the paper's choice at equal multiply-adds is alpha = 0.8.
    Raises LissomError where even the smallest network that the rules make does not fit.
    """
    if not budget_ms > 0:
        raise LissomError(f"the budget is {budget_ms} ms; it is greater than 0")
    if not alphas:
        raise LissomError("name at least one alpha")
    ask = measure or _measure(device, runtime, threads, batch, seconds)
    with torch.device("meta"):
        original = create_model(model, **kwargs)
    probes: dict[Stages, Scaled] = {}
    for alpha in alphas:
        for factor in factors:
            scaled = scale_network(model, factor, type_of_alpha(alpha), image_size=image_size, **kwargs)
            probes.setdefault(scaled.after, scaled)
    costs = [scaled.cost_after for scaled in probes.values()]
    times = _asked(ask, list(probes.values()))
    line = _line(costs, times)
    before = next(iter(probes.values())).before
    found = []
    for alpha in alphas:
        largest = _largest(original, before, alpha, line, budget_ms)
        if largest is not None:
            scaled = scale_network(model, largest, type_of_alpha(alpha), image_size=image_size, **kwargs)
            found.append((alpha, scaled, line.predict(scaled.cost_after)))
    if not found:
        least = min(times)
        raise LissomError(
            f"no scaled {model} is predicted to answer within {budget_ms:g} ms (the fastest one measured took "
            f"{least:.3g} ms); allow more time, smaller images or a smaller network"
        )
    measured = _asked(ask, [scaled for _, scaled, _ in found])
    candidates = [
        Candidate(alpha, scaled, predicted, ms, ms <= budget_ms)
        for (alpha, scaled, predicted), ms in zip(found, measured, strict=True)
    ]
    return tuple(sorted(candidates, key=lambda one: (not one.fits, -one.scaled.cost_after.macs)))


def _asked(ask: Measure, networks: Sequence[Scaled]) -> list[float]:
    shapes = [(in_channels(one.model), one.after.train_size, one.after.train_size) for one in networks]
    return [float(ms) for ms in ask([one.model.eval() for one in networks], shapes)]


def _measure(device: str, runtime: str, threads: int | None, batch: int, seconds: float) -> Measure:
    from lissom.meters.comparing import measure

    def ask(networks: Sequence[nn.Module], shapes: Sequence[tuple[int, int, int]]) -> list[float]:
        # Each says its own input size in its default_cfg.
        rows = measure(*networks, device=device, runtime=runtime, threads=threads, batch=batch, seconds=seconds).rows
        return [measurement.latency_ms for _, measurement in rows]

    return ask


def _line(costs: Sequence[Complexity], times: Sequence[float]) -> TimeModel:
    """From the count whose line predicts left-out networks with the least mean relative error."""
    errors: dict[str, float] = {}
    for figure in FIGURES:
        try:
            predicted = left_out(costs, times, figure)
        except LissomError:  # all of them, or all but one, have the same count
            continue
        errors[figure] = statistics.fmean(abs(p / ms - 1) for p, ms in zip(predicted, times, strict=True))
    if not errors:
        raise LissomError(f"{len(costs)} different networks are too few to predict a time; give more factors or alphas")
    return fit_time(costs, times, min(errors, key=lambda figure: errors[figure]))


def _largest(original: nn.Module, before: Stages, alpha: float, line: TimeModel, budget_ms: float) -> float | None:
    """A factor, at most ``LARGEST``, whose network is predicted to fit and whose double's is not; None where none fits.

    Costs do not grow steadily with the factor: widths and groups are rounded. So of the factors between the two all are
    tried, from the largest down.
    """
    kind = type_of_alpha(alpha)
    known: dict[Stages, bool] = {}

    def fits(factor: float) -> bool:
        after = scale_config(before, kind, factor)
        if after not in known:
            with torch.device("meta"):
                network = with_stages(original, after, check=False)
            shape = (in_channels(network), after.train_size, after.train_size)
            known[after] = line.predict(complexity(network, shape)) <= budget_ms
        return known[after]

    factor = 1.0
    if fits(factor):
        while factor < LARGEST and fits(2 * factor):
            factor *= 2
        if factor >= LARGEST:
            return LARGEST
    else:
        while not fits(factor):
            factor /= 2
            if factor < 1 / LARGEST:
                return None
    between = (factor * 2 ** (step / STEPS) for step in range(STEPS - 1, 0, -1))
    return next((one for one in between if fits(one)), factor)
