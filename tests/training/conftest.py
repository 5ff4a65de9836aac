"""Small data and small networks that train in a second."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from lissom.tasks.task import Task


@dataclass
class Arrays:
    """A split of arrays: x float32 (N, C, H, W), labels int64 (N,) or None."""

    name: str
    x: np.ndarray
    labels: np.ndarray | None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.x)

    def inputs(self, indices: np.ndarray | slice) -> np.ndarray:
        return np.ascontiguousarray(self.x[indices])

    def sample(self, count: int, seed: int) -> Arrays:
        rows = np.random.default_rng(seed).permutation(len(self))[:count]
        return Arrays(self.name, self.x[rows], None if self.labels is None else self.labels[rows])


def stripes(name: str, count: int, seed: int) -> Arrays:
    """8 x 8 images: bright rows (0), bright columns (1) or a bright corner (2), in noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    x = random.normal(0, 0.5, (count, 1, 8, 8)).astype(np.float32)
    for image, label in zip(x, labels, strict=True):
        start = random.integers(2)
        if label == 0:
            image[0, start::2] += 1
        elif label == 1:
            image[0, :, start::2] += 1
        else:
            image[0, :4, :4] += 1.5
    return Arrays(name, x, labels.astype(np.int64))


def make_task() -> Task:
    return Task(
        fit=stripes("fit", 160, 0),
        choose=stripes("choose", 60, 1),
        report=stripes("report", 60, 2),
        shape=(1, 8, 8),
        classes=("rows", "columns", "corner"),
        name="stripes",
    )


def make_network(seed: int = 0, classes: int = 3) -> nn.Module:
    """BatchNorm and dropout have state that a resumed run must repeat."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(128, classes),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on several threads, much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def task() -> Task:
    return make_task()


@pytest.fixture
def network():
    """A function (seed, classes) -> a network."""
    return make_network
