"""Forecast ETTh1 with FFNet, UniRepLKNet and linear models, beside each other: errors on the test months.

``python benchmarks/forecasting.py DATA [--models linear,ffnet] [--epochs 10] [--share 1] [--seeds 1] [--horizon 96]``,
DATA being ``.../ett/ETTh1.csv``. The published split (12, 4 and 4 months) and standardisation (by the training months);
every window counts, the last ones too. Each model is trained by Adam on the mean squared error, halving its rate each
epoch from the third on, and judged with the weights of its best epoch on the validation months. An epoch sees
``--share`` of the training windows, drawn anew: they overlap, and a quarter of them holds nearly all there is to learn.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lissom.data.series import ETT, read_series
from lissom.layers.revin import RevIN
from lissom.models.factory import create_model

LOOKBACK = 96
BATCH = 64


class Linear(nn.Module):
    """One linear map along time, the same for all variables, behind RevIN without weights: the plain baseline."""

    def __init__(self, variables: int, horizon: int) -> None:
        super().__init__()
        self.revin, self.head = RevIN(variables, affine=False), nn.Linear(LOOKBACK, horizon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, statistics = self.revin(x)
        return self.revin.restore(self.head(x.transpose(1, 2)).transpose(1, 2), statistics)


class Decomposed(nn.Module):
    """DLinear (arXiv 2205.13504): a moving average over 25 steps and what it leaves, a linear map along time each."""

    def __init__(self, variables: int, horizon: int) -> None:
        super().__init__()
        self.trend, self.rest = nn.Linear(LOOKBACK, horizon), nn.Linear(LOOKBACK, horizon)
        for layer in (self.trend, self.rest):
            nn.init.constant_(layer.weight, 1 / LOOKBACK)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        trend = F.avg_pool1d(F.pad(x, (12, 12), mode="replicate"), 25, 1)
        return (self.trend(trend) + self.rest(x - trend)).transpose(1, 2)


MODELS: dict[str, tuple[float, Callable[[int, int], nn.Module]]] = {
    "linear": (1e-3, Linear),
    "dlinear": (1e-3, Decomposed),
    "ffnet": (1e-4, lambda variables, horizon: create_model("ffnet_series", variables=variables, horizon=horizon)),
    "unireplknet": (
        3e-4,
        lambda variables, horizon: create_model(
            "unireplknet_series", channels=variables, lookback=LOOKBACK, horizon=horizon, dim=24, dims=(16, 32, 64, 64),
            depths=(1, 1, 2, 1), kernel_sizes=(3, 13, (13, 3), 3), drop_path_rate=0.2, drop_rate=0.0,
            ls_init_value=0.1,
        ),
    ),
}  # fmt: skip


def errors(model: nn.Module, windows: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Mean squared and mean absolute error over all windows, steps and variables."""
    squared = absolute = 0.0
    model.eval()
    with torch.no_grad():
        for first in range(0, len(windows[0]), 256):
            seen, follows = (torch.from_numpy(part[first : first + 256].copy()) for part in windows)
            apart = model(seen) - follows
            squared, absolute = squared + float(apart.square().sum()), absolute + float(apart.abs().sum())
    return squared / windows[1].size, absolute / windows[1].size


def trained(
    model: nn.Module, parts: dict[str, tuple[np.ndarray, np.ndarray]], rate: float, epochs: int, share: float
) -> nn.Module:
    best, kept = float("inf"), copy.deepcopy(model.state_dict())
    seen, follows = parts["train"]
    optimiser = torch.optim.Adam(model.parameters(), rate)
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = rate * 0.5 ** max(0, epoch - 2)
        model.train()
        for rows in torch.randperm(len(seen))[: round(share * len(seen))].split(BATCH):
            x, y = (torch.from_numpy(part[rows.numpy()]) for part in (seen, follows))
            loss = F.mse_loss(model(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        error = errors(model, parts["val"])[0]
        print(f"  epoch {epoch + 1}: validation {error:.4f}", flush=True)
        if error < best:
            best, kept = error, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--horizon", type=int, default=96)
    options = parser.parse_args()
    series = read_series(options.data).standardised(ETT.train)
    parts = {
        name: part.windows(LOOKBACK, options.horizon) for name, part in series.divided(ETT, LOOKBACK).items()
    }  # fmt: skip
    for name in options.models.split(","):
        rate, build = MODELS[name]
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            began = time.perf_counter()
            model = trained(build(series.values.shape[1], options.horizon), parts, rate, options.epochs, options.share)
            squared, absolute = errors(model, parts["test"])
            size = sum(p.numel() for p in model.parameters())
            print(
                f"{name} seed {seed}: MSE {squared:.4f} MAE {absolute:.4f}, {size:,} parameters, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
