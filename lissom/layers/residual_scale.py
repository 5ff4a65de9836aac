"""Scaled residuals: x + scale f(x), which keeps wide residual networks from dying (Inception-ResNet, arXiv 1602.07261).

Above some thousand filters, section 3.3 says, a residual network's activations sink to zero early in training, whatever
the rate of learning; factors from 0.1 to 0.3 before the addition prevent it.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ResidualScale"]


class ResidualScale(nn.Module):
    """x + ``scale`` block(x), or ``act`` of it, around any ``block`` that keeps the shape.

    ``fold_scale_`` moves the factor into the last convolution or linear layer of a block that ends in one, for good;
    ``fuse`` (and with it the technique) does so where it can be done. Raises ValueError for a scale of 0 or less.
    """

    def __init__(self, block: nn.Module, scale: float = 0.1, act: nn.Module | None = None) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"a scale of {scale} leaves the block out or turns it round; one above 0 is wanted")
        self.block, self.scale = block, scale
        self.act = nn.Identity() if act is None else act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        return self.act(x + (y if self.scale == 1 else self.scale * y))

    def _last(self) -> nn.Conv2d | nn.Linear | None:
        layer = self.block
        while isinstance(layer, nn.Sequential) and len(layer):
            layer = layer[-1]
        return layer if isinstance(layer, nn.Conv2d | nn.Linear) else None

    @torch.no_grad()
    def fold_scale_(self) -> ResidualScale:
        """The same answers with the factor in the weights. Raises ValueError where the block does not end in a
        convolution or linear layer."""
        layer = self._last()
        if layer is None:
            raise ValueError(f"{type(self.block).__name__} does not end in a convolution or linear layer to fold into")
        layer.weight.mul_(self.scale)
        if layer.bias is not None:
            layer.bias.mul_(self.scale)
        self.scale = 1.0
        return self

    def fuse(self) -> ResidualScale:
        """``fold_scale_`` where the block allows it."""
        return self if self._last() is None else self.fold_scale_()

    def extra_repr(self) -> str:
        return f"scale={self.scale}"
