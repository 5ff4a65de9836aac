"""DepS: train the whole network first, then its sub-networks beside it, at a rising rate (ECCV 2024, arXiv 2407.06167).

The paper's body was not at hand; formulas here are read from its abstract and summaries, and are settings. With t the
share of the training that is done, every step minimises

    L_full(labels) + sum over i of eps(t) * L_i,      L_i = CE(softmax of the whole network's answers, z_i),

- t < ``start`` (one half): the whole network alone, as it is always trained ("full-model warm-up").
- t >= ``start``: besides it the smallest sub-network and ``random`` others, drawn anew every step ("sandwich" sampling,
  BigNAS, arXiv 2003.11142), taught by the whole network's own answers of the same step, detached.
- eps(t) = min(1, ``eps0`` + (1 - ``eps0``) (t - ``start``) / ``ramp``): what sub-networks do to the shared weights
  begins small ("E-shrinking"). It weighs their gradient, not the rate of an optimizer, so that the whole network learns
  as fast as ever; an optimizer that normalises gradients (Adam) hides it: train with SGD.
- ``teachers`` "snapshots": the soft labels are the mean of those of the whole network and of its last ``keep`` copies
  from earlier in this phase, one every ``every`` of the training ("in-place distillation warm-up").

``start`` 0 and ``eps0`` 1 is plain sandwich training. Sub-networks leave the running statistics of BatchNorms alone,
which are the whole network's; before a sub-network is judged it needs its own (``lissom.training.recalibration``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.layers.elastic import draw_setting, is_elastic, largest, smallest, without_statistics
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.methods.base import Method, unwrapped

__all__ = [
    "DelayedShrinking",
    "Sandwich",
    "check_elastic",
    "eps_at",
    "resized",
    "sandwich_settings",
    "soft_cross_entropy",
]

TEACHERS = ("current", "snapshots")


def eps_at(share: float, start: float = 0.5, eps0: float = 1e-4, ramp: float = 0.1) -> float:
    """The weight of sub-networks' gradients at ``share`` (0 to 1) of the training: 0 before ``start``, then rising
    linearly from ``eps0`` to 1 over ``ramp`` of it."""
    if share < start:
        return 0.0
    return min(1.0, eps0 + (1 - eps0) * (share - start) / ramp) if ramp > 0 else 1.0


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-sum targets log softmax(logits) over dimension 1, the mean over everything else. ``targets`` are shares."""
    return -(targets * functional.log_softmax(logits, 1)).sum(1).mean()


def sandwich_settings(model: Any, random: int) -> list[dict[str, Any]]:
    """The smallest sub-network's setting, and ``random`` drawn from torch's global generator."""
    return [smallest(model), *(draw_setting(model) for _ in range(random))]


