"""Kar2 and Kar3: steps along the signs of the gradient and of its averages (the Terminator, arXiv 2401.17948).

Every weight moves by a whole number of learning rates: one for the sign of its gradient, and one for the sign of each
average of its past gradients. Where gradient and averages agree, Kar3 moves three times as far as a sign step; where
they do not, they cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["Kar2", "Kar3"]


class _Kar(torch.optim.Optimizer):
    """p -= lr (sign(g) + sum over i of sign(m_i)), then m_i = beta_i m_i + (1 - beta_i) g: averages before the step."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, ...], weight_decay: float) -> None:
        if not lr >= 0:
            raise ValueError(f"the learning rate is {lr}; it is at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; each is at least 0 and below 1")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; it is at least 0")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what ``closure`` returned, which computes the gradients anew where it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if gradient.is_sparse:
                    raise ValueError("Kar takes no sparse gradients: its averages are dense")
                state = self.state[parameter]
                if not state:
                    for number in range(len(group["betas"])):
                        state[f"average{number}"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                direction = gradient.sign()
                for number, beta in enumerate(group["betas"]):
                    average = state[f"average{number}"]
                    direction.add_(average.sign())
                    average.lerp_(gradient, 1 - beta)
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(direction, alpha=group["lr"])
        return loss


class Kar2(_Kar):
    """Signs of the gradient and of one average of past gradients: an entry moves by 0, ``lr`` or 2 ``lr``.

    sign(0) is 0, so that a first step, whose average is 0, is a plain sign step. ``weight_decay`` shrinks weights by
    lr weight_decay a step, apart from the gradient (AdamW's); the published training has none. One average a weight
    is kept. Raises ValueError for a negative ``lr`` or ``weight_decay`` and a beta outside of [0, 1).

    >>> optimizer = Kar2(model.parameters(), lr=1e-3)
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1.2e-3, beta: float = 0.95, weight_decay: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__(params, lr, (beta,), weight_decay)


class Kar3(_Kar):
    """Signs of the gradient and of two averages, a fast and a slow one: an entry moves by 0 to 3 ``lr``.

    Defaults are those published for CIFAR-10; for CIFAR-100 lr is 1.20925e-3 and betas (0.75, 0.99). Two averages a
    weight are kept, as in Adam. ``weight_decay`` and errors as in ``Kar2``.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1.215e-3, betas: tuple[float, float] = (0.5, 0.95),
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, (float(betas[0]), float(betas[1])), weight_decay)
