"""A second classifier, taught by another network's labels: what timm's distilled networks share (DeiT, 2012.12877)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lissom.layers.conv_norm import NormLinear

__all__ = ["DistilledHead"]


class DistilledHead:
    """Put before a network class whose classifier ``head`` is a ``NormLinear``: adds ``head_dist`` beside it.

    The answer is the mean of both, in training too, so that any training works; after ``set_distilled_training()``
    training gets the pair (own head's, distilled head's), as published code always gives it. The network's own
    ``__init__`` must have run, and ``forward_head(x, pre_logits=True)`` must give the heads' input.
    """

    head: nn.Module
    head_dist: nn.Module
    num_classes: int
    num_features: int
    training: bool
    distilled_training: bool = False

    def _new_head(self) -> nn.Module:
        return NormLinear(self.num_features, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training gets both heads' answers apart."""
        self.distilled_training = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The last layers of both heads."""
        return getattr(self.head, "l", self.head), getattr(self.head_dist, "l", self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New, untrained heads of ``num_classes`` outputs; none for 0."""
        super().reset_classifier(num_classes, global_pool)  # type: ignore[misc]
        parameter = next(self.parameters())  # type: ignore[attr-defined]
        self.head_dist = self._new_head().to(parameter).train(self.training)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> Any:
        """Maps to logits (B, classes), or where ``pre_logits`` to what the heads read."""
        x = super().forward_head(x, pre_logits=True)  # type: ignore[misc]
        if pre_logits:
            return x
        own, distilled = self.head(x), self.head_dist(x)
        if self.training and self.distilled_training:
            return own, distilled
        return (own + distilled) / 2
