"""Activations: what convolutions write, a better predictor of run time than multiplications (arXiv 2103.06877).

Section 3 of the paper: on hardware that waits for memory, run time follows the number of activations, that is of
elements in the outputs of all convolutions, more closely than multiply-adds or parameters. ``complexity`` counts the
three as the paper's code does, and ``fit_time`` relates any of them to measured times:

    time = intercept + slope * figure,    both at least 0, the sum of squares of (predicted / measured - 1) least.

The relative error is what a user of the prediction feels, and a fit of plain squares would see the largest networks
alone. ``left_out`` predicts every network from the others, which is the prediction's honest test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from lissom.errors import LissomError

__all__ = ["FIGURES", "Complexity", "TimeModel", "complexity", "correlations", "fit_time", "left_out"]

FIGURES = ("activations", "macs", "params")
LEAST = 3  # networks for a fit of two numbers that is not its own points


@dataclass(frozen=True)
class Complexity:
    """What one input costs a network: multiply-adds, parameters, activations (elements)."""

    macs: int
    params: int
    activations: int

    def over(self, other: Complexity) -> dict[str, float]:
        """How many times the figures of ``other`` these are, by name."""
        return {name: getattr(self, name) / getattr(other, name) for name in FIGURES}


def complexity(model: nn.Module, shape: Sequence[int]) -> Complexity:
    """What the layers of ``model`` cost on one input of ``shape`` (C, H, W), by the paper's counters.

    Convolutions (those of squeeze-and-excitation too) count k k C_in C_out H W / groups multiply-adds, one more an
    output where they have a bias, and C_out H W activations; linear layers the same at one place; max and average
    pools of a window k k C H W and C H W. Norms, activation functions and global pools count nothing, and neither does
    what no module of these kinds computes. A module that runs twice counts twice. Parameters are all of the model's.

    The model may lie on the meta device; it is left as it was. Raises LissomError where it does not run on such an
    input.
    """
    macs = activations = 0

    def count(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs, activations
        outputs = output[0].numel()  # of one input
        activations += outputs
        if isinstance(module, nn.Linear):
            macs += outputs * (module.in_features + (module.bias is not None))
        elif isinstance(module, _POOLS):
            window = module.kernel_size
            macs += outputs * (prod(window) if isinstance(window, tuple) else window ** (output.ndim - 2))
        elif isinstance(module, _TRANSPOSED):  # each input element meets one filter
            macs += inputs[0][0].numel() * prod(module.weight.shape[1:]) + outputs * (module.bias is not None)
        else:
            macs += outputs * (prod(module.weight.shape[1:]) + (module.bias is not None))

    reference = next(model.parameters(), torch.zeros(0))
    training = [module for module in model.modules() if module.training]
    with ExitStack() as handles, torch.no_grad():
        for module in model.modules():
            if isinstance(module, _COUNTED):
                handles.callback(module.register_forward_hook(count).remove)
        try:
            model.eval()(torch.zeros(1, *shape, device=reference.device, dtype=reference.dtype))
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise LissomError(f"the model does not run on an input of shape {(1, *shape)}: {first}") from error
        finally:
            for module in training:
                module.training = True
    return Complexity(macs, sum(p.numel() for p in model.parameters()), activations)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_COUNTED: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *_TRANSPOSED, *_POOLS)


@dataclass(frozen=True)
class TimeModel:
    """Milliseconds from one figure of a network: ``intercept + slope * figure``, on the device that was measured."""

    by: str
    intercept: float
    slope: float

    def predict(self, cost: Complexity) -> float:
        """Milliseconds."""
        return self.intercept + self.slope * getattr(cost, self.by)


def fit_time(costs: Sequence[Complexity], ms: Sequence[float], by: str = "activations") -> TimeModel:
    """The line that predicts measured times ``ms`` from the figure ``by`` of ``costs`` with the least relative error.

    Raises LissomError for fewer than three networks, times that are not positive, networks that are all of one
    figure, and a figure of another name than ``FIGURES``.
    """
    x, y = _figures(costs, by), _times(costs, ms)
    # Weighted by 1 / time, the residuals are relative errors; columns of like size keep the problem well posed.
    scale = x.max()
    best: tuple[float, float, float] | None = None
    for columns in ((1, 1), (1, 0), (0, 1)):  # both numbers, then each held at 0
        a = np.stack([columns[0] / y, columns[1] * x / scale / y], 1)
        intercept, slope = np.linalg.lstsq(a, np.ones_like(y), rcond=None)[0]
        if intercept < 0 or slope < 0:
            continue
        error = float(np.square(a @ [intercept, slope] - 1).sum())
        if best is None or error < best[0] - 1e-12:
            best = (error, float(intercept), float(slope / scale))
    assert best is not None  # a constant alone is never negative
    return TimeModel(by, best[1], best[2])


def left_out(costs: Sequence[Complexity], ms: Sequence[float], by: str = "activations") -> tuple[float, ...]:
    """Each network's time in ms as the others predict it; raises LissomError as ``fit_time``, for fewer than four."""
    if len(costs) <= LEAST:
        raise LissomError(f"{len(costs)} networks are too few to leave one out; {LEAST + 1} are needed")
    _times(costs, ms)
    return tuple(
        fit_time(
            [cost for j, cost in enumerate(costs) if j != i], [time for j, time in enumerate(ms) if j != i], by
        ).predict(costs[i])
        for i in range(len(costs))
    )


def correlations(costs: Sequence[Complexity], ms: Sequence[float], by: str = "activations") -> dict[str, float]:
    """How a figure goes with the measured times: Pearson's r, Pearson's r of the logarithms, Spearman's rank
    correlation, under the names ``pearson``, ``log`` and ``rank``. Raises LissomError as ``fit_time``."""
    from scipy import stats

    x, y = _figures(costs, by), _times(costs, ms)
    if np.ptp(y) == 0:
        raise LissomError("all networks took the same time; there is nothing to correlate")
    return {
        "pearson": float(stats.pearsonr(x, y).statistic),
        "log": float(stats.pearsonr(np.log(x), np.log(y)).statistic),
        "rank": float(stats.spearmanr(x, y).statistic),
    }


def _figures(costs: Sequence[Complexity], by: str) -> np.ndarray:
    if by not in FIGURES:
        raise LissomError(f"no figure of a network is called {by!r}; known: {', '.join(FIGURES)}")
    x = np.array([getattr(cost, by) for cost in costs], float)
    if len(x) < LEAST:
        raise LissomError(f"{len(x)} networks are too few to fit a time; {LEAST} are needed")
    if np.ptp(x) == 0:
        raise LissomError(f"all networks have the same {by}; a time cannot be fitted to that")
    return x


def _times(costs: Sequence[Complexity], ms: Sequence[float]) -> np.ndarray:
    if len(costs) != len(ms):
        raise LissomError(f"{len(costs)} networks and {len(ms)} times; one time a network is wanted")
    if not all(math.isfinite(time) and time > 0 for time in ms):
        raise LissomError("a time is not a positive number of milliseconds")
    return np.array(ms, float)
