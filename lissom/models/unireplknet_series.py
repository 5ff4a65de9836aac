"""UniRepLKNet that reads time series: a series embedded, written as an image, read by the network for images.

The published front end (arXiv 2311.15599): instance normalisation, an embedding of each step, and the plain reshape of
all its numbers to a square image of one channel. Published is the front end of a forecaster whose decoder (that of
Corrformer) is not part of this library; in its place stand linear layers: from all positions of the last map to the
forecast, or from their mean to classes. The network itself is ``lissom.models.unireplknet.UniRepLKNet``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import register_model
from torch import nn

from lissom.layers.revin import RevIN
from lissom.layers.series_embedding import SeriesEmbedding, square_factor
from lissom.models.fit_transformer import _own
from lissom.models.unireplknet import UniRepLKNet
from lissom.ops.as_images import map_to_series, series_to_image

__all__ = ["UniRepLKNetSeries", "unireplknet_series"]


class UniRepLKNetSeries(nn.Module):
    """Series (B, lookback, channels) to a forecast (B, horizon, channels), logits (B, num_classes), or tokens.

    ``horizon`` above 0 forecasts, on the series' own scale; ``num_classes`` above 0 classifies; with neither the
    answer is the last map as tokens (B, h w, C), for a decoder of the user's. Not both.

    - ``dim`` is the width of the embedding; lookback x dim numbers must fill a square image (48 x 768 are published);
    - ``time_features`` and ``place_features``: how many are given with each step and each series, as ``times``
      (B, lookback, time_features) and ``place`` (B, place_features); see ``SeriesEmbedding``;
    - ``published``: the last map becomes tokens by a plain reshape, which mixes channels and positions, as the
      published program does; without it a token is a position;
    - ``dims``, ``depths``, ``kernel_sizes`` and what else is given are ``UniRepLKNet``'s.

    Raises ValueError where the numbers fill no square, and for series of another shape.
    """

    def __init__(
        self,
        channels: int = 11,
        lookback: int = 48,
        horizon: int = 0,
        num_classes: int = 0,
        dim: int = 768,
        time_features: int = 0,
        place_features: int = 0,
        published: bool = False,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 27, 3),
        kernel_sizes: Sequence[int | Sequence[int]] = (3, 13, (13, 3, 3), 11),
        **network: Any,
    ) -> None:
        super().__init__()
        least = square_factor(lookback)
        side = int((lookback * dim) ** 0.5)
        if side * side != lookback * dim:
            raise ValueError(
                f"{lookback} steps of {dim} numbers fill no square image; a width of {least} times a square number does"
            )
        if horizon > 0 and num_classes > 0:
            raise ValueError("a network forecasts or classifies; name a horizon or a number of classes, not both")
        self.channels, self.lookback, self.horizon = channels, lookback, horizon
        self.num_classes, self.published = num_classes, published
        self.revin = RevIN(channels)
        self.embedding = SeriesEmbedding(channels, dim, time_features, place_features)
        self.network = UniRepLKNet(
            1, num_classes, "avg" if num_classes else "", depths, dims, kernel_sizes, **network
        )  # fmt: skip
        if not num_classes:  # the norm before the classes has nothing to do
            self.network.norm = nn.Identity()
        for _ in range(len(dims) + 1):
            side = -(-side // 2)
        self.num_features = dims[-1]
        self.head: nn.Module = nn.Identity()
        if horizon:
            self.head = nn.Linear(side * side * dims[-1], horizon * channels)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head if self.horizon else self.network.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer of ``num_classes`` outputs, 0 the mean's features, for a network that classifies.

        Raises ValueError for one that forecasts.
        """
        if not self.num_classes and not self.network.global_pool:
            raise ValueError("this network has no classes; build one with num_classes")
        self.num_classes = num_classes
        self.network.reset_classifier(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks anew in the backward pass instead of keeping their intermediate maps."""
        self.network.set_grad_checkpointing(enable)

    def image(
        self, x: torch.Tensor, times: torch.Tensor | None = None, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalised series (B, lookback, channels) as the network sees them, (B, 1, s, s)."""
        return series_to_image(self.embedding(x, times, place))

    def forward(
        self, x: torch.Tensor, times: torch.Tensor | None = None, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        if x.ndim != 3 or x.shape[1:] != (self.lookback, self.channels):
            raise ValueError(f"series (B, {self.lookback}, {self.channels}) are wanted, not {tuple(x.shape)}")
        x, statistics = self.revin(x)
        y = self.network(self.image(x, times, place))
        if self.network.global_pool:
            return y
        tokens = map_to_series(y, self.published)
        if not self.horizon:
            return tokens
        y = self.head(tokens.flatten(1)).unflatten(1, (self.horizon, self.channels))
        return self.revin.restore(y, statistics)


@register_model
def unireplknet_series(pretrained: bool = False, **kwargs: Any) -> UniRepLKNetSeries:
    """The published sizes (s): series (B, 48, 11) to tokens (B, 36, 768); with ``horizon=24`` to (B, 24, 11)."""
    return UniRepLKNetSeries(**_own(kwargs))
