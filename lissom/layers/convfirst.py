"""ConvFirst and MBConv residual blocks, "On the Efficiency of Convolutional Neural Networks" (arXiv 2404.03617).

ConvFirst puts the spatial convolution before the expansion, on C channels instead of eC, so that one kernel can
compute the whole block tile by tile with a cheap halo. MBConv, with the convolution in the middle, is its comparison.
Both use grouped convolutions with a fixed group width, and the key names of the published block definitions
(``layers.0.weight``, ...).
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ConvFirst", "MBConv"]


class _Residual(nn.Module):
    """``layers``, and the input added where the block keeps its shape."""

    def __init__(self, layers: list[nn.Module], shortcut: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C', H / stride, W / stride)
        y = self.layers(x)
        return y + x if self.shortcut else y


class ConvFirst(_Residual):
    """Grouped kxk convolution, 1x1 expansion to ``expansion`` x C, SiLU, 1x1 projection; each with its BatchNorm.

    (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)); the input is added where channels
    and size agree. No activation follows the first convolution, nor the block.

    Raises ValueError where ``group_width`` does not divide ``in_channels``, or ``kernel_size`` is even.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, group_width: int = 8,
        expansion: int = 4, activation: type[nn.Module] = nn.SiLU,
    ) -> None:  # fmt: skip
        hidden = expansion * in_channels
        super().__init__(
            [
                _spatial(in_channels, kernel_size, stride, group_width),
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                activation(),
                nn.Conv2d(hidden, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            ],
            shortcut=stride == 1 and in_channels == out_channels,
        )


class MBConv(_Residual):
    """1x1 expansion to ``expansion`` x C, grouped kxk convolution, 1x1 projection; no squeeze-and-excitation.

    Shapes, shortcut and errors as ConvFirst's; SiLU follows the expansion and the convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, group_width: int = 8,
        expansion: int = 4, activation: type[nn.Module] = nn.SiLU,
    ) -> None:  # fmt: skip
        hidden = expansion * in_channels
        super().__init__(
            [
                nn.Conv2d(in_channels, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                activation(),
                _spatial(hidden, kernel_size, stride, group_width),
                nn.BatchNorm2d(hidden),
                activation(),
                nn.Conv2d(hidden, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            ],
            shortcut=stride == 1 and in_channels == out_channels,
        )


def _spatial(channels: int, kernel_size: int, stride: int, group_width: int) -> nn.Conv2d:
    if channels % group_width:
        raise ValueError(f"{channels} channels are not divisible into groups of {group_width}")
    if kernel_size % 2 == 0:
        raise ValueError(f"a kernel of {kernel_size} has no middle; give an odd one")
    return nn.Conv2d(
        channels, channels, kernel_size, stride, kernel_size // 2, groups=channels // group_width, bias=False
    )
