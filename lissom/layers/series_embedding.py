"""Time series as embedded steps: what stands before a network that reads them as tokens or as an image.

UniRepLKNet's front end for series (arXiv 2311.15599), which is the field's usual one: a short circular convolution of
the values, plus linear maps of what is known of the time and of the place. ``lissom.ops.as_images.series_to_image``
then makes an image of the answer.
"""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["SeriesEmbedding", "square_factor"]


class SeriesEmbedding(nn.Module):
    """Values (B, T, channels) -> (B, T, dim).

    A circular convolution over three steps, without bias; plus, where ``time_features`` of each step are given,
    (B, T, time_features), a linear map of them; plus, where ``place_features`` of each series are, (B,
    place_features), one of these, the same at every step. What was announced must be given, and nothing else: raises
    ValueError.
    """

    def __init__(self, channels: int, dim: int, time_features: int = 0, place_features: int = 0) -> None:
        super().__init__()
        self.value = nn.Conv1d(channels, dim, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.value.weight, nonlinearity="leaky_relu")
        self.time = nn.Linear(time_features, dim, bias=False) if time_features else None
        self.place = nn.Linear(place_features, dim) if place_features else None

    def forward(
        self, x: torch.Tensor, times: torch.Tensor | None = None, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        for what, given, layer in (("times", times, self.time), ("place", place, self.place)):
            if (given is None) != (layer is None):
                wanted = "given" if layer is None else "missing"
                raise ValueError(f"features of the {what} are {wanted}, and the layer was built otherwise")
        y = self.value(x.transpose(1, 2)).transpose(1, 2)
        if times is not None and self.time is not None:
            y = y + self.time(times)
        if place is not None and self.place is not None:
            y = y + self.place(place)[:, None]
        return y


def square_factor(steps: int) -> int:
    """The least width whose product with ``steps`` is a square number: 3 of 48, 6 of 96. Its products with squares
    (12, 27, 48, ... of 48) are the others. Raises ValueError for a number below 1."""
    if steps < 1:
        raise ValueError(f"{steps} steps are no series")
    return next(width for width in range(1, steps + 1) if math.isqrt(width * steps) ** 2 == width * steps)
