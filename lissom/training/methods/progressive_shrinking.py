"""Once-for-All's progressive shrinking: sub-networks of ever smaller sizes, taught by the whole network (1908.09791).

The trained whole network is the teacher throughout. Then kernels, depths and widths are opened one after the other, the
largest values first; each opening is a training of its own (``Stage``). A step draws ``count`` sub-networks of what is
open and minimises the sum of

    CE(labels, z) + kd_ratio * CE(softmax of the teacher's answers, z).

Before widths are opened, channels are sorted by importance, so that slices keep the best of them. The stages of
``published_stages`` have the published epochs, rates and numbers of sub-networks for values like MobileNetV3's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.layers.elastic import ElasticNetwork, draw_setting, largest
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.methods.base import Method, unwrapped
from lissom.training.methods.delayed_shrinking import check_elastic, refuse_processes, resized, soft_cross_entropy

__all__ = ["ProgressiveShrinking", "Stage", "published_stages", "teacher_of"]

Opened = tuple[tuple[str, tuple[Any, ...]], ...]  # kind -> values
KERNEL_RATE, LATER_RATE, SHORT_RATE = 3e-2, 7.5e-3, 2.5e-3
LONG, SHORT, WARMUP = 120, 25, 5  # epochs
COUNTS = {"kernel": 1, "depth": 2}  # sub-networks a step; 4 for the widths
SORTED = ("expand", "width", "heads")  # kinds whose slices are of sorted channels


@dataclass(frozen=True)
class Stage:
    """One opening: the values that are ``opened`` by kind (all other kinds stay at their largest), ``epochs``, the
    highest rate, the share of ``warmup``, sub-networks a step. ``sort``: channels are sorted before it; the number is
    that of the smaller widths which are trained already, None sorts nothing."""

    name: str
    opened: Opened
    epochs: float
    lr: float
    warmup: float
    count: int
    sort: int | None = None


def published_stages(network: ElasticNetwork) -> tuple[Stage, ...]:
    """The published stages for the network's own choices: kernels at once, then depths, then widths, each from the
    largest value down.

    A stage that opens a kind's last value lasts 120 epochs with 5 of warm-up, others 25 without. Rates are those
    published for batches of 64 a device: 3e-2 for kernels, 7.5e-3 and 2.5e-3 behind them.
    """
    values: dict[str, set[Any]] = {}
    for dimension in network.dimensions():
        values.setdefault(dimension.kind, set()).update(dimension.values)
    order = [kind for kind in ("kernel", "stem", "depth", "width", "heads", "expand") if len(values.get(kind, ())) > 1]
    stages: list[Stage] = []
    opened: dict[str, tuple[Any, ...]] = {}
    for kind in order:
        falling = sorted(values[kind], reverse=True)
        steps = [len(falling)] if kind in ("kernel", "stem") else list(range(2, len(falling) + 1))
        for step in steps:
            opened = {**opened, kind: tuple(sorted(falling[:step]))}
            last = step == len(falling)
            rate = KERNEL_RATE if not stages else LATER_RATE if last else SHORT_RATE
            stages.append(
                Stage(
                    f"{kind} {', '.join(map(str, opened[kind]))}", tuple(opened.items()), LONG if last else SHORT, rate,
                    WARMUP / LONG if last else 0.0, COUNTS.get(kind, 4), step - 2 if kind in SORTED else None,
                )
            )  # fmt: skip
    return tuple(stages)


@register("method", "progressive_shrinking")
@dataclass(frozen=True)
class ProgressiveShrinking(Method):
    """One stage of progressive shrinking: ``count`` sub-networks a step of what is ``opened`` (kind, values).

    ``opened`` left out opens all kinds. ``teacher`` is the trained whole network; without one, labels alone teach.
    ``resolutions``: sides of square images, of which each batch gets one; () leaves images as they are.
    """

    teacher: nn.Module | None = None
    opened: Opened | None = None
    count: int = 1
    kd_ratio: float = 1.0
    resolutions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise LissomError(
                f"progressive_shrinking: count is {self.count}; it is a number of sub-networks, at least 1"
            )
        if not self.kd_ratio >= 0:
            raise LissomError(f"progressive_shrinking: kd_ratio is {self.kd_ratio}; it is at least 0")

    def prepare(self, model: nn.Module, task: Task) -> None:
        check_elastic(model, "progressive_shrinking")
        if self.teacher is model:
            raise LissomError("the teacher is the super-network itself; give a copy of it")
        if task.fit is not None and task.fit.labels is None:
            raise LissomError("progressive shrinking learns from labels; the data have none")
        kinds = {d.kind for d in model.dimensions()}  # type: ignore[operator]
        if unknown := [kind for kind, _ in self.opened or () if kind not in kinds]:
            raise LissomError(f"nothing of the kind {unknown[0]!r} can be opened; there is: {', '.join(sorted(kinds))}")

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        assert targets is not None
        refuse_processes()
        inner: Any = unwrapped(model)
        inputs = resized(inputs, self.resolutions)
        soft = None
        if self.teacher is not None and self.kd_ratio:
            with torch.no_grad():
                soft = functional.softmax(self.teacher.to(inputs.device).eval()(inputs), 1)
        losses = []
        try:
            for _ in range(self.count):
                inner.set_active(draw_setting(inner, None if self.opened is None else dict(self.opened)))
                output = model(inputs)
                losses.append(task.loss(output, targets))
                if soft is not None:
                    losses.append(self.kd_ratio * soft_cross_entropy(output, soft))
        finally:
            inner.set_active(largest(inner))
        return torch.stack(losses).sum()


def teacher_of(network: nn.Module) -> nn.Module:
    """A frozen copy of the whole network, in eval mode."""
    made: Any = copy.deepcopy(network)
    made.set_active(largest(made))
    return made.requires_grad_(False).eval()  # type: ignore[no-any-return]