def resized(inputs: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """Images (B, C, H, W) at one of ``sides``, drawn from torch's global generator; as they are where there is none."""
    if not sides:
        return inputs
    side = sides[int(torch.randint(len(sides), ()))]
    if tuple(inputs.shape[-2:]) == (side, side):
        return inputs
    return functional.interpolate(inputs, size=(side, side), mode="bilinear", antialias=True)


def check_elastic(model: nn.Module, what: str) -> None:
    """Raise LissomError where the model is no super-network, or several processes train it."""
    if not is_elastic(model):
        raise LissomError(
            f"{what} trains super-networks, and {type(model).__name__} is none; take an ofa_ network, or make one of "
            "your own model with lissom.training.supernet.supernet_of(model, shape)"
        )


class _Copies:
    """The whole network at earlier times, the last ``keep`` of them."""

    def __init__(self) -> None:
        self.taken = 0  # how many in all
        self.models: list[nn.Module] = []

    def __repr__(self) -> str:
        return "copies"  # a setting of every run alike


@register("method", "delayed_shrinking")
@dataclass(frozen=True)
class DelayedShrinking(Method):
    """Train a super-network as DepS does; the module's text gives the loss.

    ``start`` and ``ramp`` are shares of the training. ``weight`` is the sub-networks' in the loss, all alike, besides
    eps. ``random``: sub-networks a step beside the smallest. ``distil``: they learn from the whole network's answers,
    else from labels. ``resolutions``: sides of square images, of which each batch gets one, drawn anew; () leaves
    images as they are. The data need labels. One device: several forward passes make one step, which distributed
    training does not allow.
    """

    start: float = 0.5
    eps0: float = 1e-4
    ramp: float = 0.1
    random: int = 2
    weight: float = 1.0
    distil: bool = True
    teachers: str = "current"
    keep: int = 2
    every: float = 0.1
    resolutions: tuple[int, ...] = ()
    _share: float = 0.0
    _copies: _Copies = field(default_factory=_Copies, compare=False)

    def __post_init__(self) -> None:
        for wrong, sentence in (
            (not 0 <= self.start <= 1, f"start is {self.start}; it is a share of the training, 0 to 1"),
            (not 0 <= self.eps0 <= 1, f"eps0 is {self.eps0}; it lies between 0 and 1"),
            (not 0 <= self.ramp <= 1, f"ramp is {self.ramp}; it is a share of the training, 0 to 1"),
            (self.random < 0, f"random is {self.random}; it is a number of sub-networks, at least 0"),
            (not self.weight >= 0, f"weight is {self.weight}; it is at least 0"),
            (self.teachers not in TEACHERS, f"teachers is {self.teachers!r}; it is {' or '.join(map(repr, TEACHERS))}"),
            (self.keep < 1, f"keep is {self.keep}; it is a number of snapshots, at least 1"),
            (any(side < 1 for side in self.resolutions), f"resolutions are sides in pixels, not {self.resolutions}"),
            (not 0 < self.every <= 1, f"every is {self.every}; it is a share of the training, above 0 and at most 1"),
        ):
            if wrong:
                raise LissomError(f"delayed_shrinking: {sentence}")

    @property
    def eps(self) -> float:
        """The weight of sub-networks' gradients at the step that this is for (``at``)."""
        return eps_at(self._share, self.start, self.eps0, self.ramp)

    def at(self, share: float) -> Self:
        return replace(self, _share=share)

    def prepare(self, model: nn.Module, task: Task) -> None:
        check_elastic(model, "delayed_shrinking")
        if task.fit is not None and task.fit.labels is None:
            raise LissomError("the whole network learns from labels; the data have none")
        self._copies.taken, self._copies.models = 0, []
        model.set_active(largest(model))  # type: ignore[operator, arg-type]

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        assert targets is not None
        refuse_processes()
        inner: Any = unwrapped(model)
        whole = largest(inner)
        inner.set_active(whole)
        self._remember(inner)
        inputs = resized(inputs, self.resolutions)
        output = model(inputs)
        loss = task.loss(output, targets)
        eps = self.eps * self.weight
        if eps == 0:  # bit by bit what plain training does: nothing is drawn, no parameter gets a gradient of zeros
            return loss
        soft = self._soft(output.detach(), inputs) if self.distil else None
        try:
            with without_statistics(inner):
                for setting in sandwich_settings(inner, self.random):
                    inner.set_active(setting)
                    own = model(inputs)
                    loss = loss + eps * (task.loss(own, targets) if soft is None else soft_cross_entropy(own, soft))
        finally:
            inner.set_active(whole)
        return loss

    # Snapshots

    def _remember(self, model: nn.Module) -> None:
        if self.teachers != "snapshots" or self._share < self.start:
            return
        due = 1 + math.floor((self._share - self.start) / self.every)
        if due > self._copies.taken:
            self._copies.taken = due
            shot = copy.deepcopy(model).requires_grad_(False).eval()
            self._copies.models = [*self._copies.models, shot][-self.keep :]

    @torch.no_grad()
    def _soft(self, current: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        shares = [functional.softmax(current, 1)]
        shares += [functional.softmax(shot(inputs).to(current), 1) for shot in self._copies.models]
        return torch.stack(shares).mean(0)

    def state(self, model: nn.Module) -> dict[str, Any]:
        return {
            "taken": self._copies.taken,
            "snapshots": [{k: v.clone() for k, v in m.state_dict().items()} for m in self._copies.models],
        }

    def load_state(self, state: Mapping[str, Any], model: nn.Module) -> None:
        kept: Sequence[Mapping[str, torch.Tensor]] = state.get("snapshots", ())
        self._copies.taken, self._copies.models = int(state.get("taken", 0)), []
        for weights in kept:
            shot = copy.deepcopy(model)
            shot.load_state_dict(dict(weights))
            self._copies.models.append(shot.requires_grad_(False).eval())


@register("method", "sandwich")
@dataclass(frozen=True)
class Sandwich(DelayedShrinking):
    """Sandwich training from the first step on (BigNAS, arXiv 2003.11142): ``delayed_shrinking``, start 0 and eps 1."""

    start: float = 0.0
    eps0: float = 1.0


def refuse_processes() -> None:
    """Raise LissomError in a training of several processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise LissomError("super-networks train on one device: several forward passes make one step; leave out devices")
