"""A Dyn-Perceiver of a few thousand parameters, and images of four patterns that it learns in seconds."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch
from torch import nn

from lissom.models.dyn_perceiver import DynPerceiver
from lissom.tasks.task import Task
from lissom.training.methods.multi_exit_kd import multi_exit_loss

SHAPE = (3, 16, 16)


def block(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
    )


def cnn(in_chans: int = 3) -> tuple[nn.Module, list[nn.Module]]:
    widths = (8, 8, 16, 16, 24)
    return block(in_chans, 8, 1), [block(widths[n], widths[n + 1], 2) for n in range(4)]


def tiny(seed: int = 0, in_chans: int = 3, **sizes: Any) -> DynPerceiver:
    torch.manual_seed(seed)
    known = {"num_classes": 4, "latents": 16, "depths": (1, 1, 2, 1), "self_ratio": 2.0, "pool": 2}
    return DynPerceiver(cnn(in_chans), in_chans=in_chans, **{**known, **sizes})


def patterns(count: int, seed: int, noise: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """Rows, columns, a bright corner or nothing, in noise: float32 (N, 3, 16, 16), int64 (N,)."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    x = random.normal(0, noise, (count, *SHAPE)).astype(np.float32)
    x[labels == 0, :, ::2] += 1
    x[labels == 1, :, :, ::2] += 1
    x[labels == 2, :, :8, :8] += 1
    return x, labels.astype(np.int64)


def trained(steps: int = 60) -> DynPerceiver:
    """The tiny one, trained until its exits are mostly right; each caller gets one of its own."""
    return copy.deepcopy(_trained(steps))


@functools.cache
def _trained(steps: int) -> DynPerceiver:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    task = Task(None, None)  # type: ignore[arg-type]
    for step in range(steps):
        x, y = (torch.from_numpy(a) for a in patterns(64, step))
        optimizer.zero_grad()
        multi_exit_loss(model.train()(x), y, task, (0.5, 0.5, 1.0, 1.0)).backward()
        optimizer.step()
    return model.eval()
