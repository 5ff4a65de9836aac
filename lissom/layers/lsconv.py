"""LS convolution: a large static kernel looks, a small dynamic one aggregates (LSNet, arXiv 2503.23135).

Large-kernel perception (``LKP``) predicts, from a wide neighbourhood of every pixel, the small kernels with which
``lissom.ops.ska.ska`` then convolves that pixel's near neighbourhood. Checkpoints' own names are kept.
"""

from __future__ import annotations

import torch
from torch import nn

from lissom.layers.conv_norm import ConvNorm
from lissom.ops.ska import ska

__all__ = ["LKP", "LSConv"]


class LKP(nn.Module):
    """Kernels for ``ska`` from a map: (B, dim, H, W) -> (B, dim / groups, small_kernel^2, H, W).

    A depthwise convolution of ``large_kernel`` between 1 x 1 convolutions at half the width. The weights of one
    kernel are normalised together over all its taps and all positions. ``groups`` channels share a kernel.
    Raises ValueError where a kernel's size is even, or ``dim`` is odd or no multiple of ``groups``.
    """

    def __init__(self, dim: int, large_kernel: int = 7, small_kernel: int = 3, groups: int = 8) -> None:
        super().__init__()
        if large_kernel % 2 == 0 or small_kernel % 2 == 0:
            raise ValueError(f"kernels of {large_kernel} and {small_kernel} have no centre; their sizes must be odd")
        if dim % 2 or dim % groups:
            raise ValueError(f"{dim} channels cannot be halved, or shared out to kernels of {groups} channels")
        self.kernels, self.taps = dim // groups, small_kernel**2
        self.cv1 = ConvNorm(dim, dim // 2)
        self.act = nn.ReLU()
        self.cv2 = ConvNorm(dim // 2, dim // 2, large_kernel, groups=dim // 2)
        self.cv3 = ConvNorm(dim // 2, dim // 2)
        self.cv4 = nn.Conv2d(dim // 2, self.taps * self.kernels, 1)
        self.norm = nn.GroupNorm(self.kernels, self.taps * self.kernels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.cv3(self.cv2(self.act(self.cv1(x))))
        return self.norm(self.cv4(self.act(x))).unflatten(1, (self.kernels, self.taps))


class LSConv(nn.Module):
    """x + norm(ska(x, LKP(x))): (B, dim, H, W) -> (B, dim, H, W), any H and W.

    Arguments and errors are those of ``LKP``. Cost in multiplications a pixel, at the published sizes:
    (3 / 4 + 9 / 16) dim^2 + (49 / 2 + 9) dim.
    """

    def __init__(self, dim: int, large_kernel: int = 7, small_kernel: int = 3, groups: int = 8) -> None:
        super().__init__()
        self.lkp = LKP(dim, large_kernel, small_kernel, groups)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bn(ska(x, self.lkp(x)))
