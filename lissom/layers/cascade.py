"""Two classifiers as one module, for a cascade: the first answers, and the surer of both does (arXiv 2412.01039).

The module's answer is a tuple, as that of a model with exits: the first's logits, and what stands once the second has
run too. Post-check compares how far each is from being sure, ``doubt``, which is 1 minus the published score. It is the
same comparison in exact arithmetic; but two scores near 1 are equal in float32, or differ by its rounding alone, while
their doubts still differ as they should. So the answer does not hang on a runtime's last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["SCORES", "Cascade", "Member", "PostCheck", "Renormalise", "Temperature", "doubt"]

SCORES = ("confidence", "difference", "entropy")


def doubt(logits: torch.Tensor, score: str) -> torch.Tensor:
    """Logits (..., classes), two or more -> (...), the lower the surer, small numbers to their full precision.

    With the shares p of the softmax, best first: 1 - p_1 (confidence), 1 - (p_1 - p_2) (difference), or the entropy
    over ln(classes).
    """
    ordered = logits.topk(logits.shape[-1], -1).values
    distance = ordered[..., 1:] - ordered[..., :1]
    shares = distance.exp()  # of all classes but the best, over the best one's
    rest = shares.sum(-1)
    if score == "confidence":
        return rest / (1 + rest)
    if score == "difference":
        return (rest + shares[..., 0]) / (1 + rest)
    # -sum p ln p = ln(1 + rest) - sum shares distance / (1 + rest). Near 0 the logarithm of 1 + rest is rounding only.
    small = rest * (1 - rest / 2 + rest * rest / 3)
    whole = torch.where(rest < 1e-3, small, (1 + rest).log())
    return (whole - (shares * distance).sum(-1) / (1 + rest)) / math.log(logits.shape[-1])


class Temperature(nn.Module):
    """Logits over a temperature, ``value``: it changes how sure an answer is, and no answer."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.value = value

    def extra_repr(self) -> str:
        return f"{self.value:g}"

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.value == 1 else logits * (1 / self.value)


class Renormalise(nn.Module):
    """Images (B, C, H, W) normalised by one mean and deviation a channel, as another network wants them."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], wanted_mean: Sequence[float], wanted_std: Sequence[float]
    ) -> None:
        super().__init__()
        given, wanted = (torch.tensor(m, dtype=torch.float64) for m in (mean, wanted_mean))
        deviation, new = (torch.tensor(s, dtype=torch.float64) for s in (std, wanted_std))
        self.register_buffer("scale", (deviation / new).float()[:, None, None], persistent=False)
        self.register_buffer("shift", ((given - wanted) / new).float()[:, None, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift


class Member(nn.Module):
    """A network of a cascade: images (B, C, H, W) -> logits (B, classes), over its temperature.

    ``prepare`` makes the cascade's input what the network wants (None: it is so already).
    """

    def __init__(self, network: nn.Module, prepare: nn.Module | None = None) -> None:
        super().__init__()
        self.prepare = nn.Identity() if prepare is None else prepare
        self.network = network
        self.temperature = Temperature()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.temperature(self.network(self.prepare(x)))


class PostCheck(nn.Module):
    """Logits of both, (B, classes) each -> those of the surer: the second's where its score is strictly higher."""

    def __init__(self, score: str = "difference") -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score is {' or '.join(map(repr, SCORES))}, not {score!r}")
        self.score = score

    def extra_repr(self) -> str:
        return self.score

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        surer = doubt(second, self.score) < doubt(first, self.score)
        return torch.where(surer[..., None], second, first)


class Cascade(nn.Module):
    """Images (B, C, H, W) -> (the first member's logits, the cascade's), (B, classes) each.

    ``score`` is what post-check compares; None: no post-check, the second's answer stands. ``input`` hands the images
    on as they are: with the first's answer it is all that the second member's part needs, so the model is cut there.
    """

    def __init__(self, first: Member, second: Member, score: str | None = "difference") -> None:
        super().__init__()
        self.input = nn.Identity()
        self.first = first
        self.second = second
        self.check = None if score is None else PostCheck(score)

    @property
    def carries(self) -> tuple[str, ...]:
        """Paths of the modules whose outputs are all that the second member's part needs."""
        return ("input",) if self.check is None else ("input", "first")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.input(x)
        first, second = self.first(x), self.second(x)
        return first, second if self.check is None else self.check(first, second)
